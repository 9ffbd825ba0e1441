"""A suspended guest brought back, kept and ended: by whom, how often, and after which crash."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.bhyve import locks, paused, restore
from bhystream.backend.bhyve.checkpoint import Checkpoint
from bhystream.backend.bhyve.paused import BhyvePaused
from bhystream.backend.bhyve.source import BhyveSource
from bhystream.backend.launch import Child
from bhystream.backend.process import Identity, boot_id
from bhystream.errors import GuestError, TakenError
from bhystream.standin.kernel import StandinHost
from standin.rig import Console, Rig, Spec, assert_unbroken

from .bhyve_rig import ID, Two, require_sink, two_hosts, without_sink

HERE = os.uname().nodename
VERBS = ["keep", "resume", "discard"]


class KilledError(BaseException):
    """We were killed here."""


@pytest.fixture
def two() -> Iterator[Two]:
    with two_hosts() as made:
        yield made


@pytest.fixture(params=[False, True], ids=["node-gone", "node-left"])
def node(request: pytest.FixtureRequest) -> Iterator[Two]:
    """Two hosts, whose bhyve may leave its VM behind."""
    with two_hosts(generation=4, node_left=request.param) as made:
        yield made


def suspended(two: Two, spec: Spec | None = None) -> tuple[BhyveSource, BhyvePaused]:
    """Suspend a new guest; return its source and what a keeper has."""
    guest = two.start(spec)
    made = two.source()
    made.prepare(ID)
    keeper = paused.open_paused(made.revive())
    keeper.hold()
    made.pause()
    guest.await_exit()
    return made, keeper


def anew(one: BhyvePaused) -> BhyvePaused:
    """Return the same guest as somebody finds it who has only its record."""
    return paused.open_paused(one.place.to_json())


def lose(*ones: BhyveSource | BhyvePaused) -> None:
    """End whoever has the memory mapped."""
    for one in ones:
        one.close()


def test_the_keeper_brings_a_guest_back_when_bhysend_is_gone(node: Two) -> None:
    made, keeper = suspended(node)
    lose(made)
    assert not keeper.runs()
    assert keeper.is_alive()
    keeper.resume()
    assert keeper.runs()
    node.assert_runs_on()


def test_a_guest_whose_node_is_left_is_brought_back_without_a_keeper() -> None:
    with two_hosts(generation=4, node_left=True) as two:
        made, keeper = suspended(two)
        lose(made, keeper)
        found = anew(keeper)
        assert found.is_alive()
        found.resume()
        two.assert_runs_on()


def test_without_node_and_keeper_the_memory_is_lost_and_that_is_seen(two: Two) -> None:
    require_sink()
    made, keeper = suspended(two)
    lose(made, keeper)
    found = anew(keeper)
    assert not found.is_alive()
    with pytest.raises(GuestError, match="left nothing to go on from"):
        found.resume()
    assert not two.here.host.exists("g")


def test_a_kept_guest_outlives_everybody(node: Two) -> None:
    made, keeper = suspended(node)
    made.keep()
    lose(made, keeper)
    assert not node.here.host.exists("g")
    assert list(node.staging.iterdir()) == []
    kept = node.base / "held" / ID
    assert sorted(os.listdir(kept)) == ["ckp", "ckp.kern", "ckp.meta", "synced"]
    assert (kept / "ckp").stat().st_blocks * 512 < 8 << 20
    found = anew(keeper)
    assert found.is_alive() and not found.runs()
    found.resume()
    node.assert_runs_on()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_may_be_done_twice(node: Two, verb: str) -> None:
    made, keeper = suspended(node)
    for _ in range(2):
        act(keeper, verb)
    for _ in range(2):
        act(anew(keeper), verb)
    lose(made, keeper)
    outcome(node, anew(keeper), verb)


def act(one: BhyvePaused, verb: str) -> None:
    if verb == "discard":
        one.discard("")
    else:
        getattr(one, verb)()


def outcome(two: Two, found: BhyvePaused, verb: str) -> None:
    """Assert what a verb has to leave behind."""
    if verb == "keep":
        assert not two.here.host.exists("g")
        found.resume()
    if verb == "discard":
        assert not two.here.host.exists("g")
        assert two.here.pid("g") is None
        assert two.left() == []
    else:
        two.assert_runs_on()


@pytest.mark.parametrize("verb", ["resume", "discard"])
def test_a_kept_guest_is_brought_back_or_ended(two: Two, verb: str) -> None:
    made, keeper = suspended(two)
    made.keep()
    lose(made, keeper)
    act(anew(keeper), verb)
    act(anew(keeper), verb)
    outcome(two, anew(keeper), verb)


# Killed between two steps, and done again.

STEPS: tuple[tuple[Any, str], ...] = (
    (os, "rename"),
    (os, "fsync"),
    (os, "unlink"),
    (os, "rmdir"),
    (os, "makedirs"),
    (shutil, "copyfile"),
    (shutil, "rmtree"),
    (StandinHost, "destroy"),
    (StandinHost, "unmount_null"),
    (locks.Locks, "_write"),
    (restore, "Child"),
)


def kill_at(patch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Let nothing happen from step `number` on; return how many steps were asked for."""
    asked = 0

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked > number:
                raise KilledError
            return real(*args, **kwargs)

        return step

    for owner, name in STEPS:
        patch.setattr(owner, name, counting(getattr(owner, name)))
    # One who was killed does not tidy up.
    patch.setattr(restore.Restore, "_undo", lambda self: None)
    return lambda: asked


@pytest.mark.parametrize("has_sink", [True, False], ids=["sink", "file"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_was_killed_at_any_step_is_done_again(
    verb: str, has_sink: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 0
    with monkeypatch.context() as outer:
        if has_sink:
            require_sink()
        else:
            without_sink(outer)
        while True:
            with two_hosts(generation=4, node_left=True) as two:
                made, keeper = suspended(two)
                lose(made, keeper)
                with pytest.MonkeyPatch.context() as patch:
                    asked = kill_at(patch, number)
                    with suppress(KilledError):
                        act(anew(keeper), verb)
                    finished = asked() <= number
                assert anew(keeper).is_alive() or verb == "discard", number
                act(anew(keeper), verb)
                outcome(two, anew(keeper), verb)
            if finished:
                break
            number += 1
    assert number >= {"keep": 8, "resume": 8, "discard": 3}[verb]


def test_a_start_that_nobody_waited_for_is_found_and_not_repeated(two: Two) -> None:
    """Who resumes is killed when bhyve has just been started; it loads on by itself."""
    made, keeper = suspended(two)
    made.keep()
    lose(made, keeper)
    two.here.settings(fail=["slow-restore"])
    pids = []

    class Last(Child):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            pids.append(self.pid)
            self.let_go()
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore, "Child", Last)
        patch.setattr(restore.Restore, "_undo", lambda self: None)
        with pytest.raises(KilledError):
            anew(keeper).resume()
    assert keeper.place.is_started()
    (two.here.directory / "release").touch()
    anew(keeper).resume()
    assert [two.here.pid("g")] == pids
    two.assert_runs_on()


def test_a_start_that_does_not_end_is_waited_for_with_a_limit(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, keeper = suspended(two)
    made.keep()
    lose(made, keeper)
    two.here.settings(fail=["slow-restore"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore.Restore, "_await", raises_killed)
        patch.setattr(restore.Restore, "_undo", lambda self: None)
        with pytest.raises(KilledError):
            anew(keeper).resume()
    monkeypatch.setattr(paused, "_SETTLE_S", -0.5)
    with pytest.raises(GuestError, match="its bhyve -r does not end"):
        anew(keeper).resume()
    (two.here.directory / "release").touch()
    monkeypatch.undo()
    anew(keeper).resume()
    two.assert_runs_on()


# Another guest of the same name.


def another(rig: Rig) -> Console:
    """Start another guest of that name on a host; return its console."""
    guest = rig.launch("g", Spec(touched="1M"))
    guest.console.await_beats(1)
    return guest.console


def test_another_guest_of_that_name_is_not_taken_for_a_held_one(two: Two) -> None:
    made, keeper = suspended(two)
    made.keep()
    lose(made, keeper)
    console = another(two.here)
    found = anew(keeper)
    assert found.is_alive()
    with pytest.raises(GuestError, match=r"another guest of that name runs here, process \d+"):
        found.resume()
    console.await_sweeps(1)
    assert_unbroken(console)
    two.here.guest("g").power_off()
    assert (two.base / "held" / ID / "ckp").exists()
    found.resume()
    two.assert_runs_on()


def test_another_guest_of_that_name_is_not_taken_for_a_loaded_one(two: Two) -> None:
    loaded = as_loaded(two)
    console = another(two.here)
    with pytest.raises(GuestError, match="another guest of that name runs here"):
        loaded.resume()
    console.await_sweeps(1)
    two.here.guest("g").power_off()
    loaded.resume()
    two.assert_runs_on()


@pytest.mark.parametrize("where", ["held", "loaded"])
def test_what_is_kept_is_discarded_beside_another_guest_of_that_name(two: Two, where: str) -> None:
    """It need not be ended for that: its state is not this one's, nor are its VM and locks."""
    found = as_loaded(two)
    if where == "held":
        found = two.paused(replace(found.place, process=Identity(1, 1, boot_id())))
    console = another(two.here)
    with pytest.raises(GuestError, match="another guest of that name runs here"):
        found.discard("b.example")  # it would run twice
    found.discard("")
    assert not Path(found.place.kept).exists()
    console.await_sweeps(1)
    assert_unbroken(console)


@pytest.mark.parametrize("where", ["source", "destination"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_vm_of_that_name_that_is_not_ours_is_never_destroyed(
    node: Two, verb: str, where: str
) -> None:
    """One that a loader made, and that has no socket yet."""
    if where == "source":
        made, found = suspended(node)
        lose(made)
        node.here.host.destroy("g")  # as its supervisor does
    else:
        found = as_loaded(node)
    node.here.host.create("g")
    theirs = node.here.host.node_id("g")
    if verb == "resume":
        with pytest.raises(GuestError, match="a VM of that name is here"):
            found.resume()
    else:
        act(found, verb)
    assert node.here.host.node_id("g") == theirs


def as_loaded(two: Two) -> BhyvePaused:
    """Return a guest that stands kept as a destination's does, on the source's host."""
    made, keeper = suspended(two)
    made.keep()
    lose(made, keeper)
    return paused.open_paused({**keeper.place.to_json(), "process": None})


def test_a_guest_that_runs_is_not_ended(two: Two) -> None:
    made, keeper = suspended(two)
    made.resume()
    lose(made)
    with pytest.raises(GuestError, match="it runs, so it is not ended here"):
        keeper.discard("")
    two.assert_runs_on()


def test_a_guest_that_was_never_paused_is_left_alone(two: Two) -> None:
    two.start()
    made = two.source()
    made.prepare(ID)
    keeper = paused.open_paused(made.revive())
    assert keeper.is_alive()
    lose(made)
    keeper.clear()
    keeper.resume()
    two.assert_runs_on()


def test_a_guest_that_did_not_come_to_its_pause_is_not_suspended_by_keep(two: Two) -> None:
    guest = two.start()
    made = two.source()
    made.prepare(ID)
    with pytest.raises(GuestError, match="it is not suspended in"):
        paused.open_paused(made.revive()).keep()
    assert guest.process.poll() is None
    lose(made)
    two.assert_runs_on()


def test_a_restore_that_fails_is_tried_again(node: Two) -> None:
    made, keeper = suspended(node)
    node.here.settings(fail=["restore"])
    with pytest.raises(GuestError, match="bhyve -r: Failed to restore kernel structs"):
        made.resume()
    assert not node.here.host.exists("g")
    node.here.settings(fail=[])
    lose(made)
    keeper.resume()
    node.assert_runs_on()


def test_a_restore_that_may_have_run_is_not_tried_again(two: Two) -> None:
    """The disks may have gone on."""
    made, keeper = suspended(two)
    made.keep()
    lose(made, keeper)
    two.here.settings(fail=["restore-late"])
    with pytest.raises(TakenError, match=r"vm_restore_time: .*; it may have run by then"):
        anew(keeper).resume()
    two.here.settings(fail=[])
    two.here.host.destroy("g")
    found = anew(keeper)
    with pytest.raises(TakenError, match="its bhyve -r has ended; it may have run") as refused:
        found.resume()
    assert two.here.pid("g") is None
    assert found.is_alive()
    command = refused.value.hint.rpartition(": ")[2]
    os.unlink(command.removeprefix("rm "))
    found.resume()
    two.assert_runs_on()


def test_a_guest_that_may_have_run_can_be_discarded(two: Two) -> None:
    made, keeper = suspended(two)
    two.here.settings(fail=["restore-late"])
    with pytest.raises(TakenError, match="it may have run"):
        made.resume()
    lose(made, keeper)
    anew(keeper).discard("")
    assert two.left() == []


def test_the_network_comes_back_with_the_guest(two: Two) -> None:
    made, keeper = suspended(two)
    [tap] = keeper.place.bridges
    (two.here.directory / "net" / tap).unlink()
    made.resume()
    assert two.here.host.bridge_of(tap) == "bridge0"
    lose(made)
    two.assert_runs_on()


# vm-bhyve.


def managed(two: Two) -> tuple[BhyveSource, BhyvePaused]:
    made = two.source()
    made.prepare(ID)
    keeper = paused.open_paused(made.revive())
    keeper.hold()
    return made, keeper


@pytest.fixture(params=[0, 5], ids=["exit-0", "exit-5"])
def vm(request: pytest.FixtureRequest) -> Iterator[Two]:
    """Two hosts, with a guest of vm-bhyve's at the source."""
    with two_hosts(suspend_status=request.param) as made, made.supervise():
        yield made


def test_the_supervisor_is_told_before_the_suspend_and_ends(vm: Two) -> None:
    made, keeper = managed(vm)
    seen = []
    real = Checkpoint.request

    def looking(self: Checkpoint, directory_fd: int, filename: str, *, suspend: bool) -> None:
        seen.append(vm.lock("suspending"))
        real(self, directory_fd, filename, suspend=suspend)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "request", looking)
        made.pause()
    assert seen == [HERE]
    made.resume()
    assert vm.guests[0].await_exit() == 0
    assert vm.here.host.bridge_of("tap-g-0-4-0") == "bridge0"
    assert vm.lock("run") == HERE
    assert vm.lock("suspending") is None
    lose(made, keeper)
    vm.assert_runs_on()


def test_a_pause_that_fails_takes_the_lock_back(two: Two) -> None:
    with two.supervise() as supervisor:
        made, keeper = managed(two)
        (two.staging / f"bhysend-{ID[:16]}" / "ckp.meta").mkdir()
        with pytest.raises(GuestError):
            made.pause()
        assert two.lock("suspending") == HERE
        made.resume()
        assert two.lock("suspending") is None
        assert two.lock("run") == HERE
        assert supervisor.process.poll() is None
        lose(made, keeper)
        two.assert_runs_on()


def test_a_checkpoint_needs_no_lock(two: Two) -> None:
    with two.supervise():
        made = two.source(keep=True)
        made.prepare(ID)
        made.pause()
        assert two.lock("suspending") is None
        made.resume()
        lose(made)
        two.assert_runs_on()


@pytest.mark.parametrize(
    ("there", "word"),
    [
        ("elsewhere", "elsewhere"),
        ("", "moved-by-bhysend"),
        (HERE, "moved-by-bhysend"),
    ],
)
def test_a_guest_that_moved_away_is_locked(vm: Two, there: str, word: str) -> None:
    made, keeper = managed(vm)
    made.pause()
    lose(made)
    keeper.discard(there)
    assert vm.guests[0].await_exit() == 0
    assert vm.lock("run") == word
    assert vm.lock("suspending") is None
    anew(keeper).discard(there)
    assert vm.lock("run") == word
    assert vm.left() == []


def test_a_held_guest_is_locked_with_a_word_that_is_no_host(vm: Two) -> None:
    made, keeper = managed(vm)
    made.pause()
    made.keep()
    lose(made, keeper)
    assert vm.lock("run") == "held-by-bhysend"
    assert not (vm.here.directory / "vm" / "g" / "g.save").exists()
    anew(keeper).resume()
    assert vm.lock("run") == HERE
    vm.assert_runs_on()


def test_a_keep_that_was_killed_before_the_lock_locks_when_it_is_done_again(vm: Two) -> None:
    made, keeper = managed(vm)
    made.pause()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paused.BhyvePaused, "_await_supervisor", raises_killed)
        with pytest.raises(KilledError):
            made.keep()
    assert vm.left() != []
    anew(keeper).keep()
    assert vm.lock("run") == "held-by-bhysend"


def raises_killed(self: object) -> None:
    raise KilledError


def test_a_supervisor_that_does_not_end_is_named_and_nothing_is_lost(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paused, "_SUPERVISOR_S", 0.2)
    with two.supervise() as supervisor:
        made, keeper = managed(two)
        supervisor.kill()
        made.pause()
        with pytest.raises(GuestError, match="its vm-bhyve supervisor does not end") as caught:
            made.resume()
        [command] = [word for word in caught.value.hint.split(": ") if word.startswith("rm ")]
        os.unlink(command.removeprefix("rm "))
        made.resume()
        lose(made, keeper)
        two.assert_runs_on()


def test_the_memory_is_safe_before_a_supervisor_is_waited_for(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It destroys the VM, which may be all that has the memory."""
    monkeypatch.setattr(paused, "_SUPERVISOR_S", 0.0)
    two.here.settings(generation=4, node_left=True)
    with two.supervise() as supervisor:
        made, keeper = managed(two)
        supervisor.kill()
        made.pause()
        lose(made, keeper)
        with pytest.raises(GuestError, match="its vm-bhyve supervisor does not end"):
            anew(keeper).resume()
        two.here.host.destroy("g")
        (two.here.directory / "vm" / "g" / "run.lock").unlink()
        anew(keeper).resume()
        two.assert_runs_on()


def test_a_loaded_guest_that_is_discarded_leaves_no_lock(two: Two, tmp_path: Path) -> None:
    made, keeper = suspended(two)
    made.keep()
    lose(made, keeper)
    record = {**keeper.place.to_json(), "process": None, "manager": str(tmp_path)}
    loaded = paused.open_paused(record)
    loaded.keep()
    assert (tmp_path / "run.lock").read_text() == "held-by-bhysend\n"
    loaded.discard("")
    assert not (tmp_path / "run.lock").exists()
    (tmp_path / "run.lock").write_text("elsewhere\n")
    loaded.discard("")
    assert (tmp_path / "run.lock").read_text() == "elsewhere\n"

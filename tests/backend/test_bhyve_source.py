"""BhyveSource over a live guest: what a pause that fails leaves, and what the guest does then."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.backend.bhyve import paused, source
from bhystream.backend.bhyve.checkpoint import Checkpoint, Outcome, UnansweredError, settle
from bhystream.backend.bhyve.place import Place
from bhystream.backend.bhyve.source import BhyveSource
from bhystream.errors import GoneError, GuestError, IncompatibleError, PipeError
from standin.rig import Spec, assert_unbroken, await_true

from .bhyve_rig import ID, Two, require_sink, sink_prefix, small_tmpfs, two_hosts, without_sink

NVME = Spec(devices=(*Spec().devices, ("0.9.0", "nvme")))
SINKS = ["sink", "file"]


@pytest.fixture(params=[4, 5], ids=["G4", "G5"])
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    with two_hosts(generation=request.param) as made:
        yield made


@pytest.fixture(params=SINKS)
def sink(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where bhyve writes the memory: to the null device, or into a file."""
    if request.param == "file":
        without_sink(monkeypatch)
    elif require_sink():
        pytest.skip("in this process only root has the sink")
    return str(request.param)


def prepared(two: Two, *, keep: bool = False, without: str = "#") -> BhyveSource:
    made = two.source(keep=keep, without=without)
    made.prepare(ID)
    return made


def back(two: Two, made: BhyveSource) -> None:
    """Let the guest of a failed or successful pause run on, and see that nothing is lost."""
    made.resume()
    made.close()
    two.assert_runs_on()


def test_opening_and_closing_changes_nothing(two: Two) -> None:
    two.start()
    made = two.source()
    assert made.name == "g"
    assert made.lock_name == "standin-g"
    assert [one.name for one in made.head().layout] == ["lowmem"]
    assert sorted(made.resources()) == ["bootrom=", "com1=", "disk0=", "net0="]
    made.close()
    made.close()
    two.assert_runs_on()


def test_a_guest_that_is_not_there_is_refused(two: Two) -> None:
    two.start()
    (two.here.directory / "h.config").write_text((two.here.directory / "g.config").read_text())
    with pytest.raises(GuestError, match="no VM of that name"):
        two.source("h")


@pytest.mark.parametrize(
    ("without", "found"), [("memory.size", "memory.size"), ("cpus=", "sockets")]
)
def test_a_configuration_that_is_not_the_guests_is_refused(
    two: Two, without: str, found: str
) -> None:
    two.start()
    with pytest.raises(IncompatibleError, match=rf"{found}: the configuration says"):
        two.source(without=without)
    two.assert_runs_on()


def test_what_was_prepared_goes_with_close(two: Two, sink: str) -> None:
    two.start()
    made = prepared(two)
    place = two.staging / f"bhysend-{ID[:16]}"
    assert (place / "ckp").is_symlink() == (sink == "sink")
    assert bool(made.warnings()[2:]) == (sink == "file")
    made.close()
    two.assert_runs_on()


def test_a_suspended_guest_comes_back(two: Two, sink: str) -> None:
    guest = two.start()
    made = prepared(two)
    made.pause()
    assert guest.await_exit() == 5
    assert made.states()[0].name == "meta"
    back(two, made)


def test_a_guest_that_runs_on_serves_others_again(two: Two) -> None:
    two.start()
    made = prepared(two)
    made.resume()
    two.here.ask("g", cmd="of somebody else")
    back(two, made)


@pytest.mark.parametrize("status", [0, 5])
def test_either_status_is_a_suspend(two: Two, status: int) -> None:
    two.here.settings(suspend_status=status)
    guest = two.start()
    made = prepared(two)
    made.pause()
    assert guest.await_exit() == status
    back(two, made)


def test_a_device_that_cannot_be_saved_refuses_the_pause(two: Two, sink: str) -> None:
    guest = two.start(NVME)
    made = prepared(two, without="0.9.0")
    with pytest.raises(GuestError) as caught:
        made.pause()
    assert caught.value.hint == "a device that cannot be saved is the usual reason"
    assert guest.process.poll() is None
    back(two, made)
    assert guest.process.poll() is None
    assert "nvme@pci.0.9.0: snapshot not supported" in guest.stderr()
    # The cause is gone with the device, and so is the refusal.
    guest.power_off()
    two.guests.clear()
    two.start()
    made = prepared(two)
    made.pause()
    back(two, made)


def test_what_bhyve_says_of_a_refusal_is_handed_on() -> None:
    with two_hosts(generation=5) as two:
        two.start(NVME)
        made = prepared(two, without="0.9.0")
        with pytest.raises(GuestError, match=r"refused: failed to snapshot"):
            made.pause()
        back(two, made)


@pytest.mark.parametrize("generation", [4, 5])
def test_a_move_with_such_a_device_fails_and_the_next_succeeds(generation: int) -> None:
    require_sink()
    with two_hosts(generation=generation) as two:
        guest = two.start(NVME)
        ended = two.move("-f", without="0.9.0")
        assert ended.status == 69, ended.stderr
        assert "guest g: it runs here" in ended.stderr
        two.assert_runs_on()
        guest.power_off()
        two.guests.clear()
        two.start()
        ended = two.move("-f")
        assert ended.status == 0, ended.stderr
        two.assert_moved()


def test_a_device_that_bhyve_may_not_open_is_replaced_by_a_file(two: Two) -> None:
    if require_sink():
        pytest.skip("only root can remount")
    guest = two.start()
    made = prepared(two)
    null = two.staging / f"bhysend-{ID[:16]}" / "dev" / "null"
    subprocess.run(["mount", "-o", "remount,bind,nodev", null], check=True)
    made.pause()
    assert guest.await_exit() == 5
    assert "failed to open a snapshot file" in guest.stderr()
    image = two.staging / f"bhysend-{ID[:16]}" / "ckp"
    assert image.is_file() and image.stat().st_size == 64 << 20
    back(two, made)


# No answer.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_SUSPEND_S", 0.2)
    monkeypatch.setattr(paused, "_SETTLE_S", 1.0)


def test_a_request_without_an_answer_is_given_up_and_the_guest_runs_on(
    two: Two, sink: str, impatient: None
) -> None:
    two.start()
    made = prepared(two)
    two.here.settings(fail=["hang"])
    with pytest.raises(UnansweredError, match="has not answered for"):
        made.pause()
    assert (two.staging / f"bhysend-{ID[:16]}").exists()
    back(two, made)


def test_a_checkpoint_without_an_answer_is_given_up_and_the_guest_runs_on(
    two: Two, impatient: None
) -> None:
    two.start()
    made = prepared(two, keep=True)
    two.here.settings(fail=["hang"])
    with pytest.raises(UnansweredError):
        made.pause()
    back(two, made)


def test_a_request_that_was_given_up_never_suspends_the_guest_later(
    two: Two, sink: str, impatient: None
) -> None:
    guest = two.start()
    # Somebody else's connection is served first, and says nothing for now.
    with two.here.connect("g"):
        made = prepared(two)
        with pytest.raises(UnansweredError):
            made.pause()
        made.resume()
        made.close()
        assert list(two.staging.iterdir()) == []
    assert settle(two.here.directory / "run", "g", "guest g", 20.0)
    await_true(lambda: "failed to open a snapshot file" in guest.stderr(), "the late request")
    assert guest.process.poll() is None
    two.assert_runs_on()


def test_a_request_that_had_begun_when_it_was_given_up_is_waited_for(
    two: Two, sink: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = two.start()
    made = prepared(two)
    kern = two.staging / f"bhysend-{ID[:16]}" / "ckp.kern"

    def gives_up(self: Checkpoint, limit_s: float) -> Outcome:
        monkeypatch.undo()
        await_true(kern.exists, "the first file")
        raise UnansweredError("given up")

    monkeypatch.setattr(Checkpoint, "await_outcome", gives_up)
    with pytest.raises(UnansweredError, match="given up"):
        made.pause()
    back(two, made)
    assert guest.await_exit() == 5  # it was suspended, and is back


def test_a_second_request_without_an_answer_is_given_up_as_the_first(
    two: Two, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first has left must not pass for a request that has begun."""
    if require_sink():
        pytest.skip("only root can remount")
    two.start()
    made = prepared(two)
    null = two.staging / f"bhysend-{ID[:16]}" / "dev" / "null"
    subprocess.run(["mount", "-o", "remount,bind,nodev", null], check=True)
    real = BhyveSource._reconnect

    def hanging(self: BhyveSource, before: Checkpoint) -> None:
        two.here.settings(fail=["hang"])
        real(self, before)

    monkeypatch.setattr(BhyveSource, "_reconnect", hanging)
    with pytest.raises(UnansweredError):
        made.pause()
    back(two, made)


def test_a_guest_that_hangs_is_no_reason_to_hang(tmp_path: Path) -> None:
    prefix = require_sink()
    with two_hosts() as two:
        two.start()
        two.here.settings(fail=["hang"])
        words = two.send("-f")[len(prefix) :]
        limits = [f"backend.bhyve.{name}=0.5" for name in ("source._SUSPEND_S",)]
        limited = Path(__file__).parents[1] / "cli" / "limited.py"
        [ended] = two.run(
            [*prefix, words[0], str(limited), *limits, "--", *words[1:], *two.receive()]
        )
        assert ended.status == 69, ended.stderr
        assert "its bhyve has not answered for" in ended.stderr
        assert "guest g: it runs here" in ended.stderr
        two.assert_runs_on()


# The node.


@pytest.mark.parametrize("is_left", [False, True])
def test_the_node_is_made_anew_when_the_guest_comes_back(
    two: Two, sink: str, is_left: bool
) -> None:
    two.here.settings(node_left=is_left)
    guest = two.start()
    node = two.here.directory / "vmm" / "g"
    before = node.stat().st_ino
    made = prepared(two)
    made.pause()
    guest.await_exit()
    assert node.exists() == is_left
    back(two, made)
    assert node.stat().st_ino != before


# Death.


def test_a_bhyve_that_dies_in_the_suspend_is_a_lost_guest_and_that_is_said(
    two: Two, sink: str
) -> None:
    guest = two.start()
    two.here.settings(fail=["die"])
    made = prepared(two)
    with pytest.raises(GuestError, match=r"ckp\.meta is empty"):
        made.pause()
    assert guest.await_exit() == -signal.SIGKILL
    with pytest.raises(GoneError, match="its bhyve has ended, and left nothing to go on from"):
        made.resume()
    record = paused.open_paused(made.revive())
    assert not record.runs()
    assert not record.is_alive()
    made.close()


# Room.


def test_a_staging_directory_without_room_is_refused_before_the_pause(two: Two) -> None:
    two.start()
    with small_tmpfs(two.directory / "tiny", "1m") as tiny:
        os.environ["BHYSEND_STAGING"] = str(tiny)
        made = two.source()
        with pytest.raises(GuestError, match=rf"staging: {tiny} has \d+ bytes free, \d+ are need"):
            made.prepare(ID)
        made.close()
        assert list(tiny.iterdir()) == []
    two.assert_runs_on()


def test_why_the_memory_needs_room_is_told_with_the_refusal(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_sink(monkeypatch)
    two.start()
    with small_tmpfs(two.directory / "tiny", "65m") as tiny:
        os.environ["BHYSEND_STAGING"] = str(tiny)
        made = two.source()
        with pytest.raises(GuestError, match="staging: ") as refused:
            made.prepare(ID)
        assert "bhyve writes the memory into" in refused.value.hint
        assert "Operation not permitted" in refused.value.hint
        made.close()


def test_a_state_directory_without_room_is_refused_before_the_pause(two: Two) -> None:
    two.start()
    with small_tmpfs(two.base / "held", "1m") as held:
        made = two.source()
        with pytest.raises(GuestError, match=rf"state directory: {held} has \d+ bytes free"):
            made.prepare(ID)
        made.close()
    two.assert_runs_on()


def test_one_file_system_needs_the_room_of_both(two: Two) -> None:
    """Either fits, and what is kept is written before the staging goes."""
    two.start()
    with small_tmpfs(two.base / "held", "100m") as held:
        (held / "staging").mkdir()
        os.environ["BHYSEND_STAGING"] = str(held / "staging")
        made = two.source()
        with pytest.raises(GuestError, match=rf"staging and state directory: {held} has \d+ bytes"):
            made.prepare(ID)
        made.close()
    two.assert_runs_on()


def fill(directory: Path) -> None:
    """Leave no room in a file system."""
    free = os.statvfs(directory)
    with (directory / "other").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)


def test_room_that_vanishes_before_the_pause_is_seen_again(two: Two) -> None:
    two.start()
    with small_tmpfs(two.base / "held", "160m") as held:
        made = prepared(two)
        fill(held)
        with pytest.raises(GuestError, match=r"state directory: .* has 0 bytes free"):
            made.pause()
        made.resume()
        made.close()
    two.assert_runs_on()


def test_room_that_vanishes_at_the_suspend_leaves_the_guest_running(
    two: Two, sink: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = two.start()
    with small_tmpfs(two.directory / "tiny", "160m") as tiny:
        os.environ["BHYSEND_STAGING"] = str(tiny)
        made = prepared(two)
        filling(monkeypatch, tiny)
        with pytest.raises(GuestError):
            made.pause()
        assert guest.process.poll() is None
        made.resume()
        made.close()
        assert [path.name for path in tiny.iterdir()] == ["other"]
    assert "No space left" in guest.stderr()
    two.assert_runs_on()


def filling(patch: pytest.MonkeyPatch, directory: Path) -> None:
    """Let the room vanish after the last check, before the request."""
    real = Checkpoint.request

    def request(self: Checkpoint, directory_fd: int, filename: str, *, suspend: bool) -> None:
        if not (directory / "other").exists():
            fill(directory)
        real(self, directory_fd, filename, suspend=suspend)

    patch.setattr(Checkpoint, "request", request)


def test_the_room_for_the_state_is_held_until_the_request(two: Two) -> None:
    """bhyve would not see that it is gone, and end with half a state."""
    require_sink()
    two.start()
    with small_tmpfs(two.directory / "tiny", "160m") as tiny:
        os.environ["BHYSEND_STAGING"] = str(tiny)
        made = prepared(two)
        fill(tiny)
        made.pause()
        made.resume()
        made.close()
    two.assert_runs_on()


def test_the_room_for_the_state_is_held_until_the_second_request(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_sink()
    two.start()
    made = prepared(two)
    assert made._place is not None
    place, held = made._place, [made._place.held_bytes()]
    request, reconnect = Checkpoint.request, BhyveSource._reconnect

    def asking(self: Checkpoint, directory_fd: int, filename: str, *, suspend: bool) -> None:
        held.append(place.held_bytes())
        if len(held) == 2:  # what bhyve cannot open is refused
            place.staged.memory.unlink()
            place.staged.memory.mkdir()
        request(self, directory_fd, filename, suspend=suspend)

    def again(self: BhyveSource, before: Checkpoint) -> None:
        held.append(place.held_bytes())
        place.staged.memory.rmdir()
        reconnect(self, before)

    monkeypatch.setattr(Checkpoint, "request", asking)
    monkeypatch.setattr(Place, "has_sink", lambda self: len(held) < 3)
    monkeypatch.setattr(BhyveSource, "_reconnect", again)
    made.pause()
    assert held == [64 << 20, 0, 64 << 20, 0]
    made.resume()
    made.close()
    two.assert_runs_on()


def test_a_file_system_that_reserves_nothing_holds_no_room(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    two.start()
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    made = prepared(two)
    made.pause()
    made.resume()
    made.close()
    two.assert_runs_on()


def test_a_state_directory_that_is_full_when_the_guest_has_to_come_back_loses_nothing(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_sink()
    two.start()
    with small_tmpfs(two.base / "held", "160m") as held:
        made = prepared(two)
        filling(monkeypatch, held)
        made.pause()
        for _ in range(2):
            with pytest.raises(PipeError, match="No space left"):
                made.resume()
        (held / "other").unlink()
        made.resume()
        made.close()
    two.assert_runs_on()


# -k


def test_a_kept_guest_runs_while_its_file_is_read(two: Two) -> None:
    guest = two.start()
    made = prepared(two, keep=True)
    assert not made.is_live
    made.pause()
    [image] = made.memory()
    beats = len(guest.console.beats())
    guest.console.await_beats(beats + 3)
    assert guest.process.poll() is None
    pages = sum(end - first for first, end in made.touched())
    assert 1024 <= pages < 2048
    assert image.nbytes == 64 << 20
    assert made.changed() is None
    image.release()
    back(two, made)


def test_a_kept_guest_that_powered_off_meanwhile_is_not_started_from_its_copy(two: Two) -> None:
    guest = two.start()
    made = prepared(two, keep=True)
    made.pause()
    guest.power_off()
    record = paused.open_paused(made.revive())
    assert not record.is_alive()
    made.resume()
    made.close()
    assert two.here.pid("g") is None
    assert not two.here.host.exists("g")
    assert list(two.staging.iterdir()) == []


def test_a_copy_of_a_kept_guest_starts_elsewhere(tmp_path: Path) -> None:
    prefix = require_sink()
    del prefix
    with two_hosts() as two:
        guest = two.start()
        with (tmp_path / "kept").open("wb") as file:
            [ended] = two.run_into(file, two.send("-k"))
        assert ended.status == 0, ended.stderr
        two.assert_runs_on()
        with (tmp_path / "kept").open("rb") as file:
            [ended] = two.run_from(file, two.receive())
        assert ended.status == 0, ended.stderr
        two.arrived().await_sweeps(1)
        assert_unbroken(guest.console)
        copy = two.arrived().beats()
        assert copy == list(range(copy[0], copy[0] + len(copy)))
        assert two.held() == []


def test_the_sink_can_be_had_in_ci() -> None:
    assert sink_prefix() is not None or os.environ.get("CI") != "true"

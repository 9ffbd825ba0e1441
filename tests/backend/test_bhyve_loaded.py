"""Guests at the destination, found again by their records: running, waiting, in files."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bhystream import durable, hypervisors
from bhystream.backend.bhyve import clocks, restore, restoredguest
from bhystream.backend.bhyve import fpu as fpus
from bhystream.backend.bhyve import loaded as loadeds
from bhystream.backend.bhyve.listening import listener
from bhystream.backend.bhyve.loaded import BhyveLoaded
from bhystream.backend.bhyve.restore import Restore
from bhystream.backend.bhyve.restoredguest import RestoredGuest
from bhystream.backend.bhyve.waitingrestore import WaitingRestore
from bhystream.backend.process import Identity, await_end
from bhystream.errors import BhyError, GuestEndedError, GuestError, InputOutputError, StaleError
from bhystream.guest import State
from standin.rig import DEADLINE_S, Console, Spec, assert_unbroken, await_true

from .arriving import ID, Arriving, arriving, fpu
from .revived import open_loaded


@pytest.fixture
def guest() -> Iterator[Arriving]:
    with arriving() as made:
        yield made


def left_loaded(guest: Arriving, states: list[State] | None = None) -> dict[str, Any]:
    """Leave the guest loaded, as bhyrecv -u does; return its record as JSON keeps it."""
    sink = guest.sink(unstarted=True)
    guest.build(sink, late=True, states=states)
    record = json.dumps(dict(sink.record()))
    sink.leave_paused()
    sink.abort()
    found: dict[str, Any] = json.loads(record)
    return found


def held(guest: Arriving) -> dict[str, Any]:
    """Build a guest up to READY; return its record.  Nothing undoes the guest, as after a kill."""
    sink = guest.sink()
    guest.build(sink)
    found: dict[str, Any] = json.loads(json.dumps(dict(sink.record())))
    return found


def said(guest: Arriving) -> str:
    """Return its bhyve's log, which shows each connection that was closed without a request."""
    return (guest.base / "log" / "g.log").read_text()


def kept(guest: Arriving) -> Path:
    return guest.base / "loaded" / f"{ID}.g"


# Left loaded.


def test_a_guest_left_loaded_lies_in_files_on_the_disk(guest: Arriving) -> None:
    record = left_loaded(guest)
    assert record["process"] is None
    assert list(guest.staging_root.iterdir()) == []
    assert guest.processes() == []
    assert sorted(os.listdir(kept(guest))) == ["ckp", "ckp.fpu", "ckp.kern", "ckp.meta", "synced"]
    assert (kept(guest) / "ckp").read_bytes() == guest.image.read_bytes()
    found = open_loaded(record)
    assert found.is_alive() and not found.runs()
    found.require_paused()
    # How long its clocks went on is of no use later: nobody says then how long it has stood.
    assert list(found.states()) == [one for one in guest.states if one.name != clocks.STATE]


def test_a_guest_left_loaded_is_started_and_seen_running(guest: Arriving) -> None:
    record = left_loaded(guest)
    open_loaded(record).resume()
    assert not kept(guest).exists()
    again = open_loaded(record)
    assert again.is_alive() and again.runs()
    with pytest.raises(StaleError, match="it runs here"):
        again.require_paused()
    again.resume()
    guest.await_unbroken()
    with pytest.raises(GuestError, match="it runs, so it is not ended here"):
        again.discard("")
    again.clear()
    guest.console.await_sweeps(1)
    assert "nvlist_recv() failed" not in said(guest)


def test_its_fpu_is_loaded_then(guest: Arriving, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[State] = []
    real = fpus.load

    def load(vm: Any, memory: memoryview, states: Sequence[State], *more: Any) -> None:
        seen.extend(states)
        real(vm, memory, states, *more)

    monkeypatch.setattr(fpus, "load", load)
    record = left_loaded(guest, [*guest.states, State("other", b"", is_optional=True)])
    open_loaded(record).resume()
    assert seen == fpu(guest) and len(seen) == 2
    guest.await_unbroken()


def test_one_that_was_never_completed_is_not_alive(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash of the host may leave the files' names without their bytes."""

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    sink = guest.sink(unstarted=True)
    guest.open(sink, late=True)
    record = dict(sink.record())
    with monkeypatch.context() as patch, pytest.raises(InputOutputError, match="No space left"):
        patch.setattr(durable, "sync", full)
        sink.load(guest.states)
    found = open_loaded(record)
    assert not found.is_alive()
    for call in (found.resume, found.require_paused):
        with pytest.raises(GuestEndedError):
            call()
    sink.abort()
    assert guest.left() == []


def test_a_guest_left_loaded_is_discarded_with_all_of_it(guest: Arriving) -> None:
    record = left_loaded(guest)
    guest.there.host.create("g")
    for _ in range(2):
        open_loaded(record).discard("")
    assert not kept(guest).exists()
    assert guest.there.host.exists("g")  # not the guest's: it was made meanwhile
    assert not open_loaded(record).is_alive()


@pytest.mark.parametrize("fail", ["restore-early", "late-cut", "restore"])
def test_a_start_that_fails_leaves_it_as_it_was(guest: Arriving, fail: str) -> None:
    record = left_loaded(guest)
    guest.there.settings(fail=[fail])
    for _ in range(2):
        with pytest.raises(GuestError, match="bhyve -r"):
            open_loaded(record).resume()
        assert open_loaded(record).is_alive() and not open_loaded(record).runs()
    guest.there.settings(fail=[])
    open_loaded(record).resume()
    guest.await_unbroken()


def test_a_start_that_fails_behind_its_socket_is_not_tried_again(guest: Arriving) -> None:
    record = left_loaded(guest)
    guest.there.settings(fail=["restore-late"])
    for _ in range(2):
        with pytest.raises(StaleError, match="it may have run by then"):
            open_loaded(record).resume()
        guest.there.settings(fail=[])
    open_loaded(record).discard("")
    assert not kept(guest).exists() and guest.started() == []


def test_after_a_reboot_nobody_knows_whether_a_start_ran(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = left_loaded(guest)
    guest.there.settings(fail=["restore-late"])
    with pytest.raises(StaleError):
        open_loaded(record).resume()
    (guest.there.directory / "run" / "g").unlink(missing_ok=True)
    monkeypatch.setattr(restoredguest, "boot_id", lambda: "another")
    with pytest.raises(StaleError, match="it may have run by then"):
        open_loaded(record).resume()


class Die(Exception):
    """Stands for the death of a --resume."""


class Killed(ExitStack):
    """An ExitStack that undoes nothing, because its process was killed."""

    def __exit__(self, *_: object) -> None:
        return None


def killed(patch: pytest.MonkeyPatch) -> None:
    """Let a restore that fails undo nothing."""
    patch.setattr(restore, "ExitStack", Killed)
    patch.setattr(WaitingRestore, "undo", lambda self: None)


STEPS = [
    *((Restore, name) for name in ("_await_maps", "_map", "_await_read", "_stop")),
    *((WaitingRestore, name) for name in ("load", "release", "_await_socket")),
]


@pytest.mark.parametrize(("owner", "step"), STEPS)
def test_a_resume_that_was_killed_is_done_by_the_next(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch, owner: type, step: str
) -> None:
    record = left_loaded(guest)

    def die(self: object, *args: object) -> None:
        raise Die

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, die)
        killed(patch)
        with pytest.raises(Die):
            open_loaded(record).resume()
    assert open_loaded(record).is_alive()
    open_loaded(record).resume()
    guest.await_unbroken()
    assert len(guest.processes()) == 1
    assert not kept(guest).exists()


# Waiting.


def test_a_held_guest_is_alive_and_does_not_run(guest: Arriving) -> None:
    found = open_loaded(held(guest))
    assert found.is_alive() and not found.runs()
    found.require_paused()


def test_a_held_guest_is_discarded_with_its_process_and_its_vm(guest: Arriving) -> None:
    """As by --discard, and by -q of a stream whose bhyrecv was killed before GO."""
    record = held(guest)
    for _ in range(2):
        open_loaded(record).discard("")
        assert guest.there.host.exists("g") is False
        assert guest.processes() == []
        assert list(guest.staging_root.iterdir()) == [] and guest.started() == []
    assert not open_loaded(record).is_alive()


def test_a_held_guest_is_cleared_away(guest: Arriving) -> None:
    record = held(guest)
    open_loaded(record).clear()
    assert guest.processes() == [] and not guest.there.host.exists("g")


def test_one_that_somebody_woke_is_held_still(guest: Arriving) -> None:
    record = held(guest)
    os.kill(record["process"]["pid"], signal.SIGCONT)
    assert not open_loaded(record).runs()
    open_loaded(record).discard("")
    assert guest.processes() == []


def test_one_that_was_let_go_by_a_killed_bhyrecv_is_waited_for(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.there.settings(fail=["slow-restore"])
    sink = guest.sink()
    guest.build(sink)
    record = dict(sink.record())

    def die(self: object) -> None:
        raise Die

    with monkeypatch.context() as patch, pytest.raises(Die):
        patch.setattr(WaitingRestore, "_await_socket", die)
        killed(patch)
        sink.start()
    found = open_loaded(record)
    monkeypatch.setattr(loadeds, "_SETTLE_S", 0.0)
    monkeypatch.setattr(loadeds, "SLOW_BYTES_PER_SECOND", 1 << 40)
    with pytest.raises(GuestError, match="its bhyve -r does not end"):
        found.runs()
    with pytest.raises(GuestError, match="its bhyve -r does not end"):
        found.discard("")
    monkeypatch.setattr(loadeds, "_SETTLE_S", 60.0)
    (guest.there.directory / "release").touch()
    assert found.runs()
    found.clear()
    assert list(guest.staging_root.iterdir()) == []
    guest.await_unbroken()


def test_one_without_its_last_page_was_never_released(guest: Arriving) -> None:
    """bhyrecv was killed after it recorded STARTED: even after a SIGCONT, bhyve still waits."""
    record = held(guest)
    for _ in range(2):
        assert hypervisors.was_never_released(record)
        os.kill(record["process"]["pid"], signal.SIGCONT)
    os.kill(record["process"]["pid"], signal.SIGKILL)
    await_true(lambda: not open_loaded(record).is_alive(), "its end")
    assert not hypervisors.was_never_released(record)
    assert not hypervisors.was_never_released({"hypervisor": "qemu"})


def test_one_whose_bhyrecv_was_killed_before_it_woke_it_does_not_run(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last page is there, but bhyve stays stopped, because nobody has sent SIGCONT."""
    sink = guest.sink()
    guest.build(sink)

    def die(self: object) -> None:
        raise Die

    with monkeypatch.context() as patch, pytest.raises(Die):
        patch.setattr("bhystream.backend.launch.Child.go_on", die)
        killed(patch)
        sink.start()
    found = open_loaded(sink.record())
    assert found.is_alive() and not found.runs()
    assert not found.was_never_released()  # a SIGCONT from any process would release it
    found.discard("")
    assert guest.processes() == []


# Running.


def started(guest: Arriving) -> dict[str, Any]:
    sink = guest.sink()
    guest.build(sink)
    sink.start()
    guest.console.await_beats(1)
    return dict(sink.record())


def test_a_started_guest_is_seen_running(guest: Arriving) -> None:
    found = open_loaded(started(guest))
    assert found.is_alive() and found.runs()
    found.close()
    guest.console.await_sweeps(1)
    assert "nvlist_recv() failed" not in said(guest)


@pytest.mark.parametrize("is_left", [False, True], ids=["files-gone", "files-left"])
def test_another_guest_of_that_name_does_not_make_it_one_that_runs(
    guest: Arriving, is_left: bool
) -> None:
    """After RUNNING the source ends its guest, so a guest started anew here must not count."""
    record = started(guest)
    guest.there.host.destroy("g")
    assert await_end(Identity(**record["process"]), DEADLINE_S)
    if is_left:
        Path(record["staging"]).mkdir()
    other = guest.there.launch("g", Spec(touched="1M"))
    other.console.await_beats(1)
    found = open_loaded(record)
    assert not found.is_alive() and not found.runs()
    found.discard("")
    found.clear()
    other.console.await_sweeps(1)
    assert listener(guest.there.host, "g") is not None


def test_a_process_that_does_not_listen_does_not_run(guest: Arriving) -> None:
    """The pid may be another process's by now, or another process may have the socket."""
    record = started(guest)
    record["process"] = {**record["process"], "start_ticks": 1}
    assert not open_loaded(record).runs()
    open_loaded(record).discard("")
    guest.console.await_sweeps(1)


# By its record.


def test_a_record_leads_to_its_guest(guest: Arriving) -> None:
    found = hypervisors.open_paused(left_loaded(guest))
    assert isinstance(found, BhyveLoaded)
    with pytest.raises(BhyError):
        hypervisors.open_paused({"hypervisor": "standin", "role": "destination"})


# vm-bhyve's guest of that name.


@pytest.fixture
def lock(guest: Arriving) -> Path:
    """The run.lock of a guest that vm-bhyve manages at the destination."""
    directory = guest.there.directory / "vm" / "g"
    directory.mkdir()
    (directory / "g.conf").write_text("loader=uefi\n")
    return directory / "run.lock"


def test_a_guest_left_loaded_is_locked_until_it_is_discarded(guest: Arriving, lock: Path) -> None:
    record = left_loaded(guest)
    assert lock.read_text() == "held-by-bhysend\n"
    other = RestoredGuest.from_json(record)
    BhyveLoaded(
        guest.there.host, replace(other, kept=f"{other.kept}2", staging="/nonexistent")
    ).discard("")
    assert lock.exists()  # the guest never ran from this stream, so the lock is another's
    open_loaded(record).discard("")
    assert not lock.exists()


def test_a_guest_left_loaded_is_locked_for_this_host_when_it_runs(
    guest: Arriving, lock: Path
) -> None:
    record = left_loaded(guest)
    open_loaded(record).resume()
    assert lock.read_text().splitlines()[0] == os.uname().nodename
    assert_unbroken(Console(guest.guest.console.path))

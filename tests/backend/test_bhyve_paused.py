"""A guest that stands paused: how it is seen, resumed and ended."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.bhyve import fifo, paused
from bhystream.backend.bhyve.checkpoint import UnansweredError, settle
from bhystream.backend.bhyve.paused import BhyvePaused, PausedRecord
from bhystream.backend.bhyve.savedvcpu import SavedVcpu
from bhystream.backend.bhyve.snapshotdir import SnapshotDir
from bhystream.backend.process import Identity
from bhystream.errors import BhyError, GuestEndedError, GuestError, StaleError
from bhystream.guest import Json
from bhystream.standin.vm import StandinVm
from standin.rig import await_true

from .bhyve_rig import ID, Two, require_sink
from .revived import open_paused


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paused, "_SERVED_S", 0.3)
    monkeypatch.setattr(paused, "_SETTLE_S", 0.3)


def meta(found: BhyvePaused) -> Path:
    return Path(found.record.directory) / "ckp.meta"


# How it is seen.


def test_it_stands_and_its_process_lives(two: Two) -> None:
    guest = two.start()
    found = two.hold()
    beats = guest.console.beats()
    assert found.is_alive() and found.stands() and not found.runs()
    found.require_paused()
    assert guest.console.beats() == beats
    assert two.held() == [ID]
    found.resume()
    two.assert_runs_on()


def test_nobody_of_ours_has_it_open(two: Two) -> None:
    """Our processes may die at any time, so bhyve itself has to be the reader of its FIFO."""
    two.start()
    found = two.hold()
    inode = meta(found).stat().st_ino
    open_here = [os.stat(f"/proc/self/fd/{fd}").st_ino for fd in _fds()]
    assert inode not in open_here
    assert fifo.has_reader(meta(found))
    found.resume()


def _fds() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


def test_it_may_be_resumed_and_asked_again(two: Two) -> None:
    two.start()
    found = two.hold()
    found.resume()
    assert found.runs() and found.is_alive() and not found.stands()
    found.resume()
    open_paused(found.record.to_json()).resume()
    two.assert_runs_on()


def test_somebody_who_reads_the_fifo_lets_it_run_and_that_is_seen(two: Two) -> None:
    guest = two.start()
    found = two.hold()
    subprocess.run(["cat", meta(found)], stdout=subprocess.DEVNULL, check=True)
    with pytest.raises(StaleError, match="another program let the guest run while it stood paused"):
        found.require_paused()
    await_true(found.runs, "a guest that runs")
    with pytest.raises(GuestError, match="it runs, so it is not ended"):
        found.discard("elsewhere")
    assert guest.process.poll() is None
    found.resume()
    two.assert_runs_on()


def test_a_guest_that_ends_while_it_stands_is_gone(two: Two) -> None:
    guest = two.start()
    found = two.hold()
    guest.kill()
    with pytest.raises(GuestEndedError, match="its bhyve has ended while it stood paused"):
        found.require_paused()
    assert not found.is_alive() and not found.runs() and not found.stands()
    with pytest.raises(GuestEndedError, match="its bhyve has ended"):
        found.resume()
    assert two.held() == []
    with pytest.raises(GuestEndedError):
        found.resume()


def test_a_checkpoint_that_failed_stands_in_the_fifo_while_its_guest_runs(two: Two) -> None:
    """After a failed checkpoint bhyve resumes the guest before it writes FILE.meta."""
    guest = two.start()
    made, record = two.prepared()
    two.here.settings(fail=["hold-fail"])
    found = open_paused(record)
    asked(two, found)
    await_true(lambda: fifo.pending(meta(found)) == found.record.full_bytes, "the write")
    guest.console.await_beats(len(guest.console.beats()) + 2)
    assert not found.stands() and found.runs()
    with pytest.raises(StaleError):
        found.require_paused()
    with pytest.raises(GuestError, match="it runs"):
        found.discard("")
    found.resume()
    made.close()
    two.assert_runs_on()


def asked(two: Two, found: BhyvePaused) -> None:
    """Ask for the checkpoint, and close everything, as if killed right afterwards."""
    from bhystream.backend.bhyve.checkpoint import Checkpoint

    fd = fifo.arm(meta(found), found.record.full_bytes)
    directory = os.open(found.record.directory, os.O_RDONLY | os.O_DIRECTORY)
    checkpoint = Checkpoint(two.here.host.run_dir, "g", "guest g")
    checkpoint.request(directory, "ckp", fd)
    checkpoint.close()
    os.close(directory)
    os.close(fd)


# A request that waits.


def test_a_request_that_was_not_served_is_taken_back(two: Two) -> None:
    guest = two.start()
    made, record = two.prepared()
    found = open_paused(record)
    with two.here.connect("g"):  # bhyve serves this connection first, and waits for its request
        asked(two, found)
        found.resume()
        assert two.held() == []
    assert settle(two.here.host.run_dir, "g", "guest g", 20.0)
    assert "Failed to open kernel data snapshot file." in guest.stderr()
    made.close()
    two.assert_runs_on()


def test_what_waits_is_not_called_running(two: Two, impatient: None) -> None:
    two.start()
    made, record = two.prepared()
    found = open_paused(record)
    with two.here.connect("g"):
        asked(two, found)
        with pytest.raises(UnansweredError):
            found.runs()
        with pytest.raises(UnansweredError):
            found.discard("elsewhere")
    await_true(found.stands, "the hold")
    assert not found.runs()
    found.resume()
    made.close()
    two.assert_runs_on()


def test_one_that_has_begun_is_let_through(two: Two) -> None:
    two.start()
    made, record = two.prepared()
    found = open_paused(record)
    asked(two, found)
    found.resume()
    made.close()
    two.assert_runs_on()


@pytest.mark.parametrize("error", [0, errno.ENOSPC, errno.EROFS])
def test_a_throttled_guest_that_is_found_runs_again(
    two: Two, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the request that bhyve never got cannot be withdrawn, because the disk is full."""
    two.start()
    made, record = two.prepared()
    found = open_paused(record)
    made.suspend_vcpus()
    assert found._vcpus_stand()
    make = Path.mkdir

    def mkdir(self: Path, *args: Any, **given: Any) -> None:
        if error and self.name == "ckp.kern":
            raise OSError(error, os.strerror(error))
        make(self, *args, **given)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        found.resume()
    assert not found._vcpus_stand()
    made.close()
    two.assert_runs_on()


def test_a_guest_whose_vcpus_were_not_resumed_is_resumed_by_its_record(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.start()
    made, record = two.prepared()

    def resume_cpu(self: StandinVm, vcpu: int) -> None:
        raise GuestError(f"cannot resume vCPU {vcpu}: Device busy")

    with monkeypatch.context() as patch, pytest.raises(GuestError, match="Device busy"):
        patch.setattr(StandinVm, "resume_cpu", resume_cpu)
        made.suspend_vcpus()
        made.resume_vcpus()
    made.close()  # as bhysend does before it opens the guest by its record
    open_paused(record).resume()
    two.assert_runs_on()
    assert two.held() == []


def test_a_client_that_says_nothing_holds_nobody_up(two: Two, impatient: None) -> None:
    two.start()
    found = two.hold()
    with two.here.connect("g"):
        found.resume()
        two.assert_runs_on()


def test_another_reader_does_not_pass_for_a_request(two: Two, impatient: None) -> None:
    """If another process has the FIFO open, bhyve is asked whether all requests were served."""
    two.start()
    found = two.hold()
    fd = os.open(meta(found), os.O_RDONLY | os.O_NONBLOCK)
    found.resume()
    os.close(fd)
    two.assert_runs_on()


def test_a_bhyve_that_never_comes_to_its_last_write_is_told_and_can_be_ended(
    two: Two, impatient: None
) -> None:
    guest = two.start()
    made, record = two.prepared()
    two.here.settings(fail=["hold-hang"])
    found = open_paused(record)
    asked(two, found)
    await_true(lambda: len(two.here.waiting("g")) == 2, "the pause")
    with pytest.raises(UnansweredError):
        found.resume()
    made.close()
    assert two.held() == [ID]
    guest.kill()
    found.discard("")
    assert two.held() == []


# What was removed.


def test_a_fifo_that_was_removed_is_said_and_nothing_is_called_running(two: Two) -> None:
    guest = two.start()
    found = two.hold()
    meta(found).unlink()
    assert not found.runs()
    for _ in range(2):
        with pytest.raises(GuestError, match="the FIFO that would resume it was removed") as caught:
            found.resume()
        assert caught.value.hint == "it can only be ended: --discard"
    found.discard("")
    assert guest.await_exit() == -signal.SIGKILL


def test_a_directory_that_was_removed_is_no_release(two: Two) -> None:
    two.start()
    found = two.hold()
    subprocess.run(["umount", "-l", Path(found.record.directory, "dev", "null")], check=True)
    shutil.rmtree(found.record.directory)
    with pytest.raises(GuestError, match="was removed"):
        found.resume()
    assert not found.runs()
    found.discard("")


# The end.


def test_it_is_ended_with_its_vm_and_what_was_saved(two: Two) -> None:
    guest = two.start()
    found = two.hold()
    beats = guest.console.beats()
    found.discard("elsewhere")
    assert guest.await_exit() == -signal.SIGKILL
    assert guest.console.beats() == beats  # the guest did not run before it was ended
    assert not two.here.host.exists("g")
    assert two.held() == []
    found.discard("elsewhere")


def test_another_guest_of_its_name_is_left_alone(two: Two) -> None:
    guest = two.start()
    found = two.hold()
    guest.kill()
    two.here.host.destroy("g")
    again = two.start()
    assert not found.is_alive() and not found.runs()
    with pytest.raises(StaleError, match="it runs on elsewhere"):
        found.discard("elsewhere")
    assert two.held() == [ID]
    found.discard("")
    assert two.held() == []
    again.console.await_sweeps(1)
    with pytest.raises(GuestEndedError):
        found.resume()
    two.assert_runs_on()


def test_after_a_reboot_nothing_here_is_its(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    two.start()
    found = two.hold()
    found.resume()
    old = found.record.process._replace(boot_id="another")
    late = BhyvePaused(two.here.host, replace(found.record, process=old))
    assert not late.is_alive() and not late.runs()
    with pytest.raises(StaleError):
        late.discard("elsewhere")
    late.discard("")
    two.assert_runs_on()


def test_a_process_that_may_not_be_killed_stays_and_is_said(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.start()
    found = two.hold()

    def refuse(*_: object) -> bool:
        raise GuestError("cannot watch process 1: Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(paused, "kill_process", refuse)
        with pytest.raises(GuestError, match="guest g: cannot watch process 1: Operation not"):
            found.discard("elsewhere")
        patch.setattr(paused, "kill_process", lambda *_: False)
        with pytest.raises(GuestError, match=r"cannot end its bhyve \(process \d+\)"):
            found.discard("elsewhere")
    assert found.stands() and two.here.host.exists("g")
    found.resume()
    two.assert_runs_on()


# Registers that were not put back.


def test_a_guest_whose_registers_are_not_its_own_is_not_let_go(two: Two) -> None:
    two.start()
    found = two.hold()
    Path(found.record.directory, "journal").touch()
    with pytest.raises(GuestError, match="the registers were not put back"):
        found.resume()
    assert found.stands()
    found.discard("")
    assert not two.here.host.exists("g")


def test_a_guest_that_somebody_let_run_is_not_touched(two: Two) -> None:
    guest = two.start()
    found = two.hold()
    vm = two.here.host.open_vm("g", is_writable=True)
    with vm.map(0, 64 << 20) as memory:
        SnapshotDir(Path(found.record.directory)).journal.write(SavedVcpu.read(vm, memory, 0))
    vm.close()
    assert fifo.drain(Path(found.record.directory, "ckp.meta"), 10.0)[1]
    with pytest.raises(GuestError, match="another program let the guest run meanwhile") as caught:
        found.resume()
    assert "power it off" in caught.value.hint
    guest.console.await_sweeps(1)


def test_another_vm_of_its_name_gets_none_of_its_registers(two: Two) -> None:
    two.start()
    found = two.hold()
    Path(found.record.directory, "journal").touch()
    other = BhyvePaused(two.here.host, replace(found.record, node="0:0"))
    with pytest.raises(GuestError, match="its VM was destroyed"):
        other.resume()
    Path(found.record.directory, "journal").unlink()
    found.resume()
    two.assert_runs_on()


# The record.

RECORD = PausedRecord(
    kind="standin",
    vmm_dir="/v",
    name="g",
    process=Identity(1, 2, "b"),
    directory="/d",
    node="1:2",
    full_bytes=65536,
    manager="",
)


def test_a_record_is_what_it_was() -> None:
    assert PausedRecord.from_json(RECORD.to_json()) == RECORD
    assert RECORD.to_json() == {
        "hypervisor": "standin",
        "role": "source",
        "vmm_dir": "/v",
        "name": "g",
        "process": {"pid": 1, "start_ticks": 2, "boot_id": "b"},
        "directory": "/d",
        "node": "1:2",
        "full_bytes": 65536,
        "manager": "",
    }


@pytest.mark.parametrize("key", sorted(RECORD.to_json()))
def test_a_record_that_lacks_something_is_refused(key: str) -> None:
    broken = {name: value for name, value in RECORD.to_json().items() if name != key}
    with pytest.raises(GuestError, match="cannot read the record of a bhyve guest"):
        open_paused(broken)


@pytest.mark.parametrize("key", sorted(RECORD.to_json()))
@pytest.mark.parametrize("value", [None, [], 0, 1.5, True])
def test_a_record_with_something_else_in_it_is_refused(key: str, value: Any) -> None:
    with pytest.raises(GuestError, match="cannot read the record of a bhyve guest"):
        open_paused({**RECORD.to_json(), key: value})


@pytest.mark.parametrize(
    "change",
    [
        {"more": 1},
        {"role": "destination"},
        {"directory": "held"},
        {"full_bytes": 1},
        {"full_bytes": 1 << 40},
        {"full_bytes": 65536.0},
        {"process": {"pid": 1, "start_ticks": 2}},
        {"process": {"pid": 1, "start_ticks": 2, "boot_id": "b", "x": 1}},
        {"process": {"pid": "1", "start_ticks": 2, "boot_id": "b"}},
    ],
)
def test_a_record_that_is_not_ours_is_refused(change: Json) -> None:
    with pytest.raises(BhyError, match="cannot read the record of a bhyve guest"):
        open_paused({**RECORD.to_json(), **change})


def test_the_sink_is_had_here() -> None:
    require_sink()

"""The keeper: real processes, real kills, and records that tell the keeper what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bhystream
from bhystream.backend.process import identify
from bhystream.errors import GuestError
from bhystream.guest import GO, HELD, MOVED, PAUSED
from bhystream.handover.state import Lock, Record, Records
from bhystream.send import keeper
from bhystream.send.keeper import Keeper
from bhystream.units import NS
from support.clock import Clock
from support.descriptors import descriptors
from support.processes import is_gone

ME = identify(os.getpid(), "QEMU")
# A guest whose process lives, but which does not answer on its QMP socket.
REVIVE = {
    "hypervisor": "qemu",
    "name": "web1",
    "qmp": "/nonexistent/web1.qmp",
    "pid": ME.pid,
    "start_ticks": ME.start_ticks,
    "boot_id": ME.boot_id,
    "restore": {},
    "announce": False,
}
RECORD = Record("a" * 32, "web1", "qemu:/web1", "lock-1", PAUSED, REVIVE)


@pytest.fixture
def lock(base: Path) -> Iterator[Lock]:
    made = Lock(base, RECORD.lock, "guest web1")
    yield made
    made.release()


# The keeper as a child of bhysend.


def test_a_dismissed_keeper_ends_and_does_nothing(
    base: Path, records: Records, lock: Lock, capfd: pytest.CaptureFixture[str]
) -> None:
    made = Keeper(base, RECORD, lock)
    records.write(RECORD)
    assert made.dismiss() == 0
    assert records.all() == [RECORD]
    made.dismiss()  # a second call is no error
    assert capfd.readouterr().err == ""


def test_starting_one_records_nothing(base: Path, records: Records, lock: Lock) -> None:
    made = Keeper(base, RECORD, lock)
    assert records.all() == []
    made.dismiss()


def test_a_keeper_that_is_dead_already_is_dismissed(base: Path, lock: Lock) -> None:
    made = Keeper(base, RECORD, lock)
    os.kill(made.pid, signal.SIGKILL)
    assert is_gone(made.pid, 60)
    made.dismiss()


def test_a_keeper_that_does_not_end_is_ended(
    base: Path, lock: Lock, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Keeper(base, RECORD, lock)
    assert made.is_alive()
    os.kill(made.pid, signal.SIGSTOP)
    monkeypatch.setattr(keeper, "_END_SECONDS", 0.2)
    try:
        assert made.dismiss() == -signal.SIGKILL
        assert not made.is_alive()
    finally:
        if made.is_alive():
            os.kill(made.pid, signal.SIGKILL)


def test_a_keeper_survives_what_ends_a_pipeline(
    base: Path, lock: Lock, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("INT", "HUP", "TERM", "QUIT", "TSTP", "USR1", "USR2")
    numbers = [getattr(signal, f"SIG{name}") for name in names]
    # If the tests run with some of these signals ignored, the keeper would inherit that.
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        made = Keeper(base, RECORD, lock)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    for number in numbers:
        os.kill(made.pid, number)
    assert made.dismiss() == 0
    assert capfd.readouterr().err == ""


FLOODED = """
import os, signal, sys, threading
from pathlib import Path
from bhystream.handover.state import Lock
from send.test_keeper import RECORD
from bhystream.send.keeper import Keeper
names = ("INT", "HUP", "TERM", "QUIT", "TSTP")
numbers = [getattr(signal, f"SIG{name}") for name in names]
for number in numbers:
    signal.signal(number, lambda *_: None)
is_over = threading.Event()
def flood():
    while not is_over.is_set():
        for number in numbers:
            os.killpg(0, number)
threading.Thread(target=flood).start()
base = Path(sys.argv[1])
lock = Lock(base, RECORD.lock, "guest web1")
try:
    for _ in range(12):
        assert Keeper(base, RECORD, lock).dismiss() == 0
finally:
    is_over.set()
"""


def test_a_keeper_survives_what_ends_a_pipeline_also_while_it_starts(base: Path) -> None:
    """A key on the terminal reaches the process before the process has its own session."""
    done = subprocess.run(
        [sys.executable, "-c", FLOODED, str(base)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_keeper_has_its_own_session_and_pins_no_directory(base: Path, lock: Lock) -> None:
    made = Keeper(base, RECORD, lock)
    try:
        assert os.getsid(made.pid) == made.pid
        assert os.readlink(f"/proc/{made.pid}/cwd") == "/"
    finally:
        made.dismiss()


def test_a_keeper_inherits_the_lock_and_nothing_else(base: Path, lock: Lock) -> None:
    theirs, ours = os.pipe()
    memory = os.memfd_create("guest", 0)
    for fd in (theirs, ours, memory):
        os.set_inheritable(fd, True)
    made = Keeper(base, RECORD, lock)
    try:
        directory = f"/proc/{made.pid}/fd"
        found = {int(name): os.readlink(f"{directory}/{name}") for name in os.listdir(directory)}
    finally:
        made.dismiss()
        for fd in (theirs, ours, memory):
            os.close(fd)
    assert found.pop(0) == found.pop(1) == "/dev/null"
    assert found.pop(2) == os.readlink("/proc/self/fd/2")
    assert found.pop(lock.fd) == str(base / "lock/lock-1")
    assert [name.partition("[")[0] for name in found.values()] == ["socket:"]


def test_a_keeper_that_does_not_start_is_an_error_before_anything_is_done(
    base: Path, records: Records, lock: Lock, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GuestError, match="guest web1: its keeper does not start"):
        Keeper(base, RECORD, lock)
    assert descriptors() == before
    assert records.all() == []


def test_a_keeper_that_says_nothing_is_given_up(
    base: Path, lock: Lock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    silent = tmp_path / "silent"
    # The program ends when the order has come and the socket is closed.
    silent.write_text('#!/bin/sh\nexec cat <&"$3" >/dev/null\n')
    silent.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(silent))
    monkeypatch.setattr(keeper, "_START_SECONDS", 0.2)
    with pytest.raises(GuestError, match="its keeper does not start"):
        Keeper(base, RECORD, lock)


# When bhysend has been killed.

PARENT = """
import json
import sys
from bhystream.handover import state
from bhystream.send.keeper import Keeper
from bhystream.handover.state import Lock, Record, Records

base = state.directory()
record = Record("a" * 32, "web1", "qemu:/web1", "lock-1", "paused", json.loads(sys.argv[1]))
keeper = Keeper(base, record, Lock(base, record.lock, "guest web1"))
for phase in sys.argv[2:]:
    Records(base, "source").write(record.with_phase(phase))
print(keeper.pid, flush=True)
sys.stdin.read()
"""


def orphan(*phases: str) -> int:
    """Start a keeper under a parent that records these phases, and SIGKILL the parent.

    Returns the keeper's pid.
    """
    argv = [sys.executable, "-c", PARENT, json.dumps(REVIVE), *phases]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        parent.kill()
    return pid


def test_a_keeper_is_of_the_same_program(base: Path, tmp_path: Path) -> None:
    # The keeper comes from a source tree on a relative path, and not from the installed one.
    tree = tmp_path / "tree"
    shutil.copytree(Path(bhystream.__file__).parent, tree / "lib/bhystream")
    module = tree / "lib/bhystream/send/keeper.py"
    module.write_text(module.read_text().replace('b"ready\\n"', 'b"other\\n"'))
    assert "other" in module.read_text()
    done = subprocess.run(
        [sys.executable, "-c", PARENT, json.dumps(REVIVE)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": "lib"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_without_a_record_it_ends(
    base: Path, records: Records, capfd: pytest.CaptureFixture[str]
) -> None:
    assert is_gone(orphan(), 60)
    assert records.all() == []
    assert capfd.readouterr().err == ""


def test_a_held_guest_is_the_operators(
    base: Path, records: Records, capfd: pytest.CaptureFixture[str]
) -> None:
    assert is_gone(orphan(PAUSED, HELD), 60)
    assert [record.phase for record in records.all()] == [HELD]
    assert capfd.readouterr().err == "bhysend: guest web1: bhysend is gone; the guest is held\n"


def test_it_keeps_record_and_lock_while_it_tries(base: Path, records: Records) -> None:
    pid = orphan(PAUSED)
    try:
        with pytest.raises(GuestError, match="another bhysend or bhyrecv works on it"):
            Lock(base, RECORD.lock, "guest web1")
        assert not is_gone(pid, 0.5)
        assert [record.phase for record in records.all()] == [PAUSED]
    finally:
        os.kill(pid, signal.SIGKILL)
    assert is_gone(pid, 60)
    Lock(base, RECORD.lock, "guest web1").release()


# A bhysend that is stopped.


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


@pytest.mark.parametrize("phase", [PAUSED, HELD, GO, MOVED, None])
def test_one_that_is_stopped_while_its_guest_is_paused_is_killed(
    sleeper: subprocess.Popen[bytes],
    records: Records,
    phase: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper, "_STOPPED_SECONDS", 0.0)
    if phase:
        records.write(RECORD.with_phase(phase))
    guard = keeper.Guard(sleeper.pid, records, RECORD.id)
    guard.look()
    assert sleeper.poll() is None  # it is not stopped
    stop(sleeper)
    guard.look()
    if phase == PAUSED:
        assert sleeper.wait(60) == -signal.SIGKILL
        guard.look()  # the process is gone: look() does nothing
    else:
        assert sleeper.poll() is None


def test_one_that_goes_on_in_time_is_left_alone(
    sleeper: subprocess.Popen[bytes], records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.write(RECORD)
    clock = Clock(now_ns=1000 * NS)
    monkeypatch.setattr(keeper, "time", clock)
    guard = keeper.Guard(sleeper.pid, records, RECORD.id)
    for _ in range(3):
        stop(sleeper)
        guard.look()
        clock.now_ns += round((keeper._STOPPED_SECONDS - 1) * NS)
        guard.look()
        sleeper.send_signal(signal.SIGCONT)
        os.waitpid(sleeper.pid, os.WCONTINUED)
        guard.look()
    assert sleeper.poll() is None

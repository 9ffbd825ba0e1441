"""Processes are told apart: real ones on this system, and FreeBSD's by sample answers."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.backend import launch, process, process_freebsd
from bhystream.errors import GuestError
from support.processes import process_state
from support.waiting import until

Child = subprocess.Popen[bytes]


@pytest.fixture
def sleeper() -> Iterator[Child]:
    child = subprocess.Popen(["sleep", "600"])
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def test_a_process_is_known_again(sleeper: Child) -> None:
    who = process.identify(sleeper.pid, "sleep")
    assert who.pid == sleeper.pid
    assert process.is_same(who, process.identify(sleeper.pid, "sleep"))
    assert process.is_alive(who)


@pytest.mark.parametrize(
    ("pid", "later", "boot"), [(os.getpid(), 0, ""), (None, 1, ""), (None, 0, "x")]
)
def test_another_pid_start_or_boot_is_another_process(
    sleeper: Child, pid: int | None, later: int, boot: str
) -> None:
    who = process.identify(sleeper.pid, "sleep")
    other = process.Identity(pid or who.pid, who.start_ticks + later, boot or who.boot_id)
    assert not process.is_same(who, other)
    assert not process.is_alive(other)
    assert process.open_ending(other) is None
    assert process.await_end(other, 0)
    assert process.end_process(other)
    assert sleeper.poll() is None


@pytest.mark.parametrize("path", ["stat", "boot_id"])
def test_a_process_that_cannot_be_looked_at_has_not_ended(
    sleeper: Child, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its guest may stand paused, and a guest that is said to have ended is left alone."""
    who = process.identify(sleeper.pid, "sleep")

    def fails(name: str, mode: str) -> object:
        if name.endswith(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open(name, mode)

    monkeypatch.setattr(process, "open", fails, raising=False)
    if path == "boot_id":
        assert process.is_alive(who)  # it was read before, and is the same until the reboot
        process.boot_id.cache_clear()
    with pytest.raises(GuestError, match="Input/output error"):
        process.is_alive(who)
    with pytest.raises(GuestError, match="Input/output error"):
        process.open_ending(who)
    assert not process.end_process(who)
    assert sleeper.poll() is None


def test_a_process_lives_until_its_last_thread_has_ended() -> None:
    """A process whose first thread ends before the others looks like a zombie."""
    code = (
        "import ctypes, os, threading, sys\n"
        "threading.Thread(target=sys.stdin.read).start()\n"
        "exit_thread = {'x86_64': 60, 'aarch64': 93}[os.uname().machine]\n"
        "ctypes.CDLL(None).syscall(exit_thread, 0)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        who = process.identify(child.pid, "python")
        until(lambda: process_state(child.pid) == "Z", "the end of the first thread")
        assert process.is_alive(who)
        assert not process.await_end(who, 0.05)
    finally:
        child.kill()
    assert process.await_end(who, 20)
    assert not process.is_alive(who)
    child.communicate()


@pytest.fixture
def stubborn() -> Iterator[Child]:
    """Yield a process that ignores SIGTERM."""
    words = ["/bin/sh", "-c", "trap '' TERM; echo; read -r _"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child
        child.kill()


def test_a_stopped_process_is_killed_at_once(stubborn: Child) -> None:
    who = process.identify(stubborn.pid, "sh")
    assert not process.is_stopped(who)
    stubborn.send_signal(signal.SIGSTOP)
    until(lambda: process.is_stopped(who), "the stop")
    assert process.is_alive(who)
    assert process.kill_process(who)
    assert stubborn.wait() == -signal.SIGKILL
    assert process.kill_process(who)
    assert not process.is_stopped(who)


def test_another_process_with_its_pid_is_not_killed(sleeper: Child) -> None:
    who = process.identify(sleeper.pid, "sleep")
    other = process.Identity(who.pid, who.start_ticks + 1000, who.boot_id)
    sleeper.send_signal(signal.SIGSTOP)
    until(lambda: process.is_stopped(who), "the stop")
    assert not process.is_stopped(other)
    assert process.kill_process(other)
    assert sleeper.poll() is None


def test_a_child_is_stopped_when_none_of_its_threads_runs(tmp_path: Path) -> None:
    code = (
        "import sys, threading\nfor _ in range(4): threading.Thread(target=sys.stdin.read).start()"
    )
    gate, opener = os.pipe()
    child = launch.Child([sys.executable, "-c", code], str(tmp_path / "log"), stdin=gate)
    assert child.status is None
    assert child.stop(20)
    tasks = Path(f"/proc/{child.pid}/task")
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()]
    assert set(states) == {"T"}
    child.go_on()
    assert child.stop(20)
    child.kill()
    os.close(gate)
    os.close(opener)
    assert not child.stop(20)
    assert child.status == -signal.SIGKILL


@pytest.mark.parametrize(
    "code, words",
    [
        ("print('no such disk'); raise SystemExit(3)", "no such disk; it ended with status 3"),
        ("raise SystemExit(4)", "it ended with status 4"),
        (
            "import os; print('paused', flush=True); os.kill(os.getpid(), 9)",
            "paused; it was killed by SIGKILL (signal 9)",
        ),
    ],
)
def test_a_child_s_last_words_end_with_how_it_ended(tmp_path: Path, code: str, words: str) -> None:
    """If a guest dies at once, bhyve tells its exit status only: 3 is a triple fault."""
    child = launch.Child([sys.executable, "-c", code], str(tmp_path / "log"))
    assert child.ends_within(20)
    assert child.last_words() == words


def test_a_zombie_is_not_alive(sleeper: Child) -> None:
    who = process.identify(sleeper.pid, "sleep")
    sleeper.kill()
    assert process.await_end(who, 20)
    assert not process.is_alive(who)


def test_a_process_that_is_gone_has_no_identity(sleeper: Child) -> None:
    who = process.identify(sleeper.pid, "sleep")
    sleeper.kill()
    sleeper.wait()
    assert not process.is_alive(who)
    assert process.await_end(who, 0)
    assert process.end_process(who)
    with pytest.raises(
        process.EndedError, match=f"cannot find the bhyve process {who.pid}: it has ended"
    ):
        process.identify(who.pid, "bhyve")


def test_a_wait_for_a_living_process_keeps_its_limit(sleeper: Child) -> None:
    who = process.identify(sleeper.pid, "sleep")
    begin = time.monotonic()
    assert not process.await_end(who, 0.05)
    assert 0.05 <= time.monotonic() - begin < 10
    assert sleeper.poll() is None


def test_a_process_is_ended_politely(sleeper: Child) -> None:
    assert process.end_process(process.identify(sleeper.pid, "sleep"))
    assert sleeper.wait() == -signal.SIGTERM


def test_a_process_that_ignores_it_is_ended_all_the_same() -> None:
    program = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True)"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{program}; time.sleep(600)"], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    with child.stdout:
        child.stdout.readline()
        assert process.end_process(process.identify(child.pid, "python"), polite_s=0.05)
    assert child.wait() == -signal.SIGKILL


def test_the_peer_of_a_socket_is_found() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert process.peer_pid(ours, "bhyve") == os.getpid()


# FreeBSD: texts and structures as its programs and its kernel return them.


def test_the_boot_time_is_read() -> None:
    text = "{ sec = 1790798684, usec = 725700 } Wed Sep 30 16:04:44 2026\n"
    assert process_freebsd.parse_boottime(text) == 1790798684
    with pytest.raises(GuestError, match=r"cannot read kern\.boottime: ''"):
        process_freebsd.parse_boottime("")


def test_the_start_of_a_process_is_read() -> None:
    text = "SCs  Wed Sep 30 16:04:44 2026    \n"
    assert process_freebsd.parse_ps(text) == ("S", 1790784284)
    text = "I    Fri Jan  2 03:04:05 2026    \n"
    assert process_freebsd.parse_ps(text) == ("I", 1767323045)


def test_no_line_and_a_zombie_are_no_process() -> None:
    assert process_freebsd.parse_ps("") is None
    assert process_freebsd.parse_ps("Z    -\n") is None


def test_another_answer_of_ps_is_not_guessed_at() -> None:
    with pytest.raises(GuestError, match="cannot read what ps says"):
        process_freebsd.parse_ps("S    mer. 30 sept. 16:04:44 2026\n")


def test_the_ignored_signals_are_read() -> None:
    """Those of a bhyve on FreeBSD 15.1: its guest has switched ACPI on, or not."""
    assert process_freebsd.parse_ignored("1848c006\n", signal.SIGTERM)
    assert not process_freebsd.parse_ignored("18488006\n", signal.SIGTERM)
    assert process_freebsd.parse_ignored("18488006\n", signal.SIGINT)
    assert not process_freebsd.parse_ignored("", signal.SIGTERM)
    with pytest.raises(GuestError, match="cannot read what ps says: 'none'"):
        process_freebsd.parse_ignored("none\n", signal.SIGTERM)


def test_a_program_that_only_complains_has_not_said_that_there_is_no_process() -> None:
    assert process_freebsd._run("/bin/sh", "-c", "exit 1") == b""  # ps(1) of no process
    with pytest.raises(GuestError, match="/bin/sh failed: ps: no memory"):
        process_freebsd._run("/bin/sh", "-c", "echo 'ps: no memory' >&2; exit 1")


def xucred(version: int, pid: int) -> bytes:
    groups = struct.pack("<16I", *range(1000, 1016))
    raw = struct.pack("<IIhxx", version, 0, 16) + groups + bytes(4) + struct.pack("<ixxxx", pid)
    assert len(raw) == 88
    return raw


def test_the_pid_stands_behind_the_groups_of_a_peer() -> None:
    assert process_freebsd.unpack_xucred(xucred(0, 4711)) == 4711


def test_a_peer_of_another_layout_has_no_pid() -> None:
    assert process_freebsd.unpack_xucred(xucred(1, 4711)) == 0
    assert process_freebsd.unpack_xucred(xucred(0, 4711)[:80]) == 0

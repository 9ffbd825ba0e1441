"""The command of bhysend -p: what the command is given, and how the command ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bhystream.errors import GuestError
from bhystream.send.hook import Hook
from support.processes import is_gone
from support.waiting import until

ID = "00" * 16


def run(command: str) -> Hook:
    hook = Hook(command, "web1", ID)
    hook.begin()
    return hook


def line_in(path: Path) -> str:
    """Return the line in a file, once the line is complete."""
    until(lambda: path.exists() and path.read_text().endswith("\n"), f"a line in {path}", 60)
    return path.read_text().strip()


_DYING = """
import os, signal, sys
from bhystream.send.hook import Hook
print(Hook(sys.argv[1], "web1", "00").group, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_command_that_the_keeper_may_not_know_never_begins(tmp_path: Path) -> None:
    """bhysend is killed after it has made the process, and before it has told its keeper."""
    words = [sys.executable, "-P", "-c", _DYING, f": > {tmp_path}/began; sleep 600"]
    said = subprocess.run(words, capture_output=True, text=True).stdout
    until(lambda: is_gone(int(said)), "the end of the command's process", 60)
    assert not list(tmp_path.iterdir())


def test_status_0_is_success() -> None:
    run("exit 0").wait()
    run("").wait()


@pytest.mark.parametrize("status", [1, 3, 127, 255])
def test_any_other_status_is_an_error(status: int) -> None:
    hook = run(f"exit {status}")
    with pytest.raises(GuestError) as caught:
        hook.wait()
    assert str(caught.value) == f"guest web1: the -p command ended with status {status}"


@pytest.mark.parametrize(("name", "number"), [("SIGKILL", 9), ("SIGTERM", 15), ("SIGSEGV", 11)])
def test_a_signal_is_named(name: str, number: int) -> None:
    hook = run(f"kill -{name[3:]} $$")
    says = rf"the -p command was killed by {name} \(signal {number}\)$"
    with pytest.raises(GuestError, match=says):
        hook.wait()


def test_a_signal_without_a_name_is_an_error_too() -> None:
    hook = run(f"kill -{signal.SIGRTMIN + 1} $$")
    with pytest.raises(GuestError, match=r"the -p command was killed by signal \d+$"):
        hook.wait()


def test_its_output_is_our_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    run("echo out; echo err >&2").wait()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.split() == ["out", "err"]


def test_its_input_is_empty(capfd: pytest.CaptureFixture[str]) -> None:
    # The command does not get the standard input of bhysend.
    theirs, ours = os.pipe()
    before = os.dup(0)
    os.dup2(theirs, 0)
    os.close(theirs)
    os.write(ours, b"ours\n")
    os.close(ours)
    try:
        run("cat; readlink /proc/self/fd/0").wait()
    finally:
        os.dup2(before, 0)
        os.close(before)
    assert capfd.readouterr().err == "/dev/null\n"


def test_its_environment_names_guest_and_stream(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER", "kept")
    run('echo "$BHYSEND_GUEST $BHYSEND_ID $OTHER"').wait()
    assert capfd.readouterr().err == f"web1 {ID} kept\n"


def test_it_inherits_no_descriptor_of_ours(capfd: pytest.CaptureFixture[str]) -> None:
    theirs, ours = os.pipe()
    os.set_inheritable(ours, True)
    try:
        run(f"test -e /dev/fd/{ours} && echo inherited; true").wait()
    finally:
        os.close(theirs)
        os.close(ours)
    assert capfd.readouterr().err == ""


def test_a_keyboard_interrupt_does_not_reach_it() -> None:
    # The command has a process group of its own: bhysend handles a Ctrl-C, and calls kill().
    hook = run("kill -STOP $$")
    try:
        assert os.getpgid(hook.group) == hook.group
    finally:
        hook.kill()


def test_kill_ends_the_whole_group(tmp_path: Path) -> None:
    # The shell's child waits for ever: only the signal ends the child.
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    hook = run(f"cat {fifo} & echo $! > {tmp_path}/child; wait")
    child = int(line_in(tmp_path / "child"))
    hook.kill()
    assert is_gone(child, 10)
    assert is_gone(hook.group, 10)


def test_kill_after_the_end_is_no_error() -> None:
    hook = run("exit 0")
    hook.wait()
    hook.kill()
    hook.kill()


def test_kill_ends_what_a_failed_command_left_behind(tmp_path: Path) -> None:
    # bhysend(8), -p: "If the move fails, bhysend kills hook."
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    hook = run(f"cat {fifo} & echo $! > {tmp_path}/child; exit 1")
    child = int(line_in(tmp_path / "child"))
    with pytest.raises(GuestError, match="status 1"):
        hook.wait()
    hook.kill()
    try:
        assert is_gone(child, 10)
    finally:
        os.close(os.open(fifo, os.O_RDWR))  # ends the child if kill() has failed

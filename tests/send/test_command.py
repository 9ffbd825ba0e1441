"""The command of the command form: its end, and the terminal that a killed one leaves behind."""

from __future__ import annotations

import contextlib
import os
import pty
import sys

import pytest

from bhystream.errors import GuestError
from bhystream.send.command import Command


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import os, signal, sys\n{code}")


@pytest.mark.parametrize("status", [0, 3])
def test_a_command_ends_when_its_input_does(status: int) -> None:
    command = Command(python(f"sys.stdin.buffer.read(); sys.exit({status})"))
    os.write(command.stream_fd, b"stream")
    assert command.end(60) == status
    command.hang_up()  # a second call is no error


def test_a_command_that_does_not_end_is_killed() -> None:
    command = Command(python("signal.pause()"))
    assert command.end(0) is None


def test_a_command_is_not_ended_by_the_terminal() -> None:
    """A Ctrl-C at the terminal must not cut the way back while GO may be out."""
    numbers = "signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP"
    command = Command(
        python(f"sys.exit(any(signal.getsignal(n) != signal.SIG_IGN for n in ({numbers})))")
    )
    assert command.end(60) == 0


def test_a_command_that_is_not_there_is_an_error() -> None:
    with pytest.raises(GuestError, match="cannot run /none/ssh: No such file or directory"):
        Command(["/none/ssh", "hv2"])


def test_the_words_of_a_command_can_be_typed() -> None:
    command = Command(["true", "a b", "$c"])
    assert command.words == "true 'a b' '$c'"
    assert command.end(60) == 0


# A process with a terminal of its own runs the command: the test's process has none, or another.
AT_A_TERMINAL = """
import sys, termios
from bhystream.send.command import Command
command = Command(["sh", "-c", "stty -echo < /dev/tty; echo; read line"])
assert command.words and open(command.answer_fd, closefd=False).readline() == "\\n"
def echoes():
    return bool(termios.tcgetattr(0)[3] & termios.ECHO)
unseen = not echoes()
{end}
sys.exit(0 if unseen and echoes() else 1)
"""


@pytest.mark.parametrize(
    "end",
    ["command._process.send_signal(19)\nassert command.end(0) is None", "command.kill()"],
    ids=["late", "interrupted"],
)
def test_a_killed_command_leaves_no_terminal_without_echo(end: str) -> None:
    """ssh asks for a password so, and bhysend kills an ssh that goes on asking after a Ctrl-C."""
    pid, fd = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-c", AT_A_TERMINAL.replace("{end}", end)])
    said = b""
    with contextlib.suppress(OSError), open(fd, "rb", buffering=0) as terminal:
        while data := terminal.read(4096):
            said += data
    assert os.waitpid(pid, 0)[1] == 0, said

"""The command of the command form: a child of bhysend, from its start to its end."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import termios
from collections.abc import Iterator, Sequence
from io import FileIO
from typing import Any

from bhystream.errors import GuestError
from bhystream.send.options import AS_IT_IS

# The command ignores these signals: a Ctrl-C or a closed terminal must not cut the
# way back while GO may be out.  bhysend ends the command, by closing its standard input.
_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP)


class Terminal:
    """The modes of our terminal, which a command may change: ssh asks for a password unseen.

    A shell takes the modes that a program leaves behind for its own, unless a signal has ended
    the program.
    """

    def __init__(self) -> None:
        """Note the modes as they are now, if we have a terminal."""
        self._modes: list[Any] | None = None
        with self._opened() as fd:
            if fd is not None:
                self._modes = termios.tcgetattr(fd)

    def restore(self) -> None:
        """Set the modes as they were, if we are in the foreground.  Never raises."""
        with self._opened() as fd:
            # In the background this would stop us.
            if self._modes and fd is not None and os.tcgetpgrp(fd) == os.getpgrp():
                termios.tcsetattr(fd, termios.TCSANOW, self._modes)

    @staticmethod
    @contextlib.contextmanager
    def _opened() -> Iterator[int | None]:
        fd = None
        try:
            with contextlib.suppress(OSError):
                fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            with contextlib.suppress(OSError, termios.error):
                yield fd
        finally:
            if fd is not None:
                os.close(fd)


class Command:
    """The command of the command form: a child process, which the caller must end()."""

    def __init__(self, argv: Sequence[str], umask: int = AS_IT_IS) -> None:
        """Start the command.  umask: the operator's, for the command.

        The caller must not have started a thread yet, because preexec_fn is not safe
        beside threads.  Raises GuestError if the command cannot be run.
        """
        self.words = shlex.join(argv)
        self._terminal = Terminal()
        try:
            # Popen gives the child copies of its ends, so `theirs` closes them here in
            # any case; `ours` closes bhysend's ends only if a step fails.
            with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
                stdin, self._stream = _pipe(theirs, ours)
                self._answers, stdout = _pipe(ours, theirs)
                self._process = subprocess.Popen(
                    argv, stdin=stdin, stdout=stdout, preexec_fn=_ignore, umask=umask
                )
                ours.pop_all()
        except OSError as error:
            raise GuestError(f"cannot run {argv[0]}: {error.strerror}") from error
        self.stream_fd = self._stream.fileno()
        self.answer_fd = self._answers.fileno()

    def hang_up(self) -> None:
        """Close the command's standard input: the command reads EOF.  May be called twice."""
        with contextlib.suppress(OSError):
            self._stream.close()

    def ends_within(self, seconds: float) -> int | None:
        """Return the command's status if the command ends in that time, else None."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self, seconds: float) -> int | None:
        """Close the command's standard input and wait; kill the command after `seconds`.

        Returns the command's status, or None if it was killed.  Interruptible: a signal ends
        the wait, and the caller calls kill().
        """
        self.hang_up()
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None
        self._answers.close()
        return status

    def kill(self) -> None:
        """Kill the command, which may have left the terminal without echo, and wait for it."""
        self._process.kill()
        self._process.wait()
        self._answers.close()
        self._terminal.restore()


def _pipe(reading: contextlib.ExitStack, writing: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    """Return both ends of a pipe; each stack owns and closes its end.  Raises OSError."""
    read_fd, write_fd = os.pipe()
    return (
        reading.enter_context(FileIO(read_fd, "r")),
        writing.enter_context(FileIO(write_fd, "w")),
    )


def _ignore() -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)

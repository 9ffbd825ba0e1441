"""The answered forms at the destination: bhyrecv's answers, and when they are due.

Reply writes the answers to standard output.  It waits until a decisive answer is
written, but writes SEEN only if the pipe has room, so that a way back that
nobody reads never stops the stream.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import time
from collections.abc import Callable
from pathlib import Path

from bhystream.errors import BhyError, FormatError, GuestError, IncompatibleError
from bhystream.handover.answers import Answer, pack, unpack
from bhystream.handover.state import host_id
from bhystream.stream.writer import write_all
from bhystream.units import NS

_STDOUT = 1
_HELLO_SECONDS = 10.0
_SEEN_BYTES = 16 << 20
_SEEN_NS = NS // 2
_DRAIN_SECONDS = 10.0


class Reply:
    """The answers to one stream."""

    def __init__(self, base: Path, id_: str) -> None:
        """base: the state directory, absolute.  id_: the stream's id.

        Raises IncompatibleError if HELLO has no room for the directory, or the
        directory is not plain text: the source could not print what to type.
        Raises AccessError, InputOutputError if the host id cannot be read.
        """
        self._id = id_
        self._hello = (host_id(base), str(base))
        hello = Answer(id_, "HELLO", self._hello)
        try:
            is_told = unpack(pack(hello)) == hello
        except FormatError:
            is_told = False
        if not is_told:
            raise IncompatibleError(
                f"state directory {base}: the answers cannot name it: too long, or no plain text",
                "set BHYSEND_STATE_DIR to another directory",
            )
        self._bytes = 0
        self._seen_ns = 0

    def hello(self) -> None:
        """Answer HELLO, which names this host.  Raises InputOutputError."""
        self.say("HELLO", *self._hello)

    def say(self, word: str, *args: str) -> None:
        """Answer.  Raises InputOutputError."""
        write_all(_STDOUT, pack(Answer(self._id, word, args)), "write the answers")

    def try_to_say(self, word: str, *args: str) -> None:
        """Answer; do nothing if nobody reads the answers."""
        try:
            self.say(word, *args)
        except BhyError:
            return

    def seen(self, sequence: int, offset_bytes: int, *, now: bool) -> None:
        """Answer SEEN if that is due, or `now`; never wait.

        sequence: the number of the last section that was read, -1 if none was read.
        offset_bytes: the end of that section, counted from the start of the stream.
        """
        time_ns = time.monotonic_ns()
        is_due = offset_bytes - self._bytes >= _SEEN_BYTES or time_ns - self._seen_ns >= _SEEN_NS
        if sequence < 0 or not (now or is_due):
            return
        poller = select.poll()
        poller.register(_STDOUT, select.POLLOUT)
        # A pipe that poll(2) calls writable takes a line without blocking.
        if any(event & select.POLLOUT for _, event in poller.poll(0)):
            self.try_to_say("SEEN", str(sequence))
            self._bytes, self._seen_ns = offset_bytes, time_ns


class Silence:
    """A Reply for a stream that is not answered: it says nothing."""

    def hello(self) -> None:
        """Do nothing."""

    def say(self, word: str, *args: str) -> None:
        """Do nothing."""

    def try_to_say(self, word: str, *args: str) -> None:
        """Do nothing."""

    def seen(self, sequence: int, offset_bytes: int, *, now: bool) -> None:
        """Do nothing."""


class TimedInput:
    """The input of a verify.Walk: a descriptor whose reads call back, or end, in time.

    A read waits even if another process has made the shared descriptor non-blocking again.
    on_quiet: called every 10 s while a read waits, or None.  deadline: seconds of
    the monotonic clock, after which a read raises GuestError(why), or None.
    """

    def __init__(self, fd: int) -> None:
        """fd: stays the caller's."""
        self._fd = fd
        self._poller = select.poll()
        self._poller.register(fd, select.POLLIN)
        self.on_quiet: Callable[[], None] | None = None
        self.deadline: float | None = None
        self.why = ""

    @property
    def can_splice(self) -> bool:
        """Say whether splice() can be called: the input is a pipe, and the system is Linux."""
        return hasattr(os, "splice") and stat.S_ISFIFO(os.fstat(self._fd).st_mode)

    def readinto(self, buffer: memoryview, /) -> int:
        """Read once; return the bytes read, 0 at the end.  Raises OSError, GuestError."""
        return self._read(os.readv, (buffer,))

    def splice(self, fd: int, nbytes: int) -> int:
        """Move up to so many bytes into the pipe of fd, which has room, as readinto() reads."""
        return self._read(os.splice, fd, nbytes)

    def _read(self, call: Callable[..., int], *args: object) -> int:
        """Call with the descriptor and the arguments, once that finds something or the end."""
        if self.on_quiet or self.deadline is not None:
            self._wait()
        while True:
            try:
                return call(self._fd, *args)
            except BlockingIOError:
                self._poller.poll()

    def _wait(self) -> None:
        """Wait for a byte or the end."""
        while True:
            left = _HELLO_SECONDS
            if self.deadline is not None:
                left = min(left, max(self.deadline - time.monotonic(), 0.0))
            is_ready = self._poller.poll(left * 1000)
            # The deadline counts even if bytes are there: a source may send PAD
            # for ever, or a GO may have come while bhyrecv was stopped.
            if self.deadline is not None and time.monotonic() >= self.deadline:
                raise GuestError(self.why)
            if is_ready:
                return
            if self.on_quiet:
                self.on_quiet()

    def drain(self) -> None:
        """Read to the end, for at most 10 s: the filters before bhyrecv expect a reader."""
        deadline = time.monotonic() + _DRAIN_SECONDS
        with contextlib.suppress(OSError):
            while (left := deadline - time.monotonic()) > 0:
                if not self._poller.poll(left * 1000) or not os.read(self._fd, 1 << 16):
                    return

"""The answered forms at the destination: bhyrecv's answers, and when they are due.

Reply writes them to standard output.  Decisive ones are written whatever it
takes; SEEN only when the pipe has room, so that a way back that nobody reads
never stops the way in.
"""

from __future__ import annotations

import contextlib
import os
import select
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
        """base: the state directory, absolute.  id_: of the stream.

        Raises IncompatibleError for a directory that HELLO has no room for, or
        that is no text: the source could not say what to type.
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
                "set BHYSEND_STATE_DIR to another one",
            )
        self._bytes = 0
        self._seen_ns = 0

    def hello(self) -> None:
        """Say who answers."""
        self.say("HELLO", *self._hello)

    def say(self, word: str, *args: str) -> None:
        """Answer.  Raises PipeError."""
        write_all(_STDOUT, pack(Answer(self._id, word, args)), "write the answers")

    def try_to_say(self, word: str, *args: str) -> None:
        """Answer if anybody listens."""
        try:
            self.say(word, *args)
        except BhyError:
            return

    def seen(self, sequence: int, offset_bytes: int, *, now: bool) -> None:
        """Say what has been read, if it is time for that, or `now`; never wait.

        sequence: of the last section.  offset_bytes: where it ended.
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
    """The answers to a stream that is not answered: none."""

    def hello(self) -> None:
        """As Reply's."""

    def say(self, word: str, *args: str) -> None:
        """As Reply's."""

    def try_to_say(self, word: str, *args: str) -> None:
        """As Reply's."""

    def seen(self, sequence: int, offset_bytes: int, *, now: bool) -> None:
        """As Reply's."""


class TimedInput:
    """A descriptor as verify.Walk reads it, with something to do while nothing comes.

    on_quiet: called every 10 s that a read waits, or None.  deadline: on the
    monotonic clock, in seconds; then GuestError `why`.
    """

    def __init__(self, fd: int) -> None:
        """The descriptor stays the caller's."""
        self._fd = fd
        self._poller = select.poll()
        self._poller.register(fd, select.POLLIN)
        self.on_quiet: Callable[[], None] | None = None
        self.deadline: float | None = None
        self.why = ""

    def readinto(self, buffer: memoryview, /) -> int:
        """Read once.  Raises OSError, GuestError."""
        while self.on_quiet or self.deadline is not None:
            left = _HELLO_SECONDS
            if self.deadline is not None:
                left = min(left, max(self.deadline - time.monotonic(), 0.0))
            is_ready = self._poller.poll(left * 1000)
            # Also where bytes are there: a source that sends PAD for ever, or
            # a GO that lay there while we were stopped.
            if self.deadline is not None and time.monotonic() >= self.deadline:
                raise GuestError(self.why)
            if is_ready:
                break
            if self.on_quiet:
                self.on_quiet()
        while True:
            try:
                return os.readv(self._fd, [buffer])
            except BlockingIOError:
                # A process that shares the descriptor has made it so again.
                self._poller.poll()

    def drain(self) -> None:
        """Read to the end, for a while: filters before us complain of a pipe that breaks."""
        deadline = time.monotonic() + _DRAIN_SECONDS
        with contextlib.suppress(OSError):
            while (left := deadline - time.monotonic()) > 0:
                if not self._poller.poll(left * 1000) or not os.read(self._fd, 1 << 16):
                    return

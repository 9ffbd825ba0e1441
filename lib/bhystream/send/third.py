"""bhysend -A, the third stage: hands the destination's answers to the first.

    bhysend -a g | ssh dst bhyrecv | bhysend -A      the move's own
    ssh dst bhyrecv -q ID | bhysend -A               the way out of doubt

It finds its bhysend by the stream id in HELLO, gives it every line, and ends
with the status that it is told.  It always reads its input to the end, so that
nothing before it is ever stopped by a full pipe.

Where no bhysend lives any more it acts itself, on the record, when the keeper
has given up the guest's lock.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from pathlib import Path

from bhystream import commandline
from bhystream.errors import BhyError, UsageError
from bhystream.handover import state
from bhystream.handover.answers import Answer, Parser, pack
from bhystream.report import Console
from bhystream.send.rendezvous import READ_BYTES, connect
from bhystream.send.settle import Settlement
from bhystream.signals import Interrupts

_STDIN = 0
# What still comes when bhysend has ended: nobody needs it.
_DRAIN_SECONDS = 5.0
_DECISIVE = ("READY", "RUNNING", "FAILED", "RAN", "UNKNOWN", "REFUSED")


class Bhysend:
    """The bhysend of the stream, at the other end of a socket.  Select on it while it is there."""

    def __init__(self, connection: socket.socket) -> None:
        """connection: ours from here on; closed when it ends."""
        self._connection = connection
        self._said = b""

    @property
    def is_there(self) -> bool:
        """Say whether it has not hung up yet."""
        return self._connection.fileno() >= 0

    def fileno(self) -> int:
        """Return the descriptor, for select(2)."""
        return self._connection.fileno()

    @property
    def status(self) -> int | None:
        """Return the status that it told, None if it has not."""
        word, _, number = self._said.partition(b" ")
        if word == b"status" and number.endswith(b"\n"):
            return int(number)
        return None

    def tell(self, answer: Answer) -> None:
        """Hand on an answer, while it is there."""
        if not self.is_there:
            return
        try:
            self._connection.sendall(pack(answer))
        except OSError:
            # It has ended, and told its status before that.
            while self.is_there:
                self.hear()

    def hear(self) -> None:
        """Take what it says; hang up at its end."""
        try:
            data = self._connection.recv(64)
        except OSError:
            data = b""
        self._said += data
        if not data:
            self._connection.close()

    def shut(self) -> None:
        """Let it see that nothing more comes; its status may still come."""
        if self.is_there:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)


class Third:
    """One run of it."""

    def __init__(
        self, guest: str | None, base: Path, console: Console, interrupts: Interrupts
    ) -> None:
        """guest: the name that the stream's must have, or None."""
        self._interrupts = interrupts
        self._guest = guest
        self._base = base
        self._console = console
        self._parser = Parser(None, self._noise)
        self._words: dict[str, Answer] = {}
        self._bhysend: Bhysend | None = None
        self._asked = False
        self._believed = True
        self._open = True

    def relay(self) -> None:
        """Read to the end of the input, or until bhysend has told its status."""
        until = None
        while watched := self._watched():
            left = None if until is None else max(until - time.monotonic(), 0.0)
            ready, _, _ = select.select(watched, [], [], left)
            if not ready:
                return
            if self._bhysend and self._bhysend in ready:
                self._bhysend.hear()
            if _STDIN in ready:
                self._read()
            if self.status() is not None and until is None:
                until = time.monotonic() + _DRAIN_SECONDS

    def status(self) -> int | None:
        """Return the status that bhysend told, None if it has not."""
        return self._bhysend.status if self._bhysend else None

    def _watched(self) -> list[int | Bhysend]:
        """Return what something may still come from."""
        watched: list[int | Bhysend] = [_STDIN] if self._open else []
        return watched + ([self._bhysend] if self._bhysend and self._bhysend.is_there else [])

    def _read(self) -> None:
        """Take what has come, and hand it on."""
        try:
            data = os.read(_STDIN, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._open = False
            self._shut()
            return
        try:
            for answer in self._parser.feed(data) if self._believed else ():
                if answer.word in _DECISIVE:
                    self._words[answer.word] = answer
                self._meet(answer)
                if self._bhysend and self._believed:
                    self._bhysend.tell(answer)
        except BhyError as error:
            # What comes from here on is not believed, and read all the same.
            self._console.fail(error)
            self._believed = False
            self._shut()

    def _meet(self, hello: Answer) -> None:
        """Look for the bhysend of the stream, once.  Raises UsageError for another guest's."""
        if self._asked:
            return
        self._asked = True
        # The pipeline may be interrupted at the terminal, and bhysend decides.
        self._interrupts.ignore()
        found = connect(self._base, hello.id)
        if found is None:
            return
        connection, names = found
        self._bhysend = Bhysend(connection)
        if self._guest not in (None, *names):
            raise UsageError(f"stream {hello.id} is of guest {names[0]}, not {self._guest}")

    def _shut(self) -> None:
        """Let bhysend see that nothing more comes."""
        if self._bhysend:
            self._bhysend.shut()

    def _noise(self, line: bytes) -> None:
        self._console.say(line.decode("utf-8", "replace").rstrip("\n"))

    def settle(self) -> int:
        """Do what the answers say where no bhysend has told a status; return the exit status.

        Raises BhyError.
        """
        settlement = Settlement(
            self._base, self._console, self._guest, self._words, self._interrupts
        )
        hello = self._parser.hello
        if hello is None:
            settlement.without_hello()
        if not self._believed:
            settlement.distrusted(hello)
        return settlement.act(hello, met=self._bhysend is not None)


def run(guest: str | None, console: Console) -> int:
    """Be the third stage; return the exit status."""
    commandline.refuse_closed(_STDIN, "standard input", os.O_WRONLY)
    if os.isatty(_STDIN):
        raise UsageError("standard input is a terminal: the answers come from a pipe")
    third = Third(guest, state.directory(), console, Interrupts())
    third.relay()
    status = third.status()
    return third.settle() if status is None else status

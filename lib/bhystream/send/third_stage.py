"""bhysend -A, the third stage, which hands the destination's answers to the first stage.

    bhysend -a g | ssh dst bhyrecv | bhysend -A      in a move
    ssh dst bhyrecv -q ID | bhysend -A               the way out of doubt

The third stage finds its bhysend by the stream id in HELLO, hands on every answer,
and ends with the status that bhysend tells.  The third stage reads its input to the
end, so that a full pipe never stops a process before it in the pipeline.

If no bhysend lives any more, the third stage itself acts on the record, after the
keeper has released the guest's lock.
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
from bhystream.send.recovery import Recovery
from bhystream.send.rendezvous import READ_BYTES, connect
from bhystream.signals import Ended, Interrupts
from bhystream.urgent import urgently

_STDIN = 0
_LOOK_SECONDS = 0.5
# How long to read what still comes after bhysend has told its status; nobody needs it.
_DRAIN_SECONDS = 5.0
_DECISIVE = ("READY", "RUNNING", "FAILED", "RAN", "UNKNOWN", "REFUSED")


class Bhysend:
    """The bhysend of the stream, at the other end of a socket.  For select(2) while it is there."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over the connection; it is closed when bhysend hangs up."""
        self._connection = connection
        self._said = b""

    @property
    def is_there(self) -> bool:
        """Say whether bhysend has not hung up yet."""
        return self._connection.fileno() >= 0

    def fileno(self) -> int:
        """Return the descriptor, for select(2)."""
        return self._connection.fileno()

    @property
    def status(self) -> int | None:
        """Return the status that bhysend has told, None if it has told none yet."""
        word, _, number = self._said.partition(b" ")
        if word == b"status" and number.endswith(b"\n"):
            return int(number)
        return None

    def tell(self, answer: Answer) -> None:
        """Hand on an answer, if bhysend is still there."""
        if not self.is_there:
            return
        try:
            self._connection.sendall(pack(answer))
        except OSError:
            # bhysend has ended; take the status that it may have told before.
            while self.is_there:
                self.hear()

    def hear(self) -> None:
        """Take what bhysend says; close the connection if bhysend has hung up."""
        try:
            data = self._connection.recv(64)
        except OSError:
            data = b""
        self._said += data
        if not data:
            self._connection.close()

    def shut(self) -> None:
        """Let bhysend see that no more answers come; its status may still come."""
        if self.is_there:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)


class ThirdStage:
    """One run of the third stage."""

    def __init__(
        self, guest: str | None, base: Path, console: Console, interrupts: Interrupts
    ) -> None:
        """Read nothing yet.  guest: the guest that the stream must be of, or None for any."""
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
        self._drain_seconds = _DRAIN_SECONDS

    def relay(self) -> None:
        """Hand on answers to the end of the input, or until soon after bhysend's status."""
        # A paused guest waits for what comes from READY on.
        with contextlib.ExitStack() as waited_for:
            self._relay(waited_for)

    def _relay(self, waited_for: contextlib.ExitStack) -> None:
        until, is_urgent = None, False
        while watched := self._watched():
            # A signal that comes just before select() does not end it, so it never waits for long.
            left = _LOOK_SECONDS if until is None else max(until - time.monotonic(), 0.0)
            ready, _, _ = select.select(watched, [], [], left)
            if not ready and until is not None:
                return
            if self._bhysend and self._bhysend in ready:
                self._bhysend.hear()
            if _STDIN in ready:
                self._read()
            if "READY" in self._words and not is_urgent:
                waited_for.enter_context(urgently())
                is_urgent = True
            if self.status() is not None and until is None:
                waited_for.close()
                until = time.monotonic() + self._drain_seconds
                self._interrupts.obey()

    def status(self) -> int | None:
        """Return the status that bhysend has told, None if it has told none."""
        return self._bhysend.status if self._bhysend else None

    def _watched(self) -> list[int | Bhysend]:
        """Return the inputs from which something may still come."""
        watched: list[int | Bhysend] = [_STDIN] if self._open else []
        return watched + ([self._bhysend] if self._bhysend and self._bhysend.is_there else [])

    def _read(self) -> None:
        """Take what has come on standard input, and hand on its answers."""
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
            # From here on, read the input but believe nothing of it.
            self._console.fail(error)
            self._believed = False
            self._shut()

    def _meet(self, hello: Answer) -> None:
        """Look for the bhysend of the stream, once.  Raises UsageError for another guest."""
        if self._asked:
            return
        self._asked = True
        # A Ctrl-C reaches the whole pipeline; only bhysend decides what it means.
        self._interrupts.ignore(self._hurry)
        found = connect(self._base, hello.id)
        if found is None:
            return
        connection, names = found
        self._bhysend = Bhysend(connection)
        if self._guest not in (None, *names):
            raise UsageError(f"stream {hello.id} is of guest {names[0]}, not {self._guest}")

    def _hurry(self, name: str) -> None:
        """Note a signal: the processes before this one end too, or have nothing more to say."""
        self._drain_seconds = 0.0

    def _shut(self) -> None:
        """Let bhysend see that nothing more comes."""
        if self._bhysend:
            self._bhysend.shut()

    def _noise(self, line: bytes) -> None:
        self._console.say(line.decode("utf-8", "replace").rstrip("\n"))

    def settle(self) -> int:
        """Do what the answers say, because no bhysend has told a status; return the exit status.

        Raises what the methods of Recovery raise.
        """
        self._interrupts.ignore(self._hurry)
        recovery = Recovery(self._base, self._console, self._guest, self._words, self._interrupts)
        hello = self._parser.hello
        if hello is None:
            recovery.without_hello()
        if not self._believed:
            recovery.distrusted(hello)
        return recovery.act(hello, met=self._bhysend is not None)


def run(guest: str | None, console: Console) -> int:
    """Be the third stage; return the exit status.

    Raises UsageError if standard input is a terminal or cannot be read, and what
    settle() raises if no bhysend has told a status.
    """
    commandline.refuse_closed(_STDIN, "standard input", os.O_WRONLY)
    if os.isatty(_STDIN):
        raise UsageError("standard input is a terminal: the answers come from a pipe")
    interrupts = Interrupts()
    third = ThirdStage(guest, state.directory(), console, interrupts)
    try:
        third.relay()
        # From here on the status that bhysend has told is the status.
        interrupts.ignore(lambda name: None)
    except Ended as ended:
        # Before the first answer: then the guest may be in doubt here, and the status says so;
        # or when all is decided.
        error = ended.as_error()
        if third.status() is None:
            console.say(str(error))
    status = third.status()
    return third.settle() if status is None else status

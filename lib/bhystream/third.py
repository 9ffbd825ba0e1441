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
import getpass
import os
import select
import signal
import socket
import time
from pathlib import Path

from bhystream import options, state
from bhystream.answers import Answer, Parser, pack
from bhystream.errors import (
    OK,
    BhyError,
    GuestError,
    InDoubtError,
    UsageError,
)
from bhystream.handshake import RECORD, Act, Event
from bhystream.rendezvous import connect
from bhystream.report import Console
from bhystream.standing import GoneError, Standing, event_of, in_doubt
from bhystream.state import Lock, Record, Records

_STDIN = 0
_READ_BYTES = 65536
# What still comes when bhysend has ended: nobody needs it.
_DRAIN_SECONDS = 5.0
# A keeper tries for so long to resume a guest.
_LOCK_SECONDS = 150.0
_DECISIVE = ("READY", "RUNNING", "FAILED", "RAN", "UNKNOWN", "REFUSED")


class Third:
    """One run of it."""

    def __init__(self, guest: str | None, base: Path, console: Console) -> None:
        """guest: the name that the stream's must have, or None."""
        self._guest = guest
        self._base = base
        self._console = console
        self._parser = Parser(None, self._noise)
        self._words: dict[str, Answer] = {}
        self._peer: socket.socket | None = None
        self._asked = False
        self._met = False
        self._believed = True
        self._verdict = b""
        self._open = True

    def relay(self) -> None:
        """Read to the end of the input, or until bhysend has told its status."""
        until = None
        while self._open or self._peer:
            watched: list[int | socket.socket] = [_STDIN] if self._open else []
            watched += [self._peer] if self._peer else []
            left = None if until is None else max(until - time.monotonic(), 0.0)
            ready, _, _ = select.select(watched, [], [], left)
            if not ready:
                return
            if self._peer in ready:
                self._hear()
            if _STDIN in ready:
                self._read()
            if self.status() is not None and until is None:
                until = time.monotonic() + _DRAIN_SECONDS

    def status(self) -> int | None:
        """Return the status that bhysend told, None if it has not."""
        word, _, number = self._verdict.partition(b" ")
        if word == b"status" and number.endswith(b"\n"):
            return int(number)
        return None

    def _read(self) -> None:
        """Take what has come, and hand it on."""
        data = os.read(_STDIN, _READ_BYTES)
        if not data:
            self._open = False
            if self._peer:
                with contextlib.suppress(OSError):
                    self._peer.shutdown(socket.SHUT_WR)
            return
        try:
            for answer in self._parser.feed(data) if self._believed else ():
                if answer.word in _DECISIVE:
                    self._words[answer.word] = answer
                self._meet(answer)
                self._tell(answer)
        except BhyError as error:
            # What comes from here on is not believed, and read all the same.
            self._console.fail(error)
            self._believed = False
            self._hang_up()

    def _meet(self, hello: Answer) -> None:
        """Look for the bhysend of the stream, once.  Raises UsageError for another guest's."""
        if self._asked:
            return
        self._asked = True
        # The pipeline may be interrupted at the terminal, and bhysend decides.
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP):
            signal.signal(number, signal.SIG_IGN)
        found = connect(self._base, hello.id)
        if found is None:
            return
        self._met = True
        self._peer, names = found
        if self._guest not in (None, *names):
            raise UsageError(f"stream {hello.id} is of guest {names[0]}, not {self._guest}")

    def _tell(self, answer: Answer) -> None:
        if self._peer is None:
            return
        try:
            self._peer.sendall(pack(answer))
        except OSError:
            # It has ended, and told its status before that.
            while self._peer:
                self._hear()

    def _hear(self) -> None:
        assert self._peer is not None
        try:
            data = self._peer.recv(64)
        except OSError:
            data = b""
        self._verdict += data
        if not data:
            self._hang_up()

    def _hang_up(self) -> None:
        if self._peer:
            self._peer.close()
            self._peer = None

    def _noise(self, line: bytes) -> None:
        self._console.say(line.decode("utf-8", "replace").rstrip("\n"))

    # Without a bhysend.

    def settle(self) -> int:
        """Do for the guest what the answers say; return the exit status.

        Raises BhyError.
        """
        hello = self._parser.hello
        if not self._believed:
            raise UsageError("the answers were not handed on")
        if hello is None:
            raise GuestError("the destination has not answered; the guest runs where it was")
        records = Records(self._base, "source")
        record = records.get(hello.id)
        if record is None:
            return self._without_record(hello)
        if self._guest not in (None, record.guest, record.operand):
            raise UsageError(f"stream {hello.id} is of guest {record.guest}, not {self._guest}")
        with self._lock(record):
            current = records.get(hello.id)
            if current is None:
                return self._without_record(hello)
            return self._act(Standing(records, current), hello)

    def _lock(self, record: Record) -> Lock:
        """Take the guest's lock, when its keeper has done what it does."""
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                return Lock(self._base, record.lock, f"guest {record.guest}")
            except GuestError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _act(self, standing: Standing, hello: Answer) -> int:
        record = standing.record
        final = self._words.get("RUNNING") or self._words.get("FAILED")
        event = event_of(record, hello, final)
        if (record.phase, event) not in RECORD:
            event = Event.ALONE
        try:
            standing.settle(event)
        except GoneError as gone:
            standing.forget()
            raise GuestError(f"{gone}; its record is removed") from None
        acts = RECORD.get((record.phase, event), ())
        host = (record.host or hello.args[0]).partition("/")[0]
        if Act.DISCARD in acts:
            self._conclude(f"guest {record.guest}: it runs on {host}, and is gone here")
            return OK
        if Act.RESUME in acts:
            why = final.text if final and final.text else "it was not started there"
            raise GuestError(f"{host}: {why}", f"guest {record.guest}: it runs here")
        raise InDoubtError(
            f"guest {record.guest}: in doubt: {self._why(record, hello)}",
            in_doubt(record, self._base),
        )

    def _why(self, record: Record, hello: Answer) -> str:
        """Say why the answers decide nothing."""
        host = hello.args[0].partition("/")[0]
        if record.host and (record.host, record.directory) != hello.args:
            return f"the stream went to {record.host} ({record.directory}), not to {host}"
        if "RAN" in self._words:
            return f"{host} cannot say whether it ran there; look at it there"
        if "UNKNOWN" in self._words:
            return f"{host} does not know the stream"
        return f"no answer came from {host}"

    def _without_record(self, hello: Answer) -> int:
        """Say what no record means: it is settled, or somebody else's."""
        if self._met:
            if "RUNNING" in self._words:
                return OK
            raise GuestError("bhysend is gone; the guest runs on here")
        who = f"user {getpass.getuser()}, {self._base}"
        text = f"neither a bhysend nor a guest of stream {hello.id} is here ({who})"
        if any(word in self._words for word in ("READY", "RUNNING", "RAN")):
            raise InDoubtError(text, "is it another user's, or in another BHYSEND_STATE_DIR?")
        raise GuestError(text, "nothing was started at the destination")

    def _conclude(self, text: str) -> None:
        self._console.say(text)
        self._console.log(text)


def run(guest: str | None, console: Console) -> int:
    """Be the third stage; return the exit status."""
    options.refuse_closed(_STDIN, "standard input")
    if os.isatty(_STDIN):
        raise UsageError("standard input is a terminal: the answers come from a pipe")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    third = Third(guest, state.directory(), console)
    third.relay()
    status = third.status()
    return third.settle() if status is None else status

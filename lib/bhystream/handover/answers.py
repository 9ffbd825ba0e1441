"""The way back: answers of the destination, packed, parsed, and collected.

An answer is one line, `bhys1 ID WORD [argument ...]`, specified in
bhystream(5).  The parser is strict, because an answer may resume or end a guest:
a line that is not an answer of this stream ends the conversation.  Only before
the first answer other lines are passed on, since a login shell may print some.

bhysend reads the answers from an Inbox: one thread fills the inbox, and the main
thread waits on it.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from bhystream.errors import BhyError, FormatError, GuestError, IncompatibleError

MAX_LINE_BYTES = 512
MAX_NOISE_BYTES = 4096

# The words, and the number of arguments of each.
WORDS = {
    "HELLO": 2,
    "SEEN": 1,
    "ACCEPT": 0,
    "REFUSED": 1,
    "READY": 1,
    "RUNNING": 0,
    "FAILED": 1,
    "RAN": 0,
    "UNKNOWN": 0,
}
_LINE = re.compile(rb"bhys1 ([0-9a-f]{32}) ([A-Z]+)((?: [\x21-\x7e]+)*)\n")
_NUMBER = re.compile(r"[0-9]{1,19}")
_NONCE = re.compile(r"[0-9a-f]{32}")
# A host's name and its id, and an absolute path: both are printed in commands.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,253}/[0-9a-f]{1,64}")
_ESCAPE = re.compile(rb"%([0-9a-f]{2})")


class Answer(NamedTuple):
    """One answer.  id: the stream's id, 32 hex digits.  args: unescaped."""

    id: str
    word: str
    args: tuple[str, ...] = ()

    @property
    def host(self) -> str:
        """Return the name of the host that said HELLO."""
        return self.args[0].partition("/")[0]

    @property
    def text(self) -> str:
        """Return the argument of REFUSED or FAILED."""
        return self.args[0] if self.args else ""


def _escape(text: str, room: int) -> bytes:
    """Escape an argument, cut after a whole character at `room` bytes."""
    done = b""
    for character in text or "?":
        raw = character.encode("utf-8", "replace")
        plain = len(raw) == 1 and 0x21 <= raw[0] <= 0x7E and raw != b"%"
        more = raw if plain else b"".join(b"%%%02x" % byte for byte in raw)
        if len(done) + len(more) > room:
            break
        done += more
    return done


def pack(answer: Answer) -> bytes:
    """Return an answer as its line, at most 512 bytes with the newline.

    The last argument is cut if it does not fit.
    """
    line = f"bhys1 {answer.id} {answer.word}".encode("ascii")
    for arg in answer.args:
        line += b" " + _escape(arg, MAX_LINE_BYTES - len(line) - 2)
    return line + b"\n"


def unpack(line: bytes) -> Answer:
    """Parse a line with its newline.  Raises FormatError if it is not an answer."""
    match = _LINE.fullmatch(line) if len(line) <= MAX_LINE_BYTES else None
    if not match:
        raise FormatError("not an answer")
    word = match[2].decode("ascii")
    raw = match[3].split()
    if WORDS.get(word) != len(raw):
        raise FormatError(f"not an answer: {word} with {len(raw)} arguments")
    try:
        args = tuple(_unescape(each) for each in raw)
    except ValueError:
        raise FormatError(f"not an answer: {word} with a broken argument") from None
    if (word == "SEEN" and not _NUMBER.fullmatch(args[0])) or (
        word == "READY" and not _NONCE.fullmatch(args[0])
    ):
        raise FormatError(f"not an answer: {word} {args[0][:40]!r}")
    if word == "HELLO" and not _is_peer(*args):
        raise FormatError("not an answer: HELLO with a broken host or directory")
    return Answer(match[1].decode("ascii"), word, args)


def _is_peer(host: str, directory: str) -> bool:
    return bool(_HOST.fullmatch(host) and directory.startswith("/") and directory.isprintable())


def _unescape(raw: bytes) -> str:
    text = _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), raw)
    if raw.count(b"%") != len(_ESCAPE.findall(raw)):
        raise ValueError("a percent sign that escapes nothing")
    return text.decode("utf-8")


class Parser:
    """Bytes of one connection, as answers.

    The first answer has to be HELLO; noise before it is handed to `on_noise`.
    """

    def __init__(self, id_: str | None, on_noise: Callable[[bytes], None]) -> None:
        """id_: the stream's id, or None to take the id of the first HELLO."""
        self.id = id_
        self.hello: Answer | None = None
        self._on_noise = on_noise
        self._rest = b""
        self._noise_bytes = 0

    def feed(self, data: bytes) -> Iterator[Answer]:
        """Yield the answers that data completes.  Raises FormatError.

        A parser that has raised an error must not be used any more.
        """
        self._rest += data
        while (end := self._rest.find(b"\n") + 1) > 0:
            line, self._rest = self._rest[:end], self._rest[end:]
            answer = self._take(line)
            if answer:
                yield answer
        if self.hello and len(self._rest) > MAX_LINE_BYTES:
            raise FormatError("not an answer: a line without end")
        if not self.hello and len(self._rest) > MAX_NOISE_BYTES:
            raise FormatError(f"no answer in {MAX_NOISE_BYTES} bytes")

    def _take(self, line: bytes) -> Answer | None:
        if self.hello is None:
            return self._take_first(line)
        answer = unpack(line)
        if answer.id != self.id:
            raise FormatError(f"an answer of another stream, {answer.id}")
        if answer.word == "HELLO" and answer != self.hello:
            raise FormatError("another host answers than before")
        return answer

    def _take_first(self, line: bytes) -> Answer | None:
        # A shell may have printed text without a newline before the answer.
        at = max(line.find(b"bhys1 "), 0)
        try:
            answer = unpack(line[at:])
        except FormatError:
            self._noise_bytes += len(line)
            if self._noise_bytes > MAX_NOISE_BYTES:
                raise FormatError(f"no answer in {MAX_NOISE_BYTES} bytes") from None
            self._on_noise(line)
            return None
        if answer.word != "HELLO":
            raise FormatError(f"{answer.word} comes before HELLO")
        if self.id not in (None, answer.id):
            raise FormatError(f"an answer of another stream, {answer.id}")
        self.id, self.hello = answer.id, answer
        if at:
            self._on_noise(line[:at])
        return answer


class LostError(GuestError):
    """The other side has closed the way back, and may still say why."""


class Inbox:
    """The answers that have come back so far.

    One thread fills the inbox through put() and lose(); the main thread reads it
    and waits.  Only answers of the first host that said HELLO count.

    The inbox has no lock: a signal may raise anywhere in the main thread, also
    between taking a lock and releasing it.  Each field is set at once, by one
    thread only, and a byte in a socket wakes the main thread.
    """

    def __init__(self) -> None:
        """Make it empty.  seen: the highest n of SEEN.  told: the answers other than HELLO."""
        self._wake_send, self._wake_recv = socket.socketpair()
        self._wake_send.setblocking(False)
        self._wake_recv.setblocking(False)
        self.hello: Answer | None = None
        self.seen = -1
        self.told = 0
        self.accepted = False
        self.nonce: bytes | None = None
        self.final: Answer | None = None
        self.lost = ""
        self.is_closed = False

    def put(self, hello: Answer, answer: Answer) -> None:
        """Take an answer from the connection that began with this HELLO."""
        if self.hello is None:
            self.hello = hello
        if hello != self.hello:
            return
        match answer.word:
            case "SEEN":
                self.seen = max(self.seen, int(answer.args[0]))
            case "ACCEPT":
                self.accepted = True
            case "READY":
                self.nonce = bytes.fromhex(answer.args[0])
            case "REFUSED" | "RUNNING" | "FAILED" | "RAN":
                self.final = answer
        # HELLO also comes, again and again, while nothing arrives at the destination.
        self.told += answer.word != "HELLO"
        self._wake()

    def lose(self, why: str, *, closed: bool = True) -> None:
        """Note that nothing more will come, and why.

        closed: the other side has closed the way back, and may still say why; if
        false, bhysend has given it up.
        """
        if not self.lost:
            self.is_closed = closed
            self.lost = why
        self._wake()

    def _wake(self) -> None:
        # A full socket has woken the main thread already.
        with contextlib.suppress(BlockingIOError):
            self._wake_send.send(b"\0")

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition on this inbox holds; return False if it does not in time.

        Returns False early if nothing more will come.
        """
        end = time.monotonic() + seconds
        while True:
            # Empty the socket before the check: a later change fills it again.
            with contextlib.suppress(BlockingIOError):
                while self._wake_recv.recv(4096):
                    pass
            if condition():
                return True
            left = end - time.monotonic()
            if self.lost or self.final or left <= 0:
                return False
            select.select([self._wake_recv], [], [], left)

    def close(self) -> None:
        """Close the sockets; nobody may use the inbox any more."""
        self._wake_send.close()
        self._wake_recv.close()

    def failure(self) -> BhyError | None:
        """Return the error that ends the conversation before GO, None while it goes on."""
        host = self.hello.host if self.hello else "the destination"
        if self.final is not None:
            if self.final.word == "REFUSED":
                return IncompatibleError(f"{host}: {self.final.text}")
            return GuestError(f"{host}: {self.final.text or self.final.word}")
        if not self.lost:
            return None
        return LostError(self.lost) if self.is_closed else GuestError(self.lost)

    def check(self) -> None:
        """Raise the error that failure() returns, if any."""
        error = self.failure()
        if error is not None:
            raise error

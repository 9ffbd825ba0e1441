"""Stages of a pipeline that stop the data at a chosen point, and go on when told.

Tap stops the stream in the middle of a section:

    tap = Tap("MEMORY", round_=1)
    with Pipeline(send, tap.argv, receive, env=env, narrow=True) as pipeline:
        tap.reached()           # half of that section has been passed on, and no byte more
        pipeline[2].kill()      # the event under test
        tap.go()                # or close(), or flip()

The bytes before the section pass as they come.  Then the test chooses how the tap goes on.  go()
passes the rest.  close() ends the tap.  swallow() reads on and passes nothing more: both ends stay
open.  flip() passes the rest of this section with one byte of the payload inverted, and nothing
more; the tap waits until its reader has gone away, and ends.  So a fault before the end of the
stream also shows before the end, however short the rest is: otherwise the rest could fit into a
buffer, and the sender would be done.

AnswerTap does the same on the way back, before the first answer with a word; it has no flip().
Both also obey the signals of valve.py.

Hold stops before the end of the stream, and holds the last bytes back as the sender gave them to
the pipe, without a copy:

    hold = Hold()
    with Pipeline(send, hold.argv, receive, env=env) as pipeline:
        hold.reached()          # the sender has written everything, and has closed the pipe
        hold.go()
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from bhystream.stream import format as fmt
from bhystream.stream.format import Type
from cli import valve

ANY_ROUND = -1
_DEADLINE_S = 120.0
_CHUNK = 1 << 18
HOLD_BYTES = 16 << 20
_WIDE_BYTES = 1 << 20
_GO, _FLIP, _CLOSE, _SWALLOW, _REACHED = b"g", b"f", b"c", b"s", b"r"


class _Control:
    """The test's side.  The socket has a name, so that the tap's process needs no descriptor."""

    def __init__(self, *words: str) -> None:
        """words: the arguments of the tap's process, after the socket's name."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(_DEADLINE_S)
        self._listener.bind("")  # the kernel chooses a name, in no file system
        self._listener.listen(1)
        name = self._listener.getsockname().decode("latin-1").lstrip("\0")
        self.argv = (sys.executable, str(Path(__file__)), name, *words)
        self._peer: socket.socket | None = None

    def reached(self) -> None:
        """Wait until the point is reached.  Raises TimeoutError."""
        self._peer, _ = self._listener.accept()
        self._peer.settimeout(_DEADLINE_S)
        said = self._peer.recv(1)
        assert said == _REACHED, "the input ended before that point"

    def go(self) -> None:
        """Pass everything on."""
        self._order(_GO)

    def swallow(self) -> None:
        """Read to the end of the input and pass nothing on."""
        self._order(_SWALLOW)

    def close(self) -> None:
        """End the tap, which passes nothing more."""
        self._order(_CLOSE)

    def _order(self, order: bytes) -> None:
        assert self._peer is not None, "call reached() first"
        self._peer.sendall(order)
        self._peer.close()
        self._listener.close()


class Tap(_Control):
    """A tap that stops in a section of the stream."""

    def __init__(self, type_: str, round_: int = ANY_ROUND, nth: int = 0) -> None:
        """Stop in the nth section of a type in a round, or in the stream; all count from 0.

        If a round has fewer of them, the tap stops in the round's last section.
        """
        super().__init__(type_, str(round_), str(nth))

    def flip(self) -> None:
        """Pass this section on with a byte inverted, wait until the reader is gone, and end."""
        self._order(_FLIP)


class AnswerTap(_Control):
    """A tap that stops before an answer."""

    def __init__(self, word: str) -> None:
        """Stop before the first answer with this word."""
        super().__init__(word)


class Hold(_Control):
    """A stage that holds the last HOLD_BYTES back until go() or close(); it has no swallow()."""

    def __init__(self) -> None:
        super().__init__()


class _GoneError(Exception):
    """The input has ended, or the output has no reader."""


def _read(size: int) -> bytes:
    data = os.read(0, size)
    if not data:
        raise _GoneError
    return data


def _read_exactly(size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        data += _read(size - len(data))
    return data


def _write(data: bytes | bytearray) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(1, view) :]
    except OSError:
        raise _GoneError from None


def _pass(size: int) -> None:
    while size:
        data = _read(min(size, _CHUNK))
        _write(data)
        size -= len(data)


def _ask(name: str) -> bytes:
    """Say that the point is reached; return the order if it is go or flip.  Raises _GoneError."""
    with socket.socket(socket.AF_UNIX) as test:
        test.connect(f"\0{name}")
        test.sendall(_REACHED)
        order = test.recv(1)
    while order == _SWALLOW:
        _read(_CHUNK)
    if order not in (_GO, _FLIP):
        raise _GoneError
    return order


def _stop(name: str, length: int, padding: int) -> None:
    """Pass half of the payload on, say so, and do as the test orders."""
    half = length // 2
    _pass(half)
    order = _ask(name)
    rest = _read_exactly(length - half + padding)
    if order == _FLIP:
        rest[(length - half) // 2] ^= 0xFF
    _write(rest)
    if order == _FLIP:
        # poll(2) reports an error for a pipe whose reader has gone.
        gone = select.poll()
        gone.register(1, 0)
        gone.poll()
        raise _GoneError


def _walk(name: str, wanted: Type, wanted_round: int, nth: int) -> NoReturn:
    _write(_read_exactly(fmt.HEADER.size))
    round_ = seen = 0
    while True:
        head = _read_exactly(fmt.SECTION.size)
        type_, _, length, _, _ = fmt.SECTION.unpack(head)
        padding = fmt.padding_bytes(length)
        _write(head)
        # A busy host may have kept the guest from writing anything in the wanted round.
        is_over = type_ == Type.ROUND_END and round_ == wanted_round
        if is_over or (type_ == wanted and wanted_round in (ANY_ROUND, round_)):
            if is_over or seen == nth:
                _stop(name, length, padding)
                break
            seen += 1
        _pass(length + padding)
        if type_ == Type.ROUND_END:
            round_ += 1
    while True:
        _write(_read(_CHUNK))


def _listen(name: str, word: bytes) -> NoReturn:
    """Pass lines on as they come, and stop before the first answer with this word."""
    asked, rest = False, b""
    while True:
        rest += _read(_CHUNK)
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if not asked and line.split(b" ")[2:3] == [word]:
                asked = True
                _ask(name)
            _write(line + b"\n")


def _hold(name: str) -> None:
    """Move standard input into a row of pipes, and the oldest pipe's bytes to standard output."""
    full: deque[int] = deque()
    read_fd, write_fd = _wide_pipe()
    while select.select([0], [], [])[0]:
        try:
            if not os.splice(0, write_fd, HOLD_BYTES, flags=os.SPLICE_F_NONBLOCK):
                break
        except BlockingIOError:  # there is input, so the pipe is full
            os.close(write_fd)
            full.append(read_fd)
            if len(full) * _WIDE_BYTES > HOLD_BYTES:
                _drain(full.popleft())
            read_fd, write_fd = _wide_pipe()
    os.close(write_fd)
    full.append(read_fd)
    _ask(name)
    for fd in full:
        _drain(fd)


def _wide_pipe() -> tuple[int, int]:
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, _WIDE_BYTES)
    return read_fd, write_fd


def _drain(fd: int) -> None:
    while data := os.read(fd, _CHUNK):
        _write(data)
    os.close(fd)


def main(argv: list[str]) -> int:
    """Copy standard input to standard output: SOCKET [TYPE ROUND NTH], or SOCKET WORD."""
    valve.listen()
    with suppress(_GoneError):
        if len(argv) == 2:
            _hold(argv[1])
            return 0
        if len(argv) == 3:
            _listen(argv[1], argv[2].encode())
        _walk(argv[1], Type[argv[2]], int(argv[3]), int(argv[4]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

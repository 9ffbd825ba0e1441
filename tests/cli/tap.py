"""A stage of a pipeline that stops the stream in the middle of a chosen section.

    tap = Tap("MEMORY", round_=1)
    with Pipeline(send, tap.argv, receive, env=env, narrow=True) as pipeline:
        tap.reached()           # half of that section has been passed on, and no byte more
        pipeline[2].kill()      # whatever is to be tested
        tap.go()                # or close(), or flip()

The bytes before the section pass as they come.  Then there are three ways on.  go() passes the
rest.  close() ends the tap.  flip() passes the rest of this section with one byte of its payload
inverted, and nothing more: the tap waits until its reader has gone away, and ends.  So what
comes before the end of the stream also fails before it, however small the rest is: a sender that
found room for it in a buffer would be done.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from bhystream import format as fmt
from bhystream.format import Type

ANY_ROUND = -1
_DEADLINE_S = 120.0
_CHUNK = 1 << 18
_GO, _FLIP, _CLOSE, _REACHED = b"g", b"f", b"c", b"r"


class Tap:
    """The side of the test.  The socket is named, so that the process needs no descriptor."""

    def __init__(self, type_: str, round_: int = ANY_ROUND, nth: int = 0) -> None:
        """Stop in the nth section of a type in a round, or of the stream; all count from 0."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(_DEADLINE_S)
        self._listener.bind("")  # a name of the kernel's choice, in no file system
        self._listener.listen(1)
        name = self._listener.getsockname().decode("latin-1").lstrip("\0")
        self.argv = (sys.executable, str(Path(__file__)), name, type_, str(round_), str(nth))
        self._peer: socket.socket | None = None

    def reached(self) -> None:
        """Wait until the section is there.  Raises TimeoutError."""
        self._peer, _ = self._listener.accept()
        self._peer.settimeout(_DEADLINE_S)
        said = self._peer.recv(1)
        assert said == _REACHED, "the stream ended before the section"

    def go(self) -> None:
        """Pass everything on."""
        self._order(_GO)

    def flip(self) -> None:
        """Pass this section on with a byte inverted, wait for the reader's end, and end."""
        self._order(_FLIP)

    def close(self) -> None:
        """End in the middle of the section."""
        self._order(_CLOSE)

    def _order(self, order: bytes) -> None:
        assert self._peer is not None, "reached() comes first"
        self._peer.sendall(order)
        self._peer.close()
        self._listener.close()


class _GoneError(Exception):
    """The input has ended, or nobody reads the output."""


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


def _stop(name: str, length: int, padding: int) -> None:
    """Pass half of the payload on, say so, and do as told."""
    half = length // 2
    _pass(half)
    with socket.socket(socket.AF_UNIX) as test:
        test.connect(f"\0{name}")
        test.sendall(_REACHED)
        order = test.recv(1)
    if order not in (_GO, _FLIP):
        raise _GoneError
    rest = _read_exactly(length - half + padding)
    if order == _FLIP:
        rest[(length - half) // 2] ^= 0xFF
    _write(rest)
    if order == _FLIP:
        # A pipe whose reader has gone is in error.
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
        if type_ == wanted and wanted_round in (ANY_ROUND, round_):
            if seen == nth:
                _stop(name, length, padding)
                break
            seen += 1
        _pass(length + padding)
        if type_ == Type.ROUND_END:
            round_ += 1
    while True:
        _write(_read(_CHUNK))


def main(argv: list[str]) -> int:
    """Copy standard input to standard output: SOCKET TYPE ROUND NTH."""
    with suppress(_GoneError):
        _walk(argv[1], Type[argv[2]], int(argv[3]), int(argv[4]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""Targets with planted bugs: each kind of failure has to be found, and to end the run with 1."""

from __future__ import annotations

import time

from bhystream.errors import FormatError, InternalError
from fuzz.target import MIB, Target, fail


def _crash(data: bytes) -> None:
    """Index beyond the end, but only behind a word that coverage has to lead to."""
    if data[:1] == b"b" and data[1:2] == b"h" and data[2:3] == b"y":
        data[len(data)]
    raise FormatError("not the word")


def _internal(data: bytes) -> None:
    raise InternalError("a fault of the program's own")


def _hang(data: bytes) -> None:
    time.sleep(3600)


def _memory(data: bytes) -> None:
    bytes(1024 * MIB)  # more than a long-lived process may have free


def _property(data: bytes) -> None:
    fail("it does not hold")


def _sound(data: bytes) -> None:
    raise FormatError("every input is refused")


TARGETS = (
    Target("crash", _crash),
    Target("internal", _internal),
    Target("hang", _hang),
    Target("memory", _memory),
    Target("property", _property),
    Target("sound", _sound),
)

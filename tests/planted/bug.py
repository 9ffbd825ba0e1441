"""A bug that can be planted: a place in the sources, and the tests that have to catch it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lib/bhystream"
# How a test ends that finds something wrong: by an assertion, by pytest.fail() or raises(), or
# with an error of the program that it does not expect, often where it expects another one.
FOUND = ("AssertionError", "Failed", "BhyError")


class Kind(Enum):
    """A class of bugs.  Each has to have one that some test catches."""

    CHECKSUM = "skip one checksum"
    LENGTH = "ignore one length"
    ORDER = "send RUNNING before starting"
    RESUME = "resume after GO"
    DISCARD = "end the guest before RUNNING"
    PAUSED = "not ask whether the guest still stands"
    NONCE = "no nonce"
    TOMBSTONE = "no tombstone"
    FAILED = "FAILED after running"
    RECORD = "act before the record is on the disk"
    FIFO = "the FIFO not kept open by bhyve"
    RELEASE = "FILE.kern given before GO"
    BHYVE = "leave bhyve's guest other than it was"
    BOOTED = "let vm-bhyve boot a guest that runs elsewhere"
    PAGE = "lose a page"
    DISK = "take another disk"
    COMPARED = "miss a page that differs"
    CLOCK = "move a guest's clocks wrongly"
    BUTTON = "make SIGTERM mean something else to a guest that has moved"
    SPLICE = "give away pages that change"
    URGENT = "give a priority away, or keep it"
    LOST = "lose a Ctrl-C, or let it reach another"


@dataclass(frozen=True)
class Bug:
    """One bug.

    file: below PACKAGE.  text: is in the file exactly once; instead: takes its place.
    tests: the node ids, below tests/, of the tests that have to fail.  also: names of the
    exceptions with which these tests may fail, besides FOUND.  is_quick: the tests take
    less than 2 s, so the bug is planted in CI.  needs_freebsd: the tests run there only.
    """

    kind: Kind
    name: str
    file: str
    text: str
    instead: str
    tests: tuple[str, ...]
    also: tuple[str, ...] = ()
    is_quick: bool = False
    needs_freebsd: bool = False

    @property
    def is_compiled(self) -> bool:
        """Say whether a compiled module has to be built again."""
        return self.file.endswith((".pyx", ".pxd"))

    def planted(self, source: str) -> str:
        """Return the source with the bug.  Raises ValueError unless the text is there once."""
        count = source.count(self.text)
        if count != 1:
            raise ValueError(f"{self.name}: the text is in {self.file} {count} times")
        return source.replace(self.text, self.instead)

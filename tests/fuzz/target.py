"""A target: a function of bytes, and what it may do with any bytes.

A target fails if its function raises anything but an error of the package's own, if
that error is an InternalError, if the function takes longer than SECONDS, or if it needs more
memory than the target's limit.  A function may check more, with fail().
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from bhystream.errors import BhyError, InternalError

SECONDS = 10
MIB = 1 << 20
_STATM = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
_PAGE_BYTES = resource.getpagesize()


class Failure(Exception):
    """A property that has to hold for any bytes does not hold."""


def fail(why: str) -> NoReturn:
    raise Failure(why)


@dataclass(frozen=True)
class Target:
    """One target.

    call: takes the bytes.  memory_bytes: what one call may need beyond what the process has.
    longest: in bytes; longer inputs are not tried.  corpus: the directory in corpus/ with the first
    inputs, if it has not the target's name.
    """

    name: str
    call: Callable[[bytes], object]
    memory_bytes: int = 64 * MIB
    longest: int = 4096
    corpus: str = ""

    def run(self, data: bytes) -> None:
        """Call the function once.  Raises whatever shows a bug."""
        with limited(self.memory_bytes):
            attempt(lambda: self.call(data))


def attempt(act: Callable[[], object]) -> None:
    """Do something that may raise an error of the package's own."""
    try:
        act()
    except InternalError:
        raise
    except BhyError:
        return


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[None]:
    """Let the process have no more than `nbytes` of memory beyond what it has now.

    Within limited(), an inner limited() may only set a lower limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(os.pread(_STATM, 64, 0).split()[0]) * _PAGE_BYTES
    limit = now + nbytes if soft == resource.RLIM_INFINITY else min(soft, now + nbytes)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

"""Wait for a condition: a deadline only ends a broken test."""

from __future__ import annotations

import fcntl
import struct
import termios
import time
from collections.abc import Callable

DEADLINE_S = 120.0


def until(
    condition: Callable[[], object],
    what: str | Callable[[], str],
    deadline_s: float = DEADLINE_S,
    *,
    poll_s: float = 0.002,
) -> None:
    """Wait until a condition holds.  Raises TimeoutError after deadline_s.

    what: the condition in words, as a noun.  A function returns the words at the deadline.
    poll_s: the pause between two looks, longer for a condition that is costly to look at.
    """
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            words = what if isinstance(what, str) else what()
            raise TimeoutError(f"waited {deadline_s:.0f} s in vain for {words}")
        time.sleep(poll_s)


def wait_until_full(fd: int) -> None:
    """Wait until the pipe with this reading end is full, and its writer is inside write(2)."""
    room = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)

    def is_full() -> bool:
        held = fcntl.ioctl(fd, termios.FIONREAD, struct.pack("i", 0))
        return bool(struct.unpack("i", held)[0] == room)

    until(is_full, "a full pipe", 60)

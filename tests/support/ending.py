"""A program's end by a signal, caught as a program does."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

from bhystream import signals
from bhystream.errors import Interrupted
from bhystream.signals import Ended


@contextlib.contextmanager
def ended(number: int) -> Iterator[list[Interrupted]]:
    """Assert that this block is ended by a signal; the list then holds the error to report."""
    found: list[Interrupted] = []
    try:
        yield found
    except Ended as raised:
        found.append(raised.as_error())
        assert raised.number == number
    else:
        pytest.fail("the signal was lost")
    finally:
        # Else a signal that was lost would end pytest, while it shows the failure.
        signals._ending = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)

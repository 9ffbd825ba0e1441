"""Fixtures and environment of all tests."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.handover import state
from bhystream.handover.state import Records
from support.memory_source import seeded

# Some tests run parts of other tests in a separate process.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# The programs run as an administrator runs them, without what a developer's shell tells Python.
os.environ.pop("PYTHONUNBUFFERED", None)

_TAKEN = [
    getattr(signal, f"SIG{name}")
    for name in ("INT", "HUP", "TERM", "TSTP", "TTIN", "TTOU", "USR1", "PIPE", "ALRM")
]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the signal handlers that a program replaced in the tests' own process, and its timer.

    A shell starts its background jobs with SIGINT ignored, which programs respect.
    """
    before = {number: signal.getsignal(number) for number in _TAKEN}
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def in_time() -> Iterator[None]:
    """End a test that waits for the other end of a FIFO."""

    def late(*_: object) -> None:
        pytest.fail("waited for the other end of a FIFO")  # no OSError, which the code would catch

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a state directory whose path is short enough for a socket in the directory."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        monkeypatch.setenv("BHYSEND_STATE_DIR", f"{made}/s")
        yield state.directory()


@pytest.fixture
def records(base: Path) -> Records:
    """Open the records of the source."""
    return Records(base, "source")


@pytest.fixture
def rng() -> random.Random:
    return seeded()

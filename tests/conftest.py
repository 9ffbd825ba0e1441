"""Fixtures of all files."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.handover import state
from support.memory_source import seeded

# Some tests run pieces of others in a process of their own.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# The programs run as an administrator runs them, whatever a developer's shell asks of Python.
os.environ.pop("PYTHONUNBUFFERED", None)

_TAKEN = [
    getattr(signal, f"SIG{name}")
    for name in ("INT", "HUP", "TERM", "TSTP", "TTIN", "TTOU", "USR1", "PIPE", "ALRM")
]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Give the signals back that a program took over in the tests' own process.

    A shell starts what runs beside it with SIGINT ignored, which programs respect.
    """
    before = {number: signal.getsignal(number) for number in _TAKEN}
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a state directory, its name short enough for a socket in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        monkeypatch.setenv("BHYSEND_STATE_DIR", f"{made}/s")
        yield state.directory()


@pytest.fixture
def rng() -> random.Random:
    return seeded()

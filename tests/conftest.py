"""Fixtures of several files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream import state


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a state directory, its name short enough for a socket in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        monkeypatch.setenv("BHYSEND_STATE_DIR", f"{made}/s")
        yield state.directory()

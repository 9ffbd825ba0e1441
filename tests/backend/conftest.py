"""Fixtures of the backend's tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .qemu_rig import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    # A short path: a Unix socket's has 107 bytes.  On tmpfs: RAM files.
    with tempfile.TemporaryDirectory(prefix="bhyq-", dir="/dev/shm") as directory:
        made = Rig(Path(directory))
        try:
            yield made
        finally:
            made.end()

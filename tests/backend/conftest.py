"""Fixtures of the backend's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .qemu_rig import Rig, rigged


@pytest.fixture
def rig() -> Iterator[Rig]:
    with rigged() as made:
        yield made

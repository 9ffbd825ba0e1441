"""Fixtures of the stand-in's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .rig import Rig


@pytest.fixture
def host() -> Iterator[Rig]:
    """Make a host with default settings."""
    with Rig() as made:
        yield made

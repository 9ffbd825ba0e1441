"""Fixtures of the backend's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bhystream.backend.qemu import scope

from .qemu_rig import Rig, rigged


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    # These tests are no bhyrecv, and a container that ends with them may be what they run in.
    monkeypatch.setattr(scope, "above", lambda pid: [])
    with rigged() as made:
        yield made

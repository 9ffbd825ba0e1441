"""Fixtures of the backend's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bhystream.backend.bhyve import paused, ready
from bhystream.backend.qemu import scope

from .bhyve_rig import Two, require_sink, two_hosts, without_sink
from .qemu_rig import Rig, rigged


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    # These tests are no bhyrecv, and a container that ends with them may be what they run in.
    monkeypatch.setattr(scope, "above", lambda pid: [])
    with rigged() as made:
        yield made


@pytest.fixture(params=[4, 5], ids=["G4", "G5"])
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    """Make two hosts whose bhyves are both of one generation."""
    with two_hosts(generation=request.param) as made:
        yield made


@pytest.fixture(params=["sink", "file"])
def sink(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The place to which bhyve writes the memory: the null device, or a file."""
    if request.param == "file":
        without_sink(monkeypatch)
    elif require_sink():
        pytest.skip("in this process only root has the sink")
    return str(request.param)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bhysend wait no longer than a moment for bhyve."""
    monkeypatch.setattr(ready, "_HOLD_S", 0.3)
    monkeypatch.setattr(paused, "_SERVED_S", 0.3)
    monkeypatch.setattr(paused, "_SETTLE_S", 0.3)

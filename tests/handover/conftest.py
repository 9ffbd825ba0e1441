"""The host of the handover's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.recorded import Host


@pytest.fixture
def host(base: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(base, monkeypatch)

"""The hand-over in terms of QMP, without a QEMU."""

from __future__ import annotations

import time
from typing import Any

import pytest

from bhystream.backend.qemu import migration
from bhystream.errors import GuestError
from support.qmp_answers import Answers


def at(state: str) -> dict[str, Any]:
    return {"status": state, "running": state == "running", "singlestep": False}


OVER = {"status": "completed"}


def test_a_guest_is_let_run_when_its_migration_has_ended() -> None:
    """QEMU refuses `cont` in finish-migrate, in which it is for a moment behind "completed"."""
    said = [OVER, at("finish-migrate"), at("finish-migrate"), at("postmigrate"), {}, at("running")]
    qmp = Answers(said)
    migration.let_run(qmp)
    assert qmp.execute("query-status") is None, "not all answers were asked for"


def test_a_migration_that_never_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    qmp = Answers([OVER, *[at("finish-migrate")] * 50])
    with pytest.raises(GuestError, match="cannot resume: it is 'finish-migrate' after cont"):
        migration.let_run(qmp)

"""A state directory with records, which all lead to one stand-in guest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bhystream import hypervisors
from bhystream.errors import BhyError, GuestError
from bhystream.guest import DEAD, LOADED, READY, STARTED, State
from bhystream.handover.state import Record, Records

from .paused import Paused

A, B = "a" * 32, "b" * 32
OF_DESTINATION = (LOADED, READY, STARTED, DEAD)


class Guest(Paused):
    """A paused guest that notes each act, with the phase of record A at that time.

    fails: whether every act but close() fails.
    """

    def __init__(self, records: Records) -> None:
        self.records = records
        self.fails = False
        self.asked: list[tuple[str, str | None]] = []

    def do(self, act: str, there: str = "") -> None:
        record = self.records.get(A)
        self.asked.append((f"{act} {there}".rstrip(), record.phase if record else None))
        if self.fails and act != "close":
            raise GuestError("it does not answer")

    def states(self) -> Sequence[State]:
        raise AssertionError("nobody asks a recorded guest for its state")

    def require_paused(self) -> None:
        raise AssertionError("nobody asks that of a recorded guest")


class Host:
    """A state directory, and the one guest or the failure that open_paused() leads to."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.roles: dict[str, Records] = {
            "source": Records(base, "source"),
            "destination": Records(base, "destination"),
        }
        self.guest = Guest(self.roles["source"])
        self.opened: list[Mapping[str, Any]] = []
        self.error: BhyError | None = None

        def open_paused(revive: Mapping[str, Any]) -> Guest:
            self.opened.append(revive)
            if self.error:
                raise self.error
            return self.guest

        monkeypatch.setattr(hypervisors, "open_paused", open_paused)

    def record(
        self,
        phase: str,
        id_: str = A,
        *,
        guest: str = "web1",
        operand: str = "qemu:/web1",
        lock: str = "lock-1",
        time_ns: int = 1,
        peer: tuple[str, str] = ("", ""),
    ) -> Record:
        """Write a record with this phase, in the role that has the phase."""
        made = Record(
            id_, guest, operand, lock, phase, {"id": id_}, time_ns, host=peer[0], directory=peer[1]
        )
        role = "destination" if phase in OF_DESTINATION else "source"
        self.guest.records = self.roles[role]
        self.roles[role].write(made)
        return made

    def phases(self, role: str) -> list[str]:
        """Return the phases of all records of a role."""
        return [record.phase for record in self.roles[role].all()]

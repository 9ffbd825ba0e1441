"""A state directory with records, which all lead to one stand-in guest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bhystream import hypervisors
from bhystream.errors import BhyError, GuestError
from bhystream.guest import DEAD, LOADED, READY, STARTED, State
from bhystream.handover.state import Record, Records

A, B = "a" * 32, "b" * 32
OF_DESTINATION = (LOADED, READY, STARTED, DEAD)


@dataclass
class Guest:
    """What a record's guest is asked, with the phase of record A at that time.

    running: the result of runs().  fails: whether resume() and discard() fail.
    """

    records: Records
    alive: bool = True
    fails: bool = False
    running: bool = False
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    reasons: Sequence[str] = ()

    def note(self, what: str) -> None:
        record = self.records.get(A)
        self.asked.append((what, record.phase if record else None))

    def _do(self, what: str) -> None:
        self.note(what)
        if self.fails:
            raise GuestError("it does not answer")

    def resume(self) -> None:
        self._do("resume")

    def clear(self) -> None:
        self._do("clear")

    def states(self) -> Sequence[State]:
        raise AssertionError("nobody asks a recorded guest for its state")

    def require_paused(self) -> None:
        raise AssertionError("nobody asks that of a recorded guest")

    def discard(self, there: str) -> None:
        self._do(f"discard {there}".rstrip())

    def is_alive(self) -> bool:
        return self.alive

    def runs(self) -> bool:
        return self.running

    def close(self) -> None:
        self.note("close")


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

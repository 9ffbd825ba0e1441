"""What earlier moves from this host have taught about the parts of a pause.

bhysend estimates each part of the pause from what it measures in this move.  A part
also takes what no measurement before the pause shows: the vCPUs stand still, other
threads scan, files are synced, the destination's hypervisor loads.  So after a move
bhysend notes how many times the estimate each part has taken, and the median of the
last notes corrects the next estimate.  The median, because one busy moment then
spoils no later prediction.  A time is noted as how many times a second it is.  A part
without notes of its own may have those of a part that is Like it.

The notes only make a prediction better: whatever is wrong with their file, a move goes
on without them.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

from bhystream import durable

_KEPT = 5
_MAX_PARTS = 64
# A factor outside comes from an estimate that was no estimate.
_LEAST, _MOST = 0.02, 50.0
# What may stand in the file: a time, whose estimate is a second, is that of answers within a
# host or of a -p command that takes days.
_SMALLEST, _LARGEST = 1e-6, 1e6


class Like(NamedTuple):
    """A part whose notes tell how long another part takes: so many times as long."""

    part: str
    times: float


class Experience:
    """The notes of one state directory, by part: a line of text that says what was measured."""

    def __init__(self, base: Path) -> None:
        """Read the notes.  base: the state directory.  Raises nothing."""
        self._path = base / "experience.json"
        self._notes: dict[str, list[float]] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found = json.loads(self._path.read_bytes())
            if isinstance(found, dict):
                self._notes = {part: _factors(noted) for part, noted in found.items()}

    def factor(self, part: str, like: Like | None = None) -> float:
        """Return by what to multiply the estimate of a part, in bounds; 1.0 if nothing is known.

        like: as for noted().
        """
        return min(max(self.noted(part, like) or 1.0, _LEAST), _MOST)

    def noted(self, part: str, like: Like | None = None) -> float | None:
        """Return how many times its estimate a part usually took; None if nothing is known.

        like: what tells it if no note is of the part.
        """
        noted = sorted(self._notes.get(part, ()))
        if not noted:
            found = self.noted(like.part) if like else None
            return found * like.times if like and found else None
        middle = len(noted) // 2
        return noted[middle] if len(noted) % 2 else (noted[middle - 1] + noted[middle]) / 2

    def learn(self, part: str, estimated_ns: float, measured_ns: float) -> None:
        """Note what a part has taken."""
        if estimated_ns <= 0 or measured_ns <= 0:
            return
        factor = min(max(measured_ns / estimated_ns, _SMALLEST), _LARGEST)
        # The part moves to the end: the parts that no move has had for long are dropped.
        noted = [*self._notes.pop(part, []), float(f"{factor:.3g}")]
        self._notes[part] = noted[-_KEPT:]
        while len(self._notes) > _MAX_PARTS:
            del self._notes[next(iter(self._notes))]

    def save(self) -> None:
        """Write the notes.  Raises nothing: without them the next prediction is only worse."""
        with contextlib.suppress(OSError):
            durable.write(self._path, json.dumps(self._notes))


def _factors(noted: object) -> list[float]:
    """Return what is usable of the notes of one part."""
    if not isinstance(noted, list):
        return []
    usable = [one for one in noted if isinstance(one, int | float) and one == one]
    return [float(min(max(one, _SMALLEST), _LARGEST)) for one in usable[-_KEPT:]]

"""The pause of one move, measured in parts, and the closing line that reports the parts."""

from __future__ import annotations

import time
from dataclasses import dataclass

from bhystream.stream.writer import Writer
from bhystream.units import counted, duration, size


@dataclass
class Stopwatch:
    """One pause.  All values are in ns; a value that is not measured yet is 0.

    predicted_ns: the whole pause, as predicted before.  paused_at_ns: the wall clock at
    the start of the pause.  state_ns: the time to stop the guest and take its state.
    last_ns: the time of the last round.  answers_ns: from END to the answer to GO.
    pause_ns: the whole pause, as far as it is known.
    """

    predicted_ns: int = 0
    paused_at_ns: int = 0
    state_ns: int = 0
    last_ns: int = 0
    answers_ns: int = 0
    pause_ns: int = 0
    _start_ns: int = 0

    def start(self) -> None:
        """Start the measurement, just before the guest is paused."""
        self.paused_at_ns = time.time_ns()
        self._start_ns = time.monotonic_ns()

    def elapsed_ns(self) -> int:
        """Return how long the pause has taken so far."""
        return time.monotonic_ns() - self._start_ns

    def stop(self) -> None:
        """Take the pause as over now.  A later call takes the later time."""
        self.pause_ns = self.elapsed_ns()

    def line(self, what: str, writer: Writer, *, is_answered: bool, is_predicted: bool) -> str:
        """Return the closing line: what became of the guest, and the parts of its pause."""
        parts = [f"state {duration(self.state_ns)}", f"last pages {duration(self.last_ns)}"]
        if is_answered:
            parts.append(f"answers {duration(self.answers_ns)}")
        if is_predicted:
            parts.append(f"{duration(self.predicted_ns)} predicted")
        return (
            f"{what}; {counted(writer.rounds, 'round')}, {size(writer.offset_bytes)}; "
            f"paused {duration(self.pause_ns)} ({', '.join(parts)})"
        )

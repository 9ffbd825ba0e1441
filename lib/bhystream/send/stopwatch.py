"""The pause of one move, measured in its parts, and the line that tells of them."""

from __future__ import annotations

import time
from dataclasses import dataclass

from bhystream.stream.writer import Writer
from bhystream.units import counted, duration, size


@dataclass
class Stopwatch:
    """One pause.  All in ns; what has not been measured is 0.

    predicted_ns: of the whole, before it.  paused_at_ns: the wall clock when it
    began.  state_ns: to stop the guest and take its state.  last_ns: the last
    round.  answers_ns: from END to the answer to GO.  pause_ns: the whole, as
    far as it is known.
    """

    predicted_ns: int = 0
    paused_at_ns: int = 0
    state_ns: int = 0
    last_ns: int = 0
    answers_ns: int = 0
    pause_ns: int = 0
    _start_ns: int = 0

    def start(self) -> None:
        """Begin: the guest is about to be paused."""
        self.paused_at_ns = time.time_ns()
        self._start_ns = time.monotonic_ns()

    def elapsed_ns(self) -> int:
        """Return how long the pause has taken so far."""
        return time.monotonic_ns() - self._start_ns

    def stop(self) -> None:
        """Take the pause as over now; it may be taken so again, later."""
        self.pause_ns = self.elapsed_ns()

    def line(self, what: str, writer: Writer, *, is_answered: bool, is_predicted: bool) -> str:
        """Return the closing line: what became of the guest, and what its pause was made of."""
        parts = [f"state {duration(self.state_ns)}", f"last pages {duration(self.last_ns)}"]
        if is_answered:
            parts.append(f"answers {duration(self.answers_ns)}")
        if is_predicted:
            parts.append(f"{duration(self.predicted_ns)} predicted")
        return (
            f"{what}; {counted(writer.rounds, 'round')}, {size(writer.offset_bytes)}; "
            f"paused {duration(self.pause_ns)} ({', '.join(parts)})"
        )

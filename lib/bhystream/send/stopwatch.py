"""The pause of one move, measured in parts, and the closing line that reports the parts."""

from __future__ import annotations

import time
from typing import NamedTuple

from bhystream.stream.writer import Writer
from bhystream.units import counted, duration, size


class Parts(NamedTuple):
    """The parts of one pause, which follow each other, in ns.

    state_ns: to stop the guest and take its state.  last_ns: to send the last pages, and
    the state unless the form is kept.  hook_ns: how much longer the -p command takes.
    answers_ns: from END to the answer to GO.  A part that the form does not have is 0.
    """

    state_ns: int = 0
    last_ns: int = 0
    hook_ns: int = 0
    answers_ns: int = 0

    @property
    def total_ns(self) -> int:
        """Return the whole pause, but for what lies between the parts."""
        return self.state_ns + self.last_ns + self.hook_ns + self.answers_ns


class Stopwatch:
    """One pause.  All values are in ns.

    predicted: the parts as predicted just before the pause, None if nothing was.
    paused_at_ns: the wall clock at the start of the pause.  measured: the parts so far.
    pause_ns: the whole pause, as far as it is known.
    """

    def __init__(self) -> None:
        """Measure nothing yet."""
        self.predicted: Parts | None = None
        self.measured = Parts()
        self.paused_at_ns = 0
        self.pause_ns = 0
        self._start_ns = 0

    def start(self) -> None:
        """Start the measurement, just before the guest is paused.  A later call starts it anew."""
        self.paused_at_ns = time.time_ns()
        self._start_ns = time.monotonic_ns()

    def note(self, **parts: int) -> None:
        """Note what parts of the pause have taken, by the names of Parts."""
        self.measured = self.measured._replace(**parts)

    def elapsed_ns(self) -> int:
        """Return how long the pause has taken so far."""
        return time.monotonic_ns() - self._start_ns

    def stop(self) -> None:
        """Take the pause as over now.  A later call takes the later time."""
        self.pause_ns = self.elapsed_ns()

    def line(self, what: str, writer: Writer, *, is_answered: bool, has_hook: bool) -> str:
        """Return the closing line: what became of the guest, and the parts of its pause."""
        names = {"state": "state_ns", "last pages": "last_ns"}
        if has_hook:
            names["-p"] = "hook_ns"
        if is_answered:
            names["answers"] = "answers_ns"
        parts = [f"{name} {_in(self.measured, at)}" for name, at in names.items()]
        text = (
            f"{what}; {counted(writer.rounds, 'round')}, {size(writer.offset_bytes)}; "
            f"paused {duration(self.pause_ns)} ({', '.join(parts)})"
        )
        if self.predicted:
            parts = [_in(self.predicted, at) for at in names.values()]
            text += f", predicted {duration(self.predicted.total_ns)} ({', '.join(parts)})"
        return text


def _in(parts: Parts, name: str) -> str:
    return duration(getattr(parts, name))

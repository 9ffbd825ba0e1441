"""A clock in place of a module's `time`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bhystream.units import NS


def _do_nothing() -> None:
    pass


@dataclass
class Clock:
    """A clock that stands still until sleep() or a test moves it.

    A test sets the attributes.  now_ns: the time.  slept_ns: how long sleep() has slept in all.
    step_ns: how far each look at monotonic_ns() moves the clock first.  on_sleep: sleep() calls
    this at its end.
    """

    now_ns: int = 0
    slept_ns: int = 0
    step_ns: int = 0
    on_sleep: Callable[[], object] = _do_nothing
    _without_cpu_ns: int = 0

    def monotonic_ns(self) -> int:
        self.now_ns += self.step_ns
        return self.now_ns

    def thread_time_ns(self) -> int:
        return self.now_ns - self.slept_ns - self._without_cpu_ns

    def preempt(self, ns: int) -> None:
        """Let the time go on while the thread waits for a CPU."""
        self.now_ns += ns
        self._without_cpu_ns += ns

    def monotonic(self) -> float:
        return self.now_ns / NS

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        ns = round(seconds * NS)
        self.now_ns += ns
        self.slept_ns += ns
        self.on_sleep()

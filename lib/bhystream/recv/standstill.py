"""How long a guest stands still, from its pause at the source to its start here."""

from __future__ import annotations

import time

from bhystream.stream.format import Time


class Standstill:
    """One guest's standstill, which goes on until end().

    If the source waits for an answer, both hosts measure their parts by clocks that never
    step, and only the transit of END is missing.  Otherwise END may have lain in a file for
    days, and only the wall clocks of the two hosts tell.
    """

    def __init__(self, paused: Time | None, *, is_answered: bool) -> None:
        """Begin this host's part: END has just been read.  paused: the source's part, from TIME."""
        self._begun_ns = time.monotonic_ns()
        self._ended_ns: int | None = None
        self._paused = paused or Time(0, 0)
        self._is_answered = is_answered

    def end(self) -> None:
        """End it: the guest runs."""
        self._ended_ns = time.monotonic_ns()

    @property
    def is_measured(self) -> bool:
        """Say whether the source has measured its part."""
        return self._paused.paused_for_ns > 0

    @property
    def here_ns(self) -> int:
        """The part that this host has measured, in ns."""
        return (self._ended_ns or time.monotonic_ns()) - self._begun_ns

    @property
    def measured_ns(self) -> int:
        """Both parts, in ns."""
        return self._paused.paused_for_ns + self.here_ns

    @property
    def length_ns(self) -> int:
        """For how long the guest stands still, in ns, as far as that is known; else 0."""
        if self._is_answered:
            return self.measured_ns if self.is_measured else 0
        if not self._paused.paused_at_ns:
            return 0
        return max(time.time_ns() - self._paused.paused_at_ns, 0)

"""INT, HUP and TERM as an exception at the points where one is safe.

A move may be given up at almost any moment, but not inside a QMP exchange,
a durable record, or after the point of no return.  So a signal only sets a
flag, and becomes an exception where the program has said so: within
`interruptible()`, and there even out of a blocked write(2).
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from bhystream.errors import BhyError

_INTERRUPTS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
_REPORTS = [getattr(signal, name) for name in ("SIGUSR1", "SIGINFO") if hasattr(signal, name)]


class Interrupted(BhyError):
    """The operator, or a closed terminal, asked to stop."""

    status = 75


class Signals:
    """The signal handling of one program."""

    def __init__(self) -> None:
        """Ignore SIGPIPE and take over the other signals.  Main thread only."""
        self._pending = ""
        self._open = False
        self.on_report: Callable[[], None] | None = None
        self.on_deferred: Callable[[str], None] | None = None
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        for number in _INTERRUPTS:
            # Started with HUP ignored (nohup): it stays ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._interrupt)
        for number in _REPORTS:
            signal.signal(number, self._report)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._pending = signal.Signals(number).name
        if self._open:
            self._raise()
        elif self.on_deferred:
            self.on_deferred(self._pending)

    def _report(self, number: int, frame: FrameType | None) -> None:
        if self.on_report:
            self.on_report()

    def _raise(self) -> None:
        name, self._pending = self._pending, ""
        self._open = False
        raise Interrupted(f"interrupted by {name}")

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let signals raise Interrupted in this block, also one from before it."""
        self._open = True
        try:
            if self._pending:
                self._raise()
            yield
        finally:
            self._open = False

    def forget(self) -> None:
        """Drop a signal that came too late to change anything."""
        self._pending = ""

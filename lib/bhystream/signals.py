"""INT, HUP and TERM as an exception at the points where one is safe.

A move may be given up at almost any moment, but not inside a QMP exchange,
a durable record, or after the point of no return.  So a signal only sets a
flag, and becomes an exception where the program has said so: within
`interruptible()`, and there even out of a blocked write(2).
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from bhystream.errors import BhyError, PipeError

_INTERRUPTS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
_REPORTS = [getattr(signal, name) for name in ("SIGUSR1", "SIGINFO") if hasattr(signal, name)]
_SOON_S = 0.01


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

    @contextlib.contextmanager
    def watching(self, progress: Callable[[], int], seconds: int) -> Iterator[None]:
        """Be interruptible, also by standing still: for work while a guest is paused.

        progress: a count that grows.  If it has not grown for `seconds`, up to
        twice that, PipeError is raised, also out of a blocked write(2).
        """
        seen = progress()

        def look(number: int, frame: FrameType | None) -> None:
            nonlocal seen
            if progress() == seen and self._open:
                self._open = False
                raise PipeError(f"nothing was taken from the stream for {seconds} s")
            seen = progress()

        signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
        try:
            with self.interruptible():
                yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @contextlib.contextmanager
    def ticking(self, tell: Callable[[], None], seconds: int) -> Iterator[None]:
        """Call `tell` every so many seconds in this block, also out of a blocked call."""
        is_open = True

        def tick(number: int, frame: FrameType | None) -> None:
            # One that was on its way when the block was left may raise nothing:
            # GO may be half recorded then.
            if is_open:
                tell()

        signal.signal(signal.SIGALRM, tick)
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
        try:
            yield
        finally:
            is_open = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    @contextlib.contextmanager
    def until(self, deadline_s: float, give_up: Callable[[], float]) -> Iterator[None]:
        """Be interruptible, also by the time: for work that may block for ever.

        deadline_s: on the monotonic clock.  give_up: called then, also out of a
        blocked write(2); it raises, or returns in how many seconds to call it again.
        """

        def look(number: int, frame: FrameType | None) -> None:
            # Not open yet, where the time was over before the block began.
            signal.setitimer(signal.ITIMER_REAL, give_up() if self._open else _SOON_S)

        signal.signal(signal.SIGALRM, look)
        # 0 would mean never.
        signal.setitimer(signal.ITIMER_REAL, max(deadline_s - time.monotonic(), 1e-6))
        try:
            with self.interruptible():
                yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @staticmethod
    def ignore_stops() -> None:
        """Ignore Ctrl-Z from here on: it would freeze a paused guest with us."""
        for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
            signal.signal(number, signal.SIG_IGN)

    def forget(self) -> None:
        """Drop a signal that came too late to change anything."""
        self._pending = ""


class Interrupts:
    """The signals of a program that has nothing to put in order, but acts for a moment.

    What was ignored from the start stays ignored.
    """

    def __init__(self) -> None:
        """Let them end the program at once; one that asks for a report does nothing."""
        self._numbers = [
            number
            for number in (*_INTERRUPTS, signal.SIGTSTP)
            if signal.getsignal(number) != signal.SIG_IGN
        ]
        for number in (*_REPORTS, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        self.obey()

    def obey(self) -> None:
        """Let them do what they do."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_DFL)

    def ignore(self) -> None:
        """Ignore them, until obey()."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

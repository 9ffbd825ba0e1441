"""INT, HUP and TERM as an exception at the points where one is safe.

A move may be given up at almost any moment, but not inside a QMP exchange, nor
while a record is written, nor after the point of no return.  So a signal only
sets a flag.  The signal becomes an exception only within `interruptible()` and
the blocks built on it, and there even out of a blocked write(2).  Within at_waits()
it becomes one only where the work waits for a hypervisor, and calls check().

watching(), ticking() and until() use the one alarm timer of the process, and do not
nest.  A program uses Signals or Interrupts, never both.  Before it has one of them,
end_early() lets a signal end it.  handlers.py puts a signal off that comes where an
exception would be lost.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from bhystream import handlers
from bhystream.errors import InputOutputError, InternalError, Interrupted

_INTERRUPTS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
_REPORTS = [getattr(signal, name) for name in ("SIGUSR1", "SIGINFO") if hasattr(signal, name)]
_SOON_S = 0.01
_TICK_S = 0.5


class Ended(BaseException):
    """A signal ends a program that may be ended anywhere.

    No Exception, so that no part of a program takes it for a failure of its own.  hint: what
    the operator has to know, for a line of its own; may be "".
    """

    def __init__(self, name: str, hint: str) -> None:
        super().__init__(f"interrupted by {name}")
        self.hint = hint

    def as_error(self) -> Interrupted:
        """Return the error to report."""
        return Interrupted(str(self), self.hint)


def end_early(hint: str) -> None:
    """Let INT, HUP and TERM raise Ended, wherever the program is, and the next ones do nothing.

    A signal that is ignored now stays ignored.
    """
    _end_by(_taken(), hint)


def _taken() -> list[int]:
    """Return the numbers to take over from end_early(), which first gets what was put off."""
    handlers.deliver()
    return [number for number in _INTERRUPTS if signal.getsignal(number) != signal.SIG_IGN]


def _end_by(numbers: list[int], hint: str) -> None:
    def obey() -> None:
        for number in numbers:
            handlers.install(number, end, obey)

    def end(number: int) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Ended(signal.Signals(number).name, hint)

    obey()


def ignore_all() -> None:
    """Ignore INT, HUP and TERM: the program ends now, and with the status that it has.

    Python would else give the signals their default actions back before the process ends.
    """
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)


class Signals:
    """The signal handling of one program."""

    def __init__(self) -> None:
        """Ignore SIGPIPE and take over the other signals.  Main thread only."""
        self._pending = ""
        self._open = False
        self._is_at_waits = False
        self._has_alarm = False
        self.on_report: Callable[[], None] | None = None
        self.on_deferred: Callable[[str], None] | None = None
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, _too_late)
        for number in _taken():  # HUP that nohup(1) ignores stays ignored
            handlers.install(number, self._interrupt, self._reopen)
        for number in _REPORTS:
            signal.signal(number, self._report)

    def _interrupt(self, number: int) -> None:
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

    def _reopen(self) -> None:
        self._open = True

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let signals raise Interrupted in this block, also a signal that came before it.

        After an exception nothing raises any more, not even in an outer such block.
        """
        was_open, self._open = self._open, True
        self._tick()
        try:
            if self._pending:
                self._raise()
            yield
        except BaseException:
            was_open = False
            raise
        finally:
            self._open = was_open
            self._tick()

    def _tick(self) -> None:
        """Wake up from time to time in an interruptible block that has no limit of time.

        A signal that comes just before a call that blocks does not end the call: its handler
        is called only when the call returns.
        """
        if not self._has_alarm:
            tick_s = _TICK_S if self._open else 0.0
            signal.setitimer(signal.ITIMER_REAL, tick_s, tick_s)

    @contextlib.contextmanager
    def at_waits(self) -> Iterator[None]:
        """Let check() raise in this block, which may start programs and talk to hypervisors."""
        self._is_at_waits = True
        try:
            yield
        finally:
            self._is_at_waits = False

    def check(self) -> None:
        """Raise Interrupted if a signal has come, and this is within at_waits()."""
        if self._is_at_waits and self._pending:
            self._raise()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let nothing raise in this part of an interruptible block; a signal raises after it."""
        was_open, self._open = self._open, False
        try:
            yield
        finally:
            self._open = was_open
        if was_open and self._pending:
            self._raise()

    @contextlib.contextmanager
    def watching(self, progress: Callable[[], int], seconds: int) -> Iterator[None]:
        """Be interruptible, also by a standstill: for work while a guest is paused.

        progress: returns a count that grows.  If the count stands still, this
        raises InputOutputError after `seconds` to twice `seconds`, also out of a
        blocked write(2).
        """
        seen = progress()

        def look(number: int) -> None:
            nonlocal seen
            if progress() == seen and self._open:
                self._open = False
                raise InputOutputError(f"nothing was taken from the stream for {seconds} s")
            seen = progress()

        with self._alarm(look, seconds, seconds, self._reopen), self.interruptible():
            yield

    @contextlib.contextmanager
    def ticking(self, tell: Callable[[], None], seconds: int) -> Iterator[None]:
        """Call `tell` every `seconds` in this block, also out of a blocked call."""
        is_open = True

        def tick(number: int) -> None:
            # A signal that was on its way when the block was left must not
            # raise: GO may be half recorded by then.
            if is_open:
                tell()

        with self._alarm(tick, seconds, seconds):
            try:
                yield
            finally:
                is_open = False

    @contextlib.contextmanager
    def until(self, deadline_s: float, give_up: Callable[[], float]) -> Iterator[None]:
        """Be interruptible, also by a deadline: for work that may block for ever.

        deadline_s: seconds of the monotonic clock.  give_up: called at the deadline,
        also out of a blocked write(2); raises, or returns the seconds to its next call.
        """

        def look(number: int) -> None:
            # _open is not set yet if the deadline passed before the block began.
            signal.setitimer(signal.ITIMER_REAL, give_up() if self._open else _SOON_S)

        # A first interval of 0 would disarm the timer.
        first_s = max(deadline_s - time.monotonic(), 1e-6)
        with self._alarm(look, first_s), self.interruptible():
            yield

    @contextlib.contextmanager
    def _alarm(
        self,
        act: Callable[[int], None],
        first_s: float,
        interval_s: float = 0.0,
        undo: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:
        """Call act after first_s, and then every interval_s, if that is not 0.

        undo: as for handlers.install().

        The process has one such timer, so these blocks may not nest: the inner block
        would end the outer one's limit.  Raises InternalError if they do.
        """
        if self._has_alarm:
            raise InternalError("a limit of time begins inside another")
        self._has_alarm = True
        handlers.install(signal.SIGALRM, act, undo)
        signal.setitimer(signal.ITIMER_REAL, first_s, interval_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, _too_late)
            self._has_alarm = False
            self._tick()

    @staticmethod
    def wake() -> None:
        """End the time of until() now, also out of a blocked write(2).  For other threads.

        Does nothing outside such a block.
        """
        import threading  # only a throttle calls this

        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    @staticmethod
    def ignore_stops() -> None:
        """Ignore Ctrl-Z from here on: a stopped bhysend could not resume its paused guest."""
        for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
            signal.signal(number, signal.SIG_IGN)

    def forget(self) -> None:
        """Drop a signal that came too late to change anything."""
        self._pending = ""


def _too_late(number: int, frame: FrameType | None) -> None:
    """Take a tick, or an alarm that comes outside its block.

    A handler, and not SIG_IGN, which a child would inherit.
    """


class Interrupts:
    """The signals of a program that may be ended at any moment, except during one short act.

    A signal that was ignored at the start stays ignored.
    """

    def __init__(self, hint: str = "") -> None:
        """Let signals end the program at once; ignore SIGPIPE and requests for a report.

        hint: of the Ended that a signal then raises.
        """
        self._hint = hint
        self._numbers = _taken()
        self._stops = [signal.SIGTSTP] if signal.getsignal(signal.SIGTSTP) != signal.SIG_IGN else []
        for number in (*_REPORTS, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        self.obey()

    def obey(self) -> None:
        """Let INT, HUP and TERM raise Ended, and let Ctrl-Z stop the program."""
        for number in self._stops:
            signal.signal(number, signal.SIG_DFL)
        _end_by(self._numbers, self._hint)

    def ignore(self, tell: Callable[[str], None]) -> None:
        """Let no signal end or stop the program until obey().

        tell: called with the name of INT, HUP or TERM when one comes.
        """
        for number in self._stops:
            signal.signal(number, signal.SIG_IGN)
        for each in self._numbers:
            signal.signal(each, lambda number, frame: tell(signal.Signals(number).name))

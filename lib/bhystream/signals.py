"""INT, HUP and TERM as an exception at the points where one is safe.

A move may be given up at almost any moment, but not inside a QMP exchange, nor
while a record is written, nor after the point of no return.  So a signal only
sets a flag.  The signal becomes an exception only within `interruptible()` and
the blocks built on it, and there even out of a blocked write(2).  Within at_waits()
it becomes one only where the work waits for a hypervisor, and calls check().

watching(), ticking() and until() use the one alarm timer of the process, and do not
nest.  A program uses Signals or Interrupts, never both.  Before it has one of them,
end_early() lets a signal end it.

No signal is lost.  Some places are bad ones to raise an exception, as handlers.py explains: then
it is raised a moment later, or again.  SIGALRM means "look again", and may come at any time.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from bhystream.errors import BhyError, InputOutputError, InternalError, Interrupted
from bhystream.handlers import SOON_S, Imports, is_handled

_INTERRUPTS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
_REPORTS = [getattr(signal, name) for name in ("SIGUSR1", "SIGINFO") if hasattr(signal, name)]
_TICK_S = 0.5
_RAISED_S = 10.0


class Ended(BaseException):
    """A signal ends a program that may be ended anywhere.

    No Exception, so that no part of a program takes it for a failure of its own.  number: the
    signal.  hint: what the operator has to know, for a line of its own; may be "".  Who catches
    it calls as_error().
    """

    def __init__(self, number: int, hint: str) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number
        self.hint = hint
        self.is_caught = False

    def as_error(self) -> Interrupted:
        """Return the error to report.  From then on the exception is not raised again."""
        self.is_caught = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        return Interrupted(str(self), self.hint)


class _Ending:
    """Lets signals raise Ended, wherever the program is, and the next ones do nothing."""

    def __init__(self, numbers: list[int], hint: str) -> None:
        self._numbers = numbers
        self._hint = hint
        self._raised: Ended | None = None
        self._imports = Imports()
        signal.signal(signal.SIGALRM, self._look)
        for number in numbers:
            signal.signal(number, self._end)

    def _end(self, number: int, frame: FrameType | None) -> None:
        for each in self._numbers:
            signal.signal(each, signal.SIG_IGN)
        self._raised = Ended(number, self._hint)
        self.deliver(frame)

    def _look(self, number: int, frame: FrameType | None) -> None:
        self.deliver(frame)

    def deliver(self, frame: FrameType | None = None) -> None:
        """Raise Ended if a signal has come, unless that is on its way or caught."""
        error = self._raised
        if error is None or error.is_caught:
            signal.setitimer(signal.ITIMER_REAL, 0)
            return
        signal.setitimer(signal.ITIMER_REAL, SOON_S, SOON_S)
        if not is_handled(error) and not self._imports.is_in(frame):
            raise error


_ending: _Ending | None = None


def end_early(hint: str) -> None:
    """Let INT, HUP and TERM raise Ended, wherever the program is, and the next ones do nothing.

    A signal that is ignored now stays ignored.
    """
    global _ending
    _ending = _Ending(_taken(), hint)


def deliver() -> None:
    """Raise Ended here if a signal has come that end_early() or Interrupts has to raise.

    Called before a step after which the signal would mean something else, or nothing.
    """
    if _ending:
        _ending.deliver()


def _taken() -> list[int]:
    return [number for number in _INTERRUPTS if signal.getsignal(number) != signal.SIG_IGN]


def ignore_all() -> None:
    """Ignore INT, HUP and TERM: the program ends now, and with the status that it has.

    Python would else give the signals their default actions back before the process ends.
    """
    for number in (signal.SIGALRM, *_INTERRUPTS):
        signal.signal(number, signal.SIG_IGN)


class _Limit:
    """A limit of time.  due_s, of the monotonic clock: when to call look(), or once is_woken.

    look: returns the seconds to its next call, or raises.
    """

    def __init__(self, look: Callable[[], float], due_s: float) -> None:
        self.look = look
        self.due_s = due_s
        self.is_woken = False


class Signals:
    """The signal handling of one program."""

    def __init__(self) -> None:
        """Ignore SIGPIPE and take over the other signals.  Main thread only."""
        deliver()
        self._pending = self._last = ""
        self._open = False
        # What a handler, or the start of a block, has raised to end the innermost open block.
        self._raised: BaseException | None = None
        self._is_at_waits = False
        self._limit: _Limit | None = None
        self._imports = Imports()
        self.on_report: Callable[[], None] | None = None
        self.on_deferred: Callable[[str], None] | None = None
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        # A handler, and not SIG_IGN, which a child would inherit.
        signal.signal(signal.SIGALRM, self._look)
        for number in _taken():  # HUP that nohup(1) ignores stays ignored
            signal.signal(number, self._interrupt)
        for number in _REPORTS:
            signal.signal(number, self._report)

    @property
    def _may_raise(self) -> bool:
        """Say whether a block is open that no exception has ended yet."""
        return self._open and self._raised is None

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._pending = signal.Signals(number).name
        if self._may_raise:
            self._look(number, frame)
        elif self.on_deferred:
            self.on_deferred(self._pending)

    def _report(self, number: int, frame: FrameType | None) -> None:
        if self.on_report:
            self.on_report()

    def _look(self, number: int, frame: FrameType | None) -> None:
        """Raise what is to be raised in the block: an interrupt, what was dropped, a limit."""
        if self._imports.is_in(frame):
            signal.setitimer(signal.ITIMER_REAL, SOON_S, SOON_S)
            return
        limit, now_s = self._limit, time.monotonic()
        is_due = limit is not None and (limit.is_woken or now_s >= limit.due_s)
        if limit and is_due:
            limit.is_woken = False
            limit.due_s = now_s + _RAISED_S  # if look() raises: the block may take long to end
        self._arm()
        if self._open and self._raised is not None and not is_handled(self._raised):
            raise self._raised
        self._raise_pending()
        if limit and is_due:
            limit.due_s = now_s + limit.look()
            self._arm()

    def _interrupted(self) -> Interrupted:
        self._last, self._pending = self._pending, ""
        return Interrupted(f"interrupted by {self._last}")

    def _raise_pending(self) -> None:
        if self._may_raise and self._pending:
            self._raise(self._interrupted())

    def _raise(self, error: BaseException) -> NoReturn:
        self._raised = error
        raise error

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let signals raise Interrupted in this block, also a signal that came before it.

        After an exception nothing raises any more, not even in an outer such block.
        """
        was_open, outer = self._open, self._raised
        self._open, self._raised = True, None
        self._arm()
        try:
            self._raise_pending()
            yield
            if self._raised is not None:
                raise self._raised  # Python has dropped it
            self._raise_pending()  # if it came in an import
        except BaseException as error:
            was_open = False
            if self._raised not in (None, error) and not isinstance(error, BhyError):
                raise self._raised from None  # Python has made another error of it
            raise
        finally:
            self._open, self._raised = was_open, outer
            self._arm()

    def _arm(self) -> None:
        """Look from time to time in an interruptible block, and in one with a limit of time.

        A signal that comes just before a call that blocks does not end the call: its handler
        is called only when the call returns.
        """
        first_s = _TICK_S
        if self._limit:
            # A first interval of 0 would disarm the timer.
            first_s = min(first_s, max(self._limit.due_s - time.monotonic(), 1e-6))
        is_needed = self._open or self._limit is not None
        signal.setitimer(signal.ITIMER_REAL, *((first_s, _TICK_S) if is_needed else (0, 0)))

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
            raise self._interrupted()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let nothing raise in this part of an interruptible block; a signal raises after it."""
        was_open, self._open = self._open, False
        try:
            yield
        finally:
            self._open = was_open
            self._arm()
        self._raise_pending()

    @contextlib.contextmanager
    def watching(self, progress: Callable[[], int], seconds: int) -> Iterator[None]:
        """Be interruptible, also by a standstill: for work while a guest is paused.

        progress: returns a count that grows.  If the count stands still for `seconds`, this
        raises InputOutputError, also out of a blocked write(2).
        """
        seen, seen_s, still_s = progress(), time.monotonic(), 0.0

        def look() -> float:
            nonlocal seen, seen_s, still_s
            before, before_s = seen, seen_s
            seen, seen_s = progress(), time.monotonic()
            # If this process itself stood still, as with its whole host, the reader gets its time.
            still_s = still_s + min(seen_s - before_s, 2 * _TICK_S) if seen == before else 0.0
            if still_s >= seconds and self._may_raise:
                self._raise(InputOutputError(f"nothing was taken from the stream for {seconds} s"))
            return _TICK_S

        with self._limited(look, seen_s + _TICK_S), self.interruptible():
            yield

    @contextlib.contextmanager
    def ticking(self, tell: Callable[[], None], seconds: int) -> Iterator[None]:
        """Call `tell` every `seconds` in this block, also out of a blocked call."""

        def look() -> float:
            tell()
            return seconds

        with self._limited(look, time.monotonic() + seconds):
            yield

    @contextlib.contextmanager
    def until(self, deadline_s: float, give_up: Callable[[], float]) -> Iterator[None]:
        """Be interruptible, also by a deadline: for work that may block for ever.

        deadline_s: seconds of the monotonic clock.  give_up: called at the deadline,
        also out of a blocked write(2); raises, or returns the seconds to its next call.
        """

        def look() -> float:
            # The block is not open yet if the deadline passed before it began.
            if not self._may_raise:
                return SOON_S
            try:
                return give_up()
            except BhyError as error:
                self._raise(error)

        with self._limited(look, deadline_s), self.interruptible():
            yield

    @contextlib.contextmanager
    def _limited(self, look: Callable[[], float], due_s: float) -> Iterator[None]:
        """Call `look` from due_s on, as for _Limit.

        The process has one alarm timer, and these blocks do not nest.  Raises InternalError if
        they do.
        """
        if self._limit:
            raise InternalError("a limit of time begins inside another")
        self._limit = _Limit(look, due_s)
        self._arm()
        try:
            yield
        finally:
            # A signal that is on its way must not raise now: GO may be half recorded by then.
            self._limit = None
            self._arm()

    def wake(self) -> None:
        """End the time of until() now, also out of a blocked write(2).  For other threads.

        Outside such a block, nothing ends.
        """
        import threading  # only a throttle calls this

        if limit := self._limit:
            limit.is_woken = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    @staticmethod
    def ignore_stops() -> None:
        """Ignore Ctrl-Z from here on: a stopped bhysend could not resume its paused guest."""
        for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
            signal.signal(number, signal.SIG_IGN)

    def put_back(self) -> None:
        """Let the signal that has raised last raise again, in the next block."""
        self._pending = self._last

    def forget(self) -> None:
        """Drop a signal that came too late to change anything."""
        self._pending = ""


class Interrupts:
    """The signals of a program that may be ended at any moment, except during one short act.

    A signal that was ignored at the start stays ignored.
    """

    def __init__(self, hint: str = "") -> None:
        """Let signals end the program at once; ignore SIGPIPE and requests for a report.

        hint: of the Ended that a signal then raises.
        """
        deliver()
        self._hint = hint
        self._numbers = _taken()
        self._stops = [signal.SIGTSTP] if signal.getsignal(signal.SIGTSTP) != signal.SIG_IGN else []
        for number in (*_REPORTS, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        self.obey()

    def obey(self) -> None:
        """Let INT, HUP and TERM raise Ended, and let Ctrl-Z stop the program."""
        global _ending
        for number in self._stops:
            signal.signal(number, signal.SIG_DFL)
        _ending = _Ending(self._numbers, self._hint)

    def ignore(self, tell: Callable[[str], None]) -> None:
        """Let no signal end or stop the program until obey().

        tell: called with the name of INT, HUP or TERM when one comes.
        """
        deliver()
        for number in self._stops:
            signal.signal(number, signal.SIG_IGN)
        for each in self._numbers:
            signal.signal(each, lambda number, frame: tell(signal.Signals(number).name))

"""Signals become exceptions in the blocks that allow it, and nowhere else."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from contextlib import AbstractContextManager

import pytest

from bhystream import signals as module
from bhystream.errors import DowntimeError, InputOutputError, InternalError, Interrupted
from bhystream.signals import Ended, Interrupts, Signals, end_early, ignore_all
from bhystream.units import NS
from support.clock import Clock
from support.ending import ended
from support.waiting import wait_until_full

INTERRUPTS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
STOPS = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
TAKEN = (*INTERRUPTS, *STOPS, signal.SIGPIPE, signal.SIGUSR1, signal.SIGALRM)


@pytest.fixture(autouse=True)
def handlers(handlers: None) -> None:
    """Begin with the default actions; the fixture of all tests restores what it found."""
    for number in TAKEN:
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def later(clock: Clock, seconds: float, step_s: float = 0.5) -> None:
    """Let the time pass, and the alarm come after each step."""
    for _ in range(round(seconds / step_s)):
        clock.now_ns += round(step_s * NS)
        signal.raise_signal(signal.SIGALRM)


@pytest.mark.parametrize("number", INTERRUPTS)
def test_an_interrupt_is_raised_where_it_may_be(number: signal.Signals) -> None:
    signals = Signals()
    with pytest.raises(Interrupted, match=f"interrupted by {number.name}") as caught:  # noqa: SIM117
        with signals.interruptible():
            signal.raise_signal(number)
            pytest.fail("went on after the signal")
    assert caught.value.status == 75


@pytest.mark.parametrize("number", INTERRUPTS)
def test_an_interrupt_elsewhere_waits_for_the_next_such_point(number: signal.Signals) -> None:
    signals = Signals()
    signal.raise_signal(number)
    entered = False
    with pytest.raises(Interrupted, match=number.name):  # noqa: SIM117
        with signals.interruptible():
            entered = True
    assert not entered


def test_after_the_block_it_waits_again() -> None:
    signals = Signals()
    with signals.interruptible():
        pass
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted), signals.interruptible():
        pass


def test_after_an_exception_in_the_block_it_waits_again() -> None:
    signals = Signals()
    with pytest.raises(ValueError, match="other"), signals.interruptible():
        raise ValueError("other")
    signal.raise_signal(signal.SIGINT)


def test_one_interrupt_is_raised_once() -> None:
    signals = Signals()
    with pytest.raises(Interrupted), signals.interruptible():
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)  # deferred, as while a guest is being resumed
    with pytest.raises(Interrupted, match="SIGTERM"), signals.interruptible():
        pass
    with signals.interruptible():
        pass


def test_a_forgotten_interrupt_is_not_raised() -> None:
    signals = Signals()
    signal.raise_signal(signal.SIGINT)
    signals.forget()
    with signals.interruptible():
        pass


def test_on_deferred_hears_of_what_waits_only() -> None:
    signals = Signals()
    heard: list[str] = []
    signals.on_deferred = heard.append
    signal.raise_signal(signal.SIGTERM)
    assert heard == ["SIGTERM"]
    signals.forget()
    with pytest.raises(Interrupted), signals.interruptible():
        signal.raise_signal(signal.SIGHUP)
    assert heard == ["SIGTERM"]


@pytest.mark.parametrize("number", INTERRUPTS)
def test_what_was_ignored_at_the_start_stays_ignored(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    signals = Signals()
    assert signal.getsignal(number) == signal.SIG_IGN
    with signals.interruptible():
        signal.raise_signal(number)


def test_a_pipe_without_a_reader_is_no_signal() -> None:
    Signals()
    theirs, ours = os.pipe()
    os.close(theirs)
    try:
        with pytest.raises(BrokenPipeError):
            os.write(ours, b"x")
    finally:
        os.close(ours)


def test_a_report_can_be_had_at_any_time() -> None:
    signals = Signals()
    signal.raise_signal(signal.SIGUSR1)  # on_report is not set yet
    asked: list[bool] = []
    signals.on_report = lambda: asked.append(True)
    signal.raise_signal(signal.SIGUSR1)
    with signals.interruptible():
        signal.raise_signal(signal.SIGUSR1)
    assert asked == [True, True]


# A transport that accepts nothing while the guest is paused.


def test_standing_still_is_an_error(clock: Clock) -> None:
    signals = Signals()
    with pytest.raises(InputOutputError, match="nothing was taken from the stream for 1000 s"):  # noqa: SIM117
        with signals.watching(lambda: 7, 1000):
            later(clock, 999)
            later(clock, 1)
            pytest.fail("went on")


def test_standing_still_oneself_is_none(clock: Clock) -> None:
    """As when a whole host stands still: the reader has had no time either."""
    signals = Signals()
    went_on = False
    with pytest.raises(InputOutputError), signals.watching(lambda: 7, 1000):
        later(clock, 10_000, step_s=5000)
        later(clock, 997)
        went_on = True
        later(clock, 1)
        pytest.fail("went on")
    assert went_on


def test_progress_is_none(clock: Clock) -> None:
    signals = Signals()
    count = 0
    with signals.watching(lambda: count, 1000):
        for _ in range(5):
            count += 1
            later(clock, 1000)


def test_standing_still_after_progress_is_an_error(clock: Clock) -> None:
    signals = Signals()
    count = 0
    with pytest.raises(InputOutputError), signals.watching(lambda: count, 1000):
        later(clock, 500)
        count += 1
        later(clock, 600)
        later(clock, 999)
        later(clock, 1)
        pytest.fail("went on")


def assert_looks_again() -> None:
    """Assert that the alarm comes by itself, and more than once."""
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    assert 0 < left <= module._TICK_S
    assert interval == module._TICK_S


def test_the_alarm_comes_by_itself_and_ends_with_the_block() -> None:
    signals = Signals()
    with signals.watching(lambda: 0, 1000):
        assert_looks_again()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    signal.raise_signal(signal.SIGALRM)  # a late alarm has no effect


def test_ticks_come_at_their_time_and_end_with_the_block(clock: Clock) -> None:
    told: list[int] = []
    with Signals().ticking(lambda: told.append(1), 1000):
        assert_looks_again()
        for number in range(3):
            later(clock, 999)
            assert len(told) == number
            later(clock, 1)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    later(clock, 1000)  # a late alarm has no effect
    assert told == [1, 1, 1]


def test_what_a_tick_raises_ends_the_block_and_the_ticks(clock: Clock) -> None:
    def give_up() -> None:
        raise InputOutputError("nothing was taken")

    with pytest.raises(InputOutputError), Signals().ticking(give_up, 1000):
        later(clock, 1000)
        pytest.fail("went on")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    later(clock, 1000)


# A deadline.


def out_of_time() -> float:
    raise DowntimeError("-T is over")


def test_the_time_is_over_by_itself_and_ends_with_the_block(clock: Clock) -> None:
    signals = Signals()
    with signals.until(1000, out_of_time):
        assert_looks_again()
        later(clock, 999)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    later(clock, 1000)  # a late alarm has no effect
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with pytest.raises(DowntimeError), signals.until(3000, out_of_time):
        later(clock, 1001)
        pytest.fail("went on")


def test_another_thread_ends_the_time_and_only_within_the_block() -> None:
    signals = Signals()
    waking = threading.Thread(target=signals.wake)
    waking.start()  # before the first such block too
    waking.join()
    with pytest.raises(DowntimeError), signals.until(time.monotonic() + 1000, out_of_time):
        signals.wake()


def test_a_deferred_signal_raises_at_the_end_of_its_part() -> None:
    signals = Signals()
    done: list[str] = []
    with pytest.raises(Interrupted, match="SIGTERM"), signals.interruptible():
        with signals.deferred():
            signal.raise_signal(signal.SIGTERM)
            done.append("the part")
        done.append("the rest")
    assert done == ["the part"]
    with signals.deferred():  # outside an interruptible block nothing raises
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted), signals.interruptible():
        pass


def test_the_time_is_not_over_in_a_deferred_part(clock: Clock) -> None:
    signals = Signals()
    done: list[str] = []
    with pytest.raises(DowntimeError), signals.until(1000, out_of_time):
        with signals.deferred():
            later(clock, 1000)
            done.append("the part")
        later(clock, 1)
        pytest.fail("went on")
    assert done == ["the part"]


def test_a_time_that_is_over_already_is_over_at_once() -> None:
    with pytest.raises(DowntimeError), Signals().until(time.monotonic() - 1, out_of_time):
        time.sleep(60)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_who_does_not_give_up_is_asked_again(clock: Clock) -> None:
    asked: list[int] = []

    def give_up() -> float:
        asked.append(1)
        return 1000

    with Signals().until(2000, give_up):
        later(clock, 2000)
        later(clock, 999)
        assert asked == [1]
        later(clock, 1)
    assert asked == [1, 1]


def test_an_interrupt_is_raised_before_the_time_is_over() -> None:
    with pytest.raises(Interrupted), Signals().until(time.monotonic() + 1000, out_of_time):
        signal.raise_signal(signal.SIGINT)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_deferred_interrupt_is_told() -> None:
    signals = Signals()
    told: list[str] = []
    signals.on_deferred = told.append
    signal.raise_signal(signal.SIGTERM)
    assert told == ["SIGTERM"]
    with pytest.raises(Interrupted, match="SIGTERM"), signals.interruptible():
        pass
    signal.raise_signal(signal.SIGINT)
    signals.forget()
    with signals.interruptible():
        pass


def test_an_interrupt_is_raised_while_it_watches() -> None:
    signals = Signals()
    with pytest.raises(Interrupted, match="SIGINT"), signals.watching(lambda: 0, 1000):
        signal.raise_signal(signal.SIGINT)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_stop_is_ignored_from_the_pause_on() -> None:
    signals = Signals()
    signals.ignore_stops()
    for number in STOPS:
        assert signal.getsignal(number) == signal.SIG_IGN


class Helper(threading.Thread):
    """Sends a signal to the main thread once the main thread has filled a pipe."""

    def __init__(self, fd: int, number: signal.Signals, finish: threading.Event) -> None:
        super().__init__()
        self.fd, self.number, self.finish = fd, number, finish
        self.clock = Clock()
        self.sent = threading.Event()

    def run(self) -> None:
        wait_until_full(self.fd)
        self.clock.now_ns += 1000 * NS
        signal.pthread_kill(threading.main_thread().ident or 0, self.number)
        self.sent.set()
        # If the signal does not end the write within this time, the test fails, and does not hang.
        self.finish.wait(20)
        while os.read(self.fd, 1 << 20):
            pass


def blocked_write(
    points: AbstractContextManager[None],
    number: signal.Signals,
    finish: threading.Event,
    clock: Clock | None = None,
) -> None:
    """Write to a full pipe, and get a signal during the write, 1000 s later by the clock."""
    theirs, ours = os.pipe()
    helper = Helper(theirs, number, finish)
    helper.clock = clock or helper.clock
    helper.start()
    try:
        with points:
            os.write(ours, bytes(1 << 21))
    finally:
        finish.set()
        os.close(ours)
        helper.join()
        os.close(theirs)
        assert helper.sent.is_set()


def test_an_interrupt_ends_a_blocked_write() -> None:
    finish = threading.Event()
    with pytest.raises(Interrupted, match="SIGTERM"):
        blocked_write(Signals().interruptible(), signal.SIGTERM, finish)


def test_an_interrupt_that_came_just_before_the_write_ends_it() -> None:
    """Another thread takes it, so it does not end the call; its handler has only been marked."""
    theirs, ours = os.pipe()
    over = threading.Event()

    def interrupt() -> None:
        wait_until_full(theirs)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        if not over.wait(60):
            os.close(theirs)

    helper = threading.Thread(target=interrupt)
    helper.start()
    try:
        with pytest.raises(Interrupted, match="SIGTERM"), Signals().interruptible():
            os.write(ours, bytes(1 << 21))
    finally:
        over.set()
        helper.join()
        os.close(ours)
        with contextlib.suppress(OSError):
            os.close(theirs)


@pytest.mark.parametrize("limit", ["watching", "until", "ticking"])
def test_after_a_limit_of_time_within_a_block_it_ticks_again(limit: str) -> None:
    signals = Signals()
    limits: dict[str, AbstractContextManager[None]] = {
        "watching": signals.watching(lambda: 0, 1000),
        "until": signals.until(time.monotonic() + 1000, out_of_time),
        "ticking": signals.ticking(lambda: None, 1000),
    }
    with signals.interruptible():
        assert_looks_again()
        with limits[limit]:
            assert_looks_again()
        assert_looks_again()
        with signals.interruptible():
            pass
        assert_looks_again()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_standing_still_ends_a_blocked_write(clock: Clock) -> None:
    finish = threading.Event()
    with pytest.raises(InputOutputError, match="nothing was taken"):
        blocked_write(Signals().watching(lambda: 0, 1), signal.SIGALRM, finish, clock)


def test_the_end_of_the_time_ends_a_blocked_write(clock: Clock) -> None:
    finish = threading.Event()
    with pytest.raises(DowntimeError):
        blocked_write(Signals().until(1000, out_of_time), signal.SIGALRM, finish, clock)


def test_a_tick_that_raises_ends_a_blocked_write(clock: Clock) -> None:
    def give_up() -> None:
        raise InputOutputError("nothing was taken")

    finish = threading.Event()
    with pytest.raises(InputOutputError, match="nothing was taken"):
        blocked_write(Signals().ticking(give_up, 1000), signal.SIGALRM, finish, clock)


def test_a_tick_that_raises_nothing_does_not_end_a_blocked_write(clock: Clock) -> None:
    finish = threading.Event()
    blocked_write(Signals().ticking(finish.set, 1000), signal.SIGALRM, finish, clock)
    assert finish.is_set()


def test_a_report_does_not_end_a_blocked_write() -> None:
    signals = Signals()
    finish = threading.Event()
    signals.on_report = finish.set
    blocked_write(signals.interruptible(), signal.SIGUSR1, finish)
    assert finish.is_set()


@pytest.mark.parametrize("inner", ["watching", "ticking", "until"])
@pytest.mark.parametrize("outer", ["watching", "ticking", "until"])
def test_limits_of_time_do_not_nest(handlers: None, outer: str, inner: str) -> None:
    """There is one timer: the inner block would end the outer one's limit unseen."""
    signals = Signals()
    blocks = {
        "watching": lambda: signals.watching(lambda: 0, 1000),
        "ticking": lambda: signals.ticking(lambda: None, 1000),
        "until": lambda: signals.until(time.monotonic() + 1000, lambda: 1000.0),
    }
    with blocks[outer](), pytest.raises(InternalError, match="inside another"), blocks[inner]():
        pass
    with blocks[inner]():  # and after it, the timer is free again
        pass


def test_within_a_block_another_may_begin_and_end() -> None:
    signals = Signals()
    with pytest.raises(Interrupted), signals.interruptible():
        with signals.interruptible():
            pass
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on after the signal")


def test_after_an_exception_no_outer_block_raises() -> None:
    """What cleans up after an exception is not interrupted."""
    signals = Signals()
    with signals.interruptible():
        try:
            with signals.interruptible():
                raise ValueError
        except ValueError:
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_put_back_raises_in_the_next_block() -> None:
    signals = Signals()
    with pytest.raises(Interrupted), signals.interruptible():
        signal.raise_signal(signal.SIGTERM)
    signals.put_back()
    with pytest.raises(Interrupted, match="SIGTERM"), signals.interruptible():
        pass
    with signals.interruptible():
        pass


# Where the work waits for a hypervisor.


def test_a_wait_is_ended_by_a_signal_that_came_before_it() -> None:
    signals = Signals()
    signals.check()
    with pytest.raises(Interrupted, match="SIGTERM"), signals.at_waits():
        signal.raise_signal(signal.SIGTERM)  # raises nothing
        signals.check()
        pytest.fail("went on")
    signals.check()


def test_outside_of_such_a_block_a_wait_goes_on() -> None:
    signals = Signals()
    with signals.at_waits():
        pass
    signal.raise_signal(signal.SIGTERM)
    signals.check()


# A program that may be ended anywhere.


@pytest.mark.parametrize("number", INTERRUPTS)
def test_it_ends_once_with_a_hint(number: signal.Signals) -> None:
    end_early("nothing was begun")
    with ended(number) as errors:
        signal.raise_signal(number)
    for again in INTERRUPTS:
        signal.raise_signal(again)
    [error] = errors
    assert (str(error), error.hint) == (f"interrupted by {number.name}", "nothing was begun")
    assert error.status == 75
    assert not issubclass(Ended, Exception)  # no part of the program takes it for its own


def test_what_is_ignored_stays_ignored_by_both() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end_early("")
    signal.raise_signal(signal.SIGHUP)
    Interrupts()
    signal.raise_signal(signal.SIGHUP)


def test_during_its_short_act_it_says_what_came_and_then_ends_again() -> None:
    interrupts = Interrupts("nothing was changed")
    told: list[str] = []
    interrupts.ignore(told.append)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTSTP)
    assert told == ["SIGINT", "SIGTERM"]
    interrupts.obey()
    with ended(signal.SIGHUP):
        signal.raise_signal(signal.SIGHUP)


def test_at_its_end_nothing_ends_it_otherwise() -> None:
    ignore_all()
    for number in INTERRUPTS:
        signal.raise_signal(number)

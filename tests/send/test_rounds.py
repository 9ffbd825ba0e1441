"""The live rounds: however they end, and whenever a signal comes, the throttle has ended."""

from __future__ import annotations

import fcntl
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.base import Prepared
from bhystream.errors import GuestError, Interrupted
from bhystream.report import Console, Progress
from bhystream.send.job import Begun, SendJob
from bhystream.send.options import SendOptions
from bhystream.send.precopy import Limits, Round
from bhystream.send.rounds import Rounds
from bhystream.send.stopwatch import Stopwatch
from bhystream.send.throttle import Throttle
from bhystream.signals import Signals
from bhystream.stream.format import Feature, Form, Header
from bhystream.stream.writer import Writer
from support.memory_source import MemorySource
from support.waiting import until


class Guest(MemorySource):
    """A guest that stands while its vCPUs are suspended; `resume_fails` keeps it standing."""

    def __init__(self) -> None:
        super().__init__(4096)
        for page in range(self.npages):
            self.write(page, os.urandom(8))
        self.stands = False
        self.stops = 0
        self.resume_fails = False

    def suspend_vcpus(self) -> None:
        self.stands = True
        self.stops += 1

    def resume_vcpus(self) -> None:
        if self.resume_fails:
            raise GuestError("cannot resume: it is 'io-error'")
        self.stands = False


class Case:
    """The rounds of one guest, into a descriptor."""

    def __init__(self, base: Path, fd: int, limits: Limits) -> None:
        self.guest = Guest()
        self.signals = Signals()
        console = Console("bhysend")
        opts = SendOptions(guest="web1", limits=limits)
        parts: Any = (opts, base, console, self.signals, self.guest, None)
        job = SendJob(*parts)
        head = self.guest.head()
        begun = Begun(Writer(fd, Header(Form.PLAIN, Feature(0), os.urandom(16), 1)), None)
        progress = Progress(console, "web1", head.layout.npages)
        self.rounds = Rounds(job, head, begun, progress, Stopwatch(), Prepared({}))

    def throttled(self, then: Callable[[], None]) -> Callable[[Callable[[], None]], None]:
        """Return what stands in for the rounds: the throttle works, and then `then` is called."""

        def send_live(before_throttle: Callable[[], None]) -> None:
            self.rounds._throttle.set(90)
            until(lambda: self.guest.stops > 1, "the second stop")
            then()

        return send_live

    def assert_over(self) -> None:
        """Assert that the throttle's thread has ended, and that the guest runs."""
        thread = self.rounds._throttle._thread
        assert thread is not None and not thread.is_alive()
        assert not self.guest.stands


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    fd = os.open(os.devnull, os.O_WRONLY)
    made = Case(tmp_path, fd, Limits(downtime_ns=0, throttle=90))
    yield made
    made.rounds._throttle._is_over.set()
    os.close(fd)
    made.guest.close()


def test_a_signal_just_as_the_throttle_ends_waits_for_its_end(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = Throttle.__exit__

    def interrupted(self: Throttle, *args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        end(self, *args)

    monkeypatch.setattr(Throttle, "__exit__", interrupted)
    monkeypatch.setattr(case.rounds, "_send_live", case.throttled(lambda: None))
    case.rounds.precopy(lambda: None)
    case.assert_over()
    with pytest.raises(Interrupted), case.signals.interruptible():
        pass


def test_a_signal_in_the_rounds_ends_the_throttle(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_live = case.throttled(lambda: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(case.rounds, "_send_live", send_live)
    with pytest.raises(Interrupted):
        case.rounds.precopy(lambda: None)
    case.assert_over()


def test_no_signal_comes_between_the_record_and_the_throttle(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def before_throttle() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append("recorded")

    monkeypatch.setattr("bhystream.send.rounds.next_throttle", lambda *_: 50)
    with pytest.raises(Interrupted):
        case.rounds.precopy(before_throttle)
    assert done == ["recorded"]
    case.assert_over()


def test_a_move_that_ends_in_a_round_says_what_would_fit_too(case: Case) -> None:
    """As far as the rounds before it show that."""
    assert case.rounds._late().hint.endswith("pause it anyway with -f")
    first = Round(0, 10**9, 100, 0, 409_600, 10**9, 0)
    case.rounds._found = [first, first._replace(start_ns=10**9, end_ns=2 * 10**9)]
    assert case.rounds._late().hint.endswith("-f\n-d 1000ms would fit")


def test_a_throttle_that_fails_in_the_end_lets_nobody_pause_the_guest(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        case.guest.resume_fails = True

    monkeypatch.setattr(case.rounds, "_send_live", case.throttled(fail))
    with pytest.raises(GuestError, match="io-error"):
        case.rounds.precopy(lambda: None)


def test_a_throttle_that_fails_is_told_out_of_a_write_that_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest stands then, and -T may be hours away."""
    theirs, ours = os.pipe()
    case = Case(tmp_path, ours, Limits(time_ns=10**15, throttle=90))

    def fail_later() -> None:
        # The pipe takes no more than 16 pages, and the guest has 4096.
        until(lambda: fcntl.ioctl(theirs, termios.FIONREAD, bytes(4)) != bytes(4), "a write")
        case.guest.resume_fails = True

    def send_live(before_throttle: Callable[[], None]) -> None:
        case.rounds._throttle.set(90)
        failing = threading.Thread(target=fail_later)
        failing.start()
        try:
            case.rounds._transfer.round()
        finally:
            failing.join()

    monkeypatch.setattr(case.rounds, "_send_live", send_live)
    try:
        with pytest.raises(GuestError, match="io-error"):
            case.rounds.precopy(lambda: None)
    finally:
        os.close(theirs)
        os.close(ours)
        case.guest.close()


@pytest.mark.parametrize(("rounds", "is_mapped"), [(0, True), (2, False)])
def test_without_live_rounds_the_memory_is_mapped_before_the_pause(
    rounds: int, is_mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(os.devnull, os.O_WRONLY)
    made = Case(tmp_path, fd, Limits(rounds=rounds, finish=True))
    calls: list[None] = []
    monkeypatch.setattr(made.rounds._transfer, "map_touched", lambda: calls.append(None))
    made.rounds.precopy(lambda: None)
    os.close(fd)
    made.guest.close()
    assert bool(calls) == is_mapped

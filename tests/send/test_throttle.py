"""The throttle: however its block ends, the guest runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import cast

import pytest

from bhystream.backend.base import Source
from bhystream.errors import GuestError
from bhystream.send.throttle import Throttle
from support.clock import Clock
from support.waiting import until


class Guest:
    """A source whose vCPUs only note what was asked of them."""

    name = "web1"

    def __init__(self) -> None:
        self.stands = False
        self.stops = 0
        self.fails = ""
        self.on_stop: Callable[[], None] = lambda: None
        self.threads: set[int] = set()

    def suspend_vcpus(self) -> None:
        self.threads.add(threading.get_ident())
        self.stands = True
        self.stops += 1
        self.on_stop()
        if self.fails == "suspend":
            raise GuestError("cannot throttle it: it is 'shutdown'")

    def resume_vcpus(self) -> None:
        if self.fails == "resume":
            raise GuestError("cannot resume: it is 'shutdown'")
        self.stands = False


def throttle(guest: Guest) -> Throttle:
    return Throttle(cast(Source, guest), lambda: None)


def test_a_throttle_that_is_never_set_does_nothing() -> None:
    guest = Guest()
    with throttle(guest) as made:
        made.check()
    assert guest.stops == 0
    assert (made.percent, made.most, made.took_ns) == (0, 0, 0)


def test_the_vcpus_stand_again_and_again_and_run_at_the_end() -> None:
    guest = Guest()
    with throttle(guest) as made:
        made.set(90)
        until(lambda: guest.stops > 2, "the third stop")
        made.set(50)
    assert not guest.stands
    assert (made.percent, made.most) == (50, 90)
    assert made.took_ns > 0
    assert guest.threads != {threading.get_ident()} and len(guest.threads) == 1


def test_a_failure_lets_the_guest_run_at_once() -> None:
    guest = Guest()
    with pytest.raises(GuestError, match="the link"), throttle(guest) as made:
        made.set(99)
        until(lambda: guest.stands, "a stop")
        raise GuestError("the link broke")
    assert not guest.stands


def test_a_thread_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    guest = Guest()
    with pytest.raises(GuestError, match="guest web1: cannot throttle it: can't start new thread"):  # noqa: SIM117
        with throttle(guest) as made:
            made.set(50)
    assert guest.stops == 0


def test_a_guest_that_is_slow_to_stop_runs_the_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands from the beginning of the stop on, and never for more than its percent."""
    clock = Clock()
    guest = Guest()
    guest.on_stop = lambda: clock.sleep(3.0)
    waits: list[float] = []

    class Over(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return len(waits) > 3

    monkeypatch.setattr("bhystream.send.throttle.time", clock)
    made = throttle(guest)
    made.percent, made._is_over = 75, Over()
    working = threading.Thread(target=made._work)
    working.start()
    working.join()
    # It runs, stands, runs for a third of the stop, and would stand again.
    assert waits == pytest.approx([0.025, 0.075, 1.0, 0.075, 1.0])


@pytest.mark.parametrize("step", ["suspend", "resume"])
def test_what_stops_the_throttle_is_told(step: str) -> None:
    guest = Guest()
    guest.fails = step

    def is_told() -> bool:
        try:
            made.check()
        except GuestError as error:
            return "shutdown" in str(error)
        return False

    with pytest.raises(GuestError, match="shutdown"), throttle(guest) as made:
        made.set(99)
        until(is_told, "the failure")
    assert guest.stands == (step == "resume")
    assert guest.stops == 1

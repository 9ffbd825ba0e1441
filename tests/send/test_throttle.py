"""The throttle: however its block ends, the guest runs."""

from __future__ import annotations

import threading
from typing import cast

import pytest

from bhystream.backend.base import Source
from bhystream.errors import GuestError
from bhystream.send.throttle import Throttle
from support.waiting import until


class Guest:
    """A source whose vCPUs only note what was asked of them."""

    def __init__(self) -> None:
        self.stands = False
        self.stops = 0
        self.fails = ""
        self.threads: set[int] = set()

    def suspend_vcpus(self) -> None:
        self.threads.add(threading.get_ident())
        self.stands = True
        self.stops += 1
        if self.fails == "suspend":
            raise GuestError("cannot throttle it: it is 'shutdown'")

    def resume_vcpus(self) -> None:
        if self.fails == "resume":
            raise GuestError("cannot resume: it is 'shutdown'")
        self.stands = False


def throttle(guest: Guest) -> Throttle:
    return Throttle(cast(Source, guest))


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

    with throttle(guest) as made:
        made.set(99)
        until(is_told, "the failure")
    assert guest.stands == (step == "resume")
    assert guest.stops == 1

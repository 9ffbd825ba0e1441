"""What the next bhyrecv does with a guest that a killed bhyrecv has left, by its record."""

from __future__ import annotations

import pytest

from bhystream.errors import GuestError, InputOutputError
from bhystream.guest import DEAD, LOADED, READY, STARTED
from bhystream.handover import leftover
from bhystream.handover.state import Lock, Records
from support.recorded import A, B, Host


def sweep(host: Host, lock: str = "lock-1") -> None:
    leftover.sweep(host.base, host.roles["destination"], lock)


@pytest.mark.parametrize("phase", [READY, DEAD])
def test_a_guest_that_never_ran_is_dead_before_it_is_ended(host: Host, phase: str) -> None:
    host.record(phase)
    sweep(host)
    assert host.guest.asked == [("discard", DEAD), ("close", DEAD)]
    assert host.phases("destination") == [DEAD]


@pytest.mark.parametrize("phase", [STARTED, LOADED])
def test_a_guest_that_may_have_run_is_left_alone(host: Host, phase: str) -> None:
    host.record(phase)
    sweep(host)
    assert host.opened == []
    assert host.phases("destination") == [phase]


def test_another_guest_is_left_alone(host: Host) -> None:
    host.record(READY, B, lock="lock-2")
    sweep(host)
    assert host.opened == []
    assert host.phases("destination") == [READY]


def test_a_guest_whose_go_came_just_now_is_left_alone(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.record(READY)
    monkeypatch.setattr(Records, "change", lambda *_: False)
    sweep(host)
    assert host.opened == []


def test_one_whose_bhyrecv_lives_is_ended_by_it(host: Host) -> None:
    host.record(DEAD)
    with Lock(host.base, f"stream-{A}", "x"):
        sweep(host)
    assert host.guest.asked == []


def test_what_cannot_be_ended_is_in_the_way_and_no_error(host: Host) -> None:
    host.record(READY)
    host.error = GuestError("it is another guest")
    sweep(host)
    assert host.phases("destination") == [DEAD]


def test_a_tombstone_that_cannot_be_written_ends_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.record(READY)

    def full(*_: object) -> bool:
        raise InputOutputError("No space left on device")

    monkeypatch.setattr(Records, "change", full)
    with pytest.raises(InputOutputError, match="No space left"):
        sweep(host)
    assert host.opened == []

"""SIGTERM presses a guest's power button after a move, if it did so before, and only then."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from bhystream.backend.bhyve import powerbutton, restore
from bhystream.backend.bhyve.identity import POWER_BUTTON
from bhystream.backend.bhyve.restoredguest import RestoredGuest
from bhystream.backend.bhyve.sink import BhyveSink
from bhystream.errors import GuestError
from bhystream.guest import Json
from bhystream.standin.kernel import StandinHost

from .arriving import Arriving, arriving, hold, kill, process_of

pytestmark = pytest.mark.standin


@pytest.fixture
def guest() -> Iterator[Arriving]:
    with arriving() as made:
        yield made


def says(guest: Arriving, told: Json) -> None:
    """Let the HOST section say other things of the button."""
    host = {key: value for key, value in guest.head.host.items() if key != POWER_BUTTON}
    guest.head = guest.head._replace(host={**host, **told})


def started(guest: Arriving, *, late: bool = False) -> BhyveSink:
    sink = guest.sink()
    guest.build(sink, late=late)
    sink.start()
    sink.settle()
    guest.await_unbroken()
    return sink


def was_powered_off(guest: Arriving) -> bool:
    """Send SIGTERM; a guest that is powered off takes its VM with it."""
    [pid] = guest.processes()
    kill(pid, signal.SIGTERM)
    return not guest.there.host.exists("g")


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_the_button_moves_along(guest: Arriving, late: bool) -> None:
    assert guest.head.host[POWER_BUTTON] is True
    sink = started(guest, late=late)
    assert powerbutton.LOST not in sink.notices
    [pid] = guest.processes()
    assert guest.there.host.has_power_button(pid)
    assert was_powered_off(guest)


@pytest.mark.parametrize(
    "told", [{}, *({POWER_BUTTON: value} for value in (False, None, 1, "true", [True]))]
)
def test_a_guest_without_a_button_gets_none(guest: Arriving, told: Json) -> None:
    says(guest, told)
    sink = started(guest)
    assert powerbutton.LOST not in sink.notices
    assert not was_powered_off(guest)


def test_a_guest_moves_whose_button_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: StandinHost, pid: int) -> bool:
        raise GuestError("cannot run /bin/ps")

    monkeypatch.setattr(StandinHost, "has_power_button", refuse)
    with arriving() as guest:
        assert POWER_BUTTON not in guest.head.host
        monkeypatch.undo()
        started(guest)


def test_a_button_that_is_lost_is_told(guest: Arriving, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.there.settings(fail=["no-button"])
    monkeypatch.setattr(restore, "_CONNECT_S", 0.1)
    assert powerbutton.LOST in started(guest).notices
    assert not was_powered_off(guest)


def test_a_record_keeps_it(guest: Arriving) -> None:
    sink = guest.sink()
    assert sink.check(guest.head) == []
    record = dict(sink.record())
    assert RestoredGuest.from_json(record).has_power_button
    del record["has_power_button"]  # that of an older bhyrecv
    assert not RestoredGuest.from_json(record).has_power_button


def test_a_waiting_guest_has_it_before_it_is_released(guest: Arriving) -> None:
    held = hold(guest)
    try:
        assert held.is_connected
        assert guest.there.host.has_power_button(process_of(held).pid)
    finally:
        held.undo()

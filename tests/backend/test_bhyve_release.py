"""The release of a waiting bhyve: what a failure leaves, and whether the guest may have run."""

from __future__ import annotations

import calendar
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from bhystream.backend.bhyve import clocks, listening, waitingrestore
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.listening import listener, listens
from bhystream.backend.bhyve.waitingrestore import rtc_seconds
from bhystream.errors import GuestError
from bhystream.guest import State
from standin.rig import await_true

from .arriving import Arriving, again, arriving, fpu, hold, is_clean, kern, restore_of

SECOND = 10**9


@pytest.fixture
def guest() -> Iterator[Arriving]:
    with arriving() as made:
        yield made


def interrupt(*args: object) -> Any:
    raise KeyboardInterrupt


def test_a_restore_that_fails_never_ran_and_leaves_nothing(guest: Arriving) -> None:
    guest.there.settings(fail=["restore"])
    one = hold(guest)
    one.load([kern(guest)], fpu(guest))
    with pytest.raises(GuestError, match="bhyve -r: Failed to restore vhpet"):
        one.release()
    assert not one.may_have_run
    assert is_clean(guest)
    again(guest)


def test_a_restore_that_fails_with_its_socket_there_may_have_run(guest: Arriving) -> None:
    guest.there.settings(fail=["restore-late"])
    one = hold(guest)
    one.load([kern(guest)], fpu(guest))
    with pytest.raises(GuestError, match=r"bhyve -r: .*Unable to restore time"):
        one.release()
    assert one.may_have_run
    assert list((guest.base / "log").iterdir()) != []  # for the operator to read
    assert len(guest.started()) == 1


def test_a_restore_that_takes_too_long_is_ended_and_never_ran(guest: Arriving) -> None:
    guest.there.settings(fail=["slow-restore"])
    one = hold(guest)
    one.load([kern(guest)], fpu(guest))
    one.limit_s = 0.0
    with pytest.raises(GuestError, match="bhyve -r: the guest is not restored after"):
        one.release()
    assert not one.may_have_run
    assert is_clean(guest)


def test_a_slow_restore_is_waited_for(guest: Arriving) -> None:
    guest.there.settings(fail=["slow-restore"])
    one = hold(guest)
    one.load([kern(guest)], fpu(guest))
    thread = threading.Thread(target=one.release)
    thread.start()
    await_true(lambda: one.is_released, "the release")
    assert not listens(guest.there.host, "g")
    (guest.there.directory / "release").touch()
    thread.join(30)
    assert not thread.is_alive()
    guest.await_unbroken()


def test_an_interrupt_while_it_restores_ends_it(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.there.settings(fail=["slow-restore"])
    one = hold(guest)
    one.load([kern(guest)], fpu(guest))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(waitingrestore, "listens", interrupt)
        one.release()
    assert not one.may_have_run
    assert is_clean(guest)


def test_an_interrupt_when_its_socket_is_there_leaves_it_alone(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(host: Host, name: str) -> bool:
        if not (host.run_dir / name).exists():
            return False
        raise KeyboardInterrupt

    one = hold(guest)
    one.load([kern(guest)], fpu(guest))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(waitingrestore, "listens", late)
        one.release()
    assert one.may_have_run
    guest.await_unbroken()


def test_undo_may_be_done_twice_and_what_was_undone_is_held_again(guest: Arriving) -> None:
    made = restore_of(guest)
    made.hold(len(kern(guest))).undo()
    one = made.hold(len(kern(guest)))
    one.undo()
    one.undo()
    one.close()
    assert is_clean(guest)


# The clock chip.


@pytest.mark.parametrize("zone", ["UTC0", "XYZ-5:30", "ABC3"])
@pytest.mark.parametrize(
    ("keys", "is_local"),
    [
        ({}, True),
        ({"rtc.use_localtime": "true"}, True),
        ({"rtc.use_localtime": "false"}, False),
        ({"rtc.use_localtime": "no"}, False),
    ],
)
def test_the_clock_chip_gets_what_bhyve_gives_a_new_guest(
    monkeypatch: pytest.MonkeyPatch, zone: str, keys: dict[str, str], is_local: bool
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    now = 1_800_000_000
    wanted = calendar.timegm(time.localtime(now)) if is_local else now
    assert rtc_seconds(keys, now) == wanted
    monkeypatch.undo()
    time.tzset()


def test_the_clock_chip_is_set(guest: Arriving, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(
        "bhystream.standin.vm.StandinVm.set_rtc", lambda self, seconds: given.append(seconds)
    )
    one = hold(guest)
    one.load([kern(guest)], fpu(guest))
    one.release()
    one.set_clock()
    assert abs(given[0] - rtc_seconds({}, int(time.time()))) < 60


# Its other clocks.


def with_clock(states: Sequence[State], *clock: State) -> list[State]:
    """Return the states with another word on how long the clocks went on, or without one."""
    found = [state for state in states if state.name != clocks.STATE]
    assert len(found) == len(states) - 1, "the pause has saved no such state"
    return [*found, *clock]


@pytest.mark.parametrize("late", [False, True])
def test_the_clocks_are_not_moved_by_what_they_went_on_after_the_stop(
    guest: Arriving, *, late: bool
) -> None:
    sink = guest.sink()
    guest.build(sink, late=late, states=with_clock(guest.states, clocks.state_of(2 * SECOND)))
    assert sink.advance_clocks(5 * SECOND) == 3 * SECOND
    sink.start()
    guest.await_unbroken()
    assert sink.notices == []


def test_a_pause_that_is_shorter_moves_nothing_back(guest: Arriving) -> None:
    sink = guest.sink()
    guest.build(sink, states=with_clock(guest.states, clocks.state_of(2 * SECOND)))
    assert sink.advance_clocks(2 * SECOND) == 0
    sink.abort()
    assert "they went on for as long as the guest stands still" in sink.notices[0]


@pytest.mark.parametrize("ns", [0, SECOND])
def test_clocks_of_an_unknown_time_are_left(guest: Arriving, ns: int) -> None:
    """The stream has no time, or comes from a bhysend that did not say how long they went on."""
    sink = guest.sink()
    guest.build(sink, states=with_clock(guest.states) if ns else guest.states)
    assert sink.advance_clocks(ns) == 0
    sink.start()
    guest.await_unbroken()
    assert "they stand still" in sink.notices[0]


# Its socket.


def test_nobody_listens_where_there_is_no_socket(guest: Arriving) -> None:
    assert not listens(guest.there.host, "g")
    assert listener(guest.there.host, "g") is None


def test_a_socket_that_cannot_be_asked_does_not_mean_that_nobody_listens(guest: Arriving) -> None:
    (guest.there.host.run_dir / "g").symlink_to("g")
    for ask in (listens, listener):
        with pytest.raises(GuestError, match="guest g: cannot connect to its checkpoint socket"):
            ask(guest.there.host, "g")


def test_one_whose_queue_is_full_listens_and_cannot_be_told_apart(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = guest.there.start("h")
    guest.there.settings(fail=["hang"])
    opened: list[socket.socket] = []
    with pytest.raises(BlockingIOError):
        while len(opened) < 64:
            opened.append(socket.socket(socket.AF_UNIX))
            opened[-1].setblocking(False)
            opened[-1].connect(str(guest.there.directory / "run" / "h"))
    assert listens(guest.there.host, "h")
    monkeypatch.setattr(listening, "_PROBE_S", 0.1)
    with pytest.raises(GuestError, match="busy, or hangs"):
        listener(guest.there.host, "h")
    for one in opened:
        one.close()
    other.kill()

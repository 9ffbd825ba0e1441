"""How long a guest stands still: by both hosts' own clocks, or by their wall clocks."""

from __future__ import annotations

import time

import pytest

from bhystream.recv.standstill import Standstill
from bhystream.stream.format import Time

SECOND = 10**9
NOW = 1_800_000_000 * SECOND


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The monotonic clock and the wall clock, in ns."""
    found = {"monotonic": 5 * SECOND, "wall": NOW}
    monkeypatch.setattr(time, "monotonic_ns", lambda: found["monotonic"])
    monkeypatch.setattr(time, "time_ns", lambda: found["wall"])
    return found


def test_with_answers_both_hosts_have_measured(clock: dict[str, int]) -> None:
    """The wall clocks may differ by an hour."""
    standstill = Standstill(Time(NOW + 3600 * SECOND, 70), is_answered=True)
    clock["monotonic"] += 30
    clock["wall"] += 99
    assert (standstill.length_ns, standstill.measured_ns, standstill.here_ns) == (100, 100, 30)


def test_it_goes_on_until_its_end(clock: dict[str, int]) -> None:
    standstill = Standstill(Time(NOW, 70), is_answered=True)
    clock["monotonic"] += 30
    standstill.end()
    clock["monotonic"] += 1000
    assert (standstill.measured_ns, standstill.here_ns) == (100, 30)


def test_a_file_has_lain_there_for_a_day(clock: dict[str, int]) -> None:
    standstill = Standstill(Time(NOW - 86_400 * SECOND, 70), is_answered=False)
    clock["wall"] += 5
    assert standstill.length_ns == 86_400 * SECOND + 5


def test_a_wall_clock_that_is_behind_says_nothing(clock: dict[str, int]) -> None:
    assert Standstill(Time(NOW + 1, 70), is_answered=False).length_ns == 0


@pytest.mark.parametrize("is_answered", [False, True])
@pytest.mark.parametrize("paused", [None, Time(0, 0)])
def test_a_stream_without_a_time_says_nothing(
    clock: dict[str, int], paused: Time | None, is_answered: bool
) -> None:
    standstill = Standstill(paused, is_answered=is_answered)
    assert not standstill.is_measured
    assert standstill.length_ns == 0

"""The pre-copy policy, without a guest."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest

from bhystream.guest import PAGE_BYTES
from bhystream.send.precopy import (
    Decision,
    Limits,
    Round,
    bandwidth_bytes,
    decide,
    forecast,
    outlook,
)
from bhystream.units import NS

MS = 1_000_000
GO_ON, STOP, GIVE_UP = Decision.GO_ON, Decision.STOP, Decision.GIVE_UP
NPAGES = 1 << 20


def history(*rounds: tuple[int, int, int], zero: int = 0) -> list[Round]:
    """Return rounds that follow each other.

    rounds: (data pages, ms, ms of these in write(2)).  The bytes sent are those of the pages.
    """
    made, at = [], 0
    for pages, spent, writing in rounds:
        end = at + spent * MS
        made.append(Round(at, end, pages, zero, pages * PAGE_BYTES, writing * MS))
        at = end
    return made


# 100 000 pages in a second: one page takes 10 us, and 300 ms are 30 000 pages.
FULL = (100_000, 1000, 1000)


@pytest.mark.parametrize(
    ("rounds", "limits", "expected"),
    [
        pytest.param([FULL], Limits(), GO_ON, id="after-round-0"),
        pytest.param([(10, 1000, 1000)], Limits(), GO_ON, id="small-but-a-second-round-pays"),
        pytest.param([(0, 5, 0)], Limits(), STOP, id="nothing-to-send"),
        # 40 000 pages changed in 1000 ms; the next exposure is 400 ms: 16 000 pages.
        pytest.param([FULL, (40_000, 400, 400)], Limits(), STOP, id="converging"),
        pytest.param(
            [FULL, (40_000, 400, 400)], Limits(downtime_ns=159 * MS), GO_ON, id="just-too-many"
        ),
        pytest.param(
            [FULL, (40_000, 400, 400)], Limits(downtime_ns=160 * MS), STOP, id="just-few-enough"
        ),
        pytest.param([FULL, (90_000, 900, 900)], Limits(), GO_ON, id="not-yet"),
        pytest.param(
            [FULL, (90_000, 900, 900)], Limits(rounds=2), GIVE_UP, id="not-converging-at-r"
        ),
        pytest.param(
            [FULL, (90_000, 900, 900)], Limits(rounds=2, finish=True), STOP, id="forced-at-r"
        ),
        pytest.param(
            [FULL, (90_000, 900, 900)], Limits(rounds=3, finish=True), GO_ON, id="not-forced-early"
        ),
        pytest.param(
            [FULL, (90_000, 900, 900)], Limits(time_ns=1900 * MS), GIVE_UP, id="not-converging-at-T"
        ),
        pytest.param(
            [FULL, (90_000, 900, 900)],
            Limits(time_ns=1900 * MS, finish=True),
            STOP,
            id="forced-at-T",
        ),
        pytest.param(
            [FULL, (90_000, 900, 900)], Limits(time_ns=1900 * MS + 1), GO_ON, id="just-before-T"
        ),
        pytest.param(
            [FULL, (40_000, 400, 400)], Limits(time_ns=MS), STOP, id="after-T-but-it-fits"
        ),
        pytest.param([FULL], Limits(rounds=1), GIVE_UP, id="r1-too-large"),
        pytest.param([FULL], Limits(rounds=1, finish=True), STOP, id="r1-forced"),
        pytest.param([(20_000, 200, 200)], Limits(rounds=1), STOP, id="r1-fits"),
        pytest.param([FULL], Limits(rounds=1, downtime_ns=NS), STOP, id="r1-just-fits"),
        pytest.param([FULL], Limits(downtime_ns=NS), GO_ON, id="fits-but-a-round-is-left"),
        # -B at half the rate doubles the copy: 16 000 pages are 320 ms.
        pytest.param(
            [FULL, (40_000, 400, 400)],
            Limits(rate_bytes=50_000 * PAGE_BYTES),
            GO_ON,
            id="B-makes-it-longer",
        ),
        pytest.param(
            [FULL, (40_000, 400, 400)],
            Limits(rate_bytes=200_000 * PAGE_BYTES),
            STOP,
            id="B-above-the-rate",
        ),
        pytest.param([FULL, (0, 5, 0)], Limits(downtime_ns=0), STOP, id="idle-guest-with-d0"),
        pytest.param([FULL, (1, 5, 1)], Limits(downtime_ns=0), GO_ON, id="busy-guest-with-d0"),
    ],
)
def test_decisions(rounds: list[tuple[int, int, int]], limits: Limits, expected: Decision) -> None:
    made = history(*rounds)
    assert decide(made, NPAGES, limits, made[-1].end_ns) == expected


def test_compressed_pages_take_less() -> None:
    """A quarter of the bytes at a quarter of the rate takes the same time for a page."""
    plain = history(FULL, (40_000, 400, 400))
    packed = [one._replace(sent_bytes=one.sent_bytes // 4) for one in plain]
    assert outlook(packed, NPAGES, Limits()) == outlook(plain, NPAGES, Limits())


def test_lists_and_zero_pages_make_no_page_dearer() -> None:
    plain = history(FULL, (40_000, 400, 400))
    padded = [one._replace(sent_bytes=2 * one.sent_bytes) for one in plain]
    assert outlook(padded, NPAGES, Limits()).copy_ns == outlook(plain, NPAGES, Limits()).copy_ns / 2


def test_a_guest_of_zeros_stops_after_round_0() -> None:
    made = history((0, 5, 0), zero=NPAGES)
    assert decide(made, NPAGES, Limits(), made[-1].end_ns) == STOP


def test_pages_that_became_zero_count_as_change() -> None:
    # These pages cost no bytes now, but a page that changed once may hold bytes at the pause.
    made = [*history(FULL), Round(NS, 1400 * MS, 0, 40_000, 0, 0)]
    assert outlook(made, NPAGES, Limits()).last_pages == 16_000


def test_the_last_set_is_what_changes_during_the_last_round() -> None:
    view = outlook(history(FULL, (40_000, 400, 300)), NPAGES, Limits())
    assert view.last_pages == 16_000
    assert view.scan_ns == 100 * MS
    # 140 000 pages went out in 1300 ms of writing.
    assert view.copy_ns == 16_000 * 1300 * MS // 140_000


def test_after_round_0_all_pages_that_it_sent_are_expected() -> None:
    view = outlook(history(FULL, zero=7), NPAGES, Limits())
    assert (view.last_pages, view.copy_ns) == (100_000, NS)


def test_bandwidth_is_of_all_rounds() -> None:
    # The second round fitted into a pipe and took no time.
    made = history((1000, 100, 100), (1000, 1, 0))
    assert bandwidth_bytes(made, Limits()) == 2000 * PAGE_BYTES * 10


def test_bandwidth_is_unknown_before_anything_was_sent() -> None:
    assert bandwidth_bytes(history((0, 100, 100)), Limits()) == 0.0
    assert bandwidth_bytes(history((0, 100, 100)), Limits(rate_bytes=5)) == 0.0


def test_bandwidth_without_time_is_a_number() -> None:
    assert bandwidth_bytes(history((1, 1, 0)), Limits()) == PAGE_BYTES * NS


def test_bandwidth_is_never_above_the_limit() -> None:
    assert bandwidth_bytes(history(FULL), Limits(rate_bytes=12_345)) == 12_345


def test_zero_bandwidth_measured_stops_and_does_not_divide() -> None:
    made = history((0, 10, 0), (0, 10, 0))
    assert outlook(made, NPAGES, Limits()).copy_ns == 0
    assert decide(made, NPAGES, Limits(), made[-1].end_ns) == STOP


def random_history(rng: random.Random, npages: int) -> list[Round]:
    made, at = [], rng.randrange(10**12)
    for _ in range(rng.randint(1, 6)):
        data = rng.choice([0, 1, rng.randint(0, npages), npages])
        zero = rng.randint(0, npages - data)
        spent = rng.choice([0, 1, rng.randrange(10**11)])
        sent = data * PAGE_BYTES + rng.randrange(1000)
        made.append(Round(at, at + spent, data, zero, sent, rng.randint(0, spent)))
        at += spent
    return made


def random_limits(rng: random.Random) -> Limits:
    return Limits(
        downtime_ns=rng.choice([0, 1, 300 * MS, rng.randrange(10**12)]),
        rounds=rng.randint(1, 7),
        time_ns=rng.choice([0, 1, rng.randrange(10**12), 10**15]),
        finish=rng.random() < 0.5,
        rate_bytes=rng.choice([None, 1, rng.randrange(1, 10**10)]),
    )


def test_every_history_has_a_sane_outlook_and_decision(rng: random.Random) -> None:
    seen = set()
    for _ in range(5000):
        npages = rng.choice([1, 2, rng.randrange(1, 1 << 20), 1 << 36])
        made, limits = random_history(rng, npages), random_limits(rng)
        now = made[-1].end_ns - made[0].start_ns
        view = outlook(made, npages, limits)
        assert 0 <= view.last_pages <= npages
        assert view.copy_ns >= 0
        assert view.scan_ns >= 0
        got = decide(made, npages, limits, now)
        at_limit = len(made) >= limits.rounds or now >= limits.time_ns
        assert not (at_limit and got == GO_ON), (made, limits)
        assert not (limits.finish and got == GIVE_UP), (made, limits)
        assert not (got == GIVE_UP and not at_limit), (made, limits)
        if view.copy_ns > limits.downtime_ns and not (at_limit and limits.finish):
            assert got != STOP, (made, limits)
        seen.add((got, at_limit))
    # The cases have reached every decision.
    assert seen == {(GO_ON, False), (STOP, False), (STOP, True), (GIVE_UP, True)}


def one_link(found: Round, pages: int) -> Round:
    """Return the round with `pages` pages, over a link that takes 1 us for each page."""
    return found._replace(
        data_pages=pages, zero_pages=0, sent_bytes=pages * PAGE_BYTES, write_ns=pages * 1000
    )


def test_more_change_never_makes_a_shorter_pause(rng: random.Random) -> None:
    for _ in range(500):
        *made, last = [one_link(found, found.data_pages) for found in random_history(rng, 1000)]
        limits = random_limits(rng)
        counts = sorted(rng.randint(0, 1000) for _ in range(4))
        copies = [outlook([*made, one_link(last, n)], 1000, limits).copy_ns for n in counts]
        assert all(a <= b + 1 for a, b in pairwise(copies))  # allow 1 ns for rounding


# The forecast of a dry run.


@dataclass
class Link:
    """A guest that changes evenly, on a link that never falters."""

    pages: int
    dirty_bytes: float
    scan_ns: int
    rate: float

    def told(self, limits: Limits) -> tuple[int, int] | None:
        return forecast(self.pages, self.dirty_bytes, self.scan_ns, self.rate, limits)

    def moved(self, limits: Limits) -> int | None:
        """Let decide() drive the move; return the live rounds, None if given up."""
        if limits.rounds == 0:
            return 0
        made: list[Round] = []
        at, pending = 0, float(self.pages)
        while True:
            write_ns = pending * PAGE_BYTES * NS / self.rate
            end = at + self.scan_ns + int(write_ns)
            sent = int(pending * PAGE_BYTES)
            made.append(Round(at, end, int(pending), 0, sent, int(write_ns)))
            decision = decide(made, self.pages, limits, end)
            if decision != GO_ON:
                return len(made) if decision == STOP else None
            pending = min(self.dirty_bytes * (end - at) / NS / PAGE_BYTES, self.pages)
            at = end


GIB_PAGES = 1 << 18
GBIT = 10**9 / 8


@pytest.mark.parametrize(
    ("link", "limits", "expected"),
    [
        # 1 GiB at 125 MB/s takes 8590 ms; at 1 MB/s 8.6 MB change meanwhile, which take 69 ms.
        pytest.param(Link(GIB_PAGES, 1e6, 0, GBIT), Limits(), (2, 0), id="calm"),
        pytest.param(Link(GIB_PAGES, 0.0, 0, GBIT), Limits(), (2, 0), id="idle"),
        pytest.param(Link(0, 0.0, MS, GBIT), Limits(), (1, 0), id="nothing-to-send"),
        pytest.param(Link(GIB_PAGES, 2 * GBIT, 0, GBIT), Limits(), None, id="too-fast"),
        pytest.param(
            Link(GIB_PAGES, 2 * GBIT, 0, GBIT), Limits(finish=True), (30, 8589), id="forced"
        ),
        pytest.param(Link(GIB_PAGES, 2 * GBIT, 0, GBIT), Limits(rounds=0), (0, 8589), id="r0"),
        pytest.param(Link(GIB_PAGES, 0.0, 0, GBIT), Limits(rounds=1), None, id="r1-too-large"),
        pytest.param(Link(1000, 0.0, 0, GBIT), Limits(rounds=1), (1, 0), id="r1-fits"),
        pytest.param(Link(GIB_PAGES, 1e6, 0, GBIT), Limits(time_ns=NS), None, id="T-in-round-0"),
        # Each round is half as long as the one before: 8590 4295 2147 1074 537 268 ms.
        pytest.param(Link(GIB_PAGES, GBIT / 2, 0, GBIT), Limits(), (5, 268), id="halves"),
        pytest.param(
            Link(GIB_PAGES, GBIT / 2, 0, GBIT), Limits(rounds=4), None, id="halves-one-short"
        ),
    ],
)
def test_forecasts(link: Link, limits: Limits, expected: tuple[int, int] | None) -> None:
    told = link.told(limits)
    assert (told and (told[0], told[1] // MS)) == expected


def test_a_forecast_is_what_the_policy_then_does(rng: random.Random) -> None:
    converged = gave_up = 0
    for _ in range(2000):
        link = Link(
            pages=rng.randrange(1 << 12, 1 << 22),
            dirty_bytes=rng.choice([0.0, 10 ** rng.uniform(3, 11)]),
            scan_ns=rng.randrange(1, 10**9),
            rate=10 ** rng.uniform(6, 10),
        )
        limits = Limits(
            downtime_ns=rng.randrange(10 * MS, 10**10),
            rounds=rng.randint(0, 12),
            time_ns=int(10 ** rng.uniform(9, 13)),
            finish=rng.random() < 0.3,
        )
        told, moved = link.told(limits), link.moved(limits)
        if moved != (told[0] if told else None):
            # Rounding to pages and ns may change a case close to a limit, and no other case.
            nearby = [
                link.told(Limits(int(limits.downtime_ns * f), *_rest(limits, g)))
                for f in (0.99, 1.01)
                for g in (0.999, 1.001)
            ]
            assert moved in [t[0] if t else None for t in nearby], (link, limits, told, moved)
        converged += told is not None
        gave_up += told is None
    assert converged > 100
    assert gave_up > 100


def _rest(limits: Limits, factor: float) -> tuple[int, int, bool]:
    return limits.rounds, int(limits.time_ns * factor), limits.finish


def test_a_forecast_never_has_more_in_the_last_set_than_the_guest(rng: random.Random) -> None:
    for _ in range(500):
        link = Link(rng.randrange(1, 1 << 20), 10 ** rng.uniform(0, 15), rng.randrange(10**9), 1e8)
        told = link.told(Limits(finish=True, rounds=rng.randint(0, 5)))
        assert told is not None
        assert told[1] <= link.pages * PAGE_BYTES * NS / link.rate

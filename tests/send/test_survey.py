"""The measurement of a guest that runs on, over sparse files: its size and its changes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from bhystream.guest import PAGE_BYTES
from bhystream.send import survey as module
from bhystream.send.survey import Survey, places, survey
from bhystream.units import NS
from support.clock import Clock
from support.memory_source import MemorySource

SIZES = (500, 100, 400)
NPAGES = sum(SIZES)


@pytest.fixture
def source() -> Iterator[MemorySource]:
    made = MemorySource(*SIZES)
    yield made
    made.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of a survey: it passes, and the guest runs, only in sleep()."""
    made = Clock(now_ns=12345)
    monkeypatch.setattr(module, "time", made)
    return made


def test_a_survey_counts_pages(source: MemorySource, clock: Clock, rng: random.Random) -> None:
    data = set(rng.sample(range(NPAGES), 200))
    zeros = set(rng.sample(sorted(set(range(NPAGES)) - data), 50))
    for page in data:
        source.write(page, b"\1")
    for page in zeros:
        source.write(page, bytes(PAGE_BYTES))
    changed = set(rng.sample(sorted(data), 30))

    def run() -> None:
        for page in changed:
            source.write(page, b"\2")

    clock.on_sleep = run
    extents = sum(page - 1 not in changed for page in changed)
    found = survey(source, source.head())
    assert found == Survey(NPAGES, 250, 200, 30, extents, NS, 0, 0)
    assert found.dirty_bytes == 30 * PAGE_BYTES


def test_the_whole_guest_changing_is_one_place(source: MemorySource, clock: Clock) -> None:
    clock.on_sleep = lambda: source.fill(b"\1")
    found = survey(source, source.head())
    assert (found.data_pages, found.changed_pages, found.changed_extents) == (0, NPAGES, 1)


def test_places_are_runs_of_ones(rng: random.Random) -> None:
    for nwords in (0, 1, 2, 7, 64):
        for share in (0.0, 0.01, 0.5, 0.99, 1.0):
            bits = [rng.random() < share for _ in range(64 * nwords)]
            whole = sum(bit << at for at, bit in enumerate(bits)).to_bytes(8 * nwords, "little")
            runs = sum(bit and not (at and bits[at - 1]) for at, bit in enumerate(bits))
            assert places(memoryview(whole)) == runs


def test_every_other_page_is_a_place(clock: Clock) -> None:
    source = MemorySource(6000)

    def run() -> None:
        for page in range(0, 6000, 2):
            source.write(page, b"\1")

    clock.on_sleep = run
    try:
        assert survey(source, source.head()).changed_extents == 3000
    finally:
        source.close()


def test_the_scans_themselves_count_as_exposure(
    source: MemorySource, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pages change also while the first scan is under way.
    touched = source.touched

    def slow() -> Iterator[tuple[int, int]]:
        clock.now_ns += NS // 4
        return touched()

    monkeypatch.setattr(source, "touched", slow)
    found = survey(source, source.head())
    assert (found.exposure_ns, found.scan_ns) == (NS + NS // 4, NS // 4)
    assert found.scan_cpu_ns == NS // 4

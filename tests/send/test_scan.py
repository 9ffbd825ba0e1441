"""The last scan by several threads: the same pages as by one, in order, whatever fails."""

from __future__ import annotations

import random
import threading
from array import array
from collections.abc import Iterator

import pytest

from bhystream.guest import PAGE_BYTES
from bhystream.memory.page import PageHasher, find_changed
from bhystream.send import scan
from bhystream.send.scan import Piece, Scan, threads_for
from bhystream.send.spans import Span

NPAGES = (5000, 70, 1)


class Case:
    """Three segments, the table of what they held before, and which pages differ from it."""

    def __init__(self, rng: random.Random) -> None:
        self.hasher = PageHasher(7)
        total = sum(NPAGES)
        self.table = array("Q", bytes(8 * total))
        self.memory = [memoryview(bytearray(n * PAGE_BYTES)) for n in NPAGES]
        self.spans: list[Span] = []
        self.differs: set[int] = set()
        base = 0
        for segment, npages in enumerate(NPAGES):
            view = self.memory[segment]
            at = 0
            while at < npages:
                end = min(npages, at + rng.randrange(1, 1500))
                self.spans.append(Span(segment, base, at, end, rng.random() < 0.8))
                at = end
            for page in range(npages):
                view[page * PAGE_BYTES : page * PAGE_BYTES + 8] = rng.randbytes(8)
            hashes = array("Q", bytes(8 * npages))
            self.hasher.hash_pages(view, hashes)
            self.table[base : base + npages] = hashes
            for span in self.spans:
                if span.segment == segment and span.present:
                    for page in range(span.first, span.end):
                        if rng.random() < 0.1:
                            self.differs.add(base + page)
                            view[page * PAGE_BYTES] ^= 1
            base += npages

    def scan(self) -> Scan:
        return Scan(self.hasher, self.memory, memoryview(self.table), self.spans)


@pytest.fixture
def case(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(scan, "PIECE_PAGES", 100)
    return Case(rng)


def pages(found: Iterator[Piece]) -> tuple[list[tuple[int, int]], set[int]]:
    """Return the extents that were yielded, and the pages that were marked, in global pages."""
    extents, marked = [], set[int]()
    for piece in found:
        extents.append((piece.base_page + piece.first, piece.base_page + piece.end))
        bits = int.from_bytes(piece.bits, "little")
        assert piece.count == bits.bit_count()
        marked |= {
            piece.base_page + piece.first + bit
            for bit in range(piece.end - piece.first)
            if bits >> bit & 1
        }
        assert bits >> (piece.end - piece.first) == 0
    return extents, marked


@pytest.mark.parametrize("nthreads", [1, 2, 3, 8, 1000])
def test_every_page_that_differs_is_marked_and_no_other(case: Case, nthreads: int) -> None:
    extents, marked = pages(case.scan().changed(nthreads))
    assert marked == case.differs
    assert extents == sorted(extents)
    covered = [page for first, end in extents for page in range(first, end)]
    present = [
        span.base_page + page
        for span in case.spans
        if span.present
        for page in range(span.first, span.end)
    ]
    assert covered == present


def test_the_table_is_left_alone(case: Case) -> None:
    before = bytes(case.table)
    pages(case.scan().changed(3))
    assert bytes(case.table) == before


def test_nothing_to_scan_takes_no_thread(case: Case) -> None:
    case.spans = [Span(0, 0, 0, 10, False)]
    before = threading.active_count()
    assert pages(case.scan().changed(8)) == ([], set())
    assert threading.active_count() == before


@pytest.mark.parametrize("nthreads", [1, 4])
def test_what_a_thread_raises_comes_out(
    case: Case, nthreads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10**6))

    def find(*args: object) -> int:
        if next(calls) == 9:
            raise MemoryError
        return find_changed(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(scan, "find_changed", find)
    with pytest.raises(MemoryError):
        pages(case.scan().changed(nthreads))
    assert [one for one in threading.enumerate() if "_work" in one.name] == []


def test_a_scan_that_is_left_ends_its_threads(case: Case) -> None:
    found = case.scan().changed(4)
    next(found)
    found.close()
    assert [one for one in threading.enumerate() if "_work" in one.name] == []


@pytest.mark.parametrize(
    ("vcpus", "cpus", "threads"), [(1, 64, 1), (4, 64, 4), (8, 2, 2), (999, 999, 64), (0, 4, 1)]
)
def test_the_guests_vcpus_and_the_hosts_cpus_bound_the_threads(
    vcpus: int, cpus: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_cpus", lambda: cpus)
    assert threads_for(vcpus) == threads


def test_a_system_without_threads_left_scans_with_the_callers(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    _, marked = pages(case.scan().changed(4))
    assert marked == case.differs

"""The last scan by several threads: the same pages as by one, in order, whatever fails."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from bhystream.guest import PAGE_BYTES, Layout, Segment
from bhystream.memory.page import PageHasher, PageHashes, find_changed, mark_changed
from bhystream.send import scan, strides
from bhystream.send.scan import Piece, Scan
from bhystream.send.strides import bitmap, threads_for

NPAGES = (5000, 70, 1)
STARTS = (0, 5000, 5070)


class Case:
    """Three segments, the table of what they held before, and which pages differ from it."""

    def __init__(self, rng: random.Random) -> None:
        self.hasher = PageHasher(7)
        total = sum(NPAGES)
        self.layout = Layout(tuple(Segment(f"s{n}", None, n) for n in NPAGES))
        self.table = PageHashes(self.hasher, total)
        self.memory = [memoryview(bytearray(n * PAGE_BYTES)) for n in NPAGES]
        self.touched, every = bitmap(total), bitmap(total)
        every[:] = memoryview(b"\xff" * every.nbytes).cast("Q")
        # Differences where nothing was touched are not found: nothing is read there.
        runs = [rng.random() < 0.5 for _ in range(total // 200 + 1)]
        self.differs: set[int] = set()
        for base, npages, view in zip(STARTS, NPAGES, self.memory, strict=True):
            for page in range(npages):
                view[page * PAGE_BYTES : page * PAGE_BYTES + 8] = rng.randbytes(8)
            mark_changed(self.hasher, view, base, 0, npages, self.table, every, bitmap(total))
            for page in range(base, base + npages):
                is_touched = runs[page // 200] and rng.random() < 0.9
                self.touched[page >> 6] |= is_touched << (page & 63)
                if rng.random() < 0.1:
                    view[(page - base) * PAGE_BYTES] ^= 1
                    if is_touched:
                        self.differs.add(page)

    def scan(self) -> Scan:
        return Scan(self.hasher, self.memory, self.table, self.layout, self.touched)


@pytest.fixture
def case(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(scan, "PIECE_PAGES", 100)
    monkeypatch.setattr(scan, "_MAX_PIECE_PAGES", 300)
    return Case(rng)


def pages(found: Iterator[Piece]) -> tuple[list[tuple[int, int]], set[int]]:
    """Return the extents that were yielded, and the pages that were marked, in global pages."""
    extents, marked = [], set[int]()
    for piece in found:
        assert piece.base_page == STARTS[piece.segment]
        assert 0 <= piece.first < piece.end <= NPAGES[piece.segment]
        extents.append((piece.base_page + piece.first, piece.base_page + piece.end))
        bits = int.from_bytes(piece.bits, "little")
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
    assert [page for first, end in extents for page in range(first, end)] == [*range(sum(NPAGES))]


def test_a_piece_is_long_where_little_was_touched(case: Case) -> None:
    extents, _ = pages(case.scan().changed(1))
    lengths = {end - first for first, end in extents}
    assert max(lengths) == 300
    assert len(extents) < sum(NPAGES) / 100
    case.touched[:] = bitmap(sum(NPAGES))
    extents, marked = pages(case.scan().changed(1))
    assert marked == set()
    assert [end - first for first, end in extents[:17]] == [300] * 16 + [200]
    case.touched[:] = memoryview(b"\xff" * case.touched.nbytes).cast("Q")
    extents, _ = pages(case.scan().changed(1))
    assert [end - first for first, end in extents] == [100] * 50 + [70, 1]


def test_the_table_is_left_alone(case: Case) -> None:
    before = list(map(case.table.__getitem__, range(sum(NPAGES))))
    pages(case.scan().changed(3))
    assert list(map(case.table.__getitem__, range(sum(NPAGES)))) == before


def test_one_piece_takes_no_second_thread(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.layout = Layout((Segment("s", None, 10),))

    def start(_: threading.Thread) -> None:
        raise AssertionError("a thread was started")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert pages(case.scan().changed(8))[0] == [(0, 10)]


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
    ("vcpus", "cpus", "threads"),
    [(1, 64, 2), (4, 64, 5), (8, 2, 2), (999, 999, 64), (0, 4, 1), (1, 1, 1)],
)
def test_the_guests_vcpus_and_the_hosts_cpus_bound_the_threads(
    vcpus: int, cpus: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strides, "_cpus", lambda: cpus)
    assert threads_for(vcpus) == threads


def test_a_system_without_threads_left_scans_with_the_callers(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    _, marked = pages(case.scan().changed(4))
    assert marked == case.differs

"""The scan of a guest's memory: against XXH3 alone, with two threads, and of a sparse guest."""

from __future__ import annotations

import mmap
import os
import time
from array import array
from collections.abc import Callable, Iterator

from bhystream.guest import PAGE_BYTES, Layout, Segment
from bhystream.memory import hole
from bhystream.memory.batch import Batch
from bhystream.memory.page import PageHasher, PageHashes, mark_changed, mark_extents
from bhystream.send.head import write_head
from bhystream.send.scan import Scan
from bhystream.send.strides import bitmap
from bhystream.send.transfer import Transfer
from bhystream.stream.format import Feature, Form, Header
from bhystream.stream.writer import Writer

from .rows import Row, pairs, ratio_row
from .streams import Guest, memory_file

_STRIDE_PAGES = 1 << 15


def timed(act: Callable[[], object]) -> Callable[[], float]:
    """Return a function that does the act, and returns how many seconds it took."""

    def run() -> float:
        start = time.perf_counter()
        act()
        return time.perf_counter() - start

    return run


def measure(mib: int, turns: int) -> list[Row]:
    """Return the rows of an unchanged guest: one pass, and two threads against one."""
    npages = mib << 8
    hasher = PageHasher(0x0123456789ABCDEF)
    memory = mmap.mmap(-1, npages * PAGE_BYTES, flags=mmap.MAP_SHARED | mmap.MAP_ANON)
    block = os.urandom(1 << 20)
    for start in range(0, len(memory), len(block)):
        memory[start : start + len(block)] = block
    view = memoryview(memory)
    table, out = PageHashes(hasher, npages), array("Q", bytes(8 * npages))
    layout, touched = Layout((Segment("ram", None, npages),)), bitmap(npages)
    mark_extents([(0, npages)], touched)
    mark_changed(hasher, view, 0, 0, npages, table, touched, bitmap(npages))
    batch = Batch(hasher, 64, 1 << 12)

    def rescan() -> None:
        page = 0
        while page < npages:
            end = min(page + _STRIDE_PAGES, npages)
            page = batch.collect(view, 0, page, end, table, touched, False)

    def scan(nthreads: int) -> None:
        pieces = Scan(hasher, [view], table, layout, touched).changed(nthreads)
        if any(any(piece.bits) for piece in pieces):
            raise SystemExit("a page has changed")

    found = pairs(
        {
            "hash": timed(lambda: hasher.hash_pages(view, out)),
            "rescan": timed(rescan),
            "one": timed(lambda: scan(1)),
            "two": timed(lambda: scan(2)),
        },
        turns,
    )
    return [
        ratio_row("rescan, nothing changed: against XXH3", found["hash"], found["rescan"], 0.95),
        ratio_row("last scan: two threads against one", found["one"], found["two"], 1.6),
    ]


class Sparse(Guest):
    """A guest of which the touched pages are those that the file holds."""

    def __init__(self, fd: int, npages: int) -> None:
        super().__init__(fd, npages)
        self._fd = fd

    def touched(self) -> Iterator[tuple[int, int]]:
        """Ask the file, as the QEMU backend does."""
        yield from hole.data_extents(self._fd, 0, self.layout.size_bytes, ())


def sparse(big_gib: int, touched_mib: int, turns: int) -> list[Row]:
    """Return the rows of a big guest with some memory touched, against one of that size.

    The limit is what the kernel alone makes the big guest's pages cost more: it has to find and
    to map them.
    """
    rows: list[Row] = []
    small_pages, big_pages = touched_mib << 8, big_gib << 18
    dense = memory_file(small_pages * PAGE_BYTES, filled=True)
    for run, target in ((16, 1.2), (1, None)):
        fd = memory_file(big_pages * PAGE_BYTES)
        block = os.urandom(run * PAGE_BYTES)
        for first in range(0, big_pages, big_pages // (small_pages // run)):
            os.pwrite(fd, block, first * PAGE_BYTES)
        found = pairs(
            {
                "big": lambda fd=fd: _send(fd, big_pages),  # type: ignore[misc]
                "small": lambda: _send(dense, small_pages),
                "big touched": lambda fd=fd: _touch(fd, big_pages),  # type: ignore[misc]
                "small touched": lambda: _touch(dense, small_pages),
            },
            turns,
        )
        name = f"{big_gib} GiB, {touched_mib} MiB touched in runs of {4 * run} KiB"
        rows.append(
            ratio_row(
                f"{name}: against {touched_mib} MiB",
                found["big"],
                found["small"],
                target,
                at_most=True,
            )
        )
        limits = [
            small + big_touched - small_touched
            for small, big_touched, small_touched in zip(
                found["small"], found["big touched"], found["small touched"], strict=True
            )
        ]
        rows.append(ratio_row(f"{name}: its limit", limits, found["small"], None))
        os.close(fd)
    os.close(dense)
    return rows


def _send(fd: int, npages: int) -> float:
    """Send one round to a descriptor that takes everything; return how many seconds it took.

    Everything is mapped inside the clock, and unmapped outside.
    """
    with open(os.devnull, "wb", buffering=0) as sink:
        start = time.perf_counter()
        guest = Sparse(fd, npages)
        writer = Writer(sink.fileno(), Header(Form.PLAIN, Feature(0), os.urandom(16), 7))
        write_head(writer, guest.head())
        transfer = Transfer(guest, guest.layout, writer)
        transfer.round()
        return time.perf_counter() - start


def _touch(fd: int, npages: int) -> float:
    """Find the touched pages, and read a byte of each; return how many seconds it took."""
    start = time.perf_counter()
    guest = Sparse(fd, npages)
    [memory] = guest.memory()
    for first, end in guest.touched():
        bytes(memory[first * PAGE_BYTES : end * PAGE_BYTES : PAGE_BYTES])
    return time.perf_counter() - start

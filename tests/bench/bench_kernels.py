"""Compare the loops of bhystream with memcpy of the same bytes.

Every figure is the median of several turns, taken round robin so that a busy
neighbour hits all rows alike; the ratio is to memcpy in the same run.  Guest
memory is an anonymous mapping, and the receiver's file is in memory as well.

usage: python tests/bench/bench_kernels.py [MiB [turns]]
"""

from __future__ import annotations

import functools
import mmap
import os
import statistics
import struct
import sys
import tempfile
import time
from array import array
from collections.abc import Callable

from bhystream.memory.batch import Batch
from bhystream.memory.page import PageHasher, PageHashes, check_pages, mark_extents
from bhystream.memory.scatter import scatter
from bhystream.memory.xxh3 import find
from bhystream.send.strides import bitmap

PAGE = 4096
SEED = 0x0123456789ABCDEF
BATCHES = (16, 64, 256, 1024)


class Bench:
    """One guest of `npages` pages, and the buffers that the rows need."""

    def __init__(self, npages: int) -> None:
        self.npages = npages
        self.hasher = PageHasher(SEED)
        self.memory = self.map()
        block = os.urandom(1 << 20)
        for start in range(0, len(self.memory), len(block)):
            self.memory[start : start + len(block)] = block[: len(self.memory) - start]
        self.zeros = self.map()
        self.zeros[:] = bytes(len(self.zeros))
        self.touched = bitmap(npages)
        mark_extents([(0, npages)], self.touched)
        self.table, self.known = PageHashes(self.hasher, npages), PageHashes(self.hasher, npages)
        self.hashes = array("Q", bytes(8 * npages))
        self.hasher.hash_pages(self.memory, self.hashes)
        self.listed = memoryview(self.hashes).cast("B")
        self.batches = {n: Batch(self.hasher, n, 4 * n) for n in BATCHES}
        self.collect(64, self.memory, True, self.known)
        self.window = memoryview(bytearray(64 * PAGE))
        # The receiver writes its pages into this file, which is filled once, so that no
        # row pays for the allocation.
        self.fd, path = tempfile.mkstemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        os.unlink(path)
        for start in range(0, len(self.memory), len(block)):
            os.pwrite(self.fd, self.memory[start : start + len(block)], start)

    def map(self) -> memoryview:
        """Map anonymous memory that a child does not share."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANON
        return memoryview(mmap.mmap(-1, self.npages * PAGE, flags=flags))

    def memcpy(self) -> None:
        """Copy all memory through 256 KiB that stay in the cache, as a batch does."""
        view, window = self.memory, self.window
        for start in range(0, len(view), len(window)):
            piece = view[start : start + len(window)]
            window[: len(piece)] = piece

    def hash(self) -> None:
        self.hasher.hash_pages(self.memory, self.hashes)

    def collect(
        self, batch_pages: int, memory: memoryview, everything: bool, table: PageHashes
    ) -> None:
        """Walk all memory as bhysend does, but write nothing."""
        batch = self.batches[batch_pages]
        page = 0
        while page < self.npages:
            page = batch.collect(memory, 0, page, self.npages, table, self.touched, everything)
            batch.list_view()
            batch.clear()

    def rescan(self) -> None:
        self.collect(64, self.memory, False, self.known)

    def receive(self, check: bool = True) -> None:
        """Check and place all memory in sections of 64 pages, as bhyrecv does."""
        for page in range(0, self.npages, 64):
            n = min(64, self.npages - page)
            data = self.memory[page * PAGE : (page + n) * PAGE]
            # Bring the bytes into the cache first: bhyrecv has just read them from a pipe.
            self.window[: len(data)] = data
            pages = self.window[: len(data)]
            if check:
                assert check_pages(self.hasher, pages, self.listed[8 * page : 8 * (page + n)]) < 0
            extents = struct.pack("<QII", page, n, 0)
            scatter(self.fd, 0, 0, self.npages, extents, pages)


def measure(rows: dict[str, Callable[[], None]], turns: int) -> dict[str, float]:
    """Return the median seconds of each row; the first turn only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(turns + 1):
        for name in rows if turn % 2 else reversed(rows):
            start = time.perf_counter()
            rows[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bench_pages(npages: int, turns: int) -> None:
    bench = Bench(npages)
    rows: dict[str, Callable[[], None]] = {
        "memcpy into 256 KiB": bench.memcpy,
        "hash_pages": bench.hash,
    }
    for n in BATCHES:
        rows[f"collect everything, batch of {n}"] = functools.partial(
            bench.collect, n, bench.memory, True, bench.table
        )
    rows["collect everything, all zero"] = lambda: bench.collect(64, bench.zeros, True, bench.table)
    rows["rescan, nothing changed"] = bench.rescan
    rows["scatter"] = lambda: bench.receive(False)
    rows["check + scatter"] = bench.receive
    medians = measure(rows, turns)
    base = medians["memcpy into 256 KiB"]
    print(f"{npages >> 8} MiB, median of {turns}, {find().hash_name}")
    for name, seconds in medians.items():
        rate = npages * PAGE / seconds / 1e9
        print(f"{name:36} {rate:7.2f} GB/s {base / seconds:6.2f} x memcpy")


def main() -> None:
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    turns = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    bench_pages(mib << 8, turns)


if __name__ == "__main__":
    main()

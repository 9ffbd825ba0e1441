"""The last scan, on the CPUs that the paused guest does not use.

In the pause bhysend hashes every page that the guest has touched, and compares the
hashes with the table.  That is the only part of the pause that grows with the
guest's memory, and memory bandwidth is its limit, which one core alone does not
reach on most machines.  So the scan gets a thread for the CPU on which bhysend has
scanned so far, and one for each of the guest's vCPUs, which stand still, but no more
than the host has CPUs.

The pieces of memory are scanned by whichever thread is free, and handed on in the
order of the memory: the caller's thread sends the changed pages of a piece while the
other threads scan the pieces behind it.  The caller's thread scans too, as long as
pieces are left.  While the guest runs there is one thread: its vCPUs need the CPUs.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from bhystream import threads
from bhystream.guest import Layout
from bhystream.memory.page import PageHasher, PageHashes, count_bits, find_changed

# 32 MiB take some milliseconds: long against a switch of threads, short against a pause.
PIECE_PAGES = 8192
# A piece of a guest that has touched little holds more pages: its bits take 32 KiB.
_MAX_PIECE_PAGES = 32 * PIECE_PAGES


@dataclass(frozen=True)
class Piece:
    """A piece of a segment that was compared with the table, in pages of it: [first, end).

    base_page: the segment's first page, in global pages.  bits: words, bit 0 is the
    piece's first page; a bit is set if its page was touched and differs from the table.
    """

    segment: int
    base_page: int
    first: int
    end: int
    bits: memoryview


class Scan:
    """One scan of the memory of a paused guest."""

    def __init__(
        self,
        hasher: PageHasher,
        memory: Sequence[memoryview],
        table: PageHashes,
        layout: Layout,
        touched: memoryview,
    ) -> None:
        """memory: a view for each segment.  touched: a bit for each page of the guest.

        The pieces cover the guest; only the touched pages in them are read.  The memory
        does not change during the scan.  The caller may change the table only for pieces
        that changed() has yielded.
        """
        self._hasher = hasher
        self._memory = memory
        self._table = table
        self._touched = touched
        self._tasks = list(_pieces(layout, touched))
        # next() of a count is atomic, so no piece is scanned twice.
        self._next = itertools.count()
        self._is_over = False
        # No lock: a signal may raise in the caller's thread between any two steps.
        self._done: SimpleQueue[tuple[int, Piece | BaseException]] = SimpleQueue()

    def changed(self, nthreads: int) -> Generator[Piece, None, None]:
        """Scan with so many threads, the caller's among them; yield every piece, in order.

        Raises what a thread raises.  When the iterator is closed, the other threads
        have ended.
        """
        nthreads = min(nthreads, len(self._tasks))
        others = [threading.Thread(target=self._work) for _ in range(nthreads - 1)]
        found: dict[int, Piece | BaseException] = {}
        try:
            for thread in others:
                try:
                    threads.start(thread)
                except RuntimeError:  # a limit of the system: the caller's thread does the rest
                    break
            for index in range(len(self._tasks)):
                while index not in found:
                    mine = next(self._next)
                    if mine < len(self._tasks):
                        found[mine] = self._scan(mine)
                    else:
                        number, result = self._done.get()
                        found[number] = result
                piece = found.pop(index)
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self._is_over = True
            for thread in others:
                if thread.ident is not None:
                    thread.join()

    def _work(self) -> None:
        while not self._is_over and (index := next(self._next)) < len(self._tasks):
            try:
                self._done.put((index, self._scan(index)))
            except BaseException as raised:  # for the caller's thread
                self._done.put((index, raised))

    def _scan(self, index: int) -> Piece:
        segment, base, first, end = self._tasks[index]
        bits = memoryview(bytearray((end - first + 63) // 64 * 8)).cast("Q")
        find_changed(
            self._hasher,
            self._memory[segment],
            base,
            first,
            end,
            self._table,
            self._touched,
            bits,
        )
        return Piece(segment, base, first, end, bits)


def _pieces(layout: Layout, touched: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Yield (segment, its first global page, first, end) of pieces that cover the guest.

    A piece has PIECE_PAGES touched pages, or a few more, unless it would be too long
    or leave its segment.
    """
    for segment, (base, border) in enumerate(layout.extents()):
        first = at = base
        work = 0
        while at < border:
            end = min(at + PIECE_PAGES, border)
            work += count_bits(touched, at, end)
            at = end
            if work >= PIECE_PAGES or at - first >= _MAX_PIECE_PAGES or at == border:
                yield segment, base, first - base, at - base
                first, work = at, 0

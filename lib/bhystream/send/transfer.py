"""Rounds: the walk over a guest's memory that fills MEMORY sections.

The data flow of the sending side, all in one thread:

    mapping -> (compare with the hash table) -> copy -> hash the copy
            -> list + pages -> write(2) -> the pipe

and of the last round in the answered form, on Linux:

    mapping -> hash -> list -> write(2) -> the pipe
    mapping ---------- pages -> vmsplice(2) ---^

vmsplice(2) gives the pipe the guest's own pages instead of a copy, and moves them
several times as fast.  The reader then gets what the pages hold when it reads them.
So nothing may write to the pages before the destination has read them, which only
its answer tells: bhysend keeps the guest paused until then.  If the move fails first,
bhysend resumes the guest at once, and the destination finds pages that have changed
by their hashes; a destination that has not got GO starts nothing.  In the other forms
the guest may run before the last reader has read, so the pages are copied.

There is one thread, because a second one loses on small machines: measured with a
C prototype on two cores, a scanner or hasher thread beside the writer was slower in
every combination, because the two programs of a pipeline fill both cores.  The work
on a page costs about a tenth of the page's way through a pipe, and the Cython kernels
release the GIL, so a thread can still be added here if a machine shows a gain.

The batch is small (768 KiB of pages), so that a page is copied, hashed and written
while the page is in the second-level cache.

The hash table has 8 bytes for each page that was ever other than zero: the hash of the page
that the destination has, which is the page as it was last sent.  All other pages are the
zero page there.  The pages that a round reads are a bitmap, so that the loops take long
stretches of the guest in one call, however many pieces the guest has touched.  Table and
bitmap are the only memory here that grows with the guest.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from bhystream.backend.base import Readable
from bhystream.guest import PAGE_BYTES, Layout
from bhystream.memory.batch import Batch
from bhystream.memory.inplace import IN_PLACE_PAGES, PagesInPlace
from bhystream.memory.page import PageHasher, PageHashes, count_bits, mark_extents
from bhystream.send.precopy import Round
from bhystream.send.scan import Scan
from bhystream.send.strides import STRIDE_PAGES, bitmap, strides
from bhystream.stream import format as fmt
from bhystream.stream.format import Type
from bhystream.stream.writer import Writer
from bhystream.units import NS

if TYPE_CHECKING:
    from zstandard import ZstdCompressor

BATCH_PAGES = 192
HAS_VMSPLICE = hasattr(os, "splice")  # both are Linux's
# zstd saves more in a larger window, and the speed of zstd, not the cache, is the limit.
ZSTD_BATCH_PAGES = 256
# A zstd frame is sent if it saves more than a sixteenth; else the pages as they are.
_WORTH = 15 / 16


def _compressor(level: int) -> ZstdCompressor:
    # Most streams are not compressed, and do not pay for the import.
    import zstandard

    return zstandard.ZstdCompressor(level=level)


class Transfer:
    """The memory of one source, sent round by round.

    walked_pages: the pages looked at so far, in all rounds.  work_pages: two counts of
    the pages of this round that are read: how many are done, and how many there are.
    """

    def __init__(
        self,
        source: Readable,
        layout: Layout,
        writer: Writer,
        *,
        level: int | None = None,
        last_in_place: bool = False,
        on_batch: Callable[[int, int], None] = lambda done, pages: None,
    ) -> None:
        """Prepare to send; read nothing yet.  source and writer stay the caller's.

        level: the zstd level, 1 to 19, or None.  on_batch(done, sent): called after each section
        with the pages walked and sent in this round so far; what it raises ends the round.
        """
        self._source = source
        self._layout = layout
        self._writer = writer
        self._on_batch = on_batch
        self._zstd = _compressor(level) if level is not None else None
        self.npages = layout.npages
        self._hasher = PageHasher(writer.header.seed)
        pages = BATCH_PAGES if level is None else ZSTD_BATCH_PAGES
        self._batch = Batch(self._hasher, pages, fmt.MAX_EXTENTS)
        self._last_in_place = last_in_place and level is None and HAS_VMSPLICE
        self._table = PageHashes(self._hasher, self.npages)
        self._memory = source.memory()
        self.walked_pages = 0
        self.work_pages = (0, 0)

    def map_touched(self) -> None:
        """Map the touched pages here, so that reading them takes no page faults any more.

        The faults take longer than the hashes: without a live round, which maps the pages by
        reading them, this shortens the pause by 80 to 100 ms a GiB.
        """
        for first, end in self._source.touched():
            segment = self._layout.segment_of(first)
            base, memory = self._layout.starts[segment], self._memory[segment]
            for at in range(first - base, end - base, STRIDE_PAGES):
                stop = min(at + STRIDE_PAGES, end - base)
                bytes(memory[at * PAGE_BYTES : stop * PAGE_BYTES : PAGE_BYTES])

    def round(
        self, *, last: bool = False, rate_bytes: int | None = None, nthreads: int = 1
    ) -> Round:
        """Send one round: in the first round every page, later the pages that changed.

        last: the guest is paused.  rate_bytes: bytes per second that the round as a whole
        does not exceed.  nthreads: how many compare the pages of the last round with the
        table.  Raises InputOutputError, and what on_batch or a signal raises.
        """
        if last and self._last_in_place:
            self._batch = Batch(self._hasher, IN_PLACE_PAGES, fmt.MAX_EXTENTS, in_place=True)
        way = _UnderWay(self._writer, rate_bytes, self.npages)
        # This begins the log anew, so that round 0 looks at a page only afterwards.
        changed = self._source.changed()
        if changed is None or way.everything:
            changed = self._source.touched()
            way.absent = True
        self.work_pages = (0, mark_extents(changed, way.read))
        if last and way.absent and not way.everything and nthreads > 1:
            self._walk_scanned(way, nthreads)
        else:
            for segment, base, first, end in strides(self._layout):
                self._walk(way, segment, base, first, end)
        self._flush(way, self.npages)
        self._writer.round_end(way.data_pages, way.zero_pages, last=last)
        return way.over(self._writer.offset_bytes)

    def hashes(self) -> None:
        """Write the hash of every page, as the page is now.  Called after the last round.

        The guest is paused.  All touched pages are hashed anew, because the table cannot tell
        of a page that a round has missed.  The table is overwritten, so no round may follow.
        Raises what round() raises.
        """
        batch = Batch(self._hasher, fmt.MAX_HASHES, fmt.MAX_EXTENTS, in_place=True)
        touched = bitmap(self.npages)
        self.work_pages = (0, mark_extents(self._source.touched(), touched))
        for segment, base, first, end in strides(self._layout):
            at = first
            while at < end:
                before = at
                at = batch.collect(self._memory[segment], base, at, end, self._table, touched, True)
                done, total = self.work_pages
                self.work_pages = (done + count_bits(touched, base + before, base + at), total)
                if batch.full or base + at == self._layout.end_of(segment):
                    head = fmt.HASHES_HEAD.pack(batch.nextents, batch.npages)
                    self._writer.section(Type.HASHES, head + batch.list_view())
                    batch.clear()
                    self._on_batch(base + at, 0)

    def _walk_scanned(self, way: _UnderWay, nthreads: int) -> None:
        """Collect the pages of a paused guest, which several threads compare with the table."""
        scan = Scan(self._hasher, self._memory, self._table, self._layout, way.read)
        with contextlib.closing(scan.changed(nthreads)) as pieces:
            for piece in pieces:
                self._walk(way, piece.segment, piece.base_page, piece.first, piece.end, piece.bits)

    def _walk(
        self,
        way: _UnderWay,
        segment: int,
        base_page: int,
        first: int,
        end: int,
        bits: memoryview | None = None,
    ) -> None:
        """Collect pages of a segment, and write a section whenever a batch is full.

        bits: of a Piece that was scanned.
        """
        if segment != way.segment:  # a section has pages of one segment only
            self._flush(way, base_page)
            way.segment = segment
        at = first
        while at < end:
            before = at
            at = self._batch.collect(
                self._memory[segment],
                base_page,
                at,
                end,
                self._table,
                way.read,
                way.everything,
                absent=way.absent,
                bits=bits,
                origin=first,
            )
            self._count(way, base_page + before, base_page + at)
            if self._batch.full:
                self._flush(way, base_page + at)

    def _count(self, way: _UnderWay, first: int, end: int) -> None:
        """Count the global pages [first, end) as done."""
        npages = count_bits(way.read, first, end)
        self.walked_pages += end - first if way.absent else npages
        done, total = self.work_pages
        self.work_pages = (done + npages, total)

    def _flush(self, way: _UnderWay, done: int) -> None:
        """Write the batch as one MEMORY section, unless the batch is empty; keep to the rate.

        done: the global page up to which the round has walked.
        """
        batch = self._batch
        if not batch.nextents:
            return
        head = fmt.MEMORY_HEAD.pack(self._writer.rounds, batch.nextents, batch.npages, 0)
        payload = head + batch.list_view()
        start_ns, cpu_ns = time.monotonic_ns(), time.thread_time_ns()
        pages, flags = self._pages(way.segment)
        self._writer.section(Type.MEMORY, payload, flags=flags, body=pages)
        way.write_ns += time.monotonic_ns() - start_ns
        way.write_cpu_ns += time.thread_time_ns() - cpu_ns
        way.data_pages += batch.npages
        way.zero_pages += batch.nzero
        batch.clear()
        self._on_batch(done, way.data_pages)
        way.brake(self._writer.offset_bytes)

    def _pages(self, segment: int) -> tuple[memoryview | PagesInPlace, int]:
        """Return the pages of the batch, and the flags of their section."""
        batch = self._batch
        if batch.in_place:
            base = self._layout.starts[segment]
            extents = batch.list_view()[: batch.nextents * fmt.EXTENT.size]
            return PagesInPlace(self._memory[segment], base, extents, batch.npages), 0
        pages = batch.page_view()
        if self._zstd and len(pages):
            frame = self._zstd.compress(pages)
            if len(frame) < len(pages) * _WORTH:
                return memoryview(frame), fmt.FLAG_ZSTD
        return pages, 0


class _UnderWay:
    """One round under way: its counts, and the brake that keeps the round to its rate.

    everything: all pages are stated.  read: a bit for each page of the guest, set if
    the page is read.  absent: the other pages are zero; else they have not changed.
    """

    def __init__(self, writer: Writer, rate_bytes: int | None, npages: int) -> None:
        """Begin the round now.  writer: stands where the round begins.  npages: the guest's."""
        self.everything = writer.rounds == 0
        self.read = bitmap(npages)
        self.absent = False
        self.segment = 0  # where the pages of the batch lie
        self.write_ns = self.write_cpu_ns = self.data_pages = self.zero_pages = 0
        self._rate_bytes = rate_bytes
        self._start_bytes = writer.offset_bytes
        self._start_ns = time.monotonic_ns()
        self._start_cpu_ns = time.thread_time_ns()

    def brake(self, offset_bytes: int) -> None:
        """Sleep until the bytes up to this offset of the stream are due."""
        if not self._rate_bytes:
            return
        now_ns = time.monotonic_ns()
        sent_bytes = offset_bytes - self._start_bytes
        ahead_ns = sent_bytes * NS // self._rate_bytes - (now_ns - self._start_ns)
        if ahead_ns > 0:
            time.sleep(ahead_ns / NS)
            self.write_ns += time.monotonic_ns() - now_ns

    def over(self, offset_bytes: int) -> Round:
        """Return what the round has measured."""
        return Round(
            start_ns=self._start_ns,
            end_ns=time.monotonic_ns(),
            data_pages=self.data_pages,
            zero_pages=self.zero_pages,
            sent_bytes=offset_bytes - self._start_bytes,
            write_ns=self.write_ns,
            scan_ns=time.thread_time_ns() - self._start_cpu_ns - self.write_cpu_ns,
        )

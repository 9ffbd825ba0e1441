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

The batch is small (256 KiB of pages), so that a page is copied, hashed and written
while the page is in the second-level cache.

The hash table has 8 bytes per page: the hash of the page that the destination has,
which is the page as it was last sent, or else the zero page.  The table is the only
memory here that grows with the guest.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bhystream.backend.base import Readable
from bhystream.guest import Layout
from bhystream.memory.batch import Batch
from bhystream.memory.inplace import PagesInPlace
from bhystream.memory.page import PageHasher
from bhystream.send.precopy import Round
from bhystream.send.scan import Piece, Scan
from bhystream.send.spans import Span, spans
from bhystream.stream import format as fmt
from bhystream.stream.format import Type
from bhystream.stream.writer import Writer
from bhystream.units import NS

if TYPE_CHECKING:
    from zstandard import ZstdCompressor

BATCH_PAGES = 64
# Nothing passes through the sender's cache, and fewer sections cost less.
IN_PLACE_PAGES = 256
HAS_VMSPLICE = hasattr(os, "splice")  # both are Linux's
# zstd saves more in a larger window, and the speed of zstd, not the cache, is the limit.
ZSTD_BATCH_PAGES = 256
# The pages of one kernel call: this bounds how long a signal waits, and costs nothing.
_STRIDE_PAGES = 1 << 15
# A zstd frame is sent if it saves more than a sixteenth; else the pages as they are.
_WORTH = 15 / 16


def _compressor(level: int) -> ZstdCompressor:
    # Most streams are not compressed, and do not pay for the import.
    import zstandard

    return zstandard.ZstdCompressor(level=level)


class Transfer:
    """The memory of one source, sent round by round.

    walked_pages: the pages looked at so far, in all rounds.  work_pages: two counts of
    the pages of this round that may be other than zero: how many are done, and how many
    there are, as far as that is known.
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
        self._table = memoryview(bytearray(8 * self.npages)).cast("Q")
        self._hasher.fill(self._table, 0, self.npages)
        self._memory = source.memory()
        self.walked_pages = 0
        self.work_pages = (0, 0)

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
        everything = self._writer.rounds == 0
        way = _UnderWay(everything, rate_bytes, self._writer.offset_bytes)
        # The number of touched pages hardly changes from round to round: count them once.
        done, known = self.work_pages
        total = known or sum(end - first for first, end in self._source.touched())
        self.work_pages = (0, max(done, total))
        changed = self._source.changed()
        if everything or changed is None:
            found = spans(self._layout, self._source.touched())
        else:
            found = (span for span in spans(self._layout, changed) if span.present)
        if last and not everything and changed is None and nthreads > 1:
            self._walk_scanned(way, list(found), nthreads)
        else:
            for span in found:
                self._enter(way, span)
                self._walk(way, span)
        self._flush(way, self.npages)
        self._writer.round_end(way.data_pages, way.zero_pages, last=last)
        return way.over(self._writer.offset_bytes)

    def _enter(self, way: _UnderWay, span: Span) -> None:
        """Write the batch if the span is in another segment: a section has pages of one only."""
        if span.segment != way.segment:
            self._flush(way, span.base_page)
            way.segment = span.segment

    def _walk_scanned(self, way: _UnderWay, found: Sequence[Span], nthreads: int) -> None:
        """Collect the spans of a paused guest, which several threads compare with the table."""
        scan = Scan(self._hasher, self._memory, self._table, found)
        with contextlib.closing(scan.changed(nthreads)) as pieces:
            for span in found:
                self._enter(way, span)
                if not span.present:
                    self._walk(way, span)
                    continue
                at = span.first
                while at < span.end:
                    piece = next(pieces)
                    self._collect(way, piece)
                    at = piece.end

    def _collect(self, way: _UnderWay, piece: Piece) -> None:
        """Collect the changed pages of a piece that was scanned."""
        batch, memory, at = self._batch, self._memory[piece.segment], piece.first
        while piece.count and at < piece.end:
            at = batch.collect(
                memory, piece.base_page, at, piece.end, self._table, True, piece.bits, piece.first
            )
            if batch.full:
                self._flush(way, piece.base_page + at)
        self._count(piece.end - piece.first)

    def _count(self, npages: int) -> None:
        """Count pages of this round that were looked at, and may be other than zero."""
        self.walked_pages += npages
        done, total = self.work_pages
        self.work_pages = (done + npages, total)

    def _walk(self, way: _UnderWay, span: Span) -> None:
        """Collect one span, and write a section whenever a batch is full."""
        batch = self._batch
        at = span.first
        while at < span.end:
            before, end = at, min(at + _STRIDE_PAGES, span.end)
            if span.present:
                memory = self._memory[span.segment]
                at = batch.collect(memory, span.base_page, at, end, self._table, way.everything)
            else:
                at = batch.collect_absent(span.base_page, at, end, self._table, way.everything)
            if span.present:
                self._count(at - before)
            else:
                self.walked_pages += at - before
            if batch.full:
                self._flush(way, span.base_page + at)

    def _flush(self, way: _UnderWay, done: int) -> None:
        """Write the batch as one MEMORY section, unless the batch is empty; keep to the rate.

        done: the global page up to which the round has walked.
        """
        batch = self._batch
        if not batch.nextents:
            return
        head = fmt.MEMORY_HEAD.pack(self._writer.rounds, batch.nextents, batch.npages, 0)
        payload = head + batch.list_view()
        start_ns = time.monotonic_ns()
        pages, flags = self._pages(way.segment)
        self._writer.section(Type.MEMORY, payload, flags=flags, body=pages)
        way.write_ns += time.monotonic_ns() - start_ns
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
    """One round under way: its counts, and the brake that keeps the round to its rate."""

    def __init__(self, everything: bool, rate_bytes: int | None, start_bytes: int) -> None:
        """Begin the round now.  start_bytes: the stream's offset at which the round begins."""
        self.everything = everything
        self.segment = 0  # where the pages of the batch lie
        self.write_ns = self.data_pages = self.zero_pages = 0
        self._rate_bytes = rate_bytes
        self._start_bytes = start_bytes
        self._start_ns = time.monotonic_ns()

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
        )

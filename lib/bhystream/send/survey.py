"""The measurement of a guest that runs on: its size, and how fast its memory changes.

Two scans over the pages that the guest has touched, a second apart, give both.  Nothing is
paused.  Memory that the guest has never touched is not read, so that this memory stays
unallocated.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from bhystream.guest import PAGE_BYTES, Head
from bhystream.memory.page import PageHasher, PageHashes, mark_changed, mark_extents
from bhystream.send.head import new_seed
from bhystream.send.strides import bitmap, strides
from bhystream.units import NS

if TYPE_CHECKING:
    from bhystream.backend.base import Readable

_EXPOSURE_SECONDS = 1.0


class Survey(NamedTuple):
    """The result of two scans.

    touched_pages: allocated at the source.  data_pages: other than zero.
    changed_pages: changed between the scans, in changed_extents runs of pages.
    exposure_ns: from the start of one scan to that of the other.  scan_ns: the time
    that the second scan took.  scan_cpu_ns: the CPU time of it.
    """

    npages: int
    touched_pages: int
    data_pages: int
    changed_pages: int
    changed_extents: int
    exposure_ns: int
    scan_ns: int
    scan_cpu_ns: int

    @property
    def dirty_bytes(self) -> float:
        """Return the bytes that the guest changes per second."""
        return self.changed_pages * PAGE_BYTES * NS / max(self.exposure_ns, 1)


class _Scanner:
    """Repeated scans of one guest, against one hash table.  bits: the pages that changed."""

    def __init__(self, source: Readable, head: Head) -> None:
        self._source = source
        self._layout = head.layout
        self.npages = head.layout.npages
        self._memory = source.memory()
        self._hasher = PageHasher(new_seed())
        self._table = PageHashes(self._hasher, self.npages)
        self.bits = bitmap(self.npages)

    def scan(self) -> tuple[int, int]:
        """Return (touched pages, pages that differ from the last scan, or at first from zero)."""
        touched = bitmap(self.npages)
        npages = mark_extents(self._source.touched(), touched)
        changed = sum(
            mark_changed(
                self._hasher,
                self._memory[segment],
                base,
                first,
                end,
                self._table,
                touched,
                self.bits,
            )
            for segment, base, first, end in strides(self._layout)
        )
        return npages, changed

    def clear(self) -> None:
        """Forget which pages changed."""
        self.bits = bitmap(self.npages)


def places(bits: memoryview) -> int:
    """Count the runs of ones in a bitmap of little-endian words.

    A run begins at each one above a zero.  With all bits in one integer, the count takes
    20 ms for a guest of 64 GiB, whose scan takes seconds.
    """
    ones = int.from_bytes(bits, "little")
    return (ones & ~(ones << 1)).bit_count()


def survey(source: Readable, head: Head) -> Survey:
    """Scan the guest twice, which takes a second and the time of the scans.

    Raises what the methods of Readable raise.
    """
    scanner = _Scanner(source, head)
    first_ns = time.monotonic_ns()
    _, data = scanner.scan()
    scanner.clear()
    time.sleep(_EXPOSURE_SECONDS)
    second_ns, second_cpu_ns = time.monotonic_ns(), time.thread_time_ns()
    touched, changed = scanner.scan()
    return Survey(
        npages=scanner.npages,
        touched_pages=touched,
        data_pages=data,
        changed_pages=changed,
        changed_extents=places(scanner.bits),
        exposure_ns=second_ns - first_ns,
        scan_ns=time.monotonic_ns() - second_ns,
        scan_cpu_ns=time.thread_time_ns() - second_cpu_ns,
    )

"""The guest's memory in the pieces and the order of a round, and how many threads scan them."""

from __future__ import annotations

import os
from collections.abc import Iterator

from bhystream.guest import Layout

# The pages of one kernel call: this bounds how long a signal waits, and costs nothing.
STRIDE_PAGES = 1 << 15
_MAX_THREADS = 64


def strides(layout: Layout) -> Iterator[tuple[int, int, int, int]]:
    """Yield (segment, its first global page, first, end): the guest in pieces, in order.

    first, end: counted from the segment's first page.  One kernel call takes one piece.
    """
    for segment, (base, border) in enumerate(layout.extents()):
        for first in range(0, border - base, STRIDE_PAGES):
            yield segment, base, first, min(first + STRIDE_PAGES, border - base)


def bitmap(npages: int) -> memoryview:
    """Return words with a bit for each page, all clear."""
    return memoryview(bytearray(8 * (npages // 64 + 1))).cast("Q")


def threads_for(vcpus: int) -> int:
    """Return how many threads scan the memory of a paused guest with so many vCPUs."""
    return min(vcpus + 1, _cpus(), _MAX_THREADS)


def _cpus() -> int:
    """Return how many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""The lists of extents in MEMORY and HASHES sections: what their readers check."""

from __future__ import annotations

from typing import NamedTuple

from bhystream.errors import FormatError
from bhystream.guest import Layout
from bhystream.memory.extent import EXTENT, KIND_DATA, KIND_ZERO


class Counted(NamedTuple):
    """What a list states: its segment, the page after its last, and the pages of each kind."""

    segment: int
    end: int
    data_pages: int
    zero_pages: int


def count(layout: Layout, extents: memoryview, cursor: int, gapless: str = "") -> Counted:
    """Check the list of one section, and count its pages.  Raises FormatError.

    extents: at least one, packed.  cursor: the page after the last one that an earlier
    section has stated.  gapless: who must not leave out a page, "" if pages may be left out.
    """
    first = int.from_bytes(extents[:8], "little")
    if first >= layout.npages:
        raise FormatError(f"page {first} is outside the guest's {layout.npages} pages")
    segment = layout.segment_of(first)
    segment_end = layout.end_of(segment)
    data = zero = 0
    for first, npages, kind in EXTENT.iter_unpack(extents):
        if first < cursor:
            raise FormatError(f"page {first} is stated again, or out of order")
        if first != cursor and gapless:
            raise FormatError(f"{gapless} leaves out page {cursor}")
        if npages == 0:
            raise FormatError(f"the extent at page {first} is empty")
        cursor = first + npages
        if cursor > segment_end:
            raise FormatError(f"the extent at page {first} leaves its segment")
        if kind == KIND_DATA:
            data += npages
        elif kind == KIND_ZERO:
            zero += npages
        else:
            raise FormatError(f"the extent at page {first} is of kind {kind}")
    return Counted(segment, cursor, data, zero)


def nth_page(extents: memoryview, n: int) -> int:
    """Return the page number of the n-th DATA page of a list."""
    for first, npages, kind in EXTENT.iter_unpack(extents):
        if kind == KIND_DATA:
            if n < npages:
                return int(first) + n
            n -= npages
    return -1

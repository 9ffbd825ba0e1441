"""Where the pages of one segment go: a file, or the memory of a waiting guest.

Both are a base.Target.  A page of zeros becomes a hole in the file; in a mapping
it is left alone unless it was written before.  So memory that the guest never
used is not allocated here.
"""

from __future__ import annotations

from bhystream.guest import PAGE_BYTES
from bhystream.memory.extent import EXTENT, KIND_ZERO
from bhystream.memory.hole import punch
from bhystream.memory.scatter import scatter, scatter_into


class FileTarget:
    """A segment in a file, its first page at offset_bytes.  fd stays the caller's."""

    def __init__(self, fd: int, offset_bytes: int) -> None:
        self.fd = fd
        self.offset_bytes = offset_bytes

    def place(self, base_page: int, npages: int, extents: memoryview, pages: memoryview) -> None:
        """Place pages as base.Target says.  Raises OSError, ValueError."""
        scatter(self.fd, self.offset_bytes, base_page, npages, extents, pages)
        for first, count, kind in EXTENT.iter_unpack(extents):
            if kind == KIND_ZERO:
                start = self.offset_bytes + (first - base_page) * PAGE_BYTES
                punch(self.fd, start, count * PAGE_BYTES)


class MappedTarget:
    """A segment in a mapping, which is all zero at first.

    A bit for each page tells whether it was placed: only such a page is made zero.
    """

    def __init__(self, memory: memoryview) -> None:
        """memory: writable bytes, the whole segment; this object's until release()."""
        self._memory = memory
        nwords = (len(memory) // PAGE_BYTES + 63) // 64
        self._placed = memoryview(bytearray(nwords * 8)).cast("Q")

    def place(self, base_page: int, npages: int, extents: memoryview, pages: memoryview) -> None:
        """Place pages as base.Target says.  Raises ValueError."""
        if npages * PAGE_BYTES != len(self._memory):
            raise ValueError(f"{npages} pages are not the segment of {len(self._memory)} bytes")
        scatter_into(self._memory, self._placed, base_page, extents, pages)

    def release(self) -> None:
        """Release the view of the mapping."""
        self._memory.release()

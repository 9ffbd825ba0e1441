"""Where the pages of one segment go: a file, or the memory of a guest that waits.

Both are base.Target.  A page of zeros becomes a hole, or is left as it was
when nobody had written it: what the guest never used takes no memory here.
"""

from __future__ import annotations

from bhystream.guest import PAGE_BYTES
from bhystream.memory.extent import EXTENT, KIND_ZERO
from bhystream.memory.hole import punch
from bhystream.memory.page import scatter, scatter_into


class FileTarget:
    """A segment in a file, its first page at offset_bytes.  The descriptor is the caller's."""

    def __init__(self, fd: int, offset_bytes: int) -> None:
        self.fd = fd
        self.offset_bytes = offset_bytes

    def place(self, base_page: int, npages: int, extents: memoryview, pages: memoryview) -> None:
        """As base.Target's."""
        scatter(self.fd, self.offset_bytes, base_page, npages, extents, pages)
        for first, count, kind in EXTENT.iter_unpack(extents):
            if kind == KIND_ZERO:
                start = self.offset_bytes + (first - base_page) * PAGE_BYTES
                punch(self.fd, start, count * PAGE_BYTES)


class MappedTarget:
    """A segment in a mapping, which is all zero at first.

    Costs a bit a page: only a page that came before is made zero again.
    """

    def __init__(self, memory: memoryview) -> None:
        """memory: bytes, writable, the whole segment; ours until release()."""
        self._memory = memory
        nwords = (len(memory) // PAGE_BYTES + 63) // 64
        self._placed = memoryview(bytearray(nwords * 8)).cast("Q")

    def place(self, base_page: int, npages: int, extents: memoryview, pages: memoryview) -> None:
        """As base.Target's."""
        if npages * PAGE_BYTES != len(self._memory):
            raise ValueError(f"{npages} pages are not the segment of {len(self._memory)} bytes")
        scatter_into(self._memory, self._placed, base_page, extents, pages)

    def release(self) -> None:
        """Give up the mapping."""
        self._memory.release()

"""Where the pages of one segment go: base.Target over a file."""

from __future__ import annotations

from bhystream import format as fmt
from bhystream.backend.base import PAGE_BYTES
from bhystream.hole import punch
from bhystream.page import scatter


class FileTarget:
    """base.Target over a file, whose holes are its zero pages."""

    def __init__(self, fd: int, offset_bytes: int) -> None:
        """fd: the caller's.  offset_bytes: of the segment's first page."""
        self.fd = fd
        self.offset_bytes = offset_bytes

    def place(self, base_page: int, npages: int, extents: memoryview, pages: memoryview) -> None:
        """Write the pages of the DATA extents, punch those of the ZERO extents."""
        scatter(self.fd, self.offset_bytes, base_page, npages, extents, pages)
        for first, count, kind in fmt.EXTENT.iter_unpack(extents):
            if kind == fmt.KIND_ZERO:
                start = self.offset_bytes + (first - base_page) * PAGE_BYTES
                punch(self.fd, start, count * PAGE_BYTES)

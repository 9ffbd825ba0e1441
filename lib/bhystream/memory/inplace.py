"""The pages of one MEMORY section, sent from where they are, without a copy.

Only for memory that nobody writes to before the destination has answered: see
splice.pyi.  Where vmsplice(2) does not work, write(2) takes the same pages, and
copies them.
"""

from __future__ import annotations

import errno
import os

from bhystream.guest import PAGE_BYTES
from bhystream.memory.extent import EXTENT, KIND_DATA
from bhystream.memory.splice import splice_pages

# No pipe; another system; pages that the kernel gives to no pipe; a filter of system calls.
_UNABLE = frozenset({errno.EBADF, errno.ENOSYS, errno.EINVAL, errno.EFAULT, errno.EPERM})
_MAX_PARTS = 1024  # IOV_MAX


class PagesInPlace:
    """The DATA pages of a list of extents, in the mapping of their segment."""

    def __init__(
        self, segment: memoryview, base_page: int, extents: memoryview, npages: int
    ) -> None:
        """Take the arguments of splice_pages(); npages: how many DATA pages there are."""
        self._segment = segment
        self._base_page = base_page
        self._extents = extents
        self._npages = npages

    def __len__(self) -> int:
        """Return the bytes."""
        return self._npages * PAGE_BYTES

    def write(self, fd: int, start_bytes: int) -> int:
        """Give the pages to a descriptor, from this byte on; return how many bytes it has taken.

        Raises OSError.
        """
        try:
            return splice_pages(fd, self._segment, self._base_page, self._extents, start_bytes)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
        return os.writev(fd, self._parts(start_bytes))

    def _parts(self, skip_bytes: int) -> list[memoryview]:
        parts: list[memoryview] = []
        for first, count, kind in EXTENT.iter_unpack(self._extents):
            nbytes = count * PAGE_BYTES
            if kind != KIND_DATA:
                continue
            if skip_bytes >= nbytes:
                skip_bytes -= nbytes
                continue
            at = (first - self._base_page) * PAGE_BYTES
            parts.append(self._segment[at + skip_bytes : at + nbytes])
            skip_bytes = 0
            if len(parts) == _MAX_PARTS:
                break
        return parts

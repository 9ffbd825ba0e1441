"""The pages of one MEMORY section, sent from where they are, without a copy.

Only for memory that nobody writes to before the destination has answered: see
splice.pyi.
"""

from __future__ import annotations

from bhystream.guest import PAGE_BYTES
from bhystream.memory.splice import splice_pages

# The pages of a section.  Nothing passes through the sender's cache, and fewer sections cost
# less: 512 pages were 1.07 times as fast as 256 into allocated memory, and 1.04 times into other.
# 1024 were no faster: the pipe runs empty while so many pages are hashed.
#
# In the answered form without zstd, a destination takes a section of so many pages for one that
# was sent in place: see recv/placing.py.
IN_PLACE_PAGES = 512


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
        return splice_pages(fd, self._segment, self._base_page, self._extents, start_bytes)

"""Collect changed pages into what one MEMORY section carries.

Buffers, the table, and what is raised for wrong arguments: see page.pyi.
"""

from typing import final

from typing_extensions import Buffer

from bhystream.memory.page import PageHasher

@final
class Batch:
    """The list and the pages of one MEMORY section, filled page by page.

    Fill it with collect() and collect_absent(), write list_view() and
    page_view(), clear() it.  Pages are added in ascending order, also over
    calls; neighbours of one kind share an extent, also over calls and over the
    border of two segments.

    Memory is taken once: max_pages * 4104 + max_extents * 32 bytes, touched
    only as far as it is used.  64 pages or more run at full speed; up to 256
    the pages are still in the second-level cache when they are written.

    Not for two threads at once: a call during a collect raises ValueError.
    """

    def __init__(
        self,
        hasher: PageHasher,
        max_pages: int,
        max_extents: int,
        max_count: int = 0xFFFFFFFF,
    ) -> None:
        """Make an empty batch.

        max_pages: DATA pages; max_extents: extents of either kind; max_count:
        pages of one extent.  Each within [1, 2**32 - 1].  Raises OSError if
        there is no such amount of memory.
        """

    @property
    def max_pages(self) -> int: ...
    @property
    def max_extents(self) -> int: ...
    @property
    def npages(self) -> int:
        """The DATA pages held."""

    @property
    def nextents(self) -> int:
        """The extents held, of both kinds."""

    @property
    def nzero(self) -> int:
        """The pages stated as ZERO."""

    @property
    def full(self) -> bool:
        """Whether max_pages are held or an extent found no room."""

    def collect(
        self,
        segment: Buffer,
        base_page: int,
        first: int,
        end: int,
        table: Buffer,
        everything: bool,
    ) -> int:
        """Add the pages [first, end) of a segment that the destination needs.

        segment: bytes, the segment's memory, which may change meanwhile;
        first, end: counted from its first page, which is the guest's page
        `base_page`.  everything: round 0, all pages are added.  Otherwise
        those whose hash differs from the table.  A page that is zero is added
        to a ZERO extent, any other is copied, and its copy hashed.  The table
        follows what was added.

        Returns the first page not handled: `end`, or less if the batch is
        full.  Raises ValueError also for a page before the last one held.
        Releases the GIL.
        """

    def collect_absent(
        self, base_page: int, first: int, end: int, table: Buffer, everything: bool
    ) -> int:
        """Add pages that are holes at the source, without reading them.

        As collect(): everything, or those whose table entry is not zero_hash,
        become ZERO extents, their entries zero_hash.  Holding max_pages does
        not stop it, having no room for an extent does.  Releases the GIL.
        """

    def list_view(self) -> memoryview:
        """Return the extents and after them the hashes, as in the section.

        nextents * 16 + npages * 8 bytes, read-only.  Valid until the next
        collect(), collect_absent() or clear(); after that the bytes are
        other pages', though the memory stays readable.
        """

    def page_view(self) -> memoryview:
        """Return the bytes of the DATA pages: npages * 4096, read-only.

        Page-aligned.  Valid until clear(), as list_view() is.
        """

    def clear(self) -> None:
        """Empty the batch for the next section."""

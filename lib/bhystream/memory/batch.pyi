"""Collect changed pages into what one MEMORY section carries.

page.pyi describes the buffers, bitmaps, the table, and the exceptions for wrong arguments.
"""

from typing import final

from typing_extensions import Buffer

from bhystream.memory.page import PageHasher, PageHashes

@final
class Batch:
    """The list and the pages of one MEMORY section, filled page by page.

    For each section the caller fills the batch with collect(), writes list_view() and
    page_view(), and calls clear().  Pages must be added in ascending order.  Adjacent
    pages of one kind share an extent, even across two calls, or the border of two segments.

    The memory is allocated once: max_pages * 4104 + max_extents * 32 bytes, of
    which only the used part is touched.  A batch of 64 pages or more runs at full
    speed; in a batch of up to 256, the pages are still in the second-level cache
    when they are written.

    A call while another thread collects into the batch raises ValueError.
    """

    def __init__(
        self,
        hasher: PageHasher,
        max_pages: int,
        max_extents: int,
        max_count: int = 0xFFFFFFFF,
        in_place: bool = False,
    ) -> None:
        """Make an empty batch.

        max_pages: DATA pages; max_extents: extents of either kind; max_count:
        pages of one extent.  Each is within [1, 2**32 - 1].  in_place: copy no page;
        the caller writes the DATA pages of the extents from the guest's memory, to
        which nothing may write meanwhile.  Raises OSError if there is not enough
        memory.
        """

    @property
    def in_place(self) -> bool: ...
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
        """Whether max_pages are held, or an extent has found no room."""

    def collect(
        self,
        segment: Buffer,
        base_page: int,
        first: int,
        end: int,
        table: PageHashes,
        touched: Buffer,
        everything: bool,
        *,
        absent: bool = True,
        bits: Buffer | None = None,
        origin: int = 0,
    ) -> int:
        """Add the pages [first, end) of a segment that the destination needs.

        segment: bytes, the segment's memory, which may change meanwhile.
        first, end: counted from the segment's first page, which is the guest's
        page `base_page`.  touched: a bitmap; only pages whose bit is set are read.
        absent: the other pages are holes, that is zero; if false, they are passed over.
        everything: add all pages, as in round 0; if false, add those whose hash
        differs from the table.  bits: words of find_changed(), the first bit for the
        page `origin`, counted as first is; if given, the touched pages whose bit is set
        are added, and no other touched page.

        A zero page is added to a ZERO extent; any other page is copied, and the copy is
        hashed.  The table gets the hash of each page that was added.  A batch that holds
        max_pages still takes absent pages, a batch without room for an extent does not.

        Returns the first page not handled: `end`, or less if the batch is
        full.  Raises ValueError also for a page that does not follow the last
        page held.  Releases the GIL.
        """

    def list_view(self) -> memoryview:
        """Return the extents and after them the hashes, as in the section.

        The view has nextents * 16 + npages * 8 bytes, read-only.  It is valid until
        the next collect() or clear(); after that its memory
        stays readable, with the bytes of other pages.
        """

    def page_view(self) -> memoryview:
        """Return the bytes of the DATA pages: npages * 4096, read-only.

        The view is page-aligned, and valid until clear(), as in list_view().  Raises
        ValueError for a batch that leaves its pages in place.
        """

    def clear(self) -> None:
        """Empty the batch for the next section."""

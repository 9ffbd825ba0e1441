"""Place the pages of a section: in a file, or in memory.

The buffers and the exceptions for wrong arguments are those of page.pyi.
"""

from typing_extensions import Buffer

def scatter(
    fd: int, offset_bytes: int, base_page: int, npages: int, extents: Buffer, pages: Buffer
) -> int:
    """Write the pages of a MEMORY section that lie in one segment.

    The segment is the pages [base_page, base_page + npages) of the guest; its
    first page is at `offset_bytes` of `fd`.  extents: the whole list of the
    section, 16 bytes each, little endian.  pages: bytes, all DATA pages of the
    section in the order of the list.  ZERO extents are passed over; DATA
    extents are clipped to the segment, so a caller with several segments calls
    once for each with the same two buffers.

    Returns the number of pages written: over all segments these add up to
    len(pages) / 4096, unless an extent lies outside the guest.

    Each piece is one pwrite(2); a short write is continued and EINTR retried.
    Raises OSError with the errno of pwrite(2), or EIO if a write takes no byte.
    Raises ValueError also if an extent's kind is unknown, or the counts of the
    DATA extents do not add up to the pages given; the extents before the wrong
    one have been written by then.  Nothing outside the buffers is read, and
    nothing outside the segment is written, whatever the extents say.  Releases
    the GIL.
    """

def scatter_into(
    memory: Buffer, placed: Buffer, base_page: int, extents: Buffer, pages: Buffer
) -> int:
    """Copy the pages of a MEMORY section that lie in one segment into its memory.

    memory: bytes, writable, the whole segment, whose first page is the guest's
    page `base_page`; all zero at first.  placed: words, writable, one bit for
    each page of the segment, all clear at first, and changed by this function
    only: page p of the segment is bit p % 64 of word p / 64.  extents, pages: as in
    scatter().

    A page of a ZERO extent is made zero if it was placed before; else it is zero
    already, and is neither read nor written, so that a mapping that nobody has
    touched stays untouched.  Returns the number of pages copied.

    The whole buffer must have memory behind it: the process gets SIGBUS where the
    mapped file ends too early.  Raises ValueError as scatter() does.  Releases
    the GIL.
    """

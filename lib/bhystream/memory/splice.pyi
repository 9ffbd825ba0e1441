"""Give pages of memory to a pipe, and take pages out of one, without a copy in this process.

splice_pages() gives: vmsplice(2) of Linux, and where that does not work, writev(2), which
copies the same pages: into a descriptor that is no pipe, for example, and on other systems.

After vmsplice(2) the pipe holds the pages themselves.  So the bytes that its reader gets are those
that the memory has when the reader copies them: the caller must see that nothing
writes to the pages until the last reader has read them.  Filters in the pipeline
may hand the pages on, to a socket for example, so only an answer of the
destination tells when that is.

place_spliced() takes: splice(2) of Linux, and where that does not work, read(2) and pwrite(2).
"""

from typing_extensions import Buffer

from bhystream.memory.page import PageHasher

def splice_pages(
    fd: int, segment: Buffer, base_page: int, extents: Buffer, start_bytes: int
) -> int:
    """Give the DATA pages of extents to a descriptor, from one of their bytes on.

    fd: a pipe, or anything else that can be written.  segment: bytes, the memory of
    one segment, which begins at the guest's page base_page.  extents: packed as in a
    MEMORY section; all DATA pages lie in the segment.  start_bytes: how many bytes
    of the pages the descriptor has taken before.

    Returns how many bytes it has taken now, which may be fewer than are left.
    Raises ValueError for a wrong argument; OSError, EPIPE if nobody reads; and what
    a signal handler raises.  vmsplice(2) waits for a full pipe, even if the descriptor
    does not block.  Releases the GIL.
    """

def place_spliced(
    pipe_fd: int,
    nbytes: int,
    fd: int,
    offset_bytes: int,
    segment: Buffer,
    base_page: int,
    extents: Buffer,
    start_bytes: int,
    hasher: PageHasher,
    hashes: Buffer,
) -> int:
    """Write DATA pages of extents out of a pipe into a file, and compare them there.

    The segment begins at the guest's page base_page, and at offset_bytes of fd.  segment:
    bytes, a mapping of this part of the file.  extents: packed as in a MEMORY section; all DATA
    pages lie in the segment.  hashes: 8 bytes for each DATA page.  start_bytes: how many bytes
    of the pages were written by earlier calls.  nbytes: how many come now, all of which the
    pipe has; a page whose last byte is among them is hashed as the mapping shows it.

    Returns the index of the first page that has not its hash, counted over all DATA pages, or -1.
    Raises ValueError for a wrong argument; OSError, EIO also if a write takes no byte or the
    pipe has ended; and what a signal handler raises.  Nothing is written outside the extents.
    Releases the GIL.
    """

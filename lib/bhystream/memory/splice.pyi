"""Give pages of memory to a pipe without a copy: vmsplice(2) of Linux.

Where that does not work, writev(2) takes the same pages, and copies them: into a
descriptor that is no pipe, for example, and on other systems.

After vmsplice(2) the pipe holds the pages themselves.  So the bytes that its reader gets are those
that the memory has when the reader copies them: the caller must see that nothing
writes to the pages until the last reader has read them.  Filters in the pipeline
may hand the pages on, to a socket for example, so only an answer of the
destination tells when that is.
"""

from typing_extensions import Buffer

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

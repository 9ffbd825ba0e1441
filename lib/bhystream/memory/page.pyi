"""Hash, compare and place pages: the loops of the MEMORY section.

A page is 4096 bytes.  Its hash is XXH3-64 with the stream's seed.  The table
is a writable buffer of one u64 per page of the guest (format "Q"), indexed by
global page number: the hash of the page as last sent.

Every buffer must be contiguous; it may lie at any address.  Bytes are format
"B", words format "Q" (a memoryview's cast("Q"), or an array of type "Q").

Every function here raises ValueError for a number out of range or a buffer of
the wrong size or format; ValueError or BufferError for a buffer that is not
contiguous, or that is read-only but has to be written; TypeError for an argument
that is not a buffer or not a number.

Importing fails with ImportError on a big-endian host.
"""

from typing import final

from typing_extensions import Buffer

@final
class PageHasher:
    """The hash of one stream: a seed, and the secret made from it once.

    A hasher never changes, so any number of threads may use one.
    """

    def __init__(self, seed: int) -> None:
        """Look up XXH3 and derive the secret.

        seed: u64, the hash seed of the stream's header.  Raises InternalError
        if the xxhash package has no C function that works.
        """

    @property
    def zero_hash(self) -> int:
        """The hash of the page that is all zero."""

    def hash_pages(self, pages: Buffer, out: Buffer) -> None:
        """Hash whole pages into `out`, one u64 each.

        pages: bytes, 4096 for each word of `out`.  Releases the GIL.
        """

    def fill(self, table: Buffer, first: int, end: int) -> None:
        """Set the entries [first, end) of the table to zero_hash.

        Releases the GIL.
        """

def check_pages(hasher: PageHasher, pages: Buffer, hashes: Buffer) -> int:
    """Compare received pages with their listed hashes.

    pages: bytes, whole pages.  hashes: bytes, 8 for each page, little endian,
    as in the MEMORY section.  Returns the index of the first page that
    differs, or -1.  Releases the GIL.
    """

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

def find_changed(
    hasher: PageHasher,
    segment: Buffer,
    base_page: int,
    first: int,
    end: int,
    table: Buffer,
    bits: Buffer,
) -> int:
    """Find the pages that differ from the table, and change nothing but `bits`.

    The arguments are those of mark_changed(), but bit 0 of word 0 of `bits` is the
    page `first`.  So threads that look at different pages share no word that is
    written.  Returns the number of pages that differed.  Releases the GIL.
    """

def mark_changed(
    hasher: PageHasher,
    segment: Buffer,
    base_page: int,
    first: int,
    end: int,
    table: Buffer,
    bitmap: Buffer,
) -> int:
    """Find the pages that changed since the table was made, and send nothing.

    segment: bytes, the segment's memory; [first, end): its pages to look at,
    counted from its own first page, which is the guest's page `base_page`.
    table, bitmap: words.  If a page's hash differs from its entry, the page's bit
    is set (page p is bit p % 64 of word p / 64, by global number) and the entry
    becomes the new hash; no bit is cleared.  Returns the number of pages that
    differed.  Releases the GIL.
    """

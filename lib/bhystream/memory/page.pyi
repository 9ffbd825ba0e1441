"""Hash and compare pages, and keep their hashes: the loops of the MEMORY section.

A page is 4096 bytes.  Its hash is XXH3-64 with the stream's seed.  A bitmap is a
buffer of words with a bit for each page: page p is bit p % 64 of word p / 64, by
global page number.

Every buffer must be contiguous; it may lie at any address.  Bytes are format
"B", words format "Q" (a memoryview's cast("Q"), or an array of type "Q").

Every function here raises ValueError for a number out of range or a buffer of
the wrong size or format; ValueError or BufferError for a buffer that is not
contiguous, or that is read-only but has to be written; TypeError for an argument
that is not a buffer or not a number.

Importing fails with ImportError on a big-endian host.
"""

from collections.abc import Iterable
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

@final
class PageHashes:
    """The table: a hash for each page of a guest, that of the page as last sent.

    At first every page has the hash of the zero page, which is what the destination
    has.  The table has 8 bytes for each page, and takes memory only where a page has
    had another hash.  Only mark_changed() and Batch.collect() change it.
    """

    def __init__(self, hasher: PageHasher, npages: int) -> None:
        """Make the table of a guest of so many pages.

        Raises OSError if there is not enough memory.
        """

    def __len__(self) -> int:
        """Return the number of pages."""

    def __getitem__(self, page: int) -> int:
        """Return the hash of a page.  Raises IndexError outside of the guest."""

def mark_extents(extents: Iterable[tuple[int, int]], bitmap: Buffer) -> int:
    """Set the bits of extents [first, end), which are disjoint; return how many pages they have.

    Clears no bit.  Raises what the iterable raises.
    """

def count_bits(bitmap: Buffer, first: int, end: int) -> int:
    """Return how many bits of the pages [first, end) are set.  Releases the GIL."""

def check_pages(hasher: PageHasher, pages: Buffer, hashes: Buffer) -> int:
    """Compare received pages with their listed hashes.

    pages: bytes, whole pages.  hashes: bytes, 8 for each page, little endian,
    as in the MEMORY section.  Returns the index of the first page that
    differs, or -1.  Releases the GIL.
    """

def find_changed(
    hasher: PageHasher,
    segment: Buffer,
    base_page: int,
    first: int,
    end: int,
    table: PageHashes,
    touched: Buffer,
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
    table: PageHashes,
    touched: Buffer,
    bitmap: Buffer,
) -> int:
    """Find the pages that changed since the table was made, and send nothing.

    segment: bytes, the segment's memory; [first, end): its pages to look at,
    counted from its own first page, which is the guest's page `base_page`.
    touched: a bitmap; a page whose bit is clear is not read.  If a page's hash differs
    from the table's, its bit in the other bitmap is set, and the table gets the new
    hash; no bit is cleared.  Returns the number of pages that differed.  Releases
    the GIL.
    """

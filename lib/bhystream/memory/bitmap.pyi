"""Walk and count the bits of a dirty bitmap.

A bitmap is little-endian u64 words; bit i of word w is page 64 * w + i.
Buffers of words are contiguous, of format "Q", at any address.

Raised by everything here: ValueError for a page range outside the words or a
buffer of the wrong size or format; ValueError or BufferError for one that is
not contiguous, or read-only where it is written; TypeError for what is no
buffer or no number.
"""

from typing_extensions import Buffer

def walk(words: Buffer, first: int, end: int, out: Buffer) -> tuple[int, int]:
    """Write the extents of set bits within [first, end) to `out`.

    words: u64 words, at least end bits.  out: u64 words in pairs, at least
    one: the first page of an extent and the page after its last.  Extents
    ascend, are as long as can be and end at `end` at the latest.

    Returns (n, next): the number of extents written, and the page to call
    with as `first` for more; `end` if there is nothing more.  Releases the GIL.
    """

def count(words: Buffer, first: int, end: int) -> int:
    """Return the number of set bits within [first, end).

    Releases the GIL.
    """

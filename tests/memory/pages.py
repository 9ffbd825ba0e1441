"""Pages, words, bitmaps and lists of extents, as the loops over pages take them."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable

from bhystream.memory.page import PageHasher, PageHashes, mark_changed

PAGE = 4096
DATA, ZERO = 0, 1
# Which of the two is raised depends on the buffer's fault, and on its type.
WRONG_BUFFER = (ValueError, BufferError)


def words(n: int, value: int = 0) -> array[int]:
    """Return n words of this value."""
    return array("Q", [value]) * n


def bits(npages: int, pages: Iterable[int]) -> array[int]:
    """Return a bitmap in which these pages are set."""
    made = words((npages + 63) // 64)
    for page in pages:
        made[page >> 6] |= 1 << (page & 63)
    return made


def all_bits(npages: int) -> array[int]:
    """Return a bitmap in which every page is set."""
    return bits(npages, range(npages))


def pages_of(bitmap: Iterable[int]) -> set[int]:
    """Return the pages that are set in a bitmap."""
    return {64 * i + bit for i, word in enumerate(bitmap) for bit in range(64) if word >> bit & 1}


def table_of(hasher: PageHasher, memory: bytes | bytearray | memoryview) -> PageHashes:
    """Return the table of a guest of one segment, which the destination has as it is here."""
    npages = len(memory) // PAGE
    table = PageHashes(hasher, npages)
    mark_changed(hasher, memory, 0, 0, npages, table, all_bits(npages), words(npages // 64 + 1))
    return table


def hashes_in(table: PageHashes) -> list[int]:
    """Return the hash of every page."""
    return [table[page] for page in range(len(table))]


def extents(*items: tuple[int, int, int]) -> bytes:
    """Pack (first, count, kind)."""
    return b"".join(struct.pack("<QII", *item) for item in items)

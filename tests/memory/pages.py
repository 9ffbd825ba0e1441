"""Pages, words and lists of extents, as the loops over pages take them."""

from __future__ import annotations

import struct
from array import array

PAGE = 4096
DATA, ZERO = 0, 1
# Which of the two is raised depends on the buffer's fault, and on its type.
WRONG_BUFFER = (ValueError, BufferError)


def words(n: int, value: int = 0) -> array[int]:
    """Return n words of this value."""
    return array("Q", [value]) * n


def extents(*items: tuple[int, int, int]) -> bytes:
    """Pack (first, count, kind)."""
    return b"".join(struct.pack("<QII", *item) for item in items)

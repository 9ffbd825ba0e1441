"""Where the pages of one segment go: a file, or the memory of a waiting guest.

Both are a base.Target.  A page of zeros becomes a hole in the file; in a mapping
it is left alone unless it was written before.  So memory that the guest never
used is not allocated here.

Both can compare what they hold with hashes.  That reads the memory again, as the guest will
find it, and believes nothing that was noted when a page was placed.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from bhystream.guest import PAGE_BYTES
from bhystream.memory.extent import EXTENT, KIND_ZERO
from bhystream.memory.hole import data_extents, punch
from bhystream.memory.page import PageHasher, check_pages
from bhystream.memory.scatter import scatter, scatter_into
from bhystream.memory.splice import place_spliced

# The pages that are read from a file at a time, into the second-level cache.
_STEP_PAGES = 128
# The errors of file systems that do not know their holes.
_NO_HOLES = (errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP)


class Differing(NamedTuple):
    """How many pages differ, and the number of the first of them, -1 if none does."""

    npages: int
    first: int


class FileTarget:
    """A segment in a file, its first page at offset_bytes.  fd stays the caller's."""

    def __init__(self, fd: int, offset_bytes: int) -> None:
        self.fd = fd
        self.offset_bytes = offset_bytes
        self._mapping: mmap.mmap | None = None

    def place(self, base_page: int, npages: int, extents: memoryview, pages: memoryview) -> None:
        """Place pages as base.Target says.  Raises OSError, ValueError."""
        scatter(self.fd, self.offset_bytes, base_page, npages, extents, pages)
        self.place_zeros(base_page, extents)

    def map(self, npages: int) -> bool:
        """Map the segment for place_spliced(); return False if that cannot be done.

        npages: the segment's.  The file may not become shorter before unmap(): this process would
        get SIGBUS.
        """
        if self._mapping is None:
            length = npages * PAGE_BYTES
            try:
                self._mapping = mmap.mmap(
                    self.fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=self.offset_bytes
                )
            except (OSError, ValueError, OverflowError):  # such a file, or it is shorter
                return False
        return True

    def unmap(self) -> None:
        """Undo map(), which holds a descriptor of its own."""
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None

    def place_spliced(
        self,
        pipe_fd: int,
        nbytes: int,
        base_page: int,
        extents: memoryview,
        start_bytes: int,
        hasher: PageHasher,
        hashes: memoryview,
    ) -> int:
        """Call splice.place_spliced() for the segment, which map() has mapped."""
        assert self._mapping is not None
        return place_spliced(
            pipe_fd,
            nbytes,
            self.fd,
            self.offset_bytes,
            self._mapping,
            base_page,
            extents,
            start_bytes,
            hasher,
            hashes,
        )

    def place_zeros(self, base_page: int, extents: memoryview) -> None:
        """Make the pages of the ZERO extents holes.  Raises OSError."""
        for first, count, kind in EXTENT.iter_unpack(extents):
            if kind == KIND_ZERO:
                punch(self.fd, self._offset(first - base_page), count * PAGE_BYTES)

    def differing(
        self,
        hasher: PageHasher,
        base_page: int,
        extents: memoryview,
        hashes: memoryview,
        on_step: Callable[[], None],
    ) -> Differing:
        """Compare pages as base.Target says; a hole in the file is zero.  Raises OSError."""
        buffer = memoryview(bytearray(_STEP_PAGES * PAGE_BYTES))
        read = partial(self._read, buffer)
        return _compare(read, self._data, hasher, base_page, extents, hashes, on_step)

    def _offset(self, page: int) -> int:
        return self.offset_bytes + page * PAGE_BYTES

    def _read(self, buffer: memoryview, first: int, end: int) -> memoryview:
        """Return the pages [first, end) of the segment, in the buffer."""
        pages = buffer[: (end - first) * PAGE_BYTES]
        got = 0
        while got < len(pages):
            count = os.preadv(self.fd, [pages[got:]], self._offset(first) + got)
            if not count:
                raise OSError(errno.EIO, "the file ends too early")
            got += count
        return pages

    def _data(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the extents of the pages [first, end) that are not in a hole."""
        length = (end - first) * PAGE_BYTES
        for start, stop in data_extents(self.fd, self._offset(first), length, _NO_HOLES):
            yield first + start, first + stop


class MappedTarget:
    """A segment in a mapping, which is all zero at first.

    A bit for each page tells whether it was placed: only such a page is made zero.
    """

    def __init__(self, memory: memoryview, file: FileTarget | None = None) -> None:
        """Take the whole segment.

        memory: writable bytes; this object's until release().  file: the same segment, if
        to read a hole in the mapping would fill the hole.
        """
        self._memory = memory
        self._file = file
        nwords = (len(memory) // PAGE_BYTES + 63) // 64
        self._placed = memoryview(bytearray(nwords * 8)).cast("Q")

    def place(self, base_page: int, npages: int, extents: memoryview, pages: memoryview) -> None:
        """Place pages as base.Target says.  Raises ValueError."""
        if npages * PAGE_BYTES != len(self._memory):
            raise ValueError(f"{npages} pages are not the segment of {len(self._memory)} bytes")
        scatter_into(self._memory, self._placed, base_page, extents, pages)

    def differing(
        self,
        hasher: PageHasher,
        base_page: int,
        extents: memoryview,
        hashes: memoryview,
        on_step: Callable[[], None],
    ) -> Differing:
        """Compare pages as base.Target says.  Raises OSError if there is a file."""
        if self._file:
            return self._file.differing(hasher, base_page, extents, hashes, on_step)
        return _compare(self._read, _all, hasher, base_page, extents, hashes, on_step)

    def _read(self, first: int, end: int) -> memoryview:
        return self._memory[first * PAGE_BYTES : end * PAGE_BYTES]

    def release(self) -> None:
        """Release the view of the mapping."""
        self._memory.release()


def _all(first: int, end: int) -> Iterator[tuple[int, int]]:
    yield first, end


def _compare(
    read: Callable[[int, int], memoryview],
    filled: Callable[[int, int], Iterator[tuple[int, int]]],
    hasher: PageHasher,
    base_page: int,
    extents: memoryview,
    hashes: memoryview,
    on_step: Callable[[], None],
) -> Differing:
    """Compare pages with their hashes, and the pages of ZERO extents with the zero page's.

    read: returns the pages [first, end) of the segment.  filled: yields the extents within
    [first, end) that may be other than zero.
    """
    zeros = memoryview(hasher.zero_hash.to_bytes(8, "little") * _STEP_PAGES)
    found: list[int] = []
    npages = at = 0
    for first, count, kind in EXTENT.iter_unpack(extents):
        first -= base_page
        is_zero = kind == KIND_ZERO
        for start, stop in filled(first, first + count) if is_zero else _all(first, first + count):
            for page in range(start, stop, _STEP_PAGES):
                end = min(page + _STEP_PAGES, stop)
                listed = zeros if is_zero else hashes[at + 8 * (page - first) :]
                for bad in _bad(hasher, read(page, end), listed[: 8 * (end - page)]):
                    npages += 1
                    found = found or [base_page + page + bad]
                on_step()
        at += 0 if is_zero else 8 * count
    return Differing(npages, found[0] if found else -1)


def _bad(hasher: PageHasher, pages: memoryview, hashes: memoryview) -> Iterator[int]:
    """Yield the index of each page that has not its hash."""
    at = 0
    while (bad := check_pages(hasher, pages[at * PAGE_BYTES :], hashes[at * 8 :])) >= 0:
        yield at + bad
        at += bad + 1

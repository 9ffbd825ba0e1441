"""Hash, compare and place pages: the loops of the MEMORY section.

The user's documentation is in page.pyi.  Each `def` checks all arguments while
the integers are still Python's, so that no sum can wrap; then the loop runs
without the GIL on raw pointers.  The memory may be a running guest's, so no
loop may depend on reading the same byte twice.
"""

import os
import sys

cimport cython
from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport INT64_MAX, UINT64_MAX, uintptr_t
from libc.string cimport memcpy, memset
from posix.types cimport off_t
from posix.unistd cimport pwrite

from bhystream.memory import xxh3

# Words, extents and hashes are used with the bytes that they have in the stream.
if sys.byteorder != "little":
    raise ImportError("bhystream needs a little-endian host")

__all__ = [
    "PageHasher", "check_pages", "find_changed", "mark_changed", "scatter",
    "scatter_into",
]


cdef int check_range(object first, object end, object limit) except -1:
    if not 0 <= first <= end <= limit:
        raise ValueError(f"pages [{first}, {end}) are not within [0, {limit})")
    return 0


@cython.final
cdef class PageHasher:
    def __cinit__(self, seed):
        cdef uint8_t zeros[PAGE_BYTES]
        cdef make_secret_t make_secret
        if not 0 <= seed <= UINT64_MAX:
            raise ValueError(f"seed {seed} is not a u64")
        found = xxh3.find()
        self.function = <hash_t><uintptr_t>found.hash_address
        make_secret = <make_secret_t><uintptr_t>found.secret_address
        make_secret(self.secret, seed)
        memset(zeros, 0, PAGE_BYTES)
        self.zero_hash = hash_page(self, zeros)

    def hash_pages(
        self, const uint8_t[::1] pages not None, uint64_t[::1] out not None
    ):
        cdef Py_ssize_t i, npages = out.shape[0]
        cdef const uint8_t *page = &pages[0]
        cdef word_t *hashes = <word_t *>&out[0]
        if pages.shape[0] != npages * PAGE_BYTES:
            raise ValueError(f"{pages.shape[0]} bytes are not {npages} pages")
        with nogil:
            for i in range(npages):
                hashes[i] = hash_ahead(
                    self,
                    page + i * PAGE_BYTES,
                    page + min(i + 1, npages - 1) * PAGE_BYTES,
                )

    def fill(self, uint64_t[::1] table not None, first, end):
        check_range(first, end, table.shape[0])
        cdef Py_ssize_t i, start = first, stop = end
        cdef word_t *entries = <word_t *>&table[0]
        with nogil:
            for i in range(start, stop):
                entries[i] = self.zero_hash


def check_pages(
    PageHasher hasher not None,
    const uint8_t[::1] pages not None,
    const uint8_t[::1] hashes not None,
):
    cdef Py_ssize_t i, bad = -1, npages = pages.shape[0] // PAGE_BYTES
    cdef const uint8_t *page = &pages[0]
    cdef const word_t *listed = <const word_t *>&hashes[0]
    if pages.shape[0] % PAGE_BYTES or hashes.shape[0] != npages * 8:
        raise ValueError(
            f"{hashes.shape[0]} bytes of hashes for {pages.shape[0]} of pages"
        )
    with nogil:
        # No prefetch: the receiver has just read these bytes from its pipe.
        for i in range(npages):
            if hash_page(hasher, page + i * PAGE_BYTES) != listed[i]:
                bad = i
                break
    return bad


def mark_changed(
    PageHasher hasher not None,
    const uint8_t[::1] segment not None,
    base_page,
    first,
    end,
    uint64_t[::1] table not None,
    uint64_t[::1] bitmap not None,
):
    check_range(first, end, segment.shape[0] // PAGE_BYTES)
    check_range(base_page, base_page + end, min(table.shape[0], bitmap.shape[0] * 64))
    cdef uint64_t base = base_page, i, start = first, stop = end, h
    cdef uint64_t changed = 0
    cdef const uint8_t *page = &segment[0]
    cdef word_t *entries = <word_t *>&table[0]
    cdef word_t *words = <word_t *>&bitmap[0]
    with nogil:
        for i in range(start, stop):
            h = hash_ahead(
                hasher, page + i * PAGE_BYTES, page + min(i + 1, stop - 1) * PAGE_BYTES
            )
            if h != entries[base + i]:
                entries[base + i] = h
                words[(base + i) >> 6] |= <uint64_t>1 << ((base + i) & 63)
                changed += 1
    return changed


def find_changed(
    PageHasher hasher not None,
    const uint8_t[::1] segment not None,
    base_page,
    first,
    end,
    const uint64_t[::1] table not None,
    uint64_t[::1] bits not None,
):
    check_range(first, end, segment.shape[0] // PAGE_BYTES)
    check_range(base_page, base_page + end, table.shape[0])
    check_range(0, end - first, bits.shape[0] * 64)
    cdef uint64_t i, start = first, stop = end, changed = 0
    cdef const uint8_t *page = &segment[0]
    cdef const word_t *entries = <const word_t *>&table[0]
    cdef word_t *words = <word_t *>&bits[0]
    entries += <uint64_t>base_page
    with nogil:
        for i in range(start, stop):
            if hash_ahead(
                hasher, page + i * PAGE_BYTES, page + min(i + 1, stop - 1) * PAGE_BYTES
            ) != entries[i]:
                words[(i - start) >> 6] |= <uint64_t>1 << ((i - start) & 63)
                changed += 1
    return changed


# The segment that is written to: pages [base, end).  If memory is NULL, the pages
# begin at offset_bytes of fd; else at memory, and placed has a bit for each page.
cdef struct Place:
    int fd
    uint64_t offset_bytes
    uint8_t *memory
    word_t *placed
    uint64_t base
    uint64_t end


# The result for extents that do not fit the pages; an errno is above 0.
cdef enum:
    MALFORMED = -1


cdef int write_at(
    int fd, const uint8_t *source, uint64_t nbytes, uint64_t offset_bytes
) noexcept nogil:
    """Write all bytes; return 0 or an errno."""
    cdef ssize_t n
    while nbytes > 0:
        n = pwrite(fd, source, nbytes, <off_t>offset_bytes)
        if n < 0:
            if errno == EINTR:
                continue
            return errno
        if n == 0:
            return EIO  # no file does this, and the loop would never end
        source += n
        nbytes -= <uint64_t>n
        offset_bytes += <uint64_t>n
    return 0


cdef void put_pages(
    const Place *to, uint64_t lo, uint64_t hi, const uint8_t *source
) noexcept nogil:
    """Copy pages into the memory, and note that they are no longer zero."""
    cdef uint64_t i
    memcpy(to.memory + lo * PAGE_BYTES, source, (hi - lo) * PAGE_BYTES)
    for i in range(lo, hi):
        to.placed[i >> 6] |= <uint64_t>1 << (i & 63)


cdef void clear_pages(const Place *to, uint64_t lo, uint64_t hi) noexcept nogil:
    """Make pages zero; a page that was never placed is zero, and is not touched."""
    while lo < hi:
        if to.placed[lo >> 6] == 0:
            lo = (lo | 63) + 1
            continue
        if to.placed[lo >> 6] >> (lo & 63) & 1:
            memset(to.memory + lo * PAGE_BYTES, 0, PAGE_BYTES)
            to.placed[lo >> 6] &= ~(<uint64_t>1 << (lo & 63))
        lo += 1


cdef int write_pages(
    const Place *to, uint64_t lo, uint64_t hi, const uint8_t *source
) noexcept nogil:
    """Write the pages [lo, hi); return 0 or an errno."""
    if to.memory != NULL:
        put_pages(to, lo - to.base, hi - to.base, source)
        return 0
    return write_at(
        to.fd,
        source,
        (hi - lo) * PAGE_BYTES,
        to.offset_bytes + (lo - to.base) * PAGE_BYTES,
    )


cdef int place_extents(
    const Place *to,
    const uint8_t *extents,
    Py_ssize_t nextents,
    const uint8_t *source,
    uint64_t npages,
    uint64_t *written,
) noexcept nogil:
    """Place the pages that lie in the segment; return 0, an errno or MALFORMED.

    Each extent is checked when it is used, not in an earlier walk: the buffer is
    Python's, and another thread could change it in between.
    """
    cdef Extent extent
    cdef uint64_t lo, hi
    cdef Py_ssize_t i
    cdef int error
    for i in range(nextents):
        memcpy(&extent, extents + i * <Py_ssize_t>sizeof(Extent), sizeof(Extent))
        if extent.kind > ZERO or extent.first > UINT64_MAX - extent.count:
            return MALFORMED
        lo = max(extent.first, to.base)
        hi = min(extent.first + extent.count, to.end)
        if extent.kind == ZERO:
            if lo < hi and to.memory != NULL:
                clear_pages(to, lo - to.base, hi - to.base)
            continue
        if extent.count > npages:
            return MALFORMED
        if lo < hi:
            error = write_pages(to, lo, hi, source + (lo - extent.first) * PAGE_BYTES)
            if error:
                return error
            written[0] += hi - lo
        source += <uint64_t>extent.count * PAGE_BYTES
        npages -= extent.count
    return 0 if npages == 0 else MALFORMED


def scatter(
    fd,
    offset_bytes,
    base_page,
    npages,
    const uint8_t[::1] extents not None,
    const uint8_t[::1] pages not None,
):
    cdef Place to
    if min(offset_bytes, base_page, npages) < 0 or base_page + npages > UINT64_MAX:
        raise ValueError(f"no {npages} pages from {base_page} at {offset_bytes}")
    if offset_bytes + npages * PAGE_BYTES > INT64_MAX:
        raise ValueError(f"no file holds {npages} pages at offset {offset_bytes}")
    if not 0 <= fd <= 0x7FFFFFFF:
        raise ValueError(f"{fd} is not a file descriptor")
    to.fd = fd
    to.offset_bytes = offset_bytes
    to.memory = NULL
    to.placed = NULL
    to.base = base_page
    to.end = base_page + npages
    return place(&to, extents, pages)


def scatter_into(
    uint8_t[::1] memory not None,
    uint64_t[::1] placed not None,
    base_page,
    const uint8_t[::1] extents not None,
    const uint8_t[::1] pages not None,
):
    cdef Place to
    cdef Py_ssize_t npages = memory.shape[0] // PAGE_BYTES
    if memory.shape[0] % PAGE_BYTES or placed.shape[0] != (npages + 63) // 64:
        raise ValueError(
            f"{placed.shape[0]} words are no bitmap of {memory.shape[0]} bytes"
        )
    if not 0 <= base_page <= UINT64_MAX - npages:
        raise ValueError(f"no {npages} pages from {base_page}")
    to.fd = -1
    to.offset_bytes = 0
    to.memory = &memory[0]
    to.placed = <word_t *>&placed[0]
    to.base = base_page
    to.end = base_page + npages
    return place(&to, extents, pages)


cdef object place(
    const Place *to, const uint8_t[::1] extents, const uint8_t[::1] pages
):
    """Check the two buffers, place their pages, and return the number placed."""
    cdef uint64_t written = 0
    cdef Py_ssize_t nextents = extents.shape[0] // <Py_ssize_t>sizeof(Extent)
    cdef uint64_t given = <uint64_t>pages.shape[0] // PAGE_BYTES
    cdef const uint8_t *list_start = &extents[0]
    cdef const uint8_t *source = &pages[0]
    cdef int error
    if extents.shape[0] % <Py_ssize_t>sizeof(Extent) or pages.shape[0] % PAGE_BYTES:
        raise ValueError("the buffers do not hold whole extents and whole pages")
    with nogil:
        error = place_extents(to, list_start, nextents, source, given, &written)
    if error == MALFORMED:
        raise ValueError(f"the extents do not describe {given} pages of data")
    if error:
        raise OSError(error, os.strerror(error))
    return written

"""Place the pages of a section: in a file, or in memory.

The user's documentation is in scatter.pyi.  As in page.pyx, each `def` checks all
arguments while the integers are still Python's; then the loop runs without the GIL.
"""

import os

from libc.stdint cimport INT64_MAX, UINT64_MAX, uint8_t, uint64_t
from libc.string cimport memcpy, memset

from bhystream.memory.page cimport PAGE_BYTES, ZERO, Extent, word_t, write_at

__all__ = ["scatter", "scatter_into"]


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

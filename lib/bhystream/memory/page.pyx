"""Hash and compare pages: the loops of the MEMORY section.

The user's documentation is in page.pyi.  Each `def` checks all arguments while
the integers are still Python's, so that no sum can wrap; then the loop runs
without the GIL on raw pointers.  The memory may be a running guest's, so no
loop may depend on reading the same byte twice.
"""

import sys

cimport cython
from libc.stdint cimport UINT64_MAX, uintptr_t
from libc.string cimport memset

from bhystream.memory import xxh3

# Words, extents and hashes are used with the bytes that they have in the stream.
if sys.byteorder != "little":
    raise ImportError("bhystream needs a little-endian host")

__all__ = ["PageHasher", "check_pages", "find_changed", "mark_changed"]


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

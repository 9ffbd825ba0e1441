"""Hash and compare pages, and keep their hashes: the loops of the MEMORY section.

The user's documentation is in page.pyi.  Each `def` checks all arguments while
the integers are still Python's, so that no sum can wrap; then the loop runs
without the GIL on raw pointers.  The memory may be a running guest's, so no
loop may depend on reading the same byte twice.

The table of hashes must not cost more than the guest has touched, and most guests
are sparse.  An entry is the hash XOR the zero page's hash, so it is 0 for the zero
page, and a table that is all zero is complete.  The entries lie in blocks for 64
pages.  A block gets memory, next to that of the block before, when one of its entries
becomes other than 0.  So memory of the guest that was never touched costs no page
fault, and is passed over 64 pages at a time.
"""

import mmap
import sys

cimport cython
from libc.stdint cimport UINT32_MAX, UINT64_MAX, uint32_t, uintptr_t
from libc.string cimport memset

from bhystream.memory import xxh3

# Words, extents and hashes are used with the bytes that they have in the stream.
if sys.byteorder != "little":
    raise ImportError("bhystream needs a little-endian host")

__all__ = [
    "PageHasher", "PageHashes", "check_pages", "count_bits", "find_changed",
    "mark_changed", "mark_extents"
]


cdef object anonymous(Py_ssize_t nbytes):
    # mmap's default is MAP_SHARED, a file in the kernel, with slower page faults.
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)


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


@cython.final
cdef class PageHashes:
    def __cinit__(self, PageHasher hasher not None, npages):
        nblocks = npages // BLOCK_PAGES + 1
        if not 0 <= npages or nblocks > UINT32_MAX:
            raise ValueError(f"no table has {npages} pages")
        # The kernel gives zeroed memory, and only for the pages that are written to.
        self.entry_map = anonymous((nblocks + 1) * BLOCK_PAGES * sizeof(word_t))
        self.block_map = anonymous(nblocks * sizeof(uint32_t))
        self.entry_hold = self.entry_map
        self.block_hold = self.block_map
        self.entries = <word_t *>&self.entry_hold[0]
        self.blocks = <uint32_t *>&self.block_hold[0]
        self.npages = npages
        self.zero_hash = hasher.zero_hash

    def __len__(self):
        return self.npages

    def __getitem__(self, page):
        if not 0 <= page < self.npages:
            raise IndexError(f"page {page} is not within [0, {self.npages})")
        return entry_of(self, page)[0] ^ self.zero_hash


def mark_extents(extents, uint64_t[::1] bitmap not None):
    cdef word_t *words = <word_t *>&bitmap[0]
    cdef uint64_t limit = <uint64_t>bitmap.shape[0] * 64, npages = 0, at, stop
    for first, end in extents:
        check_range(first, end, limit)
        at, stop = first, end
        npages += stop - at
        while at < stop and at & 63:
            words[at >> 6] |= <uint64_t>1 << (at & 63)
            at += 1
        while stop - at >= 64:
            words[at >> 6] = UINT64_MAX
            at += 64
        while at < stop:
            words[at >> 6] |= <uint64_t>1 << (at & 63)
            at += 1
    return npages


def count_bits(const uint64_t[::1] bitmap not None, first, end):
    check_range(first, end, bitmap.shape[0] * 64)
    cdef const word_t *words = <const word_t *>&bitmap[0]
    cdef uint64_t at = first, stop = end, count = 0, word
    with nogil:
        while at < stop:
            word = words[at >> 6] >> (at & 63)
            if stop - at < 64:
                word &= (<uint64_t>1 << (stop - at)) - 1
            count += <uint64_t>count_ones(word)
            at = (at | 63) + 1
    return count


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


cdef uint64_t next_changed(
    PageHasher hasher,
    const uint8_t *segment,
    uint64_t base,
    uint64_t page,
    uint64_t end,
    PageHashes table,
    const word_t *touched,
    uint64_t *found,
) noexcept nogil:
    """Return the first touched page of [page, end) that differs from the table, or end.

    The pages are global, and segment is the memory of page `base`.  found: the hash.
    """
    cdef uint64_t ahead
    while page < end:
        if touched[page >> 6] >> (page & 63) & 1 == 0:
            page = next_bit(touched, 0, page, end)
            continue
        ahead = min(page + 1, end - 1)
        found[0] = hash_ahead(
            hasher,
            segment + (page - base) * PAGE_BYTES,
            segment + (ahead - base) * PAGE_BYTES,
        )
        if not has_hash(table, page, found[0]):
            return page
        page += 1
    return page


def mark_changed(
    PageHasher hasher not None,
    const uint8_t[::1] segment not None,
    base_page,
    first,
    end,
    PageHashes table not None,
    const uint64_t[::1] touched not None,
    uint64_t[::1] bitmap not None,
):
    check_range(first, end, segment.shape[0] // PAGE_BYTES)
    nbits = min(touched.shape[0], bitmap.shape[0]) * 64
    check_range(base_page, base_page + end, min(len(table), nbits))
    cdef uint64_t base = base_page, page = base_page + first, stop = base_page + end
    cdef uint64_t h = 0, changed = 0
    cdef const uint8_t *memory = &segment[0]
    cdef const word_t *present = <const word_t *>&touched[0]
    cdef word_t *words = <word_t *>&bitmap[0]
    with nogil:
        while True:
            page = next_changed(hasher, memory, base, page, stop, table, present, &h)
            if page == stop:
                break
            set_hash(table, page, h)
            words[page >> 6] |= <uint64_t>1 << (page & 63)
            changed += 1
            page += 1
    return changed


def find_changed(
    PageHasher hasher not None,
    const uint8_t[::1] segment not None,
    base_page,
    first,
    end,
    PageHashes table not None,
    const uint64_t[::1] touched not None,
    uint64_t[::1] bits not None,
):
    check_range(first, end, segment.shape[0] // PAGE_BYTES)
    check_range(base_page, base_page + end, min(len(table), touched.shape[0] * 64))
    check_range(0, end - first, bits.shape[0] * 64)
    cdef uint64_t base = base_page, page = base_page + first, stop = base_page + end
    cdef uint64_t start = page, h = 0, changed = 0
    cdef const uint8_t *memory = &segment[0]
    cdef const word_t *present = <const word_t *>&touched[0]
    cdef word_t *words = <word_t *>&bits[0]
    with nogil:
        while True:
            page = next_changed(hasher, memory, base, page, stop, table, present, &h)
            if page == stop:
                break
            words[(page - start) >> 6] |= <uint64_t>1 << ((page - start) & 63)
            changed += 1
            page += 1
    return changed

"""Collect changed pages into what one MEMORY section carries.

The user's documentation is in batch.pyi.

The guest runs and writes while its memory is read.  So a page that is sent is
first copied, and the copy is hashed: the hash in the section is then that of
the bytes in the section, whatever the guest does.  The loop goes page by page,
so that the copy is still in the first-level cache when it is hashed.

The memory is allocated once, and used for every section.  It consists of two
anonymous mappings, which Python's mmap owns: they are page-aligned, and a view
that outlives the batch keeps its mapping alive.
"""

cimport cython
from libc.stdint cimport UINT32_MAX, UINT64_MAX, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from bhystream.memory.page cimport (
    DATA, PAGE_BYTES, ZERO, Extent, PageHasher, PageHashes, anonymous, copy_page,
    entry_of, has_hash, hash_ahead, hash_page, is_zero, next_bit, next_not_zero,
    set_hash, set_zero, word_t
)

__all__ = ["Batch"]


# What one collect() works on.  The pages are global: those of the segment begin at
# `base`, bit 0 of `touched` is page 0, and bit 0 of `bits`, unless NULL, is `origin`.
cdef struct Walk:
    const uint8_t *memory
    uint64_t base
    const word_t *touched
    const word_t *bits
    uint64_t origin
    bint everything
    bint absent


@cython.final
cdef class Batch:
    cdef PageHasher hasher
    cdef readonly uint64_t max_pages, max_extents
    cdef readonly uint64_t npages, nextents, nzero
    cdef uint64_t max_count
    # The pages stay where they are.
    cdef readonly bint in_place
    # An extent has found no room.
    cdef bint overflow
    # A collect() runs without the GIL now; a second call must not run.
    cdef bint busy
    # The two mappings, and a view of each, so that nobody can close the mapping.
    cdef object page_map, list_map
    cdef uint8_t[::1] page_hold, list_hold
    cdef uint8_t *pages
    # The list mapping is [extents][gap for their copy][hashes]: list_view()
    # puts the copy right before the hashes, however many extents there are.
    cdef Extent *extents
    cdef uint64_t *hashes

    def __cinit__(self, PageHasher hasher not None, max_pages, max_extents,
                  max_count=UINT32_MAX, bint in_place=False):
        for limit in (max_pages, max_extents, max_count):
            if not 1 <= limit <= UINT32_MAX:
                raise ValueError(f"limit {limit} is not within [1, {UINT32_MAX}]")
        self.hasher = hasher
        self.max_pages = max_pages
        self.max_extents = max_extents
        self.max_count = max_count
        self.in_place = in_place
        self.page_map = anonymous(PAGE_BYTES if in_place else max_pages * PAGE_BYTES)
        self.list_map = anonymous(max_extents * sizeof(Extent) * 2 + max_pages * 8)
        self.page_hold = self.page_map
        self.list_hold = self.list_map
        self.pages = &self.page_hold[0]
        self.extents = <Extent *>&self.list_hold[0]
        self.hashes = <uint64_t *>(self.extents + 2 * self.max_extents)

    @property
    def full(self):
        return self.overflow or self.npages == self.max_pages

    def clear(self):
        self.check_idle()
        self.npages = self.nextents = self.nzero = 0
        self.overflow = False

    def list_view(self):
        self.check_idle()
        cdef uint64_t nbytes = self.nextents * sizeof(Extent)
        cdef uint64_t middle = self.max_extents * sizeof(Extent) * 2
        cdef uint8_t *copy = <uint8_t *>self.hashes - nbytes
        memcpy(copy, self.extents, nbytes)
        with memoryview(self.list_map) as whole:
            return whole[middle - nbytes:middle + self.npages * 8].toreadonly()

    def page_view(self):
        self.check_idle()
        if self.in_place:
            raise ValueError("the pages of this batch are where they were")
        with memoryview(self.page_map) as whole:
            return whole[:self.npages * PAGE_BYTES].toreadonly()

    def collect(
        self,
        const uint8_t[::1] segment not None,
        base_page,
        first,
        end,
        PageHashes table not None,
        const uint64_t[::1] touched not None,
        bint everything,
        *,
        bint absent=True,
        const uint64_t[::1] bits=None,
        origin=0,
    ):
        npages = segment.shape[0] // PAGE_BYTES
        nknown = min(len(table), touched.shape[0] * 64)
        self.check(base_page, first, end, npages, nknown)
        cdef Walk walk
        walk.memory = &segment[0]
        walk.base = base_page
        walk.touched = <const word_t *>&touched[0]
        walk.bits = NULL
        walk.origin = 0
        walk.everything = everything
        walk.absent = absent
        if bits is not None:
            if not 0 <= origin <= first or end - origin > bits.shape[0] * 64:
                raise ValueError(
                    f"pages [{first}, {end}) are not marked from {origin} on"
                )
            walk.origin = base_page + origin
            walk.bits = <const word_t *>&bits[0]
        cdef uint64_t page = base_page + first, stop = base_page + end
        self.busy = True
        with nogil:
            page = self.walk_pages(&walk, page, stop, table)
        self.busy = False
        return page - walk.base

    cdef int check_idle(self) except -1:
        if self.busy:
            raise ValueError("the batch is in use by another thread")
        return 0

    cdef int check(self, base_page, first, end, npages, nentries) except -1:
        self.check_idle()
        if not 0 <= first <= end <= npages:
            raise ValueError(f"pages [{first}, {end}) are not within [0, {npages})")
        if not 0 <= base_page <= nentries - end:
            raise ValueError(
                f"pages up to {base_page} + {end} are not in table and bitmap"
            )
        if self.nextents > 0:
            last = self.extents[self.nextents - 1]
            if base_page + first < last.first + last.count:
                raise ValueError("pages of one batch must ascend")
        return 0

    cdef uint64_t walk_pages(
        self, const Walk *walk, uint64_t page, uint64_t end, PageHashes table
    ) noexcept nogil:
        """Handle touched and absent pages; return the first one without room."""
        cdef uint64_t stop, next_run = next_bit(walk.touched, 0, page, end)
        while page < end:
            if walk.absent:
                page = self.take_absent(page, next_run, table, walk.everything)
                if page < next_run:
                    break
            page = next_run
            stop = next_bit(walk.touched, UINT64_MAX, page, end)
            next_run = next_bit(walk.touched, 0, stop, end)
            if walk.bits == NULL:
                page = self.take_pages(
                    walk, page, stop, min(next_run, end - 1), table, walk.everything
                )
            else:
                page = self.take_marked(walk, page, stop, table)
            if page < stop:
                break
        return page

    cdef uint64_t take_pages(
        self,
        const Walk *walk,
        uint64_t page,
        uint64_t end,
        uint64_t next_run,
        PageHashes table,
        bint everything,
    ) noexcept nogil:
        """Handle pages of the segment; return the first one without room.

        next_run: a page that is fetched at the end, because it is needed next.
        """
        cdef const uint8_t *live
        cdef const uint8_t *ahead
        cdef uint64_t h = 0, distance
        cdef bint has_room, zero
        while page < end and self.npages < self.max_pages:
            live = walk.memory + (page - walk.base) * PAGE_BYTES
            # The best distances, as measured: one page ahead of a hash, two of a copy.
            distance = 2 if everything and not self.in_place else 1
            if page + distance < end:
                ahead = live + distance * PAGE_BYTES
            else:
                ahead = walk.memory + (next_run - walk.base) * PAGE_BYTES
            if not everything or self.in_place:
                h = hash_ahead(self.hasher, live, ahead)
                if not everything and has_hash(table, page, h):
                    page += 1
                    continue
            if self.in_place:
                zero = h == self.hasher.zero_hash and is_zero(live)
                has_room = self.add(page, zero, h, table)
            else:
                has_room = self.take(live, ahead, page, table, everything)
            if not has_room:
                break
            page += 1
        return page

    cdef uint64_t take_marked(
        self, const Walk *walk, uint64_t page, uint64_t end, PageHashes table
    ) noexcept nogil:
        """Handle the pages whose bit is set; return the first one without room."""
        cdef uint64_t origin = walk.origin, stop
        while page < end:
            page = origin + next_bit(walk.bits, 0, page - origin, end - origin)
            stop = origin + next_bit(walk.bits, UINT64_MAX, page - origin, end - origin)
            page = self.take_pages(walk, page, stop, stop - 1, table, True)
            if page < stop:
                break
        return page

    cdef bint add(
        self, uint64_t page, bint zero, uint64_t h, PageHashes table
    ) noexcept nogil:
        """Add a page with its hash; return False if there is no room for it.

        The table changes last, so a page without room is found changed again.
        """
        if self.append(page, 1, ZERO if zero else DATA) == 0:
            return False
        if not zero:
            self.hashes[self.npages] = h
            self.npages += 1
        set_hash(table, page, h)
        return True

    cdef bint take(
        self,
        const uint8_t *live,
        const uint8_t *ahead,
        uint64_t page,
        PageHashes table,
        bint everything,
    ) noexcept nogil:
        """Copy one page and add it; return False if there is no room for it."""
        cdef uint8_t *copy = self.pages + self.npages * PAGE_BYTES
        cdef bint zero = copy_page(copy, live, ahead)
        cdef uint64_t h = self.hasher.zero_hash
        if not zero:
            h = hash_page(self.hasher, copy)
        if not everything and has_hash(table, page, h):
            return True  # the page changed back before it was copied
        return self.add(page, zero, h, table)

    cdef uint64_t take_absent(
        self, uint64_t page, uint64_t end, PageHashes table, bint everything
    ) noexcept nogil:
        """Handle pages that are holes; return the first one without room."""
        cdef uint64_t stop
        while page < end:
            # A run, possibly empty, of pages that all have to be added.
            stop = end
            if not everything:
                page = next_not_zero(table, page, end)
                stop = page
                while stop < end and entry_of(table, stop)[0] != 0:
                    stop += 1
            stop = page + self.append(page, stop - page, ZERO)
            set_zero(table, page, stop)
            page = stop
            if self.overflow:
                break
        return page

    cdef uint64_t append(
        self, uint64_t first, uint64_t count, uint32_t kind
    ) noexcept nogil:
        """Add the pages [first, first + count); return how many found room."""
        cdef uint64_t left = count, n
        cdef Extent *last = self.extents + self.nextents - 1
        while left > 0:
            if (
                self.nextents == 0
                or last.kind != kind
                or last.first + last.count != first
                or last.count == self.max_count
            ):
                if self.nextents == self.max_extents:
                    self.overflow = True
                    break
                last = self.extents + self.nextents
                last.first, last.count, last.kind = first, 0, kind
                self.nextents += 1
            n = min(left, self.max_count - last.count)
            last.count += <uint32_t>n
            first += n
            left -= n
        if kind == ZERO:
            self.nzero += count - left
        return count - left

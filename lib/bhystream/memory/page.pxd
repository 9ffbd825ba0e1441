"""What the loops share in C: hash, table of hashes, copy, words, write."""

from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.types cimport off_t
from posix.unistd cimport pwrite

cdef extern from *:
    """
    #include <stdint.h>
    /*
     * A u64 at any address.  Buffers come from Python and may be misaligned.
     * The compiler may assume that a plain uint64_t pointer is aligned, and the
     * vector code that it makes of a loop then traps.
     */
    typedef uint64_t bhys_word __attribute__((aligned(1), may_alias));
    """
    ctypedef uint64_t word_t "bhys_word"
    void prefetch "__builtin_prefetch"(const void *) noexcept nogil
    int trailing_zeros "__builtin_ctzll"(unsigned long long) noexcept nogil
    int count_ones "__builtin_popcountll"(unsigned long long) noexcept nogil

cdef enum:
    PAGE_BYTES = 4096
    SECRET_BYTES = 192
    LINE_BYTES = 64
    PAGE_LINES = 64
    LINE_WORDS = 8
    # The entries of one block of the table.
    BLOCK_SHIFT = 6
    BLOCK_PAGES = 64

ctypedef uint64_t (*hash_t)(const void *, size_t, const void *, size_t) noexcept nogil
ctypedef void (*make_secret_t)(void *, uint64_t) noexcept nogil

# An extent of bhystream(5), which on a little-endian host has exactly these bytes.
cdef struct Extent:
    uint64_t first
    uint32_t count
    uint32_t kind

cdef enum:
    DATA = 0
    ZERO = 1


cdef object anonymous(Py_ssize_t nbytes)


cdef class PageHasher:
    cdef hash_t function
    cdef uint8_t secret[SECRET_BYTES]
    cdef readonly uint64_t zero_hash


# See page.pyx.  blocks: for each 64 pages of the guest, the number of their block;
# block 0 is for the pages without one, and stays zero.
cdef class PageHashes:
    cdef readonly uint64_t npages
    cdef uint64_t zero_hash
    cdef word_t *entries
    cdef uint32_t *blocks
    cdef uint32_t nblocks
    # The two mappings, and a view of each, so that nobody can close the mapping.
    cdef object entry_map, block_map
    cdef uint8_t[::1] entry_hold, block_hold


cdef inline word_t *entry_of(PageHashes table, uint64_t page) noexcept nogil:
    cdef uint64_t block = table.blocks[page >> BLOCK_SHIFT]
    return table.entries + block * BLOCK_PAGES + (page & (BLOCK_PAGES - 1))


cdef inline bint has_hash(PageHashes table, uint64_t page, uint64_t h) noexcept nogil:
    return entry_of(table, page)[0] == h ^ table.zero_hash


cdef inline void set_hash(PageHashes table, uint64_t page, uint64_t h) noexcept nogil:
    cdef uint64_t entry = h ^ table.zero_hash
    if table.blocks[page >> BLOCK_SHIFT] == 0:
        if entry == 0:
            return
        table.nblocks += 1
        table.blocks[page >> BLOCK_SHIFT] = table.nblocks
    entry_of(table, page)[0] = entry


cdef inline uint64_t next_not_zero(
    PageHashes table, uint64_t page, uint64_t end
) noexcept nogil:
    """Return the first page of [page, end) that has not the zero hash, or end."""
    while page < end:
        if table.blocks[page >> BLOCK_SHIFT] == 0:
            page = (page | (BLOCK_PAGES - 1)) + 1
        elif entry_of(table, page)[0] != 0:
            return page
        else:
            page += 1
    return end


cdef inline void set_zero(PageHashes table, uint64_t page, uint64_t end) noexcept nogil:
    """Give the pages [page, end) the zero page's hash."""
    while True:
        page = next_not_zero(table, page, end)
        if page == end:
            break
        entry_of(table, page)[0] = 0
        page += 1


cdef inline uint64_t next_bit(
    const word_t *words, uint64_t flip, uint64_t at, uint64_t end
) noexcept nogil:
    """Return the first bit of [at, end) that is set, or end.

    flip: 0, or all ones to find the first bit that is clear.
    """
    cdef uint64_t word
    while at < end:
        word = (words[at >> 6] ^ flip) >> (at & 63)
        if word != 0:
            return min(end, at + <uint64_t>trailing_zeros(word))
        at = (at | 63) + 1
    return end


cdef inline uint64_t hash_page(PageHasher hasher, const uint8_t *page) noexcept nogil:
    return hasher.function(page, PAGE_BYTES, hasher.secret, SECRET_BYTES)


cdef inline uint64_t hash_ahead(
    PageHasher hasher, const uint8_t *page, const uint8_t *ahead
) noexcept nogil:
    """Hash a page while `ahead` is fetched into the cache: 1.2 times as fast.

    The hardware prefetcher stops at the end of a page.  A prefetch of a page
    that is not there does nothing, so the prefetch allocates no guest memory.
    """
    cdef int line
    for line in range(PAGE_LINES):
        prefetch(ahead + line * LINE_BYTES)
    return hash_page(hasher, page)


cdef inline bint is_zero(const uint8_t *page) noexcept nogil:
    cdef const word_t *words = <const word_t *>page
    cdef int i
    for i in range(PAGE_BYTES // 8):
        if words[i] != 0:
            return False
    return True


cdef inline bint copy_page(
    uint8_t *copy, const uint8_t *page, const uint8_t *ahead
) noexcept nogil:
    """Copy a page and say whether the copy is all zero.

    This is one loop, not memcpy(3) and a test that leaves early: the loop fetches
    `ahead` meanwhile, and copy and hash together are twice as fast.  It tests
    the very words that it copies; a running guest could change a word between
    a copy and a separate test.
    """
    cdef word_t *to = <word_t *>copy
    cdef const word_t *words = <const word_t *>page
    cdef uint64_t word, seen = 0
    cdef int line, i
    for line in range(PAGE_LINES):
        prefetch(ahead + line * LINE_BYTES)
        for i in range(LINE_WORDS):
            word = words[i]
            to[i] = word
            seen |= word
        words += LINE_WORDS
        to += LINE_WORDS
    return seen == 0


cdef inline int write_at(
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

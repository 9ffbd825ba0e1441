"""Walk and count the bits of a dirty bitmap.

The user's documentation is in bitmap.pyi.  One loop finds the next bit of
either value, because a bitmap seen through an exclusive or with all ones has
its runs and gaps swapped.
"""

from libc.stdint cimport UINT64_MAX, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    /* A u64 at any address: a buffer from Python may be misaligned. */
    typedef uint64_t bhys_word __attribute__((aligned(1), may_alias));
    """
    ctypedef uint64_t word_t "bhys_word"
    int ctz "__builtin_ctzll"(unsigned long long) noexcept nogil
    int popcount "__builtin_popcountll"(unsigned long long) noexcept nogil

cdef enum:
    WORD_PAGES = 64
    STRIDE = 8

__all__ = ["count", "walk"]


cdef int check_range(object first, object end, Py_ssize_t nwords) except -1:
    if not 0 <= first <= end <= nwords * WORD_PAGES:
        raise ValueError(f"pages [{first}, {end}) are not within {nwords} words")
    return 0


cdef uint64_t next_bit(
    const word_t *words, uint64_t page, uint64_t end, uint64_t flip
) noexcept nogil:
    """Return the first page of [page, end) with its bit set, else end.

    flip: 0, or all ones to look for a clear bit.  Reads no word outside the
    range.
    """
    cdef uint64_t index, last, word
    if page >= end:
        return end
    index = page // WORD_PAGES
    last = (end - 1) // WORD_PAGES
    word = (words[index] ^ flip) & (UINT64_MAX << (page % WORD_PAGES))
    while word == 0:
        # One branch for eight words: the gaps of a sparse map then go by as
        # fast as memory delivers them.
        while last - index > STRIDE and all_are(words + index + 1, flip):
            index += STRIDE
        if index == last:
            return end
        index += 1
        word = words[index] ^ flip
    return min(index * WORD_PAGES + <uint64_t>ctz(word), end)


cdef inline bint all_are(const word_t *words, uint64_t value) noexcept nogil:
    cdef uint64_t differ = 0
    cdef int i
    for i in range(STRIDE):
        differ |= words[i] ^ value
    return differ == 0


def walk(const uint64_t[::1] words not None, first, end, uint64_t[::1] out not None):
    check_range(first, end, words.shape[0])
    if out.shape[0] < 2 or out.shape[0] % 2:
        raise ValueError(f"{out.shape[0]} words do not hold pairs")
    cdef uint64_t page = first, stop = end
    cdef Py_ssize_t n = 0, room = out.shape[0] // 2
    cdef const word_t *bits = <const word_t *>&words[0]
    cdef word_t *pairs = <word_t *>&out[0]
    with nogil:
        page = next_bit(bits, page, stop, 0)
        while page < stop and n < room:
            pairs[2 * n] = page
            page = next_bit(bits, page, stop, UINT64_MAX)
            pairs[2 * n + 1] = page
            n += 1
            page = next_bit(bits, page, stop, 0)
    return n, page


def count(const uint64_t[::1] words not None, first, end):
    check_range(first, end, words.shape[0])
    cdef uint64_t start = first, stop = end, total
    cdef const word_t *bits = <const word_t *>&words[0]
    with nogil:
        total = count_bits(bits, start, stop)
    return total


cdef uint64_t count_bits(
    const word_t *words, uint64_t first, uint64_t end
) noexcept nogil:
    cdef uint64_t index, last, total = 0
    if first == end:
        return 0
    index = first // WORD_PAGES
    last = (end - 1) // WORD_PAGES
    # The bits before `first` and from `end` on, taken off the whole words.
    total -= <uint64_t>popcount(words[index] & ~(UINT64_MAX << (first % WORD_PAGES)))
    if end % WORD_PAGES:
        total -= <uint64_t>popcount(words[last] & (UINT64_MAX << (end % WORD_PAGES)))
    while index <= last:
        if words[index]:
            total += <uint64_t>popcount(words[index])
        index += 1
    return total

"""Give pages to a pipe, and take pages out of one, without a copy in this process.

The user's documentation is in splice.pyi.
"""

import os

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, EIO, ENOSYS, errno
from libc.stdint cimport INT64_MAX, UINT64_MAX, uint8_t, uint64_t
from libc.string cimport memcpy
from posix.unistd cimport read

from bhystream.memory.page cimport (
    DATA, PAGE_BYTES, ZERO, Extent, PageHasher, hash_ahead, word_t, write_at
)

__all__ = ["place_spliced", "splice_pages"]

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <sys/types.h>
    #include <sys/uio.h>
    /*
     * vmsplice(2) fails so if the descriptor is no pipe, if the kernel does not give
     * these pages to a pipe, or if a filter forbids the call.
     */
    static ssize_t bhys_give(int fd, const struct iovec *parts, size_t count)
    {
    #if defined(__linux__)
        ssize_t taken = vmsplice(fd, parts, count, 0);
        if (taken >= 0 || (errno != EBADF && errno != ENOSYS && errno != EINVAL
                           && errno != EFAULT && errno != EPERM))
            return taken;
    #endif
        return writev(fd, parts, (int)count);
    }
    /*
     * splice(2) into a file; ENOSYS if the file system does not have it, or if a
     * filter forbids the call.
     */
    static ssize_t bhys_splice(int pipe, int fd, int64_t offset, size_t nbytes)
    {
    #if defined(__linux__)
        loff_t at = offset;
        ssize_t moved = splice(pipe, NULL, fd, &at, nbytes, 0);
        if (moved >= 0 || (errno != EINVAL && errno != EOPNOTSUPP && errno != EPERM))
            return moved;
    #else
        (void)pipe, (void)fd, (void)offset, (void)nbytes;
    #endif
        errno = ENOSYS;
        return -1;
    }
    """
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t give "bhys_give"(
        int fd, const iovec *parts, size_t count
    ) noexcept nogil
    ssize_t splice_into "bhys_splice"(
        int pipe, int fd, uint64_t offset, size_t nbytes
    ) noexcept nogil

# One call takes no more parts.  Source: Linux, include/uapi/linux/uio.h, UIO_MAXIOV.
cdef enum:
    MAX_PARTS = 1024

# So many bytes are copied if they cannot be spliced.
cdef enum:
    COPY_BYTES = 1 << 14

# So many bytes are placed, and then hashed while they are in the second-level cache.
cdef enum:
    STEP_BYTES = 1 << 19


def splice_pages(
    fd,
    const uint8_t[::1] segment not None,
    base_page,
    const uint8_t[::1] extents not None,
    start_bytes,
):
    cdef iovec parts[MAX_PARTS]
    cdef Py_ssize_t nextents = extents.shape[0] // <Py_ssize_t>sizeof(Extent)
    cdef uint64_t npages = <uint64_t>segment.shape[0] // PAGE_BYTES
    cdef uint64_t base, skip
    cdef size_t count
    cdef ssize_t taken
    cdef int number
    if not 0 <= fd <= 0x7FFFFFFF:
        raise ValueError(f"{fd} is not a file descriptor")
    if extents.shape[0] % <Py_ssize_t>sizeof(Extent):
        raise ValueError("the buffer does not hold whole extents")
    if not 0 <= base_page <= UINT64_MAX - npages:
        raise ValueError(f"no {npages} pages from {base_page}")
    if not 0 <= start_bytes <= UINT64_MAX:
        raise ValueError(f"{start_bytes} is not an offset")
    base, skip, number = base_page, start_bytes, fd
    if not collect_parts(
        &segment[0], base, npages, &extents[0], nextents, skip, parts, &count
    ):
        raise ValueError("an extent is not within the segment")
    while True:
        with nogil:
            taken = give(number, parts, count)
        if taken >= 0:
            return taken
        if errno != EINTR:
            raise OSError(errno, os.strerror(errno))
        PyErr_CheckSignals()


cdef bint collect_parts(
    const uint8_t *segment,
    uint64_t base,
    uint64_t npages,
    const uint8_t *extents,
    Py_ssize_t nextents,
    uint64_t skip,
    iovec *parts,
    size_t *count,
) noexcept nogil:
    """List the DATA bytes behind the first `skip`; return False for a wrong extent."""
    cdef Extent extent
    cdef uint64_t nbytes
    cdef Py_ssize_t i
    count[0] = 0
    for i in range(nextents):
        memcpy(&extent, extents + i * <Py_ssize_t>sizeof(Extent), sizeof(Extent))
        if extent.kind > ZERO:
            return False
        if extent.kind != DATA:
            continue
        if extent.first < base or extent.first - base > npages:
            return False
        if extent.count > npages - (extent.first - base):
            return False
        nbytes = <uint64_t>extent.count * PAGE_BYTES
        if skip >= nbytes:
            skip -= nbytes
            continue
        if count[0] == MAX_PARTS:
            break
        nbytes -= skip
        skip += (extent.first - base) * PAGE_BYTES
        parts[count[0]].iov_base = <void *>(segment + skip)
        parts[count[0]].iov_len = nbytes
        count[0] += 1
        skip = 0
    return True


# What one place_spliced() works on.  The segment's pages begin at `offset` of fd, and
# at `memory`.  extent, at: the extent whose byte comes next, and which of its bytes
# that is.  page: the index of the DATA page that is compared next.
cdef struct Place:
    int pipe
    int fd
    uint64_t offset
    const uint8_t *memory
    uint64_t base
    uint64_t npages
    const uint8_t *extents
    Py_ssize_t nextents
    const word_t *hashes
    uint64_t nhashes
    Py_ssize_t extent
    uint64_t at
    uint64_t page
    uint64_t left


# What place_bytes() returns; an errno is above 0.
cdef enum:
    PLACED = 0
    MALFORMED = -1
    DIFFERS = -2


def place_spliced(
    pipe_fd,
    nbytes,
    fd,
    offset_bytes,
    const uint8_t[::1] segment not None,
    base_page,
    const uint8_t[::1] extents not None,
    start_bytes,
    PageHasher hasher not None,
    const uint8_t[::1] hashes not None,
):
    cdef Place place
    cdef int found
    for number in (pipe_fd, fd):
        if not 0 <= number <= 0x7FFFFFFF:
            raise ValueError(f"{number} is not a file descriptor")
    if extents.shape[0] % <Py_ssize_t>sizeof(Extent) or hashes.shape[0] % 8:
        raise ValueError("the buffers do not hold whole extents and whole hashes")
    place.npages = <uint64_t>segment.shape[0] // PAGE_BYTES
    if not 0 <= base_page <= UINT64_MAX - place.npages:
        raise ValueError(f"no {place.npages} pages from {base_page}")
    if not 0 <= offset_bytes <= INT64_MAX - segment.shape[0]:
        raise ValueError(f"no file holds {place.npages} pages at offset {offset_bytes}")
    for number in (start_bytes, nbytes):
        if not 0 <= number <= INT64_MAX:
            raise ValueError(f"{number} is no number of bytes")
    place.pipe, place.fd, place.offset = pipe_fd, fd, offset_bytes
    place.memory, place.base = &segment[0], base_page
    place.extents = &extents[0]
    place.nextents = extents.shape[0] // <Py_ssize_t>sizeof(Extent)
    place.hashes, place.nhashes = <const word_t *>&hashes[0], hashes.shape[0] // 8
    # The first start_bytes were placed before.
    place.extent, place.at, place.page = 0, start_bytes, start_bytes // PAGE_BYTES
    place.left = nbytes
    while True:
        with nogil:
            found = place_bytes(&place, hasher)
        if found == DIFFERS:
            return place.page
        if found == MALFORMED:
            raise ValueError("the extents and hashes do not list pages of these bytes")
        if found == PLACED:
            return -1
        if found != EINTR:
            raise OSError(found, os.strerror(found))
        PyErr_CheckSignals()


cdef int place_bytes(Place *to, PageHasher hasher) noexcept nogil:
    """Place and compare until nothing is left; return how that ended."""
    cdef Extent extent
    cdef uint64_t nbytes, start
    cdef ssize_t count
    while to.left > 0:
        if to.extent == to.nextents:
            return MALFORMED
        memcpy(
            &extent,
            to.extents + to.extent * <Py_ssize_t>sizeof(Extent),
            sizeof(Extent),
        )
        if extent.kind > ZERO:
            return MALFORMED
        nbytes = <uint64_t>extent.count * PAGE_BYTES if extent.kind == DATA else 0
        if to.at >= nbytes:
            to.at -= nbytes
            to.extent += 1
            continue
        if extent.first < to.base or extent.first - to.base > to.npages:
            return MALFORMED
        if extent.count > to.npages - (extent.first - to.base):
            return MALFORMED
        start = (extent.first - to.base) * PAGE_BYTES
        nbytes = min(nbytes - to.at, to.left, STEP_BYTES - to.at % STEP_BYTES)
        count = put(to.pipe, to.fd, to.offset + start + to.at, nbytes)
        if count < 0:
            return <int>-count
        if count == 0:
            return EIO  # no file does this, and the loop would never end
        to.left -= <uint64_t>count
        if not compare(to, hasher, to.memory + start, to.at, to.at + <uint64_t>count):
            return DIFFERS if to.page < to.nhashes else MALFORMED
        to.at += <uint64_t>count
    return PLACED


cdef ssize_t put(int pipe, int fd, uint64_t offset, uint64_t nbytes) noexcept nogil:
    """Write up to so many bytes out of the pipe; return how many, or minus an errno."""
    cdef uint8_t copy[COPY_BYTES]
    cdef int error = 0
    cdef ssize_t count = splice_into(pipe, fd, offset, nbytes)
    if count < 0 and errno == ENOSYS:
        count = read(pipe, copy, min(nbytes, <uint64_t>COPY_BYTES))
        if count > 0:
            error = write_at(fd, copy, <uint64_t>count, offset)
    if count < 0:
        return -errno
    return -error if error else count


cdef bint compare(
    Place *to, PageHasher hasher, const uint8_t *memory, uint64_t at, uint64_t end
) noexcept nogil:
    """Compare the pages whose last byte is one of the bytes [at, end) of an extent."""
    cdef uint64_t page = at // PAGE_BYTES, stop = end // PAGE_BYTES, h
    while page < stop:
        if to.page == to.nhashes:
            return False
        h = hash_ahead(
            hasher,
            memory + page * PAGE_BYTES,
            memory + min(page + 1, stop - 1) * PAGE_BYTES,
        )
        if h != to.hashes[to.page]:
            return False
        to.page += 1
        page += 1
    return True

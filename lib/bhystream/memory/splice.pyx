"""Give pages of memory to a pipe without a copy: vmsplice(2), or else writev(2).

The user's documentation is in splice.pyi.
"""

import os

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, errno
from libc.stdint cimport UINT64_MAX, uint8_t, uint64_t
from libc.string cimport memcpy

from bhystream.memory.page cimport DATA, PAGE_BYTES, ZERO, Extent

__all__ = ["splice_pages"]

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
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
    """
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t give "bhys_give"(
        int fd, const iovec *parts, size_t count
    ) noexcept nogil

# One call takes no more parts.  Source: Linux, include/uapi/linux/uio.h, UIO_MAXIOV.
cdef enum:
    MAX_PARTS = 1024


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

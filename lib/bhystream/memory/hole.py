"""Find and make holes in files, so that memory which was never used takes no room."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Container, Iterator

from bhystream.guest import PAGE_BYTES

# Source: Linux, include/uapi/linux/falloc.h.
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
# Source: FreeBSD 14, fspacectl(2), sys/fcntl.h; usr.sbin/bhyve/block_if.c,
# blockif_proc(), which makes the same call.  This code has never been run.
_SPACECTL_DEALLOC = 1
_ZEROS = bytes(1 << 20)
# The errors of a system, or of a file system, that cannot make holes.
_NO_HOLES = (errno.EOPNOTSUPP, errno.ENOSYS)


class _Range(ctypes.Structure):
    """struct spacectl_range, in which the call returns the rest of the range."""

    _fields_ = (("offset", ctypes.c_int64), ("length", ctypes.c_int64))


def _linux() -> Callable[[int, int, int], int]:
    call = ctypes.CDLL(None, use_errno=True).fallocate64
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    call.restype = ctypes.c_int

    def deallocate(fd: int, offset_bytes: int, length_bytes: int) -> int:
        found: int = call(fd, _PUNCH_HOLE | _KEEP_SIZE, offset_bytes, length_bytes)
        return found

    return deallocate


def _freebsd() -> Callable[[int, int, int], int]:
    call = ctypes.CDLL(None, use_errno=True).fspacectl
    pointer = ctypes.POINTER(_Range)
    call.argtypes = (ctypes.c_int, ctypes.c_int, pointer, ctypes.c_int, pointer)
    call.restype = ctypes.c_int

    def deallocate(fd: int, offset_bytes: int, length_bytes: int) -> int:
        left = _Range(offset_bytes, length_bytes)
        found = 0
        while left.length and not found:
            found = call(fd, _SPACECTL_DEALLOC, ctypes.byref(left), 0, ctypes.byref(left))
        return found

    return deallocate


_deallocate: Callable[[int, int, int], int] | None = None
if sys.platform == "linux":
    _deallocate = _linux()
elif sys.platform.startswith("freebsd"):
    _deallocate = _freebsd()


def punch(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Make a range of a file zero.

    The range becomes a hole if the system and the file system can make one, else
    zeros are written.  The range must lie inside the file.  Raises OSError.
    """
    while _deallocate is not None:
        if not _deallocate(fd, offset_bytes, length_bytes):
            return
        number = ctypes.get_errno()
        if number in _NO_HOLES:
            break
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    end = offset_bytes + length_bytes
    while offset_bytes < end:
        offset_bytes += os.pwrite(fd, _ZEROS[: end - offset_bytes], offset_bytes)


def data_extents(
    fd: int, offset_bytes: int, length_bytes: int, no_holes: Container[int]
) -> Iterator[tuple[int, int]]:
    """Yield the page extents [first, end) of a piece of a file that hold data.

    The extents are counted from the start of the piece, rounded out to whole
    pages, ascending and disjoint.  no_holes: the errnos of a file system that does
    not know its holes; the rest of the piece, all of it if the first lseek(2)
    fails, is one extent then.  Raises OSError for any other errno.
    """
    at, end, done = offset_bytes, offset_bytes + length_bytes, 0
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here on
                return
            if error.errno not in no_holes:
                raise
            start, at = at, end
        first = max((start - offset_bytes) // PAGE_BYTES, done)
        done = -(-(min(at, end) - offset_bytes) // PAGE_BYTES)
        if first < done:
            yield first, done

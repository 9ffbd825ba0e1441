"""Give memory back: make a range of a file zero, and unallocated where possible."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

# Source: Linux, include/uapi/linux/falloc.h.
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZEROS = bytes(1 << 20)

_fallocate = None
if sys.platform == "linux":
    _fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    _fallocate.restype = ctypes.c_int


def punch(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Make a range of a file zero.

    A hole where the system and the file system make one, else zeros written.
    The range lies inside the file.  Raises OSError.
    """
    if _fallocate is not None:
        while _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset_bytes, length_bytes):
            number = ctypes.get_errno()
            if number == errno.EOPNOTSUPP:
                break
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
        else:
            return
    end = offset_bytes + length_bytes
    while offset_bytes < end:
        offset_bytes += os.pwrite(fd, _ZEROS[: end - offset_bytes], offset_bytes)

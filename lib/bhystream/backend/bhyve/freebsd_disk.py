"""Facts of a disk and of a network interface on FreeBSD, found as bhyve finds them.

A disk is opened as bhyve opens the disk: for writing, or only for reading if
writing is not allowed.  The disk is closed at once, and nothing is written.

Not run on FreeBSD.
Source: usr.sbin/bhyve/block_if.c, blockif_open(), FreeBSD 15.1.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import stat
import struct

from bhystream.backend.bhyve.host import Disk
from bhystream.backend.bhyve.ioctl import IOC_IN, IOC_OUT, number

_DEV_BSIZE = 512  # Source: sys/sys/param.h
_PC_DEALLOC_PRESENT = 65  # Source: sys/sys/unistd.h
_CAN_DELETE = b"GEOM::candelete"


class Attribute(ctypes.Structure):
    """struct diocgattr_arg: the union `value` has 256 bytes, and an int in it.

    Source: sys/sys/disk.h.
    """

    _fields_ = (
        ("name", ctypes.c_char * 64),
        ("len", ctypes.c_int),
        ("value", ctypes.c_int64 * 32),
    )


# Source: sys/sys/disk.h.
DIOCGSECTORSIZE = number(IOC_OUT, "d", 128, 4)
DIOCGMEDIASIZE = number(IOC_OUT, "d", 129, 8)
DIOCGATTR = number(IOC_IN | IOC_OUT, "d", 142, ctypes.sizeof(Attribute))
# Source: sys/sys/sockio.h; sys/net/if.h, struct ifreq: a name and a union, 16 bytes each.
_IFREQ = struct.Struct("<16si12x")
SIOCGIFMTU = number(IOC_IN | IOC_OUT, "i", 51, _IFREQ.size)


def disk(path: str) -> Disk | None:
    """See host.Host.disk()."""
    with contextlib.suppress(OSError):
        # The open of a FIFO would wait.  bhyve would open a directory, but it is no disk.
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
            return None
        try:
            fd, is_writable = os.open(path, os.O_RDWR | os.O_CLOEXEC), True
        except OSError:
            fd, is_writable = os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
        try:
            return _look(fd, is_writable)
        finally:
            os.close(fd)
    return None


def _look(fd: int, is_writable: bool) -> Disk | None:
    """Return the disk behind a descriptor, None if bhyve would refuse the disk's size.

    Raises OSError for a device that is no disk.
    """
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode):
        can_delete = False
        with contextlib.suppress(OSError):
            can_delete = os.fpathconf(fd, _PC_DEALLOC_PRESENT) == 1
        return Disk(found.st_size, _DEV_BSIZE, can_delete, is_writable)
    (size,) = struct.unpack("<q", fcntl.ioctl(fd, DIOCGMEDIASIZE, bytes(8)))
    (sector,) = struct.unpack("<I", fcntl.ioctl(fd, DIOCGSECTORSIZE, bytes(4)))
    if size <= 0 or sector == 0:
        return None  # bhyve ends if it meets such a disk
    asked = Attribute(name=_CAN_DELETE, len=4)
    can_delete = False
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, DIOCGATTR, asked)
        can_delete = asked.value[0] & 0xFFFFFFFF != 0
    return Disk(size, sector, can_delete, is_writable, is_device=True)


def mtu(interface: str) -> int | None:
    """See host.Host.mtu()."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
            asked = _IFREQ.pack(os.fsencode(interface), 0)
            answer = fcntl.ioctl(any_socket, SIOCGIFMTU, asked)
    except OSError:
        return None
    found: int = _IFREQ.unpack(answer)[1]
    return found if found > 0 else None

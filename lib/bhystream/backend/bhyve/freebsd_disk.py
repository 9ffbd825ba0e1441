"""What FreeBSD tells of a disk and of a network interface, asked as bhyve asks.

A disk is opened as bhyve opens it, to be written, or else to be read, and
closed at once: nothing is written.

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
    """struct diocgattr_arg: its union has 256 bytes, and an int.  Source: sys/sys/disk.h."""

    _fields_ = (
        ("name", ctypes.c_char * 64),
        ("len", ctypes.c_int),
        ("value", ctypes.c_int64 * 32),
    )


# Source: sys/sys/disk.h.
DIOCGSECTORSIZE = number(IOC_OUT, "d", 128, 4)
DIOCGMEDIASIZE = number(IOC_OUT, "d", 129, 8)
DIOCGATTR = number(IOC_IN | IOC_OUT, "d", 142, ctypes.sizeof(Attribute))
# Source: sys/sys/sockio.h; sys/net/if.h, struct ifreq: 16 bytes of name, 16 of a union.
_IFREQ = struct.Struct("<16si12x")
SIOCGIFMTU = number(IOC_IN | IOC_OUT, "i", 51, _IFREQ.size)


def disk(path: str) -> Disk | None:
    """As host.Host.disk()."""
    with contextlib.suppress(OSError):
        # Not a FIFO, whose open waits; nor a directory, which bhyve would open.
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
    """Return what is behind a descriptor.  Raises OSError for a device that is no disk."""
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode):
        can_delete = False
        with contextlib.suppress(OSError):
            can_delete = os.fpathconf(fd, _PC_DEALLOC_PRESENT) == 1
        return Disk(found.st_size, _DEV_BSIZE, can_delete, is_writable)
    (size,) = struct.unpack("<q", fcntl.ioctl(fd, DIOCGMEDIASIZE, bytes(8)))
    (sector,) = struct.unpack("<I", fcntl.ioctl(fd, DIOCGSECTORSIZE, bytes(4)))
    if size <= 0 or sector == 0:
        return None  # bhyve ends on it
    asked = Attribute(name=_CAN_DELETE, len=4)
    can_delete = False
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, DIOCGATTR, asked)
        can_delete = asked.value[0] & 0xFFFFFFFF != 0
    return Disk(size, sector, can_delete, is_writable, is_device=True)


def mtu(interface: str) -> int | None:
    """As host.Host.mtu()."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
            asked = _IFREQ.pack(os.fsencode(interface), 0)
            answer = fcntl.ioctl(any_socket, SIOCGIFMTU, asked)
    except OSError:
        return None
    found: int = _IFREQ.unpack(answer)[1]
    return found if found > 0 else None

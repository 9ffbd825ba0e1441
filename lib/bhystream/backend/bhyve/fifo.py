"""The FIFO that holds a checkpoint: bhyve stands in its last write, until somebody reads.

    make()   a FIFO, and how many bytes it takes
    arm()    full but for one byte, so that bhyve's write of FILE.meta begins and does not end
    full     bhyve stands in that write: FIONREAD says so
    drain()  the write ends, and the guest runs on; at its end bhyve has closed it

What is in a FIFO lives as long as somebody has it open.  bhyve has it open
twice: as its own FILE.meta, and as the descriptor that the request brought
(checkpoint.py), which it keeps until its handler has returned.  So:

    it is full                 bhyve lives, and stands in the write
    nobody has it open to read  no request that brought it is waiting or being served

Both are asked of the FIFO alone, by any process, and cost a system call each.
The second needs a process that does not have it open itself: nothing here
leaves it open but arm(), whose caller closes it.

Run on FreeBSD 15.1, emulated AMD: the hold, and the release by any reader.
Read: sys/fs/fifofs/fifo_vnops.c, fifo_open() (ENXIO) and fifo_close();
sys/kern/sys_pipe.c, pipe_write(): a write of up to PIPE_BUF bytes is put in
whole or not at all, and one of PIPE_MINDIRECT or more may wait for an empty
pipe, so that neither fills it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import struct
import termios
from pathlib import Path

# Source: sys/sys/syslimits.h, PIPE_BUF; sys/sys/pipe.h, PIPE_MINDIRECT.
ATOMIC_BYTES = 512
DIRECT_BYTES = 8192
# JSON passes over it.
_FILLER = b" "
_BLOCK_BYTES = 64 << 10
_INT = struct.Struct("=i")


def make(path: Path) -> int:
    """Make a FIFO, mode 0600; return how many bytes it takes.  Raises OSError."""
    os.mkfifo(path, 0o600)
    fd = _open(path, os.O_RDWR)
    try:
        size_bytes = 0
        for block_bytes in (_BLOCK_BYTES, 1):
            while written := _write(fd, _FILLER * block_bytes):
                size_bytes += written
        return size_bytes
    finally:
        os.close(fd)


def arm(path: Path, full_bytes: int) -> int:
    """Leave room for one byte; return the FIFO, open, the caller's to close.

    Raises OSError: ENOBUFS where it does not take what it took before.
    """
    fd = _open(path, os.O_RDWR)
    try:
        _read_into(bytearray(), fd)
        if _write(fd, _FILLER * (full_bytes - 1)) != full_bytes - 1:
            raise OSError(errno.ENOBUFS, f"it takes less than {full_bytes} bytes now", str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


def pending(path: Path) -> int:
    """Return how many bytes are in a FIFO; 0 where it is not there, or is none.  Raises OSError."""
    try:
        fd = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return 0
    try:
        return pending_in(fd) if stat.S_ISFIFO(os.fstat(fd).st_mode) else 0
    finally:
        os.close(fd)


def pending_in(fd: int) -> int:
    """Return how many bytes are in an open FIFO (FIONREAD)."""
    count: int = _INT.unpack(fcntl.ioctl(fd, termios.FIONREAD, bytes(_INT.size)))[0]
    return count


def drain(path: Path, limit_s: float) -> tuple[bytes, bool]:
    """Read a FIFO until nobody has it open to write: (what was in it, whether that was so).

    limit_s: how long to wait for more.  bhyve's copy of what the request
    brought is open to write too.  Where nobody has it open at first, that is
    not seen on FreeBSD: ask has_reader() before.  Raises OSError.
    """
    found = bytearray()
    fd = _open(path, os.O_RDONLY)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while not _read_into(found, fd):
            if not poll.poll(limit_s * 1000):
                return bytes(found), False
        return bytes(found), True
    finally:
        os.close(fd)


def has_reader(path: Path) -> bool:
    """Say whether anybody has a FIFO open to read it, or is sent it.  Raises OSError."""
    try:
        os.close(_open(path, os.O_WRONLY))
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False
    return True


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)


def _write(fd: int, data: bytes) -> int:
    try:
        return os.write(fd, data)
    except BlockingIOError:
        return 0


def _read_into(found: bytearray, fd: int) -> bool:
    """Read until a FIFO is empty; say whether nobody has it open to write."""
    try:
        while part := os.read(fd, _BLOCK_BYTES):
            found += part
    except BlockingIOError:
        return False
    return True

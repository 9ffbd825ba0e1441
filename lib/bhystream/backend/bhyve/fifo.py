"""The FIFO that holds a checkpoint: bhyve waits in its last write until a process reads.

    make()   makes a FIFO, and tells how many bytes the FIFO takes
    arm()    fills all but one byte, so bhyve's write of FILE.meta begins and does not end
    full     bhyve waits in that write: FIONREAD shows it
    drain()  ends the write, so the guest runs on; drain() ends when bhyve has closed the FIFO

The bytes in a FIFO stay as long as a process has the FIFO open.  bhyve has the
FIFO open twice: as FILE.meta, and as the descriptor that came with the request
(checkpoint.py), which bhyve keeps until its handler has returned.  So:

    the FIFO is full                  bhyve lives, and waits in the write
    no process has it open to read    no request with the FIFO is waiting or being served

Any process can ask the FIFO for both, with a few system calls each.  A process
that has the FIFO open itself cannot ask for the second: only arm() leaves the
FIFO open, and arm()'s caller closes it.

Run on FreeBSD 15.1, emulated AMD: the hold, and the release by any reader.
Read: sys/fs/fifofs/fifo_vnops.c, fifo_open() (ENXIO) and fifo_close();
sys/kern/sys_pipe.c, pipe_write(): a write of up to PIPE_BUF bytes goes in whole
or not at all, and a write of PIPE_MINDIRECT bytes or more may wait for an empty
pipe, so neither of the two fills the FIFO.
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
# A reader of JSON skips spaces.
_FILLER = b" "
_BLOCK_BYTES = 64 << 10
_INT = struct.Struct("=i")


def make(path: Path) -> int:
    """Make a FIFO, mode 0600; return how many bytes the FIFO takes.  Raises OSError."""
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
    """Fill a FIFO but for one byte; return its descriptor, which the caller closes.

    full_bytes: what make() returned.  Raises OSError: ENOBUFS if the FIFO takes
    fewer bytes than make() found.
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
    """Return how many bytes are in a FIFO; 0 if there is no FIFO there.  Raises OSError."""
    try:
        fd = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return 0
    try:
        return pending_in(fd) if stat.S_ISFIFO(os.fstat(fd).st_mode) else 0
    finally:
        os.close(fd)


def pending_in(fd: int) -> int:
    """Return how many bytes are in an open FIFO (FIONREAD).  Raises OSError."""
    count: int = _INT.unpack(fcntl.ioctl(fd, termios.FIONREAD, bytes(_INT.size)))[0]
    return count


def drain(path: Path, limit_s: float) -> tuple[bytes, bool]:
    """Read a FIFO until no process has it open to write: (bytes read, whether it came to that).

    limit_s: how long to wait for more bytes.  bhyve's copy of the request's
    descriptor is open to write too.  If no process has the FIFO open to write
    at the start, FreeBSD does not show that: ask has_reader() before.  Raises
    OSError.
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
    """Say whether a process has a FIFO open to read, or is being sent its descriptor.

    Returns False if there is no FIFO.  Raises OSError.
    """
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
    """Read until a FIFO is empty; say whether no process has it open to write."""
    try:
        while part := os.read(fd, _BLOCK_BYTES):
            found += part
    except BlockingIOError:
        return False
    return True

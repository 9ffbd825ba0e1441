"""The file behind a guest's memory: found and walked.

The file is found through /proc/PID/fd, not by its path: the path may be
unlinked (bhyrecv's own guests), a memfd, or one of another mount namespace.
What proves that a descriptor is the memory is the process's own mapping: a
shared, writable one of the whole size from offset 0.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

from bhystream import hole
from bhystream.errors import AccessError, GuestError

_MAPS = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<mode>....) (?P<offset>[0-9a-f]+) "
    r"[0-9a-f]+:[0-9a-f]+ (?P<inode>\d+)"
)


def _mapped_inodes(pid: int, size_bytes: int) -> set[int]:
    """Return the inodes that the process maps shared, writable and whole.

    Inode numbers only: for some file systems (btrfs, overlayfs) maps shows
    another device number than stat(2).  A mapping that the kernel shows in
    pieces (mprotect, madvise) is put together again by its offsets.
    """
    reach: dict[int, int] = {}
    with open(f"/proc/{pid}/maps", encoding="ascii", errors="replace") as file:
        for line in file:
            found = _MAPS.match(line)
            if not found or found["mode"][1] != "w" or found["mode"][3] != "s":
                continue
            inode, offset = int(found["inode"]), int(found["offset"], 16)
            if offset == reach.get(inode, 0):
                reach[inode] = offset + int(found["end"], 16) - int(found["start"], 16)
    return {inode for inode, end in reach.items() if end == size_bytes}


def open_ram(pid: int, size_bytes: int, flags: int) -> int:
    """Open the file that holds the memory of the QEMU with this pid.

    size_bytes: of the one memory backend.  flags: os.O_RDONLY or os.O_RDWR.
    Returns a descriptor, the caller's to close.  Raises GuestError.
    """
    try:
        inodes = _mapped_inodes(pid, size_bytes)
        found: dict[tuple[int, int], str] = {}
        for name in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{name}"
            try:
                status = os.stat(path)
            except FileNotFoundError:
                continue
            if status.st_ino in inodes and status.st_size >= size_bytes:
                found[status.st_dev, status.st_ino] = path
        if len(found) != 1:
            raise GuestError(
                f"cannot find the guest's memory: {len(found)} shared files of"
                f" {size_bytes} bytes are open in process {pid}"
            )
        return os.open(next(iter(found.values())), flags | os.O_CLOEXEC)
    except PermissionError:
        raise AccessError(f"cannot open the memory of process {pid}: permission denied") from None
    except OSError as error:
        raise GuestError(f"cannot open the memory of process {pid}: {error.strerror}") from None


def extents(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the page extents [first, end) of a file that hold data.

    A file system without SEEK_DATA reports everything as data (lseek(2)).
    """
    try:
        yield from hole.data_extents(fd, 0, size_bytes, (errno.EINVAL,))
    except OSError as error:
        raise GuestError(f"cannot walk the guest's memory: {error.strerror}") from None


def other_user(fd: int, own_pid: int) -> int | None:
    """Return the pid of another process that maps this file, or None.

    The guard against the worst mistake on one host: a destination that is
    given the memory file of the guest that runs.  Sees what /proc shows us:
    all processes to root, else our own.
    """
    inode = os.fstat(fd).st_ino
    size_bytes = os.fstat(fd).st_size
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in (own_pid, os.getpid()):
            continue
        try:
            if inode in _mapped_inodes(int(name), size_bytes):
                return int(name)
        except OSError:
            continue
    return None

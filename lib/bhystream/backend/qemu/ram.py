"""The file behind a guest's memory: found, mapped and walked.

The file is found through /proc/PID/fd, not by its path: the file may be
unlinked (bhyrecv's own guests), a memfd, or in another mount namespace.
A file is proven to be the memory by QEMU's own mapping of the file, which is
shared, writable, of the whole size and from offset 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import struct
import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from bhystream import threads
from bhystream.errors import AccessError, GuestError
from bhystream.guest import PAGE_BYTES
from bhystream.memory import hole

_MAPS = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<mode>....) (?P<offset>[0-9a-f]+) "
    r"[0-9a-f]+:[0-9a-f]+ (?P<inode>[0-9]+)"
)

_STATFS_BYTES = 512  # more than struct statfs has
_HUGETLBFS_MAGIC = 0x958458F6
_BLOCK_BYTES = 512  # the unit of st_blocks
_ENTRY_BYTES = 8
_ZEROS = bytes(1 << 20)


class _Mapping(NamedTuple):
    """One shared, writable mapping of a process.  start, end, offset: in bytes; end: exclusive."""

    start: int
    end: int
    offset: int
    inode: int


def _mappings(pid: int) -> Iterator[_Mapping]:
    """Yield the shared, writable mappings of a process.  Raises OSError."""
    with open(f"/proc/{pid}/maps", encoding="ascii", errors="replace") as file:
        for line in file:
            found = _MAPS.match(line)
            if found and found["mode"][1] == "w" and found["mode"][3] == "s":
                start, end, offset = (int(found[x], 16) for x in ("start", "end", "offset"))
                yield _Mapping(start, end, offset, int(found["inode"]))


def _mapped_inodes(pid: int, size_bytes: int) -> set[int]:
    """Return the inodes that the process maps shared, writable and whole.

    Device numbers are left out: for some file systems (btrfs, overlayfs) maps
    shows another device number than stat(2).  A mapping that the kernel shows in
    pieces (after mprotect, madvise) is put together again by its offsets.
    """
    reach: dict[int, int] = {}
    for one in _mappings(pid):
        if one.offset == reach.get(one.inode, 0):
            reach[one.inode] = one.offset + one.end - one.start
    return {inode for inode, end in reach.items() if end == size_bytes}


def open_ram(pid: int, size_bytes: int, flags: int) -> int:
    """Open the file that holds the memory of the QEMU with this pid.

    size_bytes: the size of the one memory backend.  flags: os.O_RDONLY or os.O_RDWR.
    Returns a descriptor, which the caller closes.  Raises GuestError or AccessError.
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


def map_ram(fd: int, size_bytes: int, who: str, protection: int) -> mmap.mmap:
    """Map a guest's memory.  protection: mmap.PROT_READ, mmap.PROT_WRITE.  Raises GuestError."""
    try:
        return mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, protection)
    except (OSError, ValueError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise GuestError(
            f"{who}: cannot map its memory of {size_bytes} bytes: {why}",
            hint="allow more address space (ulimit -v)",
        ) from None


def is_huge(fd: int) -> bool:
    """Say whether a file is on hugetlbfs, whose files can be written only through a mapping.

    Source: Linux, include/uapi/linux/magic.h; statfs(2): f_type comes first.
    """
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd, found):
        return False
    return int.from_bytes(found.raw[: struct.calcsize("l")], sys.byteorder) == _HUGETLBFS_MAGIC


def extents(fd: int, size_bytes: int, pid: int) -> Iterator[tuple[int, int]]:
    """Yield the page extents [first, end) of a file that hold data.

    pid: the QEMU's process id.  If the file system has no SEEK_DATA, everything counts
    as data (lseek(2)).  hugetlbfs is such a file system; _huge_extents() walks its
    files.  Raises GuestError if the file cannot be walked.
    """
    try:
        if is_huge(fd):
            yield from _huge_extents(fd, size_bytes, pid)
        else:
            yield from hole.data_extents(fd, 0, size_bytes, (errno.EINVAL,))
    except OSError as error:
        raise GuestError(f"cannot walk the guest's memory: {error.strerror}") from None


class Walk:
    """A walk by a thread of its own, over the memory of a guest that stands still.

    with Walk(fd, size_bytes, pid) as walk: ...  # the thread ends with the block

    found: what extents() yields, known after the block; None if the walk has failed, or if
    the system has no thread left.
    """

    def __init__(self, fd: int, size_bytes: int, pid: int) -> None:
        """Walk nothing yet.  The arguments are those of extents()."""
        self._arguments = (fd, size_bytes, pid)
        self._thread = threading.Thread(target=self._work)
        self.found: list[tuple[int, int]] | None = None

    def __enter__(self) -> Walk:
        with contextlib.suppress(RuntimeError):
            threads.start(self._thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        with contextlib.suppress(GuestError):
            self.found = list(extents(*self._arguments))


def _huge_extents(fd: int, size_bytes: int, pid: int) -> Iterator[tuple[int, int]]:
    """Yield the extents of touched pages in a file of huge pages, without allocating any.

    Reading a hole through a mapping would allocate a huge page; read(2) returns
    zeros.  QEMU's page table shows the pages that QEMU has touched, and
    st_blocks counts all pages of the file.  If the file has more pages, because
    another process has written, or while the kernel moves a page, the remaining
    pages are read; those that are all zero may be left out.
    """
    status = os.fstat(fd)
    huge_bytes = status.st_blksize
    npages = huge_bytes // PAGE_BYTES
    touched = _present(pid, status.st_ino, size_bytes, huge_bytes)
    if touched.count(1) * huge_bytes < os.fstat(fd).st_blocks * _BLOCK_BYTES:
        for at, is_touched in enumerate(touched):
            if not is_touched and _holds_data(fd, at * huge_bytes, huge_bytes):
                touched[at] = 1
    at = 0
    while (first := touched.find(1, at)) >= 0:
        end = touched.find(0, first)
        at = len(touched) if end < 0 else end
        yield first * npages, at * npages


def _present(pid: int, inode: int, size_bytes: int, huge_bytes: int) -> bytearray:
    """Return a byte for each huge page of a file: 1 if the process's page table has the page.

    Source: Linux, Documentation/admin-guide/mm/pagemap.rst: bit 63 of an entry.
    """
    found = bytearray(size_bytes // huge_bytes)
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as table:
        for one in _mappings(pid):
            if one.inode != inode:
                continue
            for at in range(0, one.end - one.start, huge_bytes):
                place = (one.start + at) // mmap.PAGESIZE * _ENTRY_BYTES
                entry = os.pread(table.fileno(), _ENTRY_BYTES, place)
                if int.from_bytes(entry, sys.byteorder) >> 63:
                    found[(one.offset + at) // huge_bytes] = 1
    return found


def _holds_data(fd: int, offset_bytes: int, length_bytes: int) -> bool:
    """Say whether a range of a file holds a byte other than zero."""
    for at in range(offset_bytes, offset_bytes + length_bytes, len(_ZEROS)):
        if os.pread(fd, len(_ZEROS), at) != _ZEROS:
            return True
    return False


def other_user(fd: int, own_pid: int) -> int | None:
    """Return the pid of another process that maps this file, or None.

    own_pid: the process id of the QEMU that is to use the file.  This guards against
    the worst mistake on one host: to give a destination the memory file of a running
    guest.  The function sees the processes that /proc lets us examine: all for root,
    otherwise our own.
    """
    inode = os.fstat(fd).st_ino
    size_bytes = os.fstat(fd).st_size
    for name in os.listdir("/proc"):
        if not (name.isascii() and name.isdigit()) or int(name) in (own_pid, os.getpid()):
            continue
        try:
            if inode in _mapped_inodes(int(name), size_bytes):
                return int(name)
        except OSError:
            continue
    return None

"""One VM of a FreeBSD kernel: /dev/vmm/NAME, opened to be read.

Unverified: none of it has run on FreeBSD.  Confirmed in source:

- Several may have the node open: vmmdev_open() asks only whether a jail may.
  No ioctl looks at how the node was opened, and one that is not known is
  ENOTTY.  Source: freebsd/freebsd-src@012895d5 sys/dev/vmm/vmm_dev.c,
  vmmdev_ioctl(); 14: index id 189825660.
- A descriptor to read gives a mapping to read: sys/fs/devfs/devfs_vnops.c,
  devfs_mmap_f() (1020455833).  It lies in one entry of the memory map:
  vmm_dev.c, vmmdev_mmap_single().
- The mapping keeps the guest's memory when the VM is destroyed, which does
  not wait for it: see memory.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence

from bhystream.backend.bhyve import ioctl, libc
from bhystream.backend.bhyve.host import HIGHMEM_BASE_GPA, MemoryMap
from bhystream.errors import AccessError, BhyError, GuestError

PAGE_BYTES = 4096
_MAPS_CAP = 64  # VM_MAX_MEMMAPS is 8 or 16.  Source: sys/amd64/vmm/vmm.c, sys/dev/vmm/vmm_mem.h.


def walk(next_map: Callable[[int], MemoryMap | None]) -> list[MemoryMap]:
    """Return the whole memory map, ascending by gpa.

    next_map: returns the first entry at or above a gpa, None where there is
    none.  Raises GuestError where the entries do not ascend, or do not end.
    """
    maps: list[MemoryMap] = []
    gpa = 0
    while (found := next_map(gpa)) is not None:
        if found.gpa < gpa or found.length_bytes <= 0 or len(maps) == _MAPS_CAP:
            raise GuestError(f"cannot read the memory map: an entry at {found.gpa:#x} is unsound")
        maps.append(found)
        gpa = found.gpa + found.length_bytes
    return maps


def dirty_request(lengths_bytes: Sequence[int], marks_at: int) -> ioctl.DirtyPageList:
    """Return the argument of VM_GET_DIRTY_PAGE_LIST.

    lengths_bytes: lowmem's, and highmem's where there is one.  marks_at:
    address of one byte a page.
    """
    request = ioctl.DirtyPageList(marks_at, sum(lengths_bytes) // PAGE_BYTES)
    request.lowmem = ioctl.Segment(0, lengths_bytes[0])
    if len(lengths_bytes) > 1:
        request.highmem = ioctl.Segment(HIGHMEM_BASE_GPA, HIGHMEM_BASE_GPA + lengths_bytes[1])
    return request


def cut(marks: bytes, lengths_bytes: Sequence[int]) -> list[bytes]:
    """Return the marks of each segment, lowmem's first."""
    pieces, at = [], 0
    for length in lengths_bytes:
        pieces.append(marks[at : at + length // PAGE_BYTES])
        at += length // PAGE_BYTES
    return pieces


class FreeBsdVm:
    """host.Vm over the node.  Opening it changes nothing; the descriptor is ours."""

    def __init__(self, name: str, node: str) -> None:
        """node: path of the VM's node."""
        self._who = f"guest {name}"
        try:
            # Read-only is enough: the ioctls here ask, and the mapping is never written.
            self._fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise GuestError(f"{self._who}: there is no {node}") from None
        except OSError as error:
            raise self._error(error, f"open {node}") from None

    def _error(self, error: OSError, doing: str) -> BhyError:
        kind = AccessError if isinstance(error, PermissionError) else GuestError
        return kind(f"{self._who}: cannot {doing}: {error.strerror}")

    def _next_map(self, gpa: int) -> MemoryMap | None:
        """Return the first entry at or above gpa.  Source: vm_mmap_getnext: ENOENT at the end."""
        entry = ioctl.VmMemmap(gpa=gpa)
        try:
            fcntl.ioctl(self._fd, ioctl.VM_MMAP_GETNEXT, entry)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(error, "read the memory map") from None
        return MemoryMap(
            gpa=entry.gpa,
            segid=entry.segid,
            offset_bytes=entry.segoff,
            length_bytes=entry.len,
            prot=entry.prot,
            is_wired=bool(entry.flags & ioctl.VM_MEMMAP_F_WIRED),
        )

    def maps(self) -> Sequence[MemoryMap]:
        """As host.Vm's."""
        return walk(self._next_map)

    def topology(self) -> tuple[int, int, int]:
        """As host.Vm's."""
        found = ioctl.VmCpuTopology()
        try:
            fcntl.ioctl(self._fd, ioctl.VM_GET_TOPOLOGY, found)
        except OSError as error:
            raise self._error(error, "read the CPU topology") from None
        return found.sockets, found.cores, found.threads

    def map(self, gpa: int, length_bytes: int) -> mmap.mmap:
        """As host.Vm's.  The offset in the node is the guest physical address.

        Python's mapping keeps a duplicate of the node's descriptor until it is
        closed; hw.vmm.destroy does not wait for it.
        """
        try:
            return mmap.mmap(
                self._fd, length_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=gpa
            )
        except OSError as error:
            raise self._error(error, f"map its memory at {gpa:#x}") from None

    def resident(self, mapping: mmap.mmap, gpa: int) -> bytes:
        """As host.Vm's."""
        return libc.resident(mapping)

    def dirty(self, lengths_bytes: Sequence[int]) -> list[bytes] | None:
        """As host.Vm's; a stock kernel answers ENOTTY and has no log."""
        npages = sum(lengths_bytes) // PAGE_BYTES
        marks = ctypes.create_string_buffer(npages)
        request = dirty_request(lengths_bytes, ctypes.addressof(marks))
        try:
            fcntl.ioctl(self._fd, ioctl.VM_GET_DIRTY_PAGE_LIST, request)
        except OSError as error:
            if error.errno == errno.ENOTTY:
                return None
            raise self._error(error, "read which pages changed") from None
        return cut(marks.raw, lengths_bytes)

    def close(self) -> None:
        """As host.Vm's.  Twice is no error.

        Of a VM that is destroyed close(2) says ENXIO, and the descriptor is
        closed all the same.  Source: devfs_vnops.c, devfs_close(); seen by
        Solo5, hvt_freebsd.c (index id 23559320362).
        """
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1

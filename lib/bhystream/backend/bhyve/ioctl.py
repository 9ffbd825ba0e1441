"""The ioctls of /dev/vmm/NAME that are used here: their numbers and structures.

A number is computed from its structure, as <sys/ioccom.h> does, so that the
two cannot disagree; the tests compare both with what was read in FreeBSD's
headers.  amd64 only.  Unverified: none of it has run on FreeBSD.
"""

from __future__ import annotations

import ctypes

# Source: sys/sys/ioccom.h.
IOC_VOID = 0x20000000
IOC_OUT = 0x40000000
IOC_IN = 0x80000000
_LENGTH_MASK = 0x1FFF

# Source: sys/amd64/include/vmm_dev.h.
VM_MEMMAP_F_WIRED = 0x01


def number(direction: int, group: str, nr: int, length_bytes: int) -> int:
    """Return an ioctl's number.  Source: sys/sys/ioccom.h, _IOC()."""
    return direction | (length_bytes & _LENGTH_MASK) << 16 | ord(group) << 8 | nr


class VmMemmap(ctypes.Structure):
    """struct vm_memmap.  Source: vmm_dev.h; the same in 12 to 15.

    gpa, len and segoff in bytes.  VM_MMAP_GETNEXT takes gpa as where to begin.
    """

    _fields_ = (
        ("gpa", ctypes.c_uint64),
        ("segid", ctypes.c_int),
        ("segoff", ctypes.c_int64),
        ("len", ctypes.c_size_t),
        ("prot", ctypes.c_int),
        ("flags", ctypes.c_int),
    )


class VmCpuTopology(ctypes.Structure):
    """struct vm_cpu_topology.  Source: vmm_dev.h."""

    _fields_ = (
        ("sockets", ctypes.c_uint16),
        ("cores", ctypes.c_uint16),
        ("threads", ctypes.c_uint16),
        ("maxcpus", ctypes.c_uint16),
    )


class Segment(ctypes.Structure):
    """struct vmm_migration_segment: guest physical addresses [start, end), bytes."""

    _fields_ = (("start", ctypes.c_size_t), ("end", ctypes.c_size_t))


class DirtyPageList(ctypes.Structure):
    """The argument of VM_GET_DIRTY_PAGE_LIST, which no stock kernel has.

    page_list: num_pages bytes, 1 = dirty, lowmem's pages first.
    Source: FreeBSD-UPB/freebsd-src, sys/amd64/include/vmm_dev.h and
    vmm_migration.h; the order of the pages and the unit of the segments are
    inferred.
    """

    _fields_ = (
        ("page_list", ctypes.c_void_p),
        ("num_pages", ctypes.c_size_t),
        ("lowmem", Segment),
        ("highmem", Segment),
    )


# Source: vmm_dev.h, enum IOCNUM and the _IO* lines below it.
VM_MMAP_GETNEXT = number(IOC_IN | IOC_OUT, "v", 17, ctypes.sizeof(VmMemmap))
VM_GET_TOPOLOGY = number(IOC_OUT, "v", 64, ctypes.sizeof(VmCpuTopology))
VM_GET_DIRTY_PAGE_LIST = number(IOC_IN | IOC_OUT, "v", 117, ctypes.sizeof(DirtyPageList))

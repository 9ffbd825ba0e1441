"""The ioctls of /dev/vmm/NAME that are used here: their numbers and structures.

Each number is computed from its structure, as <sys/ioccom.h> does, so that the
two cannot disagree.  The tests compare the numbers and structures with what was
read in FreeBSD's headers.  amd64 only.  VM_MMAP_GETNEXT and VM_GET_TOPOLOGY
have run on FreeBSD 15.1.  The numbers of the vCPU ioctls were only read (14 and
15 agree), but C programs with the same headers have used all of them on 15.1.
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
VM_DEBUG_CPUS = 2

CPUSET_BYTES = 128
"""The largest cpuset that VM_GET_CPUS takes.  Source: sys/sys/_cpuset.h, CPU_MAXSIZE / NBBY."""

VM_EXIT_BYTES = 4096
"""The buffer for VM_RUN's struct vm_exit, which has about 200 bytes now, and may grow."""


def number(direction: int, group: str, nr: int, length_bytes: int) -> int:
    """Return an ioctl's number.  Source: sys/sys/ioccom.h, _IOC()."""
    return direction | (length_bytes & _LENGTH_MASK) << 16 | ord(group) << 8 | nr


class VmMemmap(ctypes.Structure):
    """struct vm_memmap.  Source: vmm_dev.h; the same in FreeBSD 12 to 15.

    gpa, len, segoff: in bytes.  VM_MMAP_GETNEXT begins its search at gpa.
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


class VmRegister(ctypes.Structure):
    """struct vm_register.  A regnum below 0 names a field of the VMCS or VMCB: read-only."""

    _fields_ = (
        ("cpuid", ctypes.c_int),
        ("regnum", ctypes.c_int),
        ("regval", ctypes.c_uint64),
    )


class VmRegisterSet(ctypes.Structure):
    """struct vm_register_set.  regnums: `count` c_ints.  regvals: `count` c_uint64s."""

    _fields_ = (
        ("cpuid", ctypes.c_int),
        ("count", ctypes.c_uint),
        ("regnums", ctypes.c_void_p),
        ("regvals", ctypes.c_void_p),
    )


class SegDesc(ctypes.Structure):
    """struct seg_desc.  Source: vmm.h."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("access", ctypes.c_uint32),
    )


class VmSegDesc(ctypes.Structure):
    """struct vm_seg_desc."""

    _fields_ = (
        ("cpuid", ctypes.c_int),
        ("regnum", ctypes.c_int),
        ("desc", SegDesc),
    )


class VmRun(ctypes.Structure):
    """struct vm_run of FreeBSD 14 and 15.  cpuset: cpusetsize bytes.  vm_exit: VM_EXIT_BYTES.

    FreeBSD 13's contains the struct vm_exit, and VM_RUN has another number there.
    """

    _fields_ = (
        ("cpuid", ctypes.c_int),
        ("cpuset", ctypes.c_void_p),
        ("cpusetsize", ctypes.c_size_t),
        ("vm_exit", ctypes.c_void_p),
    )


class VmCpuset(ctypes.Structure):
    """struct vm_cpuset.  cpus: cpusetsize bytes; vCPU 0 is the lowest bit of the first byte."""

    _fields_ = (
        ("which", ctypes.c_int),
        ("cpusetsize", ctypes.c_int),
        ("cpus", ctypes.c_void_p),
    )


class VmVcpu(ctypes.Structure):
    """struct vm_activate_cpu, and struct vm_nmi: the number of a vCPU."""

    _fields_ = (("vcpuid", ctypes.c_int),)


class VmIntinfo(ctypes.Structure):
    """struct vm_intinfo."""

    _fields_ = (
        ("vcpuid", ctypes.c_int),
        ("info1", ctypes.c_uint64),
        ("info2", ctypes.c_uint64),
    )


class VmRtcTime(ctypes.Structure):
    """struct vm_rtc_time: seconds since the Epoch."""

    _fields_ = (("secs", ctypes.c_int64),)


class Segment(ctypes.Structure):
    """struct vmm_migration_segment: guest physical addresses [start, end), bytes."""

    _fields_ = (("start", ctypes.c_size_t), ("end", ctypes.c_size_t))


class DirtyPageList(ctypes.Structure):
    """The argument of VM_GET_DIRTY_PAGE_LIST, an ioctl that no stock kernel has.

    page_list: num_pages bytes, one per page, 1 = dirty, lowmem's pages first.
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
VM_RUN = number(IOC_IN, "v", 1, ctypes.sizeof(VmRun))
VM_MMAP_GETNEXT = number(IOC_IN | IOC_OUT, "v", 17, ctypes.sizeof(VmMemmap))
VM_SET_REGISTER = number(IOC_IN, "v", 20, ctypes.sizeof(VmRegister))
VM_SET_SEGMENT_DESCRIPTOR = number(IOC_IN, "v", 22, ctypes.sizeof(VmSegDesc))
VM_GET_SEGMENT_DESCRIPTOR = number(IOC_IN | IOC_OUT, "v", 23, ctypes.sizeof(VmSegDesc))
VM_GET_REGISTER_SET = number(IOC_IN | IOC_OUT, "v", 25, ctypes.sizeof(VmRegisterSet))
VM_GET_INTINFO = number(IOC_IN | IOC_OUT, "v", 28, ctypes.sizeof(VmIntinfo))
VM_INJECT_NMI = number(IOC_IN, "v", 32, ctypes.sizeof(VmVcpu))
VM_GET_TOPOLOGY = number(IOC_OUT, "v", 64, ctypes.sizeof(VmCpuTopology))
VM_GET_CPUS = number(IOC_IN, "v", 91, ctypes.sizeof(VmCpuset))
VM_SUSPEND_CPU = number(IOC_IN, "v", 92, ctypes.sizeof(VmVcpu))
VM_RESUME_CPU = number(IOC_IN, "v", 93, ctypes.sizeof(VmVcpu))
VM_RTC_SETTIME = number(IOC_IN, "v", 102, ctypes.sizeof(VmRtcTime))
VM_GET_DIRTY_PAGE_LIST = number(IOC_IN | IOC_OUT, "v", 117, ctypes.sizeof(DirtyPageList))

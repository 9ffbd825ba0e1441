"""One VM of a FreeBSD kernel: /dev/vmm/NAME, opened to be read, or to be written too.

The code that reads the VM has run on FreeBSD 15.1.  The code for registers and
VM_RUN has not; C programs have done the same on 15.1.  Confirmed in source:

- Several processes may have the node open: vmmdev_open() asks only whether a
  jail may.  No ioctl looks at how the node was opened, and an unknown ioctl
  fails with ENOTTY.  Source: freebsd/freebsd-src@012895d5
  sys/dev/vmm/vmm_dev.c, vmmdev_ioctl(); FreeBSD 14: sys/amd64/vmm/vmm_dev.c.
- A descriptor that is open to read allows a mapping to read:
  sys/fs/devfs/devfs_vnops.c, devfs_mmap_f().  The mapping lies in one entry of
  the memory map: vmm_dev.c, vmmdev_mmap_single().
- An ioctl that names a vCPU waits until no other ioctl has the vCPU, and makes
  VM_RUN return: sys/dev/vmm/vmm_vm.c, vcpu_set_state_locked() and
  vcpu_wait_idle(), 15.1.  So to read a register of a running guest costs the
  vCPU one exit; if the vCPU's thread is about to stop, the register is read
  after the thread has stopped.
- The mapping keeps the guest's memory after the VM is destroyed.  The kernel
  destroys a VM without waiting for mappings: see memory.py.
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
from bhystream.backend.bhyve.host import HIGHMEM_BASE_GPA, MemoryMap, SegmentDescriptor
from bhystream.errors import AccessError, BhyError, GuestError
from bhystream.guest import PAGE_BYTES

# How often to try an ioctl that a signal interrupts, or that finds a vCPU changing its state.
_TRIES = 100
_PASSING = (errno.EINTR, errno.EBUSY)
_MAPS_CAP = 64  # VM_MAX_MEMMAPS is 8 or 16.  Source: sys/amd64/vmm/vmm.c, sys/dev/vmm/vmm_mem.h.


def walk(next_map: Callable[[int], MemoryMap | None]) -> list[MemoryMap]:
    """Return the whole memory map, ascending by gpa.

    next_map: returns the first entry at or above a gpa, or None if there is
    none.  Raises GuestError if the entries do not ascend, or do not end; and
    what next_map raises.
    """
    maps: list[MemoryMap] = []
    gpa = 0
    while (found := next_map(gpa)) is not None:
        if found.gpa < gpa or found.length_bytes <= 0 or len(maps) == _MAPS_CAP:
            raise GuestError(f"cannot read the memory map: an entry at {found.gpa:#x} is unsound")
        maps.append(found)
        gpa = found.gpa + found.length_bytes
    return maps


def pieces(maps: Sequence[MemoryMap], gpa: int, length_bytes: int) -> list[tuple[int, int]]:
    """Return (gpa, length in bytes) of each map's part of a range, in the order of the maps."""
    found = []
    for one in maps:
        first = max(one.gpa, gpa)
        end = min(one.gpa + one.length_bytes, gpa + length_bytes)
        if first < end:
            found.append((first, end - first))
    return found


def dirty_request(lengths_bytes: Sequence[int], marks_at: int) -> ioctl.DirtyPageList:
    """Return the argument of VM_GET_DIRTY_PAGE_LIST.

    lengths_bytes: lowmem's, and highmem's if there is one.  marks_at: the
    address of an array with one byte per page.
    """
    request = ioctl.DirtyPageList(marks_at, sum(lengths_bytes) // PAGE_BYTES)
    request.lowmem = ioctl.Segment(0, lengths_bytes[0])
    if len(lengths_bytes) > 1:
        request.highmem = ioctl.Segment(HIGHMEM_BASE_GPA, HIGHMEM_BASE_GPA + lengths_bytes[1])
    return request


def cut(marks: bytes, lengths_bytes: Sequence[int]) -> list[bytes]:
    """Return the marks of each segment, lowmem's first.  marks: one byte per page."""
    pieces, at = [], 0
    for length in lengths_bytes:
        pieces.append(marks[at : at + length // PAGE_BYTES])
        at += length // PAGE_BYTES
    return pieces


def numbers_in(cpuset: bytes) -> frozenset[int]:
    """Return the CPUs of a cpuset_t.  Source: sys/sys/_bitset.h; amd64 is little-endian."""
    bits = int.from_bytes(cpuset, "little")
    return frozenset(index for index in range(bits.bit_length()) if bits >> index & 1)


class FreeBsdVm:
    """host.Vm over the node.  To open the node changes nothing; the object owns its descriptor."""

    def __init__(self, name: str, node: str, *, is_writable: bool = False) -> None:
        """Open the VM.  node: the path of the VM's node.  Raises GuestError, AccessError."""
        self._who = f"guest {name}"
        flags = os.O_RDWR if is_writable else os.O_RDONLY
        try:
            self._fd = os.open(node, flags | os.O_CLOEXEC)
        except FileNotFoundError:
            raise GuestError(f"{self._who}: there is no {node}") from None
        except OSError as error:
            raise self._error(error, f"open {node}") from None

    def _error(self, error: OSError, doing: str) -> BhyError:
        kind = AccessError if isinstance(error, PermissionError) else GuestError
        return kind(f"{self._who}: cannot {doing}: {error.strerror}")

    def _ask(self, number: int, argument: ctypes.Structure, doing: str) -> None:
        """Call an ioctl, which reads and writes its argument; the caller keeps what that points to.

        EINTR: a signal ends vmm's sleeps.  EBUSY: vcpu_set_state_locked().
        """
        for _ in range(_TRIES):
            try:
                fcntl.ioctl(self._fd, number, argument)
                return
            except OSError as error:
                failed = error
                if error.errno not in _PASSING:
                    break
        raise self._error(failed, doing) from None

    def _next_map(self, gpa: int) -> MemoryMap | None:
        """Return the first entry at or above gpa, or None if there is none.

        Source: vmm's vm_mmap_getnext(), which fails with ENOENT at the end.
        """
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
        """See host.Vm."""
        return walk(self._next_map)

    def topology(self) -> tuple[int, int, int]:
        """See host.Vm."""
        found = ioctl.VmCpuTopology()
        self._ask(ioctl.VM_GET_TOPOLOGY, found, "read the CPU topology")
        return found.sockets, found.cores, found.threads

    def waiting_vcpus(self) -> frozenset[int]:
        """See host.Vm.  Stops no vCPU.  Source: vmm_dev.c, VM_GET_CPUS."""
        cpus = ctypes.create_string_buffer(ioctl.CPUSET_BYTES)
        request = ioctl.VmCpuset(ioctl.VM_DEBUG_CPUS, ioctl.CPUSET_BYTES, ctypes.addressof(cpus))
        self._ask(ioctl.VM_GET_CPUS, request, "ask which vCPUs wait")
        return numbers_in(cpus.raw)

    def registers(self, vcpu: int, numbers: Sequence[int]) -> list[int]:
        """See host.Vm."""
        asked = (ctypes.c_int * len(numbers))(*numbers)
        found = (ctypes.c_uint64 * len(numbers))()
        request = ioctl.VmRegisterSet(
            vcpu, len(numbers), ctypes.addressof(asked), ctypes.addressof(found)
        )
        self._ask(ioctl.VM_GET_REGISTER_SET, request, f"read registers of vCPU {vcpu}")
        return list(found)

    def set_register(self, vcpu: int, number: int, value: int) -> None:
        """See host.Vm.  VM_RUN goes on at the RIP that was set: vmm.c, vm_set_register()."""
        request = ioctl.VmRegister(vcpu, number, value)
        self._ask(ioctl.VM_SET_REGISTER, request, f"set register {number} of vCPU {vcpu}")

    def descriptor(self, vcpu: int, number: int) -> SegmentDescriptor:
        """See host.Vm."""
        request = ioctl.VmSegDesc(vcpu, number)
        doing = f"read segment register {number} of vCPU {vcpu}"
        self._ask(ioctl.VM_GET_SEGMENT_DESCRIPTOR, request, doing)
        found = request.desc
        return SegmentDescriptor(found.base, found.limit, found.access)

    def set_descriptor(self, vcpu: int, number: int, value: SegmentDescriptor) -> None:
        """See host.Vm."""
        desc = ioctl.SegDesc(value.base, value.limit, value.access)
        request = ioctl.VmSegDesc(vcpu, number, desc)
        doing = f"set segment register {number} of vCPU {vcpu}"
        self._ask(ioctl.VM_SET_SEGMENT_DESCRIPTOR, request, doing)

    def pending_event(self, vcpu: int) -> tuple[int, int]:
        """See host.Vm."""
        request = ioctl.VmIntinfo(vcpu)
        self._ask(ioctl.VM_GET_INTINFO, request, f"read the pending events of vCPU {vcpu}")
        return request.info1, request.info2

    def inject_nmi(self, vcpu: int) -> None:
        """See host.Vm."""
        self._ask(ioctl.VM_INJECT_NMI, ioctl.VmVcpu(vcpu), f"send an NMI to vCPU {vcpu}")

    def resume_cpu(self, vcpu: int) -> None:
        """See host.Vm."""
        self._ask(ioctl.VM_RESUME_CPU, ioctl.VmVcpu(vcpu), f"resume vCPU {vcpu}")

    def suspend_cpu(self, vcpu: int) -> None:
        """See host.Vm."""
        self._ask(ioctl.VM_SUSPEND_CPU, ioctl.VmVcpu(vcpu), f"suspend vCPU {vcpu}")

    def run(self, vcpu: int) -> int:
        """See host.Vm.  A signal to us ends it: VM_EXITCODE_BOGUS, from vm_exit_astpending()."""
        cpus = ctypes.create_string_buffer(ioctl.CPUSET_BYTES)
        left = ctypes.create_string_buffer(ioctl.VM_EXIT_BYTES)
        request = ioctl.VmRun(
            vcpu, ctypes.addressof(cpus), ioctl.CPUSET_BYTES, ctypes.addressof(left)
        )
        self._ask(ioctl.VM_RUN, request, f"run vCPU {vcpu}")
        return int.from_bytes(left.raw[:4], "little")  # struct vm_exit begins with exitcode

    def set_rtc(self, seconds: int) -> None:
        """See host.Vm."""
        self._ask(ioctl.VM_RTC_SETTIME, ioctl.VmRtcTime(seconds), "set its clock")

    def map(self, gpa: int, length_bytes: int, *, is_writable: bool = False) -> mmap.mmap:
        """See host.Vm.  The offset in the node is the guest physical address.

        Python's mapping keeps a duplicate of the node's descriptor until the
        mapping is closed; hw.vmm.destroy does not wait for the duplicate.
        Memory domains are several entries of the memory map, and one mmap(2)
        maps one entry only, so libc.map_pieces() maps them: not run.
        """
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        try:
            parts = pieces(self.maps(), gpa, length_bytes)
            if len(parts) > 1:
                return libc.map_pieces(self._fd, parts, is_writable=is_writable)
            return mmap.mmap(self._fd, length_bytes, flags=mmap.MAP_SHARED, prot=prot, offset=gpa)
        except OSError as error:
            raise self._error(error, f"map its memory at {gpa:#x}") from None

    def resident(self, mapping: mmap.mmap, gpa: int) -> bytes:
        """See host.Vm."""
        return libc.resident(mapping)

    def dirty(self, lengths_bytes: Sequence[int]) -> list[bytes] | None:
        """See host.Vm.  Returns None for ENOTTY: a stock kernel has no such log."""
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
        """See host.Vm.  Twice is no error.

        If the VM was destroyed, close(2) fails with ENXIO, and the descriptor
        is closed all the same.  Source: devfs_vnops.c, devfs_close(); seen by
        Solo5/solo5 tenders/hvt/hvt_freebsd.c.
        """
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1

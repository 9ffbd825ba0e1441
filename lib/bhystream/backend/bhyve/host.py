"""What the bhyve backend asks of its host: the device half, as protocols.

Two modules implement the protocols: freebsd.py, with the ioctls, sysctls and
system calls of a FreeBSD host, and bhystream.standin.kernel, with the files of
a stand-in.  The rest of the backend is the same code over both.

The stand-in is used only if BHYSEND_VMM_DIR names the stand-in's directory.
Streams and records of the stand-in say hypervisor "standin"; bhyve's code
refuses those, and the stand-in's refuses bhyve's.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from bhystream.backend.process import Identity
from bhystream.errors import GuestError

VMM_DIR = "BHYSEND_VMM_DIR"

LOWMEM_LIMIT_BYTES = 3 << 30
HIGHMEM_BASE_GPA = 4 << 30


class NoBhyveError(GuestError):
    """This host has no bhyve: it does not run FreeBSD, and no stand-in is named."""


class MemoryMap(NamedTuple):
    """One entry of a guest's memory map.  Source: vmm_dev.h, struct vm_memmap.

    gpa: guest physical address, in bytes.  length_bytes: a multiple of 4096.
    segid, offset_bytes: the memory segment, and the entry's place in it.
    is_wired: whether VM_MEMMAP_F_WIRED is set.
    """

    gpa: int
    segid: int
    offset_bytes: int
    length_bytes: int
    prot: int
    is_wired: bool


class SegmentDescriptor(NamedTuple):
    """The hidden part of a segment register.  Source: vmm.h, struct seg_desc."""

    base: int
    limit: int
    access: int


class Disk(NamedTuple):
    """The facts of a disk's backing on which a guest's saved state depends.

    size_bytes, sector_bytes: as bhyve finds them.  can_delete: bhyve offers
    DISCARD to the guest (GEOM::candelete; for a file, _PC_DEALLOC_PRESENT).
    is_writable: if False, bhyve opens the disk read-only and says nothing.
    is_device: the backing is no regular file; the key nodelete works on a
    device only.
    """

    size_bytes: int
    sector_bytes: int
    can_delete: bool
    is_writable: bool
    is_device: bool = False


class PortWrite(NamedTuple):
    """What an OUT instruction of a guest does: a value to a port, 1, 2 or 4 bytes of it."""

    port: int
    nbytes: int
    value: int


class ClockLayout(NamedTuple):
    """Where a kernel puts a guest's clocks into a snapshot; sizes and offsets in bytes.

    vcpu_bytes, tsc_at: the part of structure vm for one vCPU, and the TSC's place in it.
    vm_tail_bytes, hpet_tail_bytes: what follows the last vCPU, and the HPET's last timer.
    """

    vcpu_bytes: int
    tsc_at: int
    vm_tail_bytes: int
    hpet_tail_bytes: int


class Vm(Protocol):
    """One VM of the kernel.  To open a VM changes nothing.

    All methods raise GuestError if vmm fails, or AccessError if vmm may not be
    asked.  Registers are named by vmm's numbers (vmm.h, enum vm_reg_name).  A
    method that changes a vCPU may be called only while the guest stands held.
    """

    def maps(self) -> Sequence[MemoryMap]:
        """Return the memory map, ascending by gpa, with boot ROM and framebuffer."""

    def topology(self) -> tuple[int, int, int]:
        """Return (sockets, cores per socket, threads per core)."""

    def map(self, gpa: int, length_bytes: int, *, is_writable: bool = False) -> mmap.mmap:
        """Map one range of system memory, shared, to be read, or to be written too.

        gpa, length_bytes: multiples of 4096.  The caller closes the mapping,
        which keeps the memory even after the VM and its process are gone.
        """

    def waiting_vcpus(self) -> frozenset[int]:
        """Return the vCPUs that wait in bhyve (VM_DEBUG_CPUS): never started, or suspended."""

    def registers(self, vcpu: int, numbers: Sequence[int]) -> list[int]:
        """Return the values of registers, in the order of the numbers."""

    def set_register(self, vcpu: int, number: int, value: int) -> None:
        """Set one register."""

    def descriptor(self, vcpu: int, number: int) -> SegmentDescriptor:
        """Return the hidden part of a segment register."""

    def set_descriptor(self, vcpu: int, number: int, value: SegmentDescriptor) -> None:
        """Set the hidden part of a segment register."""

    def pending_event(self, vcpu: int) -> tuple[int, int]:
        """Return VM_GET_INTINFO's two words: (0, 0) if no event waits to be delivered."""

    def inject_nmi(self, vcpu: int) -> None:
        """Queue an NMI for a vCPU (VM_INJECT_NMI)."""

    def resume_cpu(self, vcpu: int) -> None:
        """Allow a vCPU to be run again (VM_RESUME_CPU): by bhyve's thread, or by run()."""

    def suspend_cpu(self, vcpu: int) -> None:
        """Undo resume_cpu() (VM_SUSPEND_CPU)."""

    def run(self, vcpu: int) -> int:
        """Run a vCPU in this thread until it leaves the guest; return the exit code (vmm.h)."""

    def set_rtc(self, seconds: int) -> None:
        """Set the guest's real time clock (VM_RTC_SETTIME): seconds since the Epoch."""

    def resident(self, mapping: mmap.mmap, gpa: int) -> bytes:
        """Return one byte per page: not 0 if mincore(2) says that the page is resident.

        mapping: what map() returned for gpa.
        """

    def dirty(self, lengths_bytes: Sequence[int]) -> list[bytes] | None:
        """Return the dirty log of each segment, and start a new log; None if there is no log.

        lengths_bytes: lowmem's, and highmem's if there is one.  A log has one
        byte per page: not 0 if the page may have been written since the last
        call.  None: the kernel keeps no such log.
        """

    def close(self) -> None:
        """Close the node; mappings stay.  Twice is no error."""


class Trace(Protocol):
    """A child of ours that becomes a bhyve, to be stopped before it reads its memory file."""

    def run_until(self, is_ready: Callable[[], bool], limit_s: float) -> bool:
        """Let the child run until a condition holds, and stop it there, before it reads.

        Returns False if the child has ended, or after limit_s seconds.
        """

    def write_ports(self, writes: Sequence[PortWrite], limit_s: float) -> bool:
        """Let bhyve act as if its guest had written to I/O ports, in this order.

        The files must be cut by then, so that bhyve waits in its read if it goes on.  No vCPU
        runs for it, and no register changes.  Returns False if bhyve did not take all the
        writes, as far as can be seen, in limit_s seconds.
        """

    def let_go(self) -> None:
        """Let the child run on, without a trace.  No error if done twice, or if it has ended.

        Raises GuestError if the trace cannot be ended, which leaves the child stopped.
        """


class Host(Protocol):
    """The host.

    A method that says nothing else raises GuestError or InputOutputError if
    the host fails, and AccessError if the host refuses.
    """

    kind: str
    """What streams and records call the hypervisor: "bhyve" or "standin"."""

    run_dir: Path
    """The directory of the checkpoint sockets."""

    def environment(self) -> Mapping[str, str]:
        """Return the variables that hypervisors.open_host() needs to find this host again.

        They are kept in records.
        """

    def sysctl(self, name: str) -> str | None:
        """Return a value as sysctl -n prints it, None if there is no sysctl of that name."""

    def swap_used_bytes(self) -> int:
        """Return how many bytes of swap are in use."""

    def free_memory_bytes(self) -> int:
        """Return how many bytes of memory can be had."""

    def program(self) -> list[str]:
        """Return the words that run bhyve."""

    def trace(self, pid: int) -> Trace:
        """Trace a child of ours that has not become bhyve yet.  Raises GuestError on failure."""

    def has_power_button(self, pid: int) -> bool:
        """Say whether a bhyve takes SIGTERM for its guest's power button: ACPI is on."""

    def program_hash(self) -> str:
        """Return a hash that differs between builds of bhyve."""

    def can_snapshot(self) -> bool | None:
        """Say whether the loaded vmm has snapshots; None if that cannot be seen.

        None: no vmm is loaded, or the kernel shows no symbols of modules.  The
        host asks for a symbol (kldsym(2), vm_snapshot_req), never with an
        ioctl, which would stop a running guest's vCPUs.
        """

    def module_hash(self) -> str:
        """Return a hash that differs between builds of vmm.ko, "" if none is loaded."""

    def clock_layout(self) -> ClockLayout | None:
        """Return where this kernel keeps a guest's clocks; None if that is not known for sure."""

    def disk(self, path: str) -> Disk | None:
        """Return the facts of a disk's backing; None if bhyve could not open the path as a disk."""

    def mtu(self, interface: str) -> int | None:
        """Return an interface's MTU in bytes, None if there is no such interface."""

    def cpu_vendor(self) -> str:
        """Return "intel", "amd", or the name that any other CPU has."""

    def exists(self, name: str) -> bool:
        """Say whether the VM's node exists.  The VM's process may be gone all the same."""

    def node_id(self, name: str) -> str:
        """Return an id that no later node of that name has, "" if there is no such VM."""

    def node_status(self, name: str) -> os.stat_result:
        """Return whose a VM's node is, and who may open it.  Raises also if there is none."""

    def open_vm(self, name: str, *, is_writable: bool = False) -> Vm:
        """Open a VM, to be read, or to be changed too.  Raises GuestError if there is none."""

    def create(self, name: str) -> None:
        """Create an empty VM, as a loader does before bhyve is started.

        Raises GuestError, also if a VM of that name exists.
        """

    def destroy(self, name: str) -> None:
        """Destroy a VM.  It is no error if the VM is gone already."""

    def mount_null(self, directory: Path) -> None:
        """Make directory/null the null device, without a link that leads out of directory.

        Raises GuestError if that is not possible.  unmount_null() undoes it.
        """

    def unmount_null(self, directory: Path) -> None:
        """Undo mount_null().  Never raises."""

    def is_memory(self, directory: Path) -> bool:
        """Say whether the files of a directory are in memory (tmpfs)."""

    def has_tap(self, tap: str) -> bool:
        """Say whether a network interface, or an ng_device(4) of a guest, exists."""

    def announce(self, cards: Mapping[str, str], process: Identity) -> None:
        """Tell the network that a guest is here: now, and after 1, 2 and 5 s, without waiting.

        cards: the MAC address behind each tap or vmnet interface.  process: the
        guest's bhyve, after whose end nothing more is told.  Raises GuestError
        if an interface or a later announcement fails; the rest is done all the same.
        """

    def parent_command(self, pid: int) -> str:
        """Return the command line of a process's parent, "" if the parent is init."""

    def knows_suspending_lock(self) -> bool:
        """Say whether suspending.lock stops this host's vm-bhyve, which is so from 1.7.0 on."""

    def datastores(self) -> Sequence[Path]:
        """Return vm-bhyve's datastores, the default one first; () if vm-bhyve is not used."""

    def starter(self) -> Sequence[str]:
        """Return the words before a guest's name that start it with vm-bhyve; () if none can.

        () also if vm-bhyve would not pass its caller's PATH on to bhyve (console=tmux).
        """

    def manager_finds(self, program: Path) -> bool:
        """Say whether vm-bhyve runs a program by its bare name, if its directory is first in PATH.

        program: must exist.
        """

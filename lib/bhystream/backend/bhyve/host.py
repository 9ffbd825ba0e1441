"""What the bhyve backend asks of its host: the device half, as protocols.

Two things keep them: freebsd.py, with the ioctls, sysctls and system calls of
a FreeBSD host, and bhystream.standin.kernel, with the files of a stand-in.
Everything else of the backend is the same code over both.

The stand-in is used where BHYSEND_VMM_DIR names its directory, and nowhere
else; its streams and records say hypervisor "standin", and neither of the two
takes the other's.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bhystream.errors import GuestError

VMM_DIR = "BHYSEND_VMM_DIR"

LOWMEM_LIMIT_BYTES = 3 << 30
HIGHMEM_BASE_GPA = 4 << 30


class NoBhyveError(GuestError):
    """This host has no bhyve: it does not run FreeBSD, and no stand-in is named."""


@dataclass(frozen=True)
class MemoryMap:
    """One entry of a guest's memory map.  Source: vmm_dev.h, struct vm_memmap.

    gpa: guest physical address, bytes.  length_bytes: multiple of 4096.
    is_wired: VM_MEMMAP_F_WIRED.
    """

    gpa: int
    segid: int
    offset_bytes: int
    length_bytes: int
    prot: int
    is_wired: bool


@dataclass(frozen=True)
class SegmentDescriptor:
    """The hidden part of a segment register.  Source: vmm.h, struct seg_desc."""

    base: int
    limit: int
    access: int


@dataclass(frozen=True)
class Disk:
    """What of a disk's backing a guest's saved state depends on.

    size_bytes, sector_bytes: as bhyve finds them.  can_delete: DISCARD is
    offered to the guest (GEOM::candelete; of a file, _PC_DEALLOC_PRESENT).
    is_writable: bhyve falls back to read-only without a word where it is not.
    is_device: it is no regular file; the key nodelete means such only.
    """

    size_bytes: int
    sector_bytes: int
    can_delete: bool
    is_writable: bool
    is_device: bool = False


class Vm(Protocol):
    """One VM of the kernel's.  Opening it changes nothing.

    All methods raise GuestError, or AccessError where it may not be asked.
    Registers go by vmm's own numbers (vmm.h, enum vm_reg_name).  What changes
    a vCPU is for a guest that stands held, and for none else.
    """

    def maps(self) -> Sequence[MemoryMap]:
        """Return the memory map, ascending by gpa: also boot ROM and framebuffer."""

    def topology(self) -> tuple[int, int, int]:
        """Return (sockets, cores, threads), each for the one before."""

    def map(self, gpa: int, length_bytes: int, *, is_writable: bool = False) -> mmap.mmap:
        """Map one entry of system memory, shared, to be read, or written too.

        The caller's; it keeps the memory when the VM and its process are gone.
        """

    def waiting_vcpus(self) -> frozenset[int]:
        """Return the vCPUs that wait in bhyve (VM_DEBUG_CPUS): never started, or suspended."""

    def registers(self, vcpu: int, numbers: Sequence[int]) -> list[int]:
        """Return registers' values."""

    def set_register(self, vcpu: int, number: int, value: int) -> None:
        """Set one register."""

    def descriptor(self, vcpu: int, number: int) -> SegmentDescriptor:
        """Return the hidden part of a segment register."""

    def set_descriptor(self, vcpu: int, number: int, value: SegmentDescriptor) -> None:
        """Set the hidden part of a segment register."""

    def pending_event(self, vcpu: int) -> tuple[int, int]:
        """Return VM_GET_INTINFO's two words: (0, 0) where no event waits to be delivered."""

    def inject_nmi(self, vcpu: int) -> None:
        """Let an NMI wait to be delivered to a vCPU (VM_INJECT_NMI)."""

    def resume_cpu(self, vcpu: int) -> None:
        """Let a vCPU be run again (VM_RESUME_CPU): by bhyve's own thread, or by run()."""

    def suspend_cpu(self, vcpu: int) -> None:
        """Undo resume_cpu() (VM_SUSPEND_CPU)."""

    def run(self, vcpu: int) -> int:
        """Run a vCPU in this thread until it leaves the guest; return the exit code (vmm.h)."""

    def set_rtc(self, seconds: int) -> None:
        """Set the guest's real time clock (VM_RTC_SETTIME): seconds since the Epoch."""

    def resident(self, mapping: mmap.mmap, gpa: int) -> bytes:
        """Return one byte a page: other than 0 where mincore(2) says it is resident.

        mapping: of map(), at gpa.
        """

    def dirty(self, lengths_bytes: Sequence[int]) -> list[bytes] | None:
        """Return one byte a page for each of lowmem and highmem, and begin anew; or None.

        Other than 0 where it may have been written since the last call.  None
        where the kernel keeps no such log.
        """

    def close(self) -> None:
        """Give up the node; mappings stay."""


class Trace(Protocol):
    """A bhyve of ours that is about to be run, to be stopped before it reads its memory file."""

    def run_until(self, is_ready: Callable[[], bool], limit_s: float) -> bool:
        """Let it run until a condition holds and it has not read yet, and stop it there.

        Returns False where it has ended, or limit_s is over.
        """

    def let_go(self) -> None:
        """Let it run on.  Twice is no error."""


class Host(Protocol):
    """The host."""

    kind: str
    """What streams and records call the hypervisor: "bhyve" or "standin"."""

    run_dir: Path
    """Where checkpoint sockets are."""

    def environment(self) -> Mapping[str, str]:
        """Return what hypervisors.open_host() needs to find this host again, for records."""

    def sysctl(self, name: str) -> str | None:
        """Return a value as sysctl -n prints it, None where there is none of that name."""

    def swap_used_bytes(self) -> int:
        """Return how much swap is in use."""

    def free_memory_bytes(self) -> int:
        """Return how much memory can be had."""

    def program(self) -> list[str]:
        """Return the words that run bhyve."""

    def trace(self, pid: int) -> Trace:
        """Take a child of ours, which runs nothing yet, by the hand.  Raises GuestError."""

    def program_hash(self) -> str:
        """Return what tells one build of bhyve from another."""

    def can_snapshot(self) -> bool | None:
        """Say whether the vmm that is loaded has snapshots; None where that is not seen.

        None: no vmm is loaded, or the kernel shows no symbols of modules.
        Asks for a symbol (kldsym(2), vm_snapshot_req), never by an ioctl: that
        one stops a running guest's vCPUs.
        """

    def module_hash(self) -> str:
        """Return what tells one build of vmm.ko from another, "" where none is loaded."""

    def disk(self, path: str) -> Disk | None:
        """Return what a disk's backing is like; None where it is no disk that bhyve could open."""

    def mtu(self, interface: str) -> int | None:
        """Return an interface's MTU, None where there is no such interface."""

    def cpu_vendor(self) -> str:
        """Return "intel", "amd", or what else the CPU calls itself."""

    def exists(self, name: str) -> bool:
        """Say whether the VM's node exists; its process may be gone."""

    def node_id(self, name: str) -> str:
        """Return what tells a VM's node from a later one of that name, "" where there is none."""

    def open_vm(self, name: str, *, is_writable: bool = False) -> Vm:
        """Open a VM, to be read, or to be changed too.  Raises GuestError where there is none."""

    def create(self, name: str) -> None:
        """Create an empty VM, as a loader does before bhyve is started."""

    def destroy(self, name: str) -> None:
        """Destroy a VM; one that is gone already is no error."""

    def mount_null(self, directory: Path) -> None:
        """Make directory/null the null device, without a name that leads out of directory.

        Raises GuestError where that is not possible.  unmount_null() undoes it.
        """

    def unmount_null(self, directory: Path) -> None:
        """Undo mount_null().  Never raises."""

    def is_memory(self, directory: Path) -> bool:
        """Say whether files in a directory live in memory (tmpfs)."""

    def has_tap(self, tap: str) -> bool:
        """Say whether a network interface, or an ng_device(4) of a guest, exists."""

    def parent_command(self, pid: int) -> str:
        """Return the command line of a process's parent, "" for init's."""

    def knows_suspending_lock(self) -> bool:
        """Say whether this host's vm-bhyve is one that suspending.lock stops: 1.7.0 or later."""

    def datastores(self) -> Sequence[Path]:
        """Return vm-bhyve's datastores, the default one first; none where it is not used."""

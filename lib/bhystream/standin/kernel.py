"""The host half of the stand-in: what the bhyve backend asks of FreeBSD, from files.

StandinHost and StandinVm keep the protocols of backend/bhyve/host.py.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bhystream import inherited
from bhystream.backend.bhyve.host import (
    HIGHMEM_BASE_GPA,
    VMM_DIR,
    Disk,
    MemoryMap,
    SegmentDescriptor,
)
from bhystream.errors import GuestError, from_oserror
from bhystream.guest import PAGE_BYTES

from . import node
from .cpu import Cpus
from .interpreter import Interpreter
from .settings import read_settings

_POLL_S = 0.0002
_SYSCTL = {
    # 1 on FreeBSD: then no device takes more than INT_MAX bytes at once.
    "debug.devfs_iosize_max_clamp": "0",
    "hw.machine": "amd64",
    "hw.machine_arch": "amd64",
    "hw.model": "Stand-in CPU",
    "hw.ncpu": "2",
    "hw.pagesize": "4096",
    "hw.vmm.maxcpu": "16",
    "hw.vmm.vmx.initialized": "1",
    "kern.build_id": "5374616e64696e0000000000000000000000000f",
    "kern.ostype": "FreeBSD",
    "machdep.tsc_freq": "2500000000",
    "vm.mincore_mapped": "0",
}
# By generation of the checkpoint interface.
_RELEASE = {
    4: {"kern.osreldate": "1501000", "kern.osrelease": "15.1-STANDIN"},
    5: {"kern.osreldate": "1600000", "kern.osrelease": "16.0-STANDIN"},
}
_MTU = 1500


class StandinVm:
    """One VM of a stand-in, opened to be read, or changed too."""

    def __init__(self, directory: Path, name: str, *, is_writable: bool = False) -> None:
        """Open the node.  Raises GuestError, AccessError."""
        self._directory = directory
        self._name = name
        self._read = node.read_map(directory, name)
        self._open_cpus: Cpus | None = None
        self._lowmem: mmap.mmap | None = None
        flags = os.O_RDWR if is_writable else os.O_RDONLY
        try:
            self._fd = os.open(node.node_path(directory, name), flags | os.O_CLOEXEC)
        except OSError as error:
            raise from_oserror(error, f"open VM {name}") from error

    def maps(self) -> Sequence[MemoryMap]:
        """Return the memory map."""
        return self._read.maps

    def topology(self) -> tuple[int, int, int]:
        """Return (sockets, cores, threads)."""
        return self._read.topology

    def map(self, gpa: int, length_bytes: int, *, is_writable: bool = False) -> mmap.mmap:
        """Map one entry of system memory."""
        if not any(m.segid == 0 and m.gpa == gpa for m in self._read.maps):
            raise GuestError(f"VM {self._name} has no system memory at {gpa:#x}")
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        try:
            return mmap.mmap(self._fd, length_bytes, prot=prot, offset=gpa)
        except (OSError, ValueError) as error:
            raise GuestError(f"cannot map {gpa:#x} of VM {self._name}: {error}") from error

    @property
    def _cpus(self) -> Cpus:
        """The file of its vCPUs, of which an empty VM has none."""
        if self._open_cpus is None:
            is_intel = read_settings(self._directory).cpu_vendor == "intel"
            path = node.beside(self._directory, self._name, "cpu")
            self._open_cpus = Cpus(path, is_intel=is_intel)
        return self._open_cpus

    def waiting_vcpus(self) -> frozenset[int]:
        """Return the vCPUs that are suspended."""
        return frozenset(n for n, cpu in enumerate(self._cpus) if cpu.get("suspended"))

    def registers(self, vcpu: int, numbers: Sequence[int]) -> list[int]:
        """Return registers' values."""
        with self._cpus.locked():
            return [self._cpus[vcpu][number] for number in numbers]

    def set_register(self, vcpu: int, number: int, value: int) -> None:
        """Set one register."""
        with self._cpus.locked():
            self._cpus[vcpu][number] = value

    def descriptor(self, vcpu: int, number: int) -> SegmentDescriptor:
        """Return the hidden part of a segment register."""
        with self._cpus.locked():
            return self._cpus[vcpu].hidden(number)

    def set_descriptor(self, vcpu: int, number: int, value: SegmentDescriptor) -> None:
        """Set the hidden part of a segment register."""
        with self._cpus.locked():
            self._cpus[vcpu].put_hidden(number, value)

    def pending_event(self, vcpu: int) -> tuple[int, int]:
        """Return the two words."""
        with self._cpus.locked():
            return self._cpus[vcpu].get("event_1"), self._cpus[vcpu].get("event_2")

    def inject_nmi(self, vcpu: int) -> None:
        """Let an NMI wait."""
        self._cpus[vcpu].put("nmi_pending", 1)

    def resume_cpu(self, vcpu: int) -> None:
        """Let a vCPU be run.  Source: vmm_vm.c, vm_resume_cpu()."""
        if not self._cpus[vcpu].get("suspended"):
            raise GuestError(f"cannot resume vCPU {vcpu}: Invalid argument")
        self._cpus[vcpu].put("suspended", 0)

    def suspend_cpu(self, vcpu: int) -> None:
        """Undo resume_cpu()."""
        self._cpus[vcpu].put("suspended", 1)

    def run(self, vcpu: int) -> int:
        """Run a vCPU until it leaves the guest; return the exit code."""
        if self._lowmem is None:
            low = next(entry for entry in self._read.maps if entry.gpa == 0)
            self._lowmem = self.map(0, low.length_bytes, is_writable=True)
        with self._cpus.locked():
            return Interpreter(self._cpus[vcpu], self._lowmem).run()

    def set_rtc(self, seconds: int) -> None:
        """Set the guest's clock, which is only remembered."""
        self._cpus.rtc_seconds = seconds

    def resident(self, mapping: mmap.mmap, gpa: int) -> bytes:
        """Return one byte a page, other than 0 where it has data and is not swapped.

        With vm.mincore_mapped other than 0, mincore(2) reports only what the
        caller's mapping has touched: nothing.
        """
        npages = len(mapping) // PAGE_BYTES
        marks = bytearray(npages)
        if StandinHost(self._directory).sysctl("vm.mincore_mapped") != "0":
            return bytes(marks)
        for start, end in node.data_extents(self._fd, gpa, gpa + len(mapping)):
            first, stop = (start - gpa) // PAGE_BYTES, -(-(end - gpa) // PAGE_BYTES)
            marks[first:stop] = b"\1" * (stop - first)
        self._unmark_swapped(marks, gpa)
        return bytes(marks)

    def dirty(self, lengths_bytes: Sequence[int]) -> list[bytes] | None:
        """Return the dirty log of each segment and clear what was seen; or None."""
        if not read_settings(self._directory).dirty_log:
            return None
        npages = [length // PAGE_BYTES for length in lengths_bytes]
        try:
            fd = os.open(
                node.beside(self._directory, self._name, "dirty"), os.O_RDWR | os.O_CLOEXEC
            )
        except FileNotFoundError:
            return None
        except OSError as error:
            raise from_oserror(error, "open the dirty log") from error
        try:
            if os.fstat(fd).st_size != sum(npages):
                raise GuestError("the dirty log is not of this layout")
            with mmap.mmap(fd, sum(npages)) as log:
                seen = log[:]
                _clear_seen(log, seen)
        finally:
            os.close(fd)
        parts, base = [], 0
        for count in npages:
            parts.append(seen[base : base + count])
            base += count
        return parts

    def close(self) -> None:
        """Give up the node."""
        if self._open_cpus is not None:
            self._open_cpus.close()
        if self._lowmem is not None:
            self._lowmem.close()
        self._open_cpus = self._lowmem = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _unmark_swapped(self, marks: bytearray, gpa: int) -> None:
        try:
            swapped = node.beside(self._directory, self._name, "swapped").read_bytes()
        except FileNotFoundError:
            return
        low = next((m.length_bytes for m in self._read.maps if m.gpa == 0), 0)
        base = low // PAGE_BYTES if gpa >= HIGHMEM_BASE_GPA else gpa // PAGE_BYTES
        for page, is_swapped in enumerate(swapped[base : base + len(marks)]):
            if is_swapped:
                marks[page] = 0


def _clear_seen(log: mmap.mmap, seen: bytes) -> None:
    """Clear the bytes that were seen set, and no other: the guest marks meanwhile."""
    start = seen.find(1)
    while start >= 0:
        end = seen.find(0, start)
        end = len(seen) if end < 0 else end
        log[start:end] = bytes(end - start)
        start = seen.find(1, end)


class StandinTrace:
    """A stand-in that is started: it waits a while before it reads, and is not stopped."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def run_until(self, is_ready: Callable[[], bool], limit_s: float) -> bool:
        """Wait for a condition; False where the process has ended, or the time is over."""
        end = time.monotonic() + limit_s
        while not is_ready():
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if time.monotonic() > end or os.waitid(os.P_PID, self._pid, flags) is not None:
                return False
            time.sleep(_POLL_S)
        return True

    def let_go(self) -> None:
        """Do nothing: it runs."""


class StandinHost:
    """The host that a stand-in's directory plays."""

    kind = "standin"

    def __init__(self, directory: Path) -> None:
        """directory: BHYSEND_VMM_DIR.  Nothing is touched."""
        self._directory = directory.absolute()
        self.run_dir = self._directory / "run"

    def environment(self) -> Mapping[str, str]:
        """Return what hypervisors.open_host() needs to find this host again."""
        return {VMM_DIR: str(self._directory)}

    def sysctl(self, name: str) -> str | None:
        """Return a value of host.json, else a plausible one."""
        settings = read_settings(self._directory)
        given = settings.sysctl.get(name)
        if given is None and name == "kern.hostuuid":
            return str(uuid.uuid5(uuid.NAMESPACE_URL, str(self._directory)))
        own = {**_SYSCTL, **_RELEASE[settings.generation]}
        return own.get(name) if given is None else given

    def swap_used_bytes(self) -> int:
        """Return how much swap host.json says is in use."""
        return read_settings(self._directory).swap_used_bytes

    def free_memory_bytes(self) -> int:
        """Return what host.json says, else what this system has."""
        given = read_settings(self._directory).free_memory_bytes
        if given is not None:
            return given
        return _available_bytes()

    def program(self) -> list[str]:
        """Return the words that run the stand-in."""
        return inherited.program("standin")

    def trace(self, pid: int) -> StandinTrace:
        """Return what looks at a stand-in that is started."""
        return StandinTrace(pid)

    def program_hash(self) -> str:
        """Return what host.json says, else a hash of the stand-in's own modules."""
        given = read_settings(self._directory).program_hash
        if given is not None:
            return given
        modules = sorted(Path(__file__).parent.glob("*.py"))
        return hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()

    def can_snapshot(self) -> bool | None:
        """Return what host.json says."""
        return read_settings(self._directory).can_snapshot

    def module_hash(self) -> str:
        """Return what host.json says."""
        return read_settings(self._directory).module_hash

    def disk(self, path: str) -> Disk | None:
        """Return what a regular file is as a disk, changed by what host.json says of it."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        if not stat.S_ISREG(found.st_mode) or not os.access(path, os.R_OK):
            return None
        disk = Disk(found.st_size, 512, False, os.access(path, os.W_OK))
        return replace(disk, **read_settings(self._directory).disks.get(path, {}))

    def mtu(self, interface: str) -> int | None:
        """Return what host.json says of a tap that exists, else 1500."""
        if not self.has_tap(interface):
            return None
        return read_settings(self._directory).mtus.get(interface, _MTU)

    def cpu_vendor(self) -> str:
        """Return what host.json says."""
        return read_settings(self._directory).cpu_vendor

    def exists(self, name: str) -> bool:
        """Say whether the VM's node exists."""
        return node.node_path(self._directory, name).exists()

    def node_id(self, name: str) -> str:
        """Return the node's inode, "" where there is none.  Its times change with its memory."""
        try:
            found = os.stat(node.node_path(self._directory, name))
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise from_oserror(error, f"look at VM {name}") from error
        return f"{found.st_dev}:{found.st_ino}"

    def open_vm(self, name: str, *, is_writable: bool = False) -> StandinVm:
        """Open a VM.  Raises GuestError where there is none."""
        return StandinVm(self._directory, name, is_writable=is_writable)

    def create(self, name: str) -> None:
        """Create an empty VM."""
        node.create(self._directory, name)

    def destroy(self, name: str) -> None:
        """Destroy a VM; one that is gone already is no error."""
        try:
            node.destroy(self._directory, name)
        except OSError as error:
            raise from_oserror(error, f"destroy VM {name}") from error

    def mount_null(self, directory: Path) -> None:
        """Bind /dev/null over directory/null; on Linux root may.  Raises GuestError."""
        target = directory / "null"
        try:
            target.touch(0o600)
        except OSError as error:
            raise from_oserror(error, f"make {target}") from error
        error_text = _run("mount", "--bind", "/dev/null", str(target))
        if error_text:
            target.unlink(missing_ok=True)
            raise GuestError(f"cannot mount the null device: {error_text}")

    def unmount_null(self, directory: Path) -> None:
        """Undo mount_null()."""
        target = directory / "null"
        _run("umount", str(target))
        try:
            target.unlink(missing_ok=True)
        except OSError:  # still mounted, or not ours: it stays
            return

    def is_memory(self, directory: Path) -> bool:
        """Say whether a directory is on tmpfs.  Source: proc_pid_mounts(5)."""
        try:
            mounts = Path("/proc/mounts").read_text().splitlines()
            path = directory.resolve(strict=True)
        except OSError:
            return False
        best, kind = Path(), ""
        for line in mounts:
            words = line.split()
            point = Path(words[1].encode().decode("unicode_escape"))
            if path.is_relative_to(point) and len(point.parts) >= len(best.parts):
                best, kind = point, words[2]
        return kind == "tmpfs"

    def bridge_of(self, tap: str) -> str | None:
        """Return the bridge that a tap belongs to."""
        try:
            return (self._directory / "net" / tap).read_text().strip() or None
        except OSError:
            return None

    def has_tap(self, tap: str) -> bool:
        """Say whether a tap exists."""
        return (self._directory / "net" / tap).exists()

    def make_tap(self, tap: str, bridge: str | None) -> None:
        """Create a tap.  Raises GuestError where there is one."""
        path = self._directory / "net" / tap
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x") as file:
                file.write(f"{bridge}\n" if bridge else "")
        except OSError as error:
            raise GuestError(f"cannot create {tap}: {error.strerror}") from error

    def parent_command(self, pid: int) -> str:
        """Return what host.json says."""
        return read_settings(self._directory).parent_command

    def knows_suspending_lock(self) -> bool:
        """Return what host.json says; the stand-in's own supervisor knows it."""
        return read_settings(self._directory).knows_suspending_lock

    def datastores(self) -> Sequence[Path]:
        """Return the one datastore, if this host has vm-bhyve."""
        store = self._directory / "vm"
        return [store] if store.is_dir() else []


def _available_bytes() -> int:
    """Return the memory that can be had without swapping; where that is not told, all there is."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        found = None
    if found:
        return int(found[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _run(*command: str) -> str:
    """Run a command; return "" or what it complained of, in one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return ""
    return done.stderr.strip().partition("\n")[0].rstrip(".") or f"status {done.returncode}"

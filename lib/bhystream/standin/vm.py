"""One VM of the stand-in, as the bhyve backend sees it: host.Vm, implemented with files."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from bhystream.backend.bhyve.host import HIGHMEM_BASE_GPA, MemoryMap, SegmentDescriptor
from bhystream.errors import GuestError, from_oserror
from bhystream.guest import PAGE_BYTES

from . import node
from .cpu import Cpus
from .settings import read_settings
from .sysctl import sysctl


class StandinVm:
    """One VM of a stand-in, opened for reading, or also for changes.

    The methods that use vCPUs raise GuestError if there is no such vCPU.
    """

    def __init__(self, directory: Path, name: str, *, is_writable: bool = False) -> None:
        """Open the node.

        Raises GuestError if there is no such VM, AccessError or InputOutputError
        if the node cannot be opened.
        """
        self._directory = directory
        self._name = name
        self._read = node.read_map(directory, name)
        self._opened = contextlib.ExitStack()
        flags = os.O_RDWR if is_writable else os.O_RDONLY
        try:
            self._fd = os.open(node.node_path(directory, name), flags | os.O_CLOEXEC)
        except OSError as error:
            raise from_oserror(error, f"open VM {name}") from error
        self._opened.callback(os.close, self._fd)

    def maps(self) -> Sequence[MemoryMap]:
        """Return the memory map."""
        return self._read.maps

    def topology(self) -> tuple[int, int, int]:
        """Return (sockets, cores, threads)."""
        return self._read.topology

    def map(self, gpa: int, length_bytes: int, *, is_writable: bool = False) -> mmap.mmap:
        """Map one entry of system memory.

        Raises GuestError if there is no entry at gpa, or if it cannot be mapped.
        """
        if not any(m.segid == 0 and m.gpa == gpa for m in self._read.maps):
            raise GuestError(f"VM {self._name} has no system memory at {gpa:#x}")
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        try:
            return mmap.mmap(self._fd, length_bytes, prot=prot, offset=gpa)
        except (OSError, ValueError) as error:
            raise GuestError(f"cannot map {gpa:#x} of VM {self._name}: {error}") from error

    @cached_property
    def _cpus(self) -> Cpus:
        """The file of the VM's vCPUs.  An empty VM has no such file."""
        is_intel = read_settings(self._directory).cpu_vendor == "intel"
        cpus = Cpus(node.beside(self._directory, self._name, "cpu"), is_intel=is_intel)
        self._opened.callback(cpus.close)
        return cpus

    @cached_property
    def _lowmem(self) -> mmap.mmap:
        low = next(entry for entry in self._read.maps if entry.gpa == 0)
        mapping = self.map(0, low.length_bytes, is_writable=True)
        self._opened.callback(mapping.close)
        return mapping

    def waiting_vcpus(self) -> frozenset[int]:
        """Return the vCPUs that are suspended."""
        return frozenset(n for n, cpu in enumerate(self._cpus) if cpu.get("suspended"))

    def registers(self, vcpu: int, numbers: Sequence[int]) -> list[int]:
        """Return the values of registers.  Raises GuestError if one cannot be read."""
        with self._cpus.locked():
            return [self._cpus[vcpu][number] for number in numbers]

    def set_register(self, vcpu: int, number: int, value: int) -> None:
        """Set one register.  Raises GuestError if the register cannot be set."""
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
        """Return the two words of VM_GET_INTINFO."""
        with self._cpus.locked():
            return self._cpus[vcpu].get("event_1"), self._cpus[vcpu].get("event_2")

    def inject_nmi(self, vcpu: int) -> None:
        """Let an NMI wait to be delivered to a vCPU."""
        self._cpus[vcpu].put("nmi_pending", 1)

    def resume_cpu(self, vcpu: int) -> None:
        """Let a vCPU be run.  Raises GuestError if the vCPU is not suspended.

        Source: sys/dev/vmm/vmm_vm.c, vm_resume_cpu().
        """
        if not self._cpus[vcpu].get("suspended"):
            raise GuestError(f"cannot resume vCPU {vcpu}: Invalid argument")
        self._cpus[vcpu].put("suspended", 0)

    def suspend_cpu(self, vcpu: int) -> None:
        """Undo resume_cpu()."""
        self._cpus[vcpu].put("suspended", 1)

    def run(self, vcpu: int) -> int:
        """Run a vCPU until it leaves the guest; return the exit code.

        Raises GuestError as Interpreter.run() does.
        """
        from .interpreter import Interpreter  # a dry run runs no vCPU

        lowmem = self._lowmem
        with self._cpus.locked():
            return Interpreter(self._cpus[vcpu], lowmem).run()

    def set_rtc(self, seconds: int) -> None:
        """Remember what the guest's clock is set to: seconds since the Epoch."""
        self._cpus.rtc_seconds = seconds

    def resident(self, mapping: mmap.mmap, gpa: int) -> bytes:
        """Return one byte a page: not 0 if the page has data and is not swapped out.

        If vm.mincore_mapped is not 0, mincore(2) reports only the pages that the
        caller's mapping has touched, which are none.
        """
        npages = len(mapping) // PAGE_BYTES
        marks = bytearray(npages)
        if sysctl(self._directory, "vm.mincore_mapped") != "0":
            return bytes(marks)
        for start, end in node.data_extents(self._fd, gpa, gpa + len(mapping)):
            first, stop = (start - gpa) // PAGE_BYTES, -(-(end - gpa) // PAGE_BYTES)
            marks[first:stop] = b"\1" * (stop - first)
        self._unmark_swapped(marks, gpa)
        return bytes(marks)

    def dirty(self, lengths_bytes: Sequence[int]) -> list[bytes] | None:
        """Return the dirty log of each segment, and clear the marks that were returned.

        Returns None if there is no log.  Raises GuestError if the log's size is
        wrong, AccessError or InputOutputError if the log cannot be opened.
        """
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
                raise GuestError("the dirty log has another size than the guest's memory")
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
        """Close the node."""
        self._opened.close()

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
    """Clear only the bytes that were seen set: meanwhile the guest marks other pages."""
    start = seen.find(1)
    while start >= 0:
        end = seen.find(0, start)
        end = len(seen) if end < 0 else end
        log[start:end] = bytes(end - start)
        start = seen.find(1, end)

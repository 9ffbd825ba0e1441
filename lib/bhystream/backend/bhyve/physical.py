"""A guest's memory by physical address, and its page tables, a few bytes at a time."""

from __future__ import annotations

import mmap
from types import TracebackType
from typing import Self

from bhystream.backend.bhyve.host import Vm
from bhystream.errors import GuestError

ADDRESS = 0x000FFFFFFFFFF000
"""The bits of an address in CR3 and in the entries of page tables."""

Lowmem = mmap.mmap | memoryview
"""A guest's memory from gpa 0 on, as one mapping."""

_PRESENT, _LARGE = 0x1, 0x80
_SHIFTS = (39, 30, 21, 12)


class Physical:
    """The memory of a paused guest, to be read.  Each object owns the mappings that it makes."""

    def __init__(self, vm: Vm, lowmem: Lowmem) -> None:
        """Map nothing yet.  lowmem: the guest's memory at gpa 0; it stays the caller's."""
        self._vm = vm
        self._lowmem = lowmem
        self._mapped: dict[int, mmap.mmap] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for mapping in self._mapped.values():
            mapping.close()
        self._mapped.clear()

    def read(self, gpa: int, length_bytes: int) -> bytes:
        """Return the bytes at an address.  Raises GuestError if no system memory is there."""
        if gpa + length_bytes <= len(self._lowmem):
            return bytes(self._lowmem[gpa : gpa + length_bytes])
        for entry in self._vm.maps():
            at = gpa - entry.gpa
            if at >= 0 and at + length_bytes <= entry.length_bytes:
                if entry.gpa not in self._mapped:
                    self._mapped[entry.gpa] = self._vm.map(entry.gpa, entry.length_bytes)
                return self._mapped[entry.gpa][at : at + length_bytes]
        raise GuestError(f"it has no memory at {gpa:#x}")

    def translate(self, cr3: int, address: int) -> int | None:
        """Return the physical address of a linear one, or None if it is not mapped.

        cr3: of the vCPU; its page tables have four levels.  Raises GuestError if
        a page table lies outside of system memory.
        """
        table = cr3 & ADDRESS
        for shift in _SHIFTS:
            entry = int.from_bytes(self.read(table + (address >> shift & 0x1FF) * 8, 8), "little")
            if not entry & _PRESENT:
                return None
            table = entry & ADDRESS
            if shift == 12 or (shift < 39 and entry & _LARGE):
                inside = (1 << shift) - 1
                return (table & ~inside) | (address & inside)
        return None

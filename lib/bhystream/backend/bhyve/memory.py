"""A guest's memory, mapped: what the source reads, and the keeper keeps.

    /dev/vmm/NAME --VM_MMAP_GETNEXT--> lowmem, highmem --mmap(2)--> one view each

A mapping outlives the VM and its process: mmap(2) of the node takes a reference
of its own to the memory's object, and vmm's destruction drops only vmm's.  That
is what makes a suspended guest whole: bhyve's snapshot needs no memory file,
because the memory is here.  So the last pages are read from here, and a
rollback writes them from here.
Confirmed in source, never run: freebsd/freebsd-src@012895d5 sys/dev/vmm/vmm_dev.c,
vmmdev_mmap_single(); @09fa9c6f sys/dev/vmm/vmm_mem.c, vm_free_memseg(); 14 the
same (index id 189825660).

Pages that were never touched are not read: reading one allocates it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from bhystream.backend.base import PAGE_BYTES, Segment
from bhystream.backend.bhyve.cold import data_extents
from bhystream.backend.bhyve.host import (
    HIGHMEM_BASE_GPA,
    LOWMEM_LIMIT_BYTES,
    Host,
    MemoryMap,
    Vm,
)
from bhystream.backend.bhyve.residency import believes_mincore, dirty_extents, extents
from bhystream.backend.bhyve.snapshot import layout_of, memory_spans
from bhystream.errors import IncompatibleError, from_oserror

_CHUNK_BYTES = 1 << 20
_ZEROS = bytes(_CHUNK_BYTES)


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file into a new one, mode 0600; its holes stay holes.  Raises OSError."""
    inner = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        outer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(inner).st_size
            os.ftruncate(outer, size)
            for first, end in data_extents(inner, 0, size):
                at = first * PAGE_BYTES
                while at < (stop := min(end * PAGE_BYTES, size)):
                    at += os.pwrite(outer, os.pread(inner, min(_CHUNK_BYTES, stop - at), at), at)
        finally:
            os.close(outer)
    finally:
        os.close(inner)


def system_memory(maps: Sequence[MemoryMap], who: str) -> list[MemoryMap]:
    """Return the maps of system memory: lowmem, and highmem if there is any.

    Boot ROM and framebuffer lie between the two.  The memory domains of a
    guest (bhyve -n) are maps that adjoin: they become one, with the first
    one's segment and offset.  Raises IncompatibleError where memory lies
    elsewhere.  Source: lib/libvmmapi/vmmapi.c, vm_setup_memory_domains(),
    FreeBSD 15.1.
    """
    found: list[MemoryMap] = []
    for one in maps:
        if LOWMEM_LIMIT_BYTES <= one.gpa < HIGHMEM_BASE_GPA:
            continue
        if found and found[-1].gpa + found[-1].length_bytes == one.gpa:
            before = found.pop()
            one = replace(
                before,
                length_bytes=before.length_bytes + one.length_bytes,
                is_wired=before.is_wired and one.is_wired,
            )
        found.append(one)
    spans = memory_spans(sum(one.length_bytes for one in found))
    if [(one.gpa, one.length_bytes) for one in found] != [(gpa, size) for gpa, _, size in spans]:
        places = ", ".join(f"0x{one.gpa:x}" for one in found) or "nowhere"
        raise IncompatibleError(
            f"{who}: its memory lies at {places}, not at 0 up to 3 GiB and then at 4 GiB"
        )
    return found


class Memory:
    """The memory of one guest: lowmem, then highmem, in pages and in the snapshot's order.

    Owns the open VM and the mappings until close().
    """

    def __init__(self, host: Host, name: str) -> None:
        """Map the memory of a VM.  Raises GuestError, AccessError or IncompatibleError."""
        self._host = host
        self._name = name
        self._vm: Vm = host.open_vm(name)
        self._mappings: list[mmap.mmap] = []
        self.views: list[memoryview] = []
        try:
            self._maps = system_memory(self._vm.maps(), f"guest {name}")
            for one in self._maps:
                mapping = self._vm.map(one.gpa, one.length_bytes)
                self._mappings.append(mapping)
                self.views.append(memoryview(mapping))
            self.topology = self._vm.topology()
        except BaseException:
            self.close()
            raise

    @property
    def layout(self) -> tuple[Segment, ...]:
        """Return the segments of the LAYOUT section."""
        return layout_of(self.size_bytes)

    @property
    def size_bytes(self) -> int:
        """Return the guest's memory size."""
        return sum(one.length_bytes for one in self._maps)

    @property
    def is_wired(self) -> bool:
        """Say whether all of it is wired, so that none is swapped out.

        The pages are wired by the VM, which unwires them when it is destroyed,
        after its node has gone.  Source: vmm_mem.c, vm_mmap_memseg() and
        vm_free_memmap(); vmm_dev.c, vmmdev_lookup_and_destroy().
        """
        return all(one.is_wired for one in self._maps) and self._host.exists(self._name)

    @property
    def base_pages(self) -> list[int]:
        """Return the first page of each segment."""
        return [0, self._maps[0].length_bytes // PAGE_BYTES][: len(self._maps)]

    def touched(self) -> Iterator[tuple[int, int]]:
        """Return the extents of pages that may be other than zero; all, where that is not known."""
        if believes_mincore(self._host, self.is_wired)[0]:
            found = [
                self._vm.resident(mapping, one.gpa)
                for mapping, one in zip(self._mappings, self._maps, strict=True)
            ]
            # Something may have been swapped out while we asked.
            if believes_mincore(self._host, self.is_wired)[0]:
                pairs = zip(found, self.base_pages, strict=True)
                return chain.from_iterable(extents(marks, base) for marks, base in pairs)
        return iter(
            [
                (base, base + one.length_bytes // PAGE_BYTES)
                for base, one in zip(self.base_pages, self._maps, strict=True)
            ]
        )

    def changed(self) -> Iterator[tuple[int, int]] | None:
        """Return the extents written since the last call, None where the kernel has no log."""
        log = self._vm.dirty([one.length_bytes for one in self._maps])
        return None if log is None else dirty_extents(log, self.base_pages)

    def write(self, path: str) -> None:
        """Write the memory into a new file, as bhyve's snapshot has it: sparse, not synced.

        Raises PipeError or AccessError; then the file is incomplete.
        """
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, self.size_bytes)
                for first, end in self.touched():
                    self._write(fd, first, end)
            finally:
                os.close(fd)
        except OSError as error:
            raise from_oserror(error, f"write {path}") from error

    def _write(self, fd: int, first: int, end: int) -> None:
        """Write an extent, but for the pieces of it that are zero."""
        index = int(len(self.views) > 1 and first >= self.base_pages[1])
        view, base_bytes = self.views[index], self.base_pages[index] * PAGE_BYTES
        at, end_bytes = first * PAGE_BYTES, end * PAGE_BYTES
        while at < end_bytes:
            piece = view[at - base_bytes : min(at + _CHUNK_BYTES, end_bytes) - base_bytes]
            if piece == _ZEROS[: len(piece)]:
                at += len(piece)
            else:
                at += os.pwrite(fd, piece, at)

    def close(self) -> None:
        """Give up the VM and the mappings.  Twice is no error.

        A view that the engine still holds keeps its mapping until it is dropped.
        """
        for view, mapping in zip(self.views, self._mappings, strict=True):
            try:
                view.release()
                mapping.close()
            except BufferError:
                continue
        self.views, self._mappings = [], []
        self._vm.close()

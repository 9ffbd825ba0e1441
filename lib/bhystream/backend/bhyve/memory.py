"""A guest's memory, mapped so that the source can read it.

    /dev/vmm/NAME --VM_MMAP_GETNEXT--> lowmem, highmem --mmap(2)--> one view each

bhysend takes no memory from bhyve's snapshot (snapshotdir.py): it reads all
pages from this mapping, also the last ones, while the guest stands paused.
Devices without a pause callback go on meanwhile, and the mapping shows what
they write.

bhysend does not read pages that were never touched: reading one allocates it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from itertools import chain

from bhystream.backend.bhyve.host import HIGHMEM_BASE_GPA, LOWMEM_LIMIT_BYTES, Host, MemoryMap, Vm
from bhystream.backend.bhyve.layout import layout_of, memory_spans
from bhystream.backend.bhyve.residency import believes_mincore, dirty_extents, extents
from bhystream.errors import IncompatibleError
from bhystream.memory.mapping import unmap


def system_memory(maps: Sequence[MemoryMap], who: str) -> list[MemoryMap]:
    """Return the maps of system memory: lowmem, and highmem if there is any.

    Boot ROM and framebuffer lie between the two.  The memory domains of a
    guest (bhyve -n) are adjoining maps; they are joined into one map with the
    segment and the offset of the first.  who: the guest, as messages name it.
    Raises IncompatibleError if the guest has memory at any other address.
    Source: lib/libvmmapi/vmmapi.c, vm_setup_memory_domains(), FreeBSD 15.1.
    """
    found: list[MemoryMap] = []
    for one in maps:
        if LOWMEM_LIMIT_BYTES <= one.gpa < HIGHMEM_BASE_GPA:
            continue
        if found and found[-1].gpa + found[-1].length_bytes == one.gpa:
            before = found.pop()
            one = before._replace(
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
    """The memory of one guest: lowmem, then highmem, in the snapshot's order.

    layout: the segments of the LAYOUT section, in pages.  topology: (sockets,
    cores, threads).  The object owns the open VM and the mappings until close().
    """

    def __init__(self, host: Host, name: str) -> None:
        """Map the memory of a VM.

        Raises GuestError if there is no such VM, AccessError if it may not be
        used, IncompatibleError as system_memory().
        """
        self._host = host
        self._name = name
        self._vm: Vm = host.open_vm(name)
        self._mappings: list[mmap.mmap] = []
        self.views: list[memoryview] = []
        try:
            self._maps = system_memory(self._vm.maps(), f"guest {name}")
            self.layout = layout_of(sum(one.length_bytes for one in self._maps))
            for one in self._maps:
                mapping = self._vm.map(one.gpa, one.length_bytes)
                self._mappings.append(mapping)
                self.views.append(memoryview(mapping))
            self.topology = self._vm.topology()
        except BaseException:
            self.close()
            raise

    @property
    def size_bytes(self) -> int:
        """Return the guest's memory size in bytes."""
        return self.layout.size_bytes

    @property
    def is_wired(self) -> bool:
        """Say whether all of the memory is wired, so that no page is swapped out.

        The VM wires the pages, and unwires them when the VM is destroyed, after
        its node has gone; so the node must still exist.  Source: vmm_mem.c,
        vm_mmap_memseg() and vm_free_memmap(); vmm_dev.c, vmmdev_lookup_and_destroy().
        """
        return all(one.is_wired for one in self._maps) and self._host.exists(self._name)

    def touched(self) -> Iterator[tuple[int, int]]:
        """Return the extents of pages that may be other than zero; all pages if that is unknown."""
        if believes_mincore(self._host, self.is_wired)[0]:
            found = [
                self._vm.resident(mapping, one.gpa)
                for mapping, one in zip(self._mappings, self._maps, strict=True)
            ]
            # A page may have been swapped out during the calls, so ask about that again.
            if believes_mincore(self._host, self.is_wired)[0]:
                pairs = zip(found, self.layout.starts, strict=True)
                return chain.from_iterable(extents(marks, base) for marks, base in pairs)
        return self.layout.extents()

    def waiting_vcpus(self) -> frozenset[int]:
        """Return the vCPUs that wait in bhyve: never started, or suspended."""
        return self._vm.waiting_vcpus()

    def changed(self) -> Iterator[tuple[int, int]] | None:
        """Return the extents written since the last call, or None if the kernel has no log."""
        log = self._vm.dirty([one.length_bytes for one in self._maps])
        return None if log is None else dirty_extents(log, self.layout.starts)

    def close(self) -> None:
        """Close the VM and release the mappings.  May be called twice."""
        unmap(self.views, self._mappings)
        self.views, self._mappings = [], []
        self._vm.close()

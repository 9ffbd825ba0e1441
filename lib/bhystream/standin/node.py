"""The memory node of a guest, DIR/vmm/NAME, and the files beside the node.

The node is a sparse file whose offset is the guest physical address: lowmem
from 0, highmem from 4 GiB, nothing between.  NAME.map says what a real kernel
answers to VM_MMAP_GETNEXT and VM_GET_TOPOLOGY.  To destroy a VM is to unlink
its node: mappings live on, as mappings of /dev/vmm/NAME do.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bhystream.backend.bhyve.host import HIGHMEM_BASE_GPA, LOWMEM_LIMIT_BYTES, MemoryMap
from bhystream.errors import GuestError, from_oserror
from bhystream.guest import PAGE_BYTES

_SUFFIXES = ("", ".map", ".dirty", ".swapped", ".cpu")
_PROT_ALL = 7
CONNECT = signal.SIGUSR2
"""What connects the power button of a stand-in that restores a guest."""


def node_path(directory: Path, name: str) -> Path:
    """Return the node's path.  Raises GuestError if the name cannot be a VM's name."""
    if not name or "/" in name or name in (".", "..") or name.endswith(_SUFFIXES[1:]):
        raise GuestError(f"not a VM's name: {name!r}")
    return directory / "vmm" / name


def beside(directory: Path, name: str, what: str) -> Path:
    """Return the path of a file beside the node.  Raises GuestError as node_path() does.

    what: "map", "dirty", "swapped" or "cpu".
    """
    path = node_path(directory, name)
    return path.with_name(f"{path.name}.{what}")


def create(directory: Path, name: str) -> None:
    """Create an empty VM.

    Raises GuestError if the VM exists, AccessError or InputOutputError if its
    files cannot be made.
    """
    path = node_path(directory, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        write_map(directory, name, Map((), (1, 1, 1), is_active=False))
    except FileExistsError as error:
        raise GuestError(f"VM {name} exists") from error
    except OSError as error:
        raise from_oserror(error, f"create VM {name}") from error


def destroy(directory: Path, name: str) -> None:
    """Destroy a VM, unless it is gone already.  Raises OSError if a file cannot be removed."""
    path = node_path(directory, name)
    for suffix in _SUFFIXES:
        path.with_name(path.name + suffix).unlink(missing_ok=True)


class Map(NamedTuple):
    """The content of NAME.map.

    topology: sockets, cores, threads.  is_active: the VM's vCPUs were activated
    once, so that no second bhyve can be started on the VM.
    """

    maps: tuple[MemoryMap, ...]
    topology: tuple[int, int, int]
    is_active: bool


def read_map(directory: Path, name: str) -> Map:
    """Return a VM's map.  Raises GuestError if there is no such VM."""
    try:
        found = json.loads(beside(directory, name, "map").read_bytes())
    except (OSError, ValueError) as error:
        raise GuestError(f"no VM {name}: {error}") from error
    sockets, cores, threads = found["topology"]
    maps = tuple(MemoryMap(**entry) for entry in found["maps"])
    return Map(maps, (sockets, cores, threads), found["is_active"])


def write_map(directory: Path, name: str, written: Map) -> None:
    """Replace a VM's map atomically.  Raises OSError if the map cannot be written."""
    path = beside(directory, name, "map")
    new = path.with_name(f".{path.name}.new")
    maps = [entry._asdict() for entry in written.maps]
    new.write_text(json.dumps({**written._asdict(), "maps": maps}))
    new.replace(path)


def sizes(memsize_bytes: int) -> tuple[int, int]:
    """Return the bytes of lowmem and of highmem.

    Source: FreeBSD lib/libvmmapi/vmmapi.c, vm_setup_memory().
    """
    low = min(memsize_bytes, LOWMEM_LIMIT_BYTES)
    return low, memsize_bytes - low


def memory_maps(
    memsize_bytes: int, *, is_wired: bool, devices: Sequence[MemoryMap] = ()
) -> tuple[MemoryMap, ...]:
    """Return the map of system memory and of device memory, ascending by gpa."""
    low, high = sizes(memsize_bytes)
    maps = [MemoryMap(0, 0, 0, low, _PROT_ALL, is_wired), *devices]
    if high:
        maps.append(MemoryMap(HIGHMEM_BASE_GPA, 0, HIGHMEM_BASE_GPA, high, _PROT_ALL, is_wired))
    return tuple(sorted(maps, key=lambda entry: entry.gpa))


def data_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges [first, stop) of a file, inside [start, end), that are not holes.

    Allocates nothing.  On a file system without holes there is one extent.
    """
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            return
        if start >= end:
            return
        stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        yield start, stop
        start = stop


class Memory:
    """A guest's memory, mapped for writing.  Page numbers go through lowmem, then highmem.

    A writer marks a page in the dirty log after writing the page, so that a
    reader who clears the mark and then reads the page misses nothing.
    """

    def __init__(self, directory: Path, name: str, memsize_bytes: int, *, has_log: bool) -> None:
        """Give the VM its memory and map it.  Raises OSError if that fails.

        has_log: whether the host keeps a dirty log.
        """
        self.path = node_path(directory, name)
        self.low_bytes, self.high_bytes = sizes(memsize_bytes)
        self.low_pages = self.low_bytes // PAGE_BYTES
        self.npages = memsize_bytes // PAGE_BYTES
        self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        end = HIGHMEM_BASE_GPA + self.high_bytes if self.high_bytes else self.low_bytes
        os.truncate(self.fd, end)
        self._low = mmap.mmap(self.fd, self.low_bytes)
        self._high = self._low
        if self.high_bytes:
            self._high = mmap.mmap(self.fd, self.high_bytes, offset=HIGHMEM_BASE_GPA)
        self._log: mmap.mmap | None = None
        if has_log:
            self._log = _map_log(beside(directory, name, "dirty"), self.npages)

    def segments(self) -> list[tuple[int, mmap.mmap]]:
        """Return (gpa, mapping) of lowmem and, if there is any, of highmem."""
        found = [(0, self._low)]
        if self.high_bytes:
            found.append((HIGHMEM_BASE_GPA, self._high))
        return found

    def read(self, page: int) -> bytes:
        """Return a copy of a page."""
        if page < self.low_pages:
            at = page * PAGE_BYTES
            return self._low[at : at + PAGE_BYTES]
        at = (page - self.low_pages) * PAGE_BYTES
        return self._high[at : at + PAGE_BYTES]

    def write(self, page: int, data: bytes, at: int = 0) -> None:
        """Write data into a page, at a byte offset, and mark the page in the log."""
        if page < self.low_pages:
            start = page * PAGE_BYTES + at
            self._low[start : start + len(data)] = data
        else:
            start = (page - self.low_pages) * PAGE_BYTES + at
            self._high[start : start + len(data)] = data
        if self._log is not None:
            self._log[page] = 1

    def allocated(self) -> Iterator[int]:
        """Yield the numbers of the pages that are not in a hole, ascending."""
        low = range(self.low_bytes)
        high = range(HIGHMEM_BASE_GPA, HIGHMEM_BASE_GPA + self.high_bytes)
        for part, base in ((low, 0), (high, self.low_pages)):
            for start, end in data_extents(self.fd, part.start, part.stop):
                first = base + (start - part.start) // PAGE_BYTES
                yield from range(first, first + -(-(end - start) // PAGE_BYTES))

    def is_current(self) -> bool:
        """Say whether the node is still there, which means that the VM was not destroyed."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        except FileNotFoundError:
            return False


def _map_log(path: Path, npages: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.truncate(fd, npages)
        return mmap.mmap(fd, npages)
    finally:
        os.close(fd)

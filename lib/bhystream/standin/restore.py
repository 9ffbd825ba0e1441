"""`-r FILE`: a snapshot's three files, and how bhyve loads them into a new VM.

bhyrecv's early start relies on the way in which bhyve reads them.  bhyve looks
at FILE's size only once, when opening FILE.  At the same time bhyve maps
FILE.kern, shared, and reads that mapping after the memory is loaded.  A read of
0 bytes from FILE is no error: at the end of a FILE that was cut, bhyve tries
again and again, and reads on when FILE has grown.  bhyve reads FILE once, from
the start to the end: every part that was read, data or hole, is in the VM's memory.

Holes cost nothing here: a hole of FILE is zeroed only where the VM has data.

Source: usr.sbin/bhyve/snapshot.c, load_restore_file(), vm_snapshot_mem_part(),
lookup_check_dev(), FreeBSD 15.1; read, and the wait in the read was run there.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bhystream.errors import BhyError
from bhystream.guest import PAGE_BYTES

from .guest import KERNEL_STRUCTS, Guest
from .node import Memory, data_extents
from .saving import abort, complain

EX_DATAERR = 65
_PIECE_BYTES = 4 << 20
_ROUND_S = 0.001  # bhyve does not sleep
# bhyve needs at least this time from the mapping of its memory to the end of the
# read: for its devices, and for every page, even in a hole.
_WHOLE_READ_S = 0.25
_EINVAL = 22
_TAIL_BYTES = 2 * PAGE_BYTES


class RestoreError(BhyError):
    """The snapshot cannot be restored.  exit_status: the status with which bhyve ends."""

    def __init__(self, text: str, exit_status: int = 1) -> None:
        super().__init__(text)
        self.exit_status = exit_status


class Snapshot:
    """An open snapshot: a descriptor of FILE, a mapping of FILE.kern, the parsed FILE.meta.

    memory_bytes, tail: the size and the last pages of FILE when it was opened.
    """

    def __init__(self, path: Path) -> None:
        """Open the three files, in bhyve's order.  Raises RestoreError if one cannot be read."""
        try:
            self.memory_fd, self.memory_bytes = _open(path, "restore file", "Restore file")
        except RestoreError as error:
            raise _unread(path, error, "Failed to load guest RAM file.") from None
        self.tail = os.pread(self.memory_fd, _TAIL_BYTES, max(0, self.memory_bytes - _TAIL_BYTES))
        try:
            fd, size = _open(_beside(path, ".kern"), "kernel data file", "Kernel data file")
        except RestoreError as error:
            raise _unread(path, error, "Failed to load guest kernel data file.") from None
        self._kern = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self._kern_fd = fd
        meta = _beside(path, ".meta")
        try:
            found = json.loads(meta.read_bytes())
        except (OSError, ValueError):
            why = RestoreError(f"Failed to parse metadata file: '{meta}'")
            raise _unread(path, why, "Failed to load guest metadata file.") from None
        self._meta: dict[str, Any] = found if isinstance(found, dict) else {}

    @property
    def name(self) -> str:
        """The guest's name, "" if FILE.meta has none."""
        found = self._basic().get("vmname")
        return found if isinstance(found, str) else ""

    @property
    def ncpus(self) -> int:
        """The number of vCPUs, 0 if FILE.meta has none."""
        return self._number("ncpus")

    @property
    def memsize_bytes(self) -> int:
        """The bytes of memory that the VM gets, 0 if FILE.meta does not say."""
        return self._number("memsize")

    def blob(self, kind: str, name: str) -> bytes | None:
        """Return a blob by its list and name, None if FILE.meta does not list the blob.

        If the blob lies outside of the mapping, the process ends, as by bhyve's
        assertion; if FILE.kern was cut meanwhile, SIGBUS ends the process.
        """
        entries = self._meta.get(kind)
        for entry in entries if isinstance(entries, list) else ():
            if entry.get("device") != name:
                continue
            start, size = int(entry["file_offset"]), int(entry["size"])
            if start < 0 or size < 0 or start + size > len(self._kern):
                complain("Assertion failed: file_offset + size <= rstate->kdata_len")
                abort()
            return self._kern[start : start + size]
        return None

    @property
    def is_cut(self) -> bool:
        """Whether FILE has become shorter since it was opened."""
        return os.fstat(self.memory_fd).st_size < self.memory_bytes

    @property
    def is_kern_cut(self) -> bool:
        """Whether FILE.kern has become shorter since it was opened."""
        return os.fstat(self._kern_fd).st_size < len(self._kern)

    def close(self) -> None:
        """Close the files."""
        os.close(self.memory_fd)
        os.close(self._kern_fd)
        self._kern.close()

    def _basic(self) -> Mapping[str, Any]:
        found = self._meta.get("basic metadata")
        return found if isinstance(found, dict) else {}

    def _number(self, key: str) -> int:
        found = self._basic().get(key)
        return found if type(found) is int and found > 0 else 0


def load_memory(
    snapshot: Snapshot, guest: Guest, *, look: Callable[[], None], fail: Sequence[str]
) -> None:
    """Read FILE into the VM's memory, from the start to the end.

    look: called in each round in which a read brings nothing; may raise.  fail:
    words of FAILURES.  Raises RestoreError if FILE is not of the memory's size.
    """
    memory = guest.memory
    total = memory.low_bytes + memory.high_bytes
    if total != snapshot.memory_bytes:
        complain(f"vm_snapshot_mem: mem size mismatch: {total} vs {snapshot.memory_bytes}")
        raise RestoreError("Failed to restore VM memory.")
    if "late-cut" in fail:
        # ftruncate(2) waits for a read(2) that has begun, so that read(2) has the end as well.
        _await_cut(lambda: snapshot.is_kern_cut, look)
        return _write_end(memory, snapshot.tail)
    _await_cut(lambda: snapshot.is_cut, look)
    base = 0
    for gpa, mapping in memory.segments():
        done = 0
        while done < len(mapping):
            end = min(os.fstat(snapshot.memory_fd).st_size - base, len(mapping))
            if end > done:
                done += _read(snapshot.memory_fd, base, memory.fd, gpa, mapping, done, end)
                continue
            if "short-read" in fail:
                raise RestoreError("Failed to restore VM memory.")
            look()
            time.sleep(_ROUND_S)
        base += len(mapping)
    return None


def _write_end(memory: Memory, data: bytes) -> None:
    """Write the last bytes of the memory page by page, beginning with the last page."""
    npages = len(data) // PAGE_BYTES
    for page in reversed(range(npages)):
        piece = data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
        memory.write(memory.npages - npages + page, piece)


def _await_cut(is_cut: Callable[[], bool], look: Callable[[], None]) -> None:
    """Wait for as long as bhyve's read would take, or until the file is cut."""
    end = time.monotonic() + _WHOLE_READ_S
    while not is_cut() and time.monotonic() < end:
        look()
        time.sleep(_ROUND_S)


def _read(fd: int, base: int, node: int, gpa: int, mapping: mmap.mmap, done: int, end: int) -> int:
    """Read FILE up to the end of the next hole or piece of data; return how many bytes that were.

    fd: FILE.  base: where the segment begins in FILE.  node, gpa: the file that holds
    the VM's memory, and where the segment begins in that file.  mapping: the segment in
    the VM's memory.  done: how many bytes of the segment were read before.  end: how
    many bytes of the segment FILE has by now.
    """
    start, stop = next(data_extents(fd, base + done, base + end), (base + end, base + end))
    start, stop = start - base, stop - base
    if start > done:
        for first, last in data_extents(node, gpa + done, gpa + start):
            mapping[first - gpa : last - gpa] = bytes(last - first)
        return start - done
    with memoryview(mapping) as view, view[done : min(stop, done + _PIECE_BYTES)] as piece:
        return os.preadv(fd, [piece], base + done)


def load_devices(snapshot: Snapshot, guest: Guest) -> None:
    """Restore the devices.

    Raises RestoreError if a blob is missing, empty, or has other constants.
    """
    for device in guest.devices:
        blob = snapshot.blob("devices", device.name)
        if blob is None:
            complain(f"Failed to lookup dev: {device.name}")
        elif not blob:
            complain(f"Restore device size is 0: {device.name}")
        elif not device.load(blob):
            complain(f"Failed to restore dev: {device.name} {_EINVAL}")
        else:
            continue
        raise RestoreError("Failed to restore PCI device state.")


def load_kernel(snapshot: Snapshot, guest: Guest) -> None:
    """Restore the kernel structures.  Raises RestoreError if a blob is missing or empty."""
    for name in KERNEL_STRUCTS:
        blob = snapshot.blob("kern_structs", name)
        if blob is None:
            raise RestoreError(f"Cannot find kern struct {name}", EX_DATAERR)
        if not blob:
            raise RestoreError(f"data with zero size for {name}", EX_DATAERR)
        guest.load_kernel(name, blob)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _unread(path: Path, error: RestoreError, what: str) -> RestoreError:
    where = f"Failed to read checkpoint info from file: '{path}'."
    return RestoreError(f"{error}\n{what}\n{where}")


def _open(path: Path, what: str, subject: str) -> tuple[int, int]:
    """Return a descriptor and the size.  Raises RestoreError if the file is missing or empty."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise RestoreError(f"Failed to open {what}: {error.strerror}") from None
    size = os.fstat(fd).st_size
    if size == 0:
        os.close(fd)
        raise RestoreError(f"{subject} is empty.")
    return fd, size

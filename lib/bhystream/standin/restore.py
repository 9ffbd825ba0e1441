"""`-r FILE`: a snapshot's three files, checked, and put into a new guest.

Source: dossier, section 5 (load_restore_file() and the restore functions of
FreeBSD usr.sbin/bhyve/snapshot.c, generation G4).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bhystream.errors import BhyError

from .guest import KERNEL_STRUCTS, Guest
from .node import data_extents

EX_DATAERR = 65
_PIECE_BYTES = 4 << 20


class RestoreError(BhyError):
    """A snapshot that cannot be restored.  exit_status: bhyve's."""

    def __init__(self, text: str, exit_status: int = 1) -> None:
        super().__init__(text)
        self.exit_status = exit_status


@dataclass(frozen=True)
class Snapshot:
    """An open snapshot.  kernel, devices: blobs by name."""

    memory_fd: int
    memory_bytes: int
    name: str
    ncpus: int
    memsize_bytes: int
    kernel: Mapping[str, bytes]
    devices: Mapping[str, bytes]


def open_snapshot(path: Path) -> Snapshot:
    """Open and check the files of a snapshot.  Raises RestoreError."""
    memory_fd, memory_bytes = _open(path)
    kern_fd, _ = _open(path.with_name(path.name + ".kern"))
    meta_fd, meta_bytes = _open(path.with_name(path.name + ".meta"))
    with open(kern_fd, "rb") as kern_file, open(meta_fd, "rb") as meta_file:
        kern = kern_file.read()
        try:
            meta = json.loads(meta_file.read(meta_bytes))
            basic = meta["basic metadata"]
            return Snapshot(
                memory_fd,
                memory_bytes,
                str(basic["vmname"]),
                int(basic["ncpus"]),
                int(basic["memsize"]),
                _blobs(meta["kern_structs"], kern),
                _blobs(meta["devices"], kern),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RestoreError(f"Failed to parse the metadata: {error!r}", EX_DATAERR) from error


def load_memory(snapshot: Snapshot, guest: Guest) -> None:
    """Read the memory file into the node; its holes stay holes.  Raises RestoreError."""
    memory = guest.memory
    if snapshot.memory_bytes != memory.low_bytes + memory.high_bytes:
        raise RestoreError("Restore error: mem size mismatch")
    base = 0
    for _, mapping in memory.segments():
        with memoryview(mapping) as view:
            for start, end in data_extents(snapshot.memory_fd, base, base + len(mapping)):
                _read_into(snapshot.memory_fd, view[start - base : end - base], start)
        base += len(mapping)
    os.close(snapshot.memory_fd)


def load_state(snapshot: Snapshot, guest: Guest) -> None:
    """Restore devices, then kernel structures.  Raises RestoreError."""
    for device in guest.devices:
        blob = snapshot.devices.get(device.name)
        if not blob:
            raise RestoreError(f"Failed to restore device {device.name}: Invalid argument")
        device.load(blob)
    for name in KERNEL_STRUCTS:
        blob = snapshot.kernel.get(name)
        if not blob:
            raise RestoreError(f"Failed to restore kernel structs: {name} is missing")
        guest.load_kernel(name, blob)


def _open(path: Path) -> tuple[int, int]:
    """Return a descriptor and the size; an empty file, so any FIFO or device, is refused."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise RestoreError(f"Failed to open restore file {path}: {error.strerror}") from error
    size = os.fstat(fd).st_size
    if size == 0:
        os.close(fd)
        raise RestoreError(f"Restore file is empty: {path}")
    return fd, size


def _blobs(entries: list[dict[str, Any]], kern: bytes) -> dict[str, bytes]:
    """Return each blob by name.  Raises ValueError for one that is not whole in .kern."""
    found = {}
    for entry in entries:
        start, size = int(entry["file_offset"]), int(entry["size"])
        if start < 0 or size <= 0 or start + size > len(kern):
            raise ValueError(f"{entry['device']} lies outside of the kern file")
        found[str(entry["device"])] = kern[start : start + size]
    return found


def _read_into(fd: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.preadv(fd, [view[:_PIECE_BYTES]], offset)
        if count == 0:
            raise RestoreError("Restore error: the memory file became shorter")
        view = view[count:]
        offset += count

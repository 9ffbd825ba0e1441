"""The rehearsal: a checkpoint that bhyve ends by itself, and what is learned from it.

FILE.meta is a regular file in it, so nothing holds the guest but the time that
the checkpoint takes.  Its text is the plan: the names, order and sizes of what
the pause will find in FILE.kern.  They are those of every checkpoint of one
configuration; where they are not, changes() says how.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from bhystream.backend.bhyve import fifo, snapshot, snapshotfiles
from bhystream.backend.bhyve.checkpoint import Checkpoint, Outcome, RefusedError
from bhystream.backend.bhyve.snapshot import FILE, Meta
from bhystream.backend.bhyve.snapshotdir import SnapshotDir
from bhystream.errors import BhyError, FormatError, GoneError, GuestError, IncompatibleError

UNSAVED = "a device that cannot be saved is the usual reason"
_MAX_SHOWN = 3


@dataclass(frozen=True)
class Rehearsal:
    """What a checkpoint has shown.  text: of FILE.meta.  took_ns: from asking to its end."""

    text: bytes
    meta: Meta
    took_ns: int


class MemoryFileError(GuestError):
    """The checkpoint came to its end before anything was saved: at its memory file, most likely."""


def rehearse(
    checkpoint: Checkpoint, directory: SnapshotDir, who: str, memory_bytes: int, limit_s: float
) -> Rehearsal:
    """Let bhyve save the guest, which runs on; remove what it has written.

    memory_bytes: of the guest.  limit_s: how long that may take.  Raises
    GuestError where the guest cannot be saved, MemoryFileError of them, and
    GoneError where it has ended.
    """
    files = directory.files
    fd = directory.open()
    start_ns = time.monotonic_ns()
    try:
        checkpoint.request(fd, FILE)
        outcome = checkpoint.await_outcome(limit_s)
    except RefusedError as error:
        raise _unsaved(directory, str(error)) from None
    finally:
        os.close(fd)
    if outcome == Outcome.EXITED:
        raise GoneError(f"{who}: its bhyve has ended in a checkpoint")
    try:
        meta, text = snapshotfiles.read_meta(files)
        snapshotfiles.check_size(files.kern, _size(directory), meta.kern_bytes, files.meta)
    except BhyError:
        said = f"{who}: its bhyve did not save it, and logs the reason itself"
        raise _unsaved(directory, said) from None
    if meta.memory_bytes != memory_bytes:
        raise GuestError(f"{who}: it was saved with {meta.memory_bytes} bytes of memory")
    if not fifo.ATOMIC_BYTES < len(text) < fifo.DIRECT_BYTES:
        raise IncompatibleError(
            f"{who}: what bhyve says of its state has {len(text)} bytes, and holds a guest"
            f" only between {fifo.ATOMIC_BYTES} and {fifo.DIRECT_BYTES}"
        )
    directory.drop_files()
    return Rehearsal(text, meta, checkpoint.served_ns - start_ns)


def _size(directory: SnapshotDir) -> int:
    """Return how much bhyve has saved of kernel and devices."""
    try:
        return directory.files.kern.stat().st_size
    except OSError:
        return 0


def _unsaved(directory: SnapshotDir, said: str) -> GuestError:
    """Return why the guest was not saved.  The memory is written first, FILE.kern behind it."""
    kind = GuestError if _size(directory) else MemoryFileError
    directory.drop_files()
    return kind(said, UNSAVED)


def changes(before: Meta, text: bytes) -> str:
    """Say how a checkpoint's FILE.meta differs from the rehearsal's, "" where that is not seen.

    text: "" or a part of it too.
    """
    try:
        after = snapshot.parse(text)
    except FormatError:
        return ""
    old = {item.state_name: item.size_bytes for item in before.items}
    new = {item.state_name: item.size_bytes for item in after.items}
    found = [f"{name} is gone" for name in old if name not in new]
    found += [f"{name} is new" for name in new if name not in old]
    found += [
        f"{name} has {new[name]} bytes, not {old[name]}"
        for name in old
        if name in new and old[name] != new[name]
    ]
    return ", ".join(found[:_MAX_SHOWN])

"""The rehearsal: a checkpoint that bhyve ends by itself, and what bhysend learns from it.

In the rehearsal FILE.meta is a regular file, so the guest stands paused only as
long as the checkpoint takes.  The text of FILE.meta is the plan: the names, order
and sizes of the blobs that the pause will find in FILE.kern.  These are the same
in every checkpoint of one configuration; if they are not, changes() says how.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from bhystream.backend.bhyve import fifo, snapshot, snapshotfiles
from bhystream.backend.bhyve.checkpoint import Checkpoint, Outcome, RefusedError
from bhystream.backend.bhyve.snapshot import FILE, Meta
from bhystream.backend.bhyve.snapshotdir import SnapshotDir
from bhystream.errors import BhyError, FormatError, GuestEndedError, GuestError, IncompatibleError

UNSAVED = "a device that cannot be saved is the usual reason"
_MAX_SHOWN = 3


@dataclass(frozen=True)
class Rehearsal:
    """The result of a rehearsal.

    text, meta: FILE.meta, as it is and parsed.  took_ns: time from request to end.
    """

    text: bytes
    meta: Meta
    took_ns: int


class MemoryFileError(GuestError):
    """The checkpoint failed before it saved any state, most likely at its memory file."""


def rehearse(
    checkpoint: Checkpoint, directory: SnapshotDir, who: str, memory_bytes: int, limit_s: float
) -> Rehearsal:
    """Let bhyve save the guest, which then runs on; remove the files that bhyve has written.

    memory_bytes: size of the guest's memory.  limit_s: how long the checkpoint
    may take.  Raises GuestError if the guest cannot be saved (MemoryFileError if
    nothing was saved), GuestEndedError if bhyve has ended, and IncompatibleError
    if FILE.meta is too short or too long for the FIFO.
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
        raise GuestEndedError(f"{who}: its bhyve has ended in a checkpoint")
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
            f"{who}: bhyve's description of its state has {len(text)} bytes, and can pause a guest"
            f" only if it has more than {fifo.ATOMIC_BYTES} and fewer than {fifo.DIRECT_BYTES}"
        )
    directory.drop_files()
    return Rehearsal(text, meta, checkpoint.served_ns - start_ns)


def _size(directory: SnapshotDir) -> int:
    """Return how many bytes of kernel and device state bhyve has saved."""
    try:
        return directory.files.kern.stat().st_size
    except OSError:
        return 0


def _unsaved(directory: SnapshotDir, said: str) -> GuestError:
    """Return why the guest was not saved.  bhyve writes the memory first, then FILE.kern."""
    kind = GuestError if _size(directory) else MemoryFileError
    directory.drop_files()
    return kind(said, UNSAVED)


def changes(before: Meta, text: bytes) -> str:
    """Say how a checkpoint's FILE.meta differs from the rehearsal's.

    text: FILE.meta, or a part of it, or b"".  Returns "" if text cannot be
    parsed, or if the two do not differ.
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

"""What holds a `bhyve -r` in its read: the last page of FILE, which is not there.

bhyve takes FILE's size when it opens it, and later reads FILE into the VM's
memory with `while (rem > 0)`, where a read of 0 bytes counts as progress to
come.  So a FILE that lost its last page in between keeps it there, for as long
as one likes, before it has restored anything; and the page lets it go.

    arm       a mark at the end of FILE's last page but one, another in its last;
              zeros in FILE.kern, as many as there will be bytes
    cut       FILE to all but its last page, FILE.kern to nothing
    is_read   the first mark shows in the VM's memory: all before it is there too
    settle    the true bytes in place of the marks, in FILE and in the memory
    fill      FILE.kern's true bytes, at the place of those that bhyve has mapped
    give      the last page, from the VM's memory

A bhyve that was faster than cut(), which waits for a read that has begun, has
read the second mark, and is not held: is_read_whole().  It finds SIGBUS in
FILE.kern, or zeros, and a restore of zeros panics the host: so on FreeBSD it is
stopped before the read (freebsd_trace.py).  Source: usr.sbin/bhyve/snapshot.c,
load_vmmem_file(), load_kdata_file(), vm_snapshot_mem_part(); run on FreeBSD
15.1, emulated AMD, FILE on tmpfs.

FILE may be the guest's only copy.  So its two pages are in FILE.tail before they
are marked, and arm() puts them back first, whatever became of an earlier attempt.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bhystream import durable
from bhystream.backend.bhyve.snapshot import memory_spans
from bhystream.backend.bhyve.snapshotfiles import Files
from bhystream.guest import PAGE_BYTES

_MARK_BYTES = 16
_TAIL_BYTES = 2 * PAGE_BYTES


@dataclass(frozen=True)
class LastPage:
    """The files of one guest that is to be held, marked.  All methods raise OSError.

    memory_bytes: of the guest, and of FILE; more than one page.  tail: the true
    bytes of its last two pages.  marks: what stands in each of the two instead.
    The memory of a method: one writable view for each of memory_spans().
    """

    files: Files
    memory_bytes: int
    tail: bytes
    marks: tuple[bytes, bytes]

    def cut(self) -> None:
        """Cut the files.  Where a read is under way, it is waited for."""
        os.truncate(self.files.memory, self.memory_bytes - PAGE_BYTES)
        os.truncate(self.files.kern, 0)

    def is_read(self, memory: Sequence[memoryview]) -> bool:
        """Say whether all but the last page has been read into the memory."""
        page = self._page(memory, 0)
        return bytes(page[PAGE_BYTES - _MARK_BYTES :]) == self.marks[0]

    def is_read_whole(self, memory: Sequence[memoryview]) -> bool:
        """Say whether the last page has been read, too: bhyve was faster than cut()."""
        return bytes(self._page(memory, 1)[:_MARK_BYTES]) == self.marks[1]

    def settle(self, memory: Sequence[memoryview]) -> bool:
        """Put the true bytes in; bhyve stands.  False where it has read the last page too."""
        last_but_one, last = self._page(memory, 0), self._page(memory, 1)
        if self.is_read_whole(memory):
            return False
        last_but_one[:] = self.tail[:PAGE_BYTES]
        last[:] = self.tail[PAGE_BYTES:]
        with open(self.files.memory, "r+b", buffering=0) as file:
            _write(file.fileno(), self.tail[:PAGE_BYTES], self._at)
        return True

    def fill(self, kern: Sequence[bytes]) -> None:
        """Write FILE.kern where bhyve has it mapped: the same file, of the size that it had.

        kern: its pieces.
        """
        at = 0
        with open(self.files.kern, "r+b", buffering=0) as file:
            for piece in kern:
                _write(file.fileno(), piece, at)
                at += len(piece)

    def give(self, memory: Sequence[memoryview]) -> None:
        """Write the last page as the memory has it."""
        page = bytes(self._page(memory, 1))
        with open(self.files.memory, "r+b", buffering=0) as file:
            _write(file.fileno(), page, self._at + PAGE_BYTES)

    @property
    def _at(self) -> int:
        """Return where the last page but one begins."""
        return self.memory_bytes - _TAIL_BYTES

    def _page(self, memory: Sequence[memoryview], which: int) -> memoryview:
        """Return the last page (1) or the last but one (0) of the memory."""
        at = self._at + which * PAGE_BYTES
        spans = memory_spans(self.memory_bytes)
        index = max(i for i, (_, offset, _) in enumerate(spans) if offset <= at)
        start = at - spans[index][1]
        return memory[index][start : start + PAGE_BYTES]


def arm(files: Files, memory_bytes: int, kern_bytes: int) -> LastPage:
    """Mark FILE, and make FILE.kern of kern_bytes zeros.  Raises OSError.

    memory_bytes: size of the guest's memory, and of FILE; more than one page.
    """
    at, saved = memory_bytes - _TAIL_BYTES, Path(f"{files.memory}.tail")
    with open(files.memory, "r+b", buffering=0) as file:
        if saved.exists():
            tail = saved.read_bytes()
            file.truncate(memory_bytes)
            _write(file.fileno(), tail, at)
        else:
            tail = os.pread(file.fileno(), _TAIL_BYTES, at)
            durable.write(saved, tail)
        marks = (os.urandom(_MARK_BYTES), os.urandom(_MARK_BYTES))
        _write(file.fileno(), b"".join(marks), at + PAGE_BYTES - _MARK_BYTES)
    kern = os.open(files.kern, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.truncate(kern, kern_bytes)
    finally:
        os.close(kern)
    return LastPage(files, memory_bytes, tail, marks)


def _write(fd: int, data: bytes, offset_bytes: int) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset_bytes)
        view, offset_bytes = view[done:], offset_bytes + done

"""The missing last page of FILE, which keeps a `bhyve -r` in its read of FILE.

bhyve takes FILE's size when it opens FILE, and later reads FILE into the VM's
memory in a loop, `while (rem > 0)`, which does not end at a read of 0 bytes.
If FILE has lost its last page in between, bhyve stays in the loop, and has
restored nothing.  bhyve leaves the loop when the last page is written to FILE.

    arm       writes a mark at the end of FILE's last page but one and another
              into FILE's last page; makes FILE.kern of zeros, in its final size
    cut       cuts the last page off FILE, and FILE.kern to 0 bytes
    is_read   says whether the first mark is in the VM's memory; if so, all
              bytes before the mark are there too
    settle    replaces the marks with the true bytes, in FILE and in the memory
    fill      writes FILE.kern's true bytes into the file that bhyve has mapped
    change    writes some of these bytes anew
    give      writes FILE's last page, from the VM's memory

cut() waits for a read that has begun.  A bhyve that was faster than cut() has
read the second mark and does not wait: is_read_whole().  Such a bhyve gets a
SIGBUS in FILE.kern, or finds zeros there, and a restore of zeros panics the
host.  On FreeBSD, therefore, bhyve is stopped before the read (freebsd_trace.py).
Source: usr.sbin/bhyve/snapshot.c, load_vmmem_file(), load_kdata_file(),
vm_snapshot_mem_part(); run on FreeBSD 15.1, emulated AMD, FILE on tmpfs.

FILE may be the guest's only copy.  So FILE's last two pages are saved in
FILE.tail before they are marked, and arm() first puts them back from there,
however an earlier attempt ended.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from bhystream import durable
from bhystream.backend.bhyve.layout import memory_spans
from bhystream.backend.bhyve.snapshotfiles import Files
from bhystream.guest import PAGE_BYTES

_MARK_BYTES = 16
_TAIL_BYTES = 2 * PAGE_BYTES


@dataclass(frozen=True)
class LastPage:
    """The marked files of one guest whose bhyve is to wait.  All methods raise OSError.

    memory_bytes: size of the guest's memory, and of FILE; more than one page.
    tail: the true bytes of FILE's last two pages.  marks: the mark in the last
    page but one, and the mark in the last page.
    Each method's memory argument: one writable view for each of memory_spans().
    """

    files: Files
    memory_bytes: int
    tail: bytes
    marks: tuple[bytes, bytes]

    def cut(self) -> None:
        """Cut the files.  Waits for a read of FILE that is under way."""
        os.truncate(self.files.memory, self.memory_bytes - PAGE_BYTES)
        os.truncate(self.files.kern, 0)

    def is_read(self, memory: Sequence[memoryview]) -> bool:
        """Say whether all but the last page has been read into the memory."""
        page = self._page(memory, 0)
        return bytes(page[PAGE_BYTES - _MARK_BYTES :]) == self.marks[0]

    def is_read_whole(self, memory: Sequence[memoryview]) -> bool:
        """Say whether the last page has been read too, because bhyve was faster than cut()."""
        return bytes(self._page(memory, 1)[:_MARK_BYTES]) == self.marks[1]

    def settle(self, memory: Sequence[memoryview]) -> bool:
        """Replace the marks with the true bytes, while bhyve is stopped.

        Returns False, and replaces nothing, if bhyve has read the last page too.
        """
        last_but_one, last = self._page(memory, 0), self._page(memory, 1)
        if self.is_read_whole(memory):
            return False
        last_but_one[:] = self.tail[:PAGE_BYTES]
        last[:] = self.tail[PAGE_BYTES:]
        with open(self.files.memory, "r+b", buffering=0) as file:
            _write(file.fileno(), self.tail[:PAGE_BYTES], self._at)
        return True

    def fill(self, kern: Sequence[bytes]) -> None:
        """Write FILE.kern's true bytes into the same file, which bhyve has mapped.

        kern: the pieces of FILE.kern, as many bytes in all as arm() made.
        """
        ends = accumulate((len(piece) for piece in kern), initial=0)
        self.change(zip(ends, kern, strict=False))

    def change(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        """Write pieces of FILE.kern, each at its offset."""
        with open(self.files.kern, "r+b", buffering=0) as file:
            for at, piece in pieces:
                _write(file.fileno(), piece, at)

    def give(self, memory: Sequence[memoryview]) -> None:
        """Write FILE's last page, taken from the memory."""
        page = bytes(self._page(memory, 1))
        with open(self.files.memory, "r+b", buffering=0) as file:
            _write(file.fileno(), page, self._at + PAGE_BYTES)

    @property
    def _at(self) -> int:
        """Return the offset of the last page but one, in bytes."""
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
    If FILE.tail is left from an earlier attempt, FILE is first made whole from it.
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
    kern = durable.create(files.kern)
    try:
        os.truncate(kern, kern_bytes)
    finally:
        os.close(kern)
    return LastPage(files, memory_bytes, tail, marks)


def _write(fd: int, data: bytes, offset_bytes: int) -> None:
    """Write all bytes of data at an offset, however often pwrite(2) writes only some."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset_bytes)
        view, offset_bytes = view[done:], offset_bytes + done

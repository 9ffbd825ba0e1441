"""The guest's RAM file, seen from the host: find the pages that proof.c owns, and patch them.

Tests use this to break a guest on purpose, and to check that a moved guest's
pages are where they were.  A page is identified by its first sixteen bytes
(magic, index, generation).  While a page is a hole, it is zero and cannot be
found, so remember its offset from before.  Pages stay at their offsets, because
the guest maps them as huge pages, and nothing in the guest moves memory.

Files are read with pread(2), and holes are skipped: reading a hole of tmpfs
through a mapping would allocate the hole.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = 4096
MAGIC = b"BHYPROOF"

# magic, page index, generation: see the head of proof.c.
_HEADER = struct.Struct("<8sII")
_BODY_WORDS = (PAGE_BYTES - _HEADER.size) // 8
_READ_BYTES = 4 << 20
_U64 = (1 << 64) - 1


@dataclass(frozen=True)
class OwnedPage:
    """A page of the proof's area as the file shows it.  offset_bytes: in the RAM file."""

    offset_bytes: int
    generation: int


def page_content(index: int, generation: int) -> bytes:
    """Return the 4096 bytes that proof.c expects in a page: the bytes that page_write() writes."""
    tag = generation << 32 | index
    x = (tag + 0x9E3779B97F4A7C15) & _U64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _U64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _U64
    x ^= x >> 31
    words = []
    for _ in range(_BODY_WORDS):
        x = (x * 6364136223846793005 + 1442695040888963407) & _U64
        words.append(x ^ x >> 32)
    return _HEADER.pack(MAGIC, index, generation) + struct.pack(f"<{_BODY_WORDS}Q", *words)


def owned_pages(path: Path) -> dict[int, OwnedPage]:
    """Return every page of the area that the file shows now, by index; holes are left out.

    The guest may run.  If a page has two copies (it should not), the newer one is returned.
    """
    found: dict[int, OwnedPage] = {}
    for offset, data in blocks(path):
        for at in range(0, len(data) - PAGE_BYTES + 1, PAGE_BYTES):
            magic, index, generation = _HEADER.unpack_from(data, at)
            if magic != MAGIC:
                continue
            if index not in found or found[index].generation < generation:
                found[index] = OwnedPage(offset + at, generation)
    return found


def find_page(path: Path, index: int) -> int:
    """Return the byte offset of one page of the area.

    Raises LookupError if the file does not show the page (it may be a hole now).
    """
    sought = MAGIC + struct.pack("<I", index)
    best: tuple[int, int] | None = None
    for offset, data in blocks(path):
        at = data.find(sought)
        while at >= 0:
            if at % PAGE_BYTES == 0:
                generation = _HEADER.unpack_from(data, at)[2]
                best = max(best or (0, 0), (generation, offset + at))
            at = data.find(sought, at + 1)
    if best is None:
        raise LookupError(f"page {index} is not in {path}")
    return best[1]


def read_page(path: Path, offset_bytes: int) -> bytes:
    """Return the page at an offset of the file."""
    with opened(path, os.O_RDONLY) as fd:
        return os.pread(fd, PAGE_BYTES, offset_bytes)


def page_generation(path: Path, offset_bytes: int) -> int:
    """Return the generation in a page's header; 0 if the page is a hole."""
    generation: int = _HEADER.unpack_from(read_page(path, offset_bytes))[2]
    return generation


def patch(path: Path, offset_bytes: int, data: bytes) -> None:
    """Overwrite part of the file; the guest sees the new data at once.

    To replace data that the guest may be writing, stop the guest first.
    """
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, data, offset_bytes)


def flip_byte(path: Path, offset_bytes: int) -> None:
    """Invert one byte of the file; a second call restores the byte."""
    with opened(path, os.O_RDWR) as fd:
        (byte,) = os.pread(fd, 1, offset_bytes)
        os.pwrite(fd, bytes([byte ^ 0xFF]), offset_bytes)


def allocated_bytes(path: Path) -> int:
    """Return how much of a sparse file has been allocated."""
    return path.stat().st_blocks * 512


def changed_pages(before: Path, after: Path) -> int:
    """Return how many pages differ between two copies of equal size."""
    if before.stat().st_size != after.stat().st_size:
        raise ValueError("the copies differ in size")
    changed = 0
    with before.open("rb") as old_file, after.open("rb") as new_file:
        while old := memoryview(old_file.read(_READ_BYTES)):
            new = memoryview(new_file.read(_READ_BYTES))
            if old != new:
                changed += sum(
                    old[at : at + PAGE_BYTES] != new[at : at + PAGE_BYTES]
                    for at in range(0, len(old), PAGE_BYTES)
                )
    return changed


def copy_sparse(source: Path, target: Path) -> None:
    """Copy the allocated parts of one RAM file into another, which is made if missing.

    The target is not changed at the source's holes; a new target is zero there.
    """
    with opened(target, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, source.stat().st_size)
        for offset, data in blocks(source):
            os.pwrite(fd, data, offset)


def blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of the file's allocated parts, in pieces of at most 4 MiB."""
    with opened(path, os.O_RDONLY) as fd:
        for start, end in _extents(fd):
            while start < end:
                data = os.pread(fd, min(_READ_BYTES, end - start), start)
                if not data:
                    return
                yield start, data
                start += len(data)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file for the length of a with statement and yield its descriptor."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _extents(fd: int) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of the file's data, by SEEK_DATA and SEEK_HOLE."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here to the end
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end

"""Samples of the guest's disks, by which the destination finds out whether it has these disks.

A copy of a disk that is a little too old differs only where the guest has written since.
So the samples are the beginning of the disk and of each partition, where file systems keep
what they write most often (superblocks, free counts, the uberblocks of ZFS), the end of the
disk, and random places, by the stream's seed.  No sample finds every old copy.

All places are read once while the guest runs, so that in the pause the host's cache has all
of them that the guest has not written since.  Then they are read again: a disk whose reads
no cache makes quick, as a disk device of FreeBSD, gets fewer samples.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping

import xxhash

from bhystream.stream import disks
from bhystream.stream.disks import Disk, Sample

BEGIN_BYTES = 256 << 10
END_BYTES = 64 << 10
RANDOM_SAMPLES = 256
RANDOM_BYTES = 4096
MAX_PARTITIONS = 8
# How long the samples of a disk may take in the pause, as far as that is known before.
_MOST_NS = 30_000_000
_TABLE_BYTES = 64 << 10
_SECTORS = (512, 4096)

# Source: the UEFI specification, GPT header and partition entry; the MBR's partition record.
_GPT = struct.Struct("<8s64xQII")
_GPT_ENTRY = struct.Struct("<16s16xQQ")
_GPT_MAGIC = b"EFI PART"
_MBR_AT, _MBR_COUNT = 446, 4
_MBR_ENTRY = struct.Struct("<4xB3xII")
_MBR_MAGIC = b"\x55\xaa"
_MBR_NONE = (0, 0xEE)  # an empty record, and that of a disk with a GPT

Place = tuple[int, int]
"""Offset and length, in bytes."""


class Sampler:
    """The guest's disks, open to be sampled."""

    def __init__(self, paths: Mapping[str, str], seed: int, say: Callable[[str], None]) -> None:
        """Open the disks, choose the places, and read all of them once.

        paths: the word of -o for each disk, and its path here.  seed: the stream's.  say:
        called with a line for each disk that cannot be read, which is then left out.
        """
        self._seed = seed
        self._say = say
        self._opened = contextlib.ExitStack()
        self._disks: list[_Open] = []
        try:
            for name, path in list(paths.items())[: disks.MAX_DISKS]:
                with self._telling(name):
                    disk = self._open(name, path)
                    if disk.places:
                        self._disks.append(disk)
        except BaseException:
            self.close()
            raise

    def take(self) -> bytes:
        """Return the payload of DISKS as the disks are now; b"" if no disk can be read."""
        found = []
        for disk in self._disks:
            with self._telling(disk.name):
                found.append(disk.sampled())
        return disks.pack(found) if found else b""

    def close(self) -> None:
        """Close the disks.  May be called twice."""
        self._opened.close()

    def _open(self, name: str, path: str) -> _Open:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._opened.callback(os.close, fd)
        disk = _Open(name, fd, self._seed)
        disk.sampled()
        start_ns = time.monotonic_ns()
        disk.sampled()
        disk.thin_out(_MOST_NS / max(time.monotonic_ns() - start_ns, 1))
        return disk

    @contextlib.contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._say(f"{name}: the destination cannot compare this disk: {error.strerror}")


class _Open:
    """One open disk, and the places to sample."""

    def __init__(self, name: str, fd: int, seed: int) -> None:
        """Raises OSError if the disk cannot be read."""
        self.name = name
        self._fd = fd
        self._seed = seed
        # Of a disk device, too: seen on FreeBSD 15.1.  Source: sys/kern/vfs_vnops.c, vn_seek().
        self._size_bytes = os.lseek(fd, 0, os.SEEK_END)
        self.places = places(name, self._size_bytes, os.pread(fd, _TABLE_BYTES, 0), seed)

    def thin_out(self, share: float) -> None:
        """Keep this share of the places, if it is below 1, and the beginning of the disk."""
        if share < 1:
            first = [place for place in self.places if place[0] < BEGIN_BYTES]
            rest = self.places[len(first) :]
            count = int(len(rest) * share)
            self.places = first + [rest[at * len(rest) // count] for at in range(count)]

    def sampled(self) -> Disk:
        """Read and hash every place.  Raises OSError."""
        samples = [Sample(*place, _hash_of(self._fd, place, self._seed)) for place in self.places]
        return Disk(self.name, self._size_bytes, tuple(samples))


def _hash_of(fd: int, place: Place, seed: int) -> int:
    """Return the XXH3-64 of a place of a disk.  Raises OSError, also at the end of the disk."""
    offset, length = place
    data = os.pread(fd, length, offset)
    if len(data) != length:
        raise OSError(0, f"it ends before {offset + length}")
    return int(xxhash.xxh3_64_intdigest(data, seed))


def places(name: str, size_bytes: int, begin: bytes, seed: int) -> list[Place]:
    """Return the places of a disk to sample, in order and disjoint.

    begin: the first bytes of the disk, with its partition table, which the guest writes: no
    place lies outside the disk, whatever the table says.
    """
    size = size_bytes // disks.UNIT_BYTES * disks.UNIT_BYTES
    if not size:
        return []
    wanted = [(0, BEGIN_BYTES), (max(size - END_BYTES, 0), END_BYTES)]
    wanted += [(first, BEGIN_BYTES) for first in partitions(begin)[:MAX_PARTITIONS]]
    for number in range(RANDOM_SAMPLES):
        at = xxhash.xxh3_64_intdigest(f"{name} {number}".encode(), seed) % -(-size // RANDOM_BYTES)
        wanted.append((at * RANDOM_BYTES, RANDOM_BYTES))
    found: list[Place] = []
    end = 0
    for first, length in sorted(wanted):
        first, last = max(first, end), min(first + length, size)
        while first < last:
            step = min(last - first, disks.MAX_SAMPLE_BYTES)
            found.append((first, step))
            end = first = first + step
    return found


def partitions(begin: bytes) -> list[int]:
    """Return where the partitions of a disk begin, in bytes; [] without a table that is known."""
    for sector in _SECTORS:
        if len(begin) >= 2 * sector and begin[sector:].startswith(_GPT_MAGIC):
            return _gpt(begin, sector)
    if begin[510:512] != _MBR_MAGIC:
        return []
    records = _MBR_ENTRY.iter_unpack(begin[_MBR_AT : _MBR_AT + _MBR_COUNT * _MBR_ENTRY.size])
    return [
        first * _SECTORS[0] for kind, first, count in records if kind not in _MBR_NONE and count
    ]


def _gpt(begin: bytes, sector: int) -> list[int]:
    _, table, count, size = _GPT.unpack_from(begin, sector)
    found = []
    if size >= _GPT_ENTRY.size:
        for at in range(table * sector, min(table * sector + count * size, len(begin)), size):
            if at + _GPT_ENTRY.size > len(begin):
                break
            kind, first, last = _GPT_ENTRY.unpack_from(begin, at)
            if any(kind) and last >= first:
                found.append(first * sector)
    return found

"""The DISKS section: what some places of the guest's disks held at the pause.

Pure functions between bytes and values, as in format.py.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from bhystream.errors import FormatError
from bhystream.stream.format import TOKEN, padding_bytes

HEAD = struct.Struct("<II")
DISK = struct.Struct("<HHIQ")
SAMPLE = struct.Struct("<QIIQ")

UNIT_BYTES = 512  # of offsets and lengths
MAX_DISKS = 32
MAX_SAMPLES = 1024
MAX_SAMPLE_BYTES = 1 << 16
_MAX_NAME_BYTES = 255


class Sample(NamedTuple):
    """One place of a disk.  hash: XXH3-64 of its bytes, with the stream's seed."""

    offset_bytes: int
    length_bytes: int
    hash: int


class Disk(NamedTuple):
    """One disk.  name: the word by which the destination's operator lends it, as "disk0"."""

    name: str
    size_bytes: int
    samples: tuple[Sample, ...]


def pack(disks: Sequence[Disk]) -> bytes:
    """Pack the payload: 1 to MAX_DISKS disks, each with 1 to MAX_SAMPLES samples."""
    parts = [HEAD.pack(len(disks), 0)]
    for disk in disks:
        raw = disk.name.encode()
        parts += [DISK.pack(len(raw), len(disk.samples), 0, disk.size_bytes), raw]
        parts.append(bytes(padding_bytes(len(raw))))
        parts += [SAMPLE.pack(at, length, 0, hash_) for at, length, hash_ in disk.samples]
    return b"".join(parts)


def unpack(data: bytes) -> tuple[Disk, ...]:
    """Unpack the payload.  Raises FormatError."""
    cursor = _Cursor(data)
    count, reserved = cursor.take(HEAD)
    if reserved:
        raise FormatError("reserved field is not zero")
    if not 1 <= count <= MAX_DISKS:
        raise FormatError(f"{count} disks are not 1 to {MAX_DISKS}")
    disks = tuple(_unpack_disk(cursor) for _ in range(count))
    if cursor.at != len(data):
        raise FormatError(f"length does not fit {count} disks")
    if len({disk.name for disk in disks}) != count:
        raise FormatError("two disks have the same name")
    return disks


class _Cursor:
    """Reads structures one after another."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def bytes(self, length: int) -> bytes:
        found = self._data[self.at : self.at + length]
        if len(found) < length:
            raise FormatError("length is too small")
        self.at += length
        return found

    def take(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(self.bytes(form.size))


def _unpack_disk(cursor: _Cursor) -> Disk:
    length, count, reserved, size_bytes = cursor.take(DISK)
    raw = cursor.bytes(length)
    padding = cursor.bytes(padding_bytes(length))
    if length > _MAX_NAME_BYTES or not TOKEN.fullmatch(raw):
        raise FormatError(f"the name is not 1 to {_MAX_NAME_BYTES} printable characters")
    name = raw.decode()
    if reserved or any(padding):
        raise FormatError(f"{name}: reserved field or padding is not zero")
    if not 1 <= count <= MAX_SAMPLES:
        raise FormatError(f"{name}: {count} samples are not 1 to {MAX_SAMPLES}")
    samples = _unpack_samples(cursor.bytes(count * SAMPLE.size), name, size_bytes)
    return Disk(name, size_bytes, samples)


def _unpack_samples(data: bytes, name: str, size_bytes: int) -> tuple[Sample, ...]:
    found = []
    end = 0
    for at, length, reserved, hash_ in SAMPLE.iter_unpack(data):
        if reserved:
            raise FormatError(f"{name}: reserved field is not zero")
        if not UNIT_BYTES <= length <= MAX_SAMPLE_BYTES or length % UNIT_BYTES:
            raise FormatError(f"{name}: a sample of {length} bytes")
        if at < end or at % UNIT_BYTES:
            raise FormatError(f"{name}: the sample at {at} is out of order")
        end = at + length
        if end > size_bytes:
            raise FormatError(f"{name}: the sample at {at} ends beyond the disk")
        found.append(Sample(at, length, hash_))
    return tuple(found)

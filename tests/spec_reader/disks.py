"""The contents of DISKS."""

from __future__ import annotations

import struct
from typing import Final

from spec_reader.found import Disk, Sample, need
from spec_reader.values import is_token

SAMPLE: Final = struct.Struct("<QIIQ")


def disks(payload: bytes) -> list[Disk]:
    need(len(payload) >= 8, "wrong length")
    count, zero = struct.unpack_from("<II", payload)
    need(zero == 0, "reserved field is not zero")
    need(1 <= count <= 32, "number of disks is not 1 to 32")
    made: list[Disk] = []
    at = 8
    for _ in range(count):
        need(len(payload) >= at + 16, "wrong length")
        length, samples, zero, size = struct.unpack_from("<HHIQ", payload, at)
        need(zero == 0, "reserved field is not zero")
        need(1 <= length <= 255, "disk name is not 1 to 255 bytes")
        need(1 <= samples <= 1024, "number of samples is not 1 to 1024")
        start = at + 16 + length + -length % 8
        end = start + samples * SAMPLE.size
        need(len(payload) >= end, "wrong length")
        name = payload[at + 16 : at + 16 + length]
        need(is_token(name), "bad disk name")
        need(not any(payload[at + 16 + length : start]), "filling of the disk name is not zero")
        need(name.decode() not in [one.name for one in made], "disk name occurs twice")
        made.append(Disk(name.decode(), size, _samples(payload[start:end], size)))
        at = end
    need(at == len(payload), "wrong length")
    return made


def _samples(raw: bytes, size: int) -> tuple[Sample, ...]:
    found, last = [], 0
    for offset, length, zero, digest in SAMPLE.iter_unpack(raw):
        need(zero == 0, "reserved field is not zero")
        need(offset % 512 == 0 and length % 512 == 0, "sample is not a multiple of 512")
        need(512 <= length <= 65536, "length of a sample is not 512 to 65536")
        need(offset >= last, "samples do not ascend")
        last = offset + length
        need(last <= size, "sample ends outside the disk")
        found.append(Sample(offset, length, digest))
    return tuple(found)

"""The places of a disk that are sampled, and what is found there."""

from __future__ import annotations

import os
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash

from bhystream.send import sampling
from bhystream.send.sampling import (
    BEGIN_BYTES,
    END_BYTES,
    MAX_PARTITIONS,
    RANDOM_SAMPLES,
    Sampler,
    partitions,
    places,
)
from bhystream.stream import disks
from support.descriptors import descriptors

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def gpt(*firsts: int, sector: int = 512, size: int = 128, table: int = 2) -> bytes:
    """Pack the beginning of a disk with partitions that begin at these sectors."""
    raw = bytearray(64 * KIB)
    struct.pack_into("<8s64xQII", raw, sector, b"EFI PART", table, 128, size)
    for number, first in enumerate(firsts):
        at = table % 100 * sector + number * size
        struct.pack_into("<16s16xQQ", raw, at, b"k" * 16, first, first + 9)
    return bytes(raw)


def mbr(*records: tuple[int, int, int]) -> bytes:
    """Pack the beginning of a disk; a record is (type, first sector, sectors)."""
    raw = bytearray(64 * KIB)
    for number, (kind, first, count) in enumerate(records):
        struct.pack_into("<4xB3xII", raw, 446 + 16 * number, kind, first, count)
    raw[510:512] = b"\x55\xaa"
    return bytes(raw)


def covers(found: list[tuple[int, int]], first: int, end: int) -> bool:
    """Say whether the places cover all of a range."""
    at = first
    for start, length in found:
        if start <= at < start + length:
            at = start + length
    return at >= end


@pytest.mark.parametrize(
    "size", [512, 4096, 64 * KIB, 300 * KIB, MIB + 512, 100 * MIB, 3 * GIB, 16 << 40]
)
@pytest.mark.parametrize("begin", [b"", gpt(2048, 1 << 20), mbr((0x83, 63, 2**32 - 1))])
def test_places_lie_in_order_in_the_disk_and_as_the_stream_wants_them(
    size: int, begin: bytes
) -> None:
    found = places("disk0", size, begin, 7)
    assert 1 <= len(found) <= disks.MAX_SAMPLES
    for (first, length), (second, _) in pairwise(found):
        assert first + length <= second
    for first, length in found:
        assert first % 512 == length % 512 == 0
        assert 512 <= length <= disks.MAX_SAMPLE_BYTES and first + length <= size
    assert covers(found, 0, min(size, BEGIN_BYTES))
    assert covers(found, max(size - END_BYTES, 0), size)


def test_so_many_disks_with_so_many_places_fit_a_section() -> None:
    firsts = [1 << (20 + n) for n in range(12)]
    many = places("d", 16 << 40, gpt(*firsts), 7)
    expected = (1 + MAX_PARTITIONS) * BEGIN_BYTES // disks.MAX_SAMPLE_BYTES
    assert len(many) <= expected + 1 + RANDOM_SAMPLES
    samples = tuple(disks.Sample(*place, 0) for place in many)
    whole = disks.pack([disks.Disk("n" * 250, 1, samples)] * disks.MAX_DISKS)
    assert len(whole) <= 262144


def test_another_stream_and_another_disk_have_other_random_places() -> None:
    one = set(places("disk0", 1 << 40, b"", 7))
    assert one == set(places("disk0", 1 << 40, b"", 7))
    for other in (places("disk0", 1 << 40, b"", 8), places("disk1", 1 << 40, b"", 7)):
        assert len(one & set(other)) < 10
    assert len(one) > RANDOM_SAMPLES - 10


@pytest.mark.parametrize(
    ("begin", "found"),
    [
        (b"", []),
        (bytes(64 * KIB), []),
        (gpt(2048, 4096), [2048 * 512, 4096 * 512]),
        (gpt(6, 100, sector=4096), [6 * 4096, 100 * 4096]),
        (gpt(2048, size=256), [2048 * 512]),
        (gpt(2048, size=8), []),
        (gpt(2048, table=2**55), []),
        (mbr((0x83, 2048, 9), (0, 5, 9), (0x0C, 8192, 9)), [2048 * 512, 8192 * 512]),
        (mbr((0xEE, 1, 9)), []),
        (mbr((0x83, 2048, 0)), []),
    ],
)
def test_partitions_are_found(begin: bytes, found: list[int]) -> None:
    assert partitions(begin) == found


def test_the_beginning_of_each_partition_is_sampled() -> None:
    found = places("disk0", GIB, gpt(2048, 1 << 20), 7)
    for first in (2048 * 512, (1 << 20) * 512):
        assert covers(found, first, first + BEGIN_BYTES)


# The samples.


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(3 * MIB))
    return path


def test_samples_are_of_the_disk_as_it_is_at_the_pause(disk: Path) -> None:
    said: list[str] = []
    before = descriptors()
    sampler = Sampler({"disk0": str(disk)}, 7, said.append)
    data = bytearray(disk.read_bytes())
    data[0] ^= 1
    with disk.open("r+b") as file:
        file.write(data[:1])
    [found] = disks.unpack(sampler.take())
    assert (found.name, found.size_bytes) == ("disk0", 3 * MIB)
    for at, length, hash_ in found.samples:
        assert hash_ == xxhash.xxh3_64_intdigest(data[at : at + length], 7)
    sampler.close()
    sampler.close()
    assert descriptors() == before and not said


@pytest.mark.parametrize("when", ["before", "in between"])
def test_a_disk_that_cannot_be_read_is_left_out_and_said(disk: Path, when: str) -> None:
    said: list[str] = []
    other = disk.with_name("other.img")
    if when == "in between":
        other.write_bytes(bytes(MIB))
    sampler = Sampler({"disk0": str(other), "disk1": str(disk)}, 7, said.append)
    if when == "in between":
        os.truncate(other, 4096)
    assert [one.name for one in disks.unpack(sampler.take())] == ["disk1"]
    assert len(said) == 1 and said[0].startswith("disk0: the destination cannot compare this disk")
    sampler.close()


def test_without_a_disk_or_with_an_empty_one_there_is_no_section(tmp_path: Path) -> None:
    said: list[str] = []
    empty = tmp_path / "empty"
    empty.touch()
    for paths in ({}, {"disk0": str(empty)}):
        sampler = Sampler(paths, 7, said.append)
        assert sampler.take() == b"" and not said
        sampler.close()


def test_more_disks_than_a_section_takes_are_left_out(disk: Path) -> None:
    sampler = Sampler({f"disk{n}": str(disk) for n in range(40)}, 7, lambda text: None)
    assert len(disks.unpack(sampler.take())) == disks.MAX_DISKS
    sampler.close()


def test_a_fifo_in_place_of_a_disk_does_not_hold_anything_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    said: list[str] = []
    sampler = Sampler({"disk0": str(tmp_path / "fifo")}, 7, said.append)
    assert sampler.take() == b"" and len(said) == 1
    sampler.close()


@pytest.mark.parametrize(("most_ns", "least", "most"), [(0, 4, 4), (10**12, 150, 300)])
def test_a_slow_disk_gets_fewer_samples_but_those_of_its_beginning(
    disk: Path, monkeypatch: pytest.MonkeyPatch, most_ns: int, least: int, most: int
) -> None:
    monkeypatch.setattr(sampling, "_MOST_NS", most_ns)
    sampler = Sampler({"disk0": str(disk)}, 7, print)
    [found] = disks.unpack(sampler.take())
    assert least <= len(found.samples) <= most
    assert covers([one[:2] for one in found.samples], 0, BEGIN_BYTES)
    sampler.close()


def test_places_are_left_out_evenly(disk: Path) -> None:
    fd = os.open(disk, os.O_RDONLY)
    one = sampling._Open("disk0", fd, 7)
    before = one.places
    one.thin_out(0.5)
    assert one.places == sorted(set(one.places)) and set(one.places) <= set(before)
    assert len(before) // 2 <= len(one.places) <= len(before) // 2 + 4
    assert one.places[-1][0] > before[-1][0] * 0.9
    one.thin_out(1.5)
    assert len(one.places) <= len(before) // 2 + 4
    os.close(fd)


def test_all_places_are_read_while_the_guest_runs(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the pause reads from the host's cache."""
    read: list[tuple[int, int]] = []
    real = os.pread

    def pread(fd: int, length: int, at: int) -> bytes:
        read.append((at, length))
        return real(fd, length, at)

    monkeypatch.setattr(os, "pread", pread)
    sampler = Sampler({"disk0": str(disk)}, 7, print)
    early = set(read)
    read.clear()
    sampler.take()
    assert set(read) <= early and read
    sampler.close()

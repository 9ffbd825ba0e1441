"""The comparison of the disks here with the source's samples."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from bhystream.recv.sampled import Comparison
from bhystream.send.sampling import Sampler
from bhystream.stream import disks
from bhystream.stream.disks import Disk
from support.descriptors import descriptors

MIB = 1 << 20
SEED = 7


def sampled(**paths: Path) -> tuple[Disk, ...]:
    """Sample disks as the source does."""
    sampler = Sampler({name: str(path) for name, path in paths.items()}, SEED, print)
    try:
        return disks.unpack(sampler.take())
    finally:
        sampler.close()


def compare(found: tuple[Disk, ...], **paths: Path) -> list[str]:
    before = descriptors()
    there = {name: str(path) for name, path in paths.items()}
    reasons = Comparison(there, found, SEED).reasons()
    assert descriptors() == before
    return reasons


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.img"
    path.write_bytes(os.urandom(2 * MIB))
    return path


@pytest.fixture
def copy(source: Path) -> Path:
    path = source.with_name("copy.img")
    path.write_bytes(source.read_bytes())
    return path


def test_a_copy_at_another_path_is_the_disk(source: Path, copy: Path) -> None:
    assert compare(sampled(disk0=source), disk0=copy) == []


def test_another_disk_is_not(source: Path, copy: Path) -> None:
    copy.write_bytes(os.urandom(2 * MIB))
    found = sampled(disk0=source)
    [why] = compare(found, disk0=copy)
    number = len(found[0].samples)
    assert why == (
        f"disk0: {copy}: it does not hold what the source's disk held when the guest was paused:"
        f" {number} samples of {number} differ, the first at offset 0"
    )


def test_one_place_that_differs_is_enough(source: Path, copy: Path) -> None:
    found = sampled(disk0=source)
    last = found[0].samples[-1]
    with copy.open("r+b") as file:
        file.seek(last.offset_bytes + last.length_bytes - 1)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    [why] = compare(found, disk0=copy)
    assert "1 sample of" in why and why.endswith(f"at offset {last.offset_bytes}")


def test_swapped_disks_are_two_other_disks(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(os.urandom(2 * MIB))
    found = sampled(disk0=source, disk1=other)
    assert compare(found, disk0=source, disk1=other) == []
    assert [why.split(":")[0] for why in compare(found, disk0=other, disk1=source)] == [
        "disk0",
        "disk1",
    ]


def test_a_shorter_disk_differs(source: Path, copy: Path) -> None:
    os.truncate(copy, MIB)
    [why] = compare(sampled(disk0=source), disk0=copy)
    assert "differ" in why


def test_a_disk_that_cannot_be_read_is_a_reason(source: Path, tmp_path: Path) -> None:
    [why] = compare(sampled(disk0=source), disk0=tmp_path)
    assert why == f"disk0: {tmp_path}: cannot compare it with the source's disk: Is a directory"


def test_a_disk_that_this_host_does_not_lend_is_left_alone(source: Path) -> None:
    assert compare(sampled(disk0=source)) == []


def test_without_a_thread_the_caller_compares(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    found = sampled(disk0=source)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert compare(found, disk0=source) == []
    assert len(compare(found, disk0=source.parent)) == 1

"""The missing last page that keeps bhyve in its read: marks, the cut, the true bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bhystream.backend.bhyve.lastpage import arm
from bhystream.backend.bhyve.layout import memory_spans
from bhystream.backend.bhyve.snapshotfiles import Files
from bhystream.guest import PAGE_BYTES

SIZE = 16 * PAGE_BYTES
GIB = 1 << 30


def files_of(directory: Path, data: bytes = b"", size: int = SIZE) -> Files:
    files = Files(directory, "ckp")
    files.memory.write_bytes(data)
    os.truncate(files.memory, size)
    return files


def read_all(files: Files, memory: list[memoryview], end: int) -> None:
    """Read FILE up to the offset `end` into the memory, as bhyve does."""
    with files.memory.open("rb") as file:
        for view, (_, offset, _) in zip(memory, memory_spans(sum(map(len, memory))), strict=True):
            piece = os.pread(file.fileno(), min(len(view), end - offset), offset)
            view[: len(piece)] = piece


def views(size: int = SIZE) -> list[memoryview]:
    return [memoryview(bytearray(length)) for _, _, length in memory_spans(size)]


@pytest.mark.parametrize("data", [b"", os.urandom(SIZE)], ids=["hole", "data"])
def test_a_file_is_whole_again_and_the_memory_has_its_bytes(tmp_path: Path, data: bytes) -> None:
    files, memory = files_of(tmp_path, data), views()
    whole = files.memory.read_bytes()
    last = arm(files, SIZE, 1000)
    assert files.kern.read_bytes() == bytes(1000)
    assert files.memory.stat().st_size == SIZE
    last.cut()
    assert files.kern.stat().st_size == 0
    assert files.memory.stat().st_size == SIZE - PAGE_BYTES
    read_all(files, memory, SIZE - 2 * PAGE_BYTES)
    assert not last.is_read(memory)
    read_all(files, memory, SIZE - PAGE_BYTES)
    assert last.is_read(memory) and not last.is_read_whole(memory)
    assert last.settle(memory)
    assert bytes(memory[0]) == whole
    last.fill([b"k" * 400, b"k" * 600])
    assert files.kern.read_bytes() == b"k" * 1000
    last.give(memory)
    assert files.memory.read_bytes() == whole


def test_the_last_page_is_what_the_memory_has(tmp_path: Path) -> None:
    files, memory = files_of(tmp_path), views()
    last = arm(files, SIZE, 1)
    last.cut()
    read_all(files, memory, SIZE - PAGE_BYTES)
    assert last.settle(memory)
    memory[0][-PAGE_BYTES:] = b"z" * PAGE_BYTES
    last.give(memory)
    assert files.memory.read_bytes() == bytes(SIZE - PAGE_BYTES) + b"z" * PAGE_BYTES


@pytest.mark.parametrize("data", [b"", os.urandom(SIZE)], ids=["hole", "data"])
def test_a_read_that_was_faster_is_seen(tmp_path: Path, data: bytes) -> None:
    files, memory = files_of(tmp_path, data), views()
    last = arm(files, SIZE, 1)
    read_all(files, memory, SIZE)
    last.cut()
    assert last.is_read(memory) and last.is_read_whole(memory)
    assert not last.settle(memory)


@pytest.mark.parametrize("step", ["arm", "cut", "settle", "give"])
def test_whatever_became_of_an_attempt_the_next_begins_with_the_true_bytes(
    tmp_path: Path, step: str
) -> None:
    """FILE may be the only copy of a guest that was left loaded, so nothing of FILE may be lost."""
    data = os.urandom(SIZE)
    files, memory = files_of(tmp_path, data), views()
    last = arm(files, SIZE, 1)
    if step != "arm":
        last.cut()
        read_all(files, memory, SIZE - PAGE_BYTES)
    if step in ("settle", "give"):
        assert last.settle(memory)
    if step == "give":
        memory[0][-PAGE_BYTES:] = bytes(PAGE_BYTES)
        last.give(memory)
    again, memory = arm(files, SIZE, 1), views()
    again.cut()
    read_all(files, memory, SIZE - PAGE_BYTES)
    assert again.settle(memory)
    assert bytes(memory[0]) == data


@pytest.mark.parametrize("extra", [1, 2, 3])
def test_the_pages_may_lie_in_two_segments(tmp_path: Path, extra: int) -> None:
    size = 3 * GIB + extra * PAGE_BYTES
    files = files_of(tmp_path, size=size)
    with files.memory.open("r+b") as file:
        os.pwrite(file.fileno(), b"a" * PAGE_BYTES + b"b" * PAGE_BYTES, size - 2 * PAGE_BYTES)
    memory = [memoryview(bytearray(0)), memoryview(bytearray(extra * PAGE_BYTES))]
    low = Low()
    last = arm(files, size, 1)
    last.cut()
    with files.memory.open("rb") as file:
        low.page[:] = os.pread(file.fileno(), PAGE_BYTES, 3 * GIB - PAGE_BYTES)
        piece = os.pread(file.fileno(), (extra - 1) * PAGE_BYTES, 3 * GIB)
    memory[1][: len(piece)] = piece
    pair: list[memoryview] = [low, memory[1]]  # type: ignore[list-item]
    assert last.is_read(pair)
    assert last.settle(pair)
    found = (bytes(low.page) + bytes(memory[1]))[-2 * PAGE_BYTES :]
    assert found == b"a" * PAGE_BYTES + b"b" * PAGE_BYTES
    last.give(pair)
    with files.memory.open("rb") as file:
        assert os.pread(file.fileno(), 2 * PAGE_BYTES, size - 2 * PAGE_BYTES) == found


class Low:
    """A stand-in for 3 GiB of lowmem that has only the last page."""

    def __init__(self) -> None:
        self.page = memoryview(bytearray(PAGE_BYTES))

    def __getitem__(self, at: slice) -> memoryview:
        assert (at.start, at.stop) == (3 * GIB - PAGE_BYTES, 3 * GIB)
        return self.page

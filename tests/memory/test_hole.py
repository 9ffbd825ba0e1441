"""Holes: punched ranges are zero, and not allocated if the file system has holes."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from bhystream.memory import hole
from support.memory_source import seeded

SIZE = 64 * 4096
FULL = bytes(range(1, 256)) * (SIZE // 255) + bytes([7]) * (SIZE % 255)


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("hole")
    os.pwrite(made, FULL, 0)
    yield made
    os.close(made)


def contents(fd: int) -> bytes:
    return os.pread(fd, SIZE * 2, 0)


def punched(first: int, end: int) -> bytes:
    return FULL[:first] + bytes(end - first) + FULL[end:]


def test_a_punched_range_is_zero_and_a_hole(fd: int) -> None:
    hole.punch(fd, 5 * 4096, 7 * 4096)
    assert contents(fd) == punched(5 * 4096, 12 * 4096)
    assert os.fstat(fd).st_blocks * 512 == SIZE - 7 * 4096
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 5 * 4096
    assert os.lseek(fd, 5 * 4096, os.SEEK_DATA) == 12 * 4096


def test_a_hole_shows_in_a_mapping(fd: int) -> None:
    with mmap.mmap(fd, SIZE) as mapping:
        assert mapping[4096] == FULL[4096]
        hole.punch(fd, 4096, 4096)
        assert mapping[4096:8192] == bytes(4096)
        assert mapping[:4096] == FULL[:4096]


def test_the_file_keeps_its_size(fd: int) -> None:
    hole.punch(fd, SIZE - 4096, 4096)
    assert os.fstat(fd).st_size == SIZE
    hole.punch(fd, 0, SIZE)
    assert os.fstat(fd).st_size == SIZE
    assert os.fstat(fd).st_blocks == 0


def test_a_hole_may_be_punched_twice(fd: int) -> None:
    hole.punch(fd, 0, SIZE)
    hole.punch(fd, 4096, 4096)
    assert contents(fd) == bytes(SIZE)


def test_random_ranges(fd: int) -> None:
    rng = seeded()
    expected = bytearray(FULL)
    for _ in range(50):
        first = rng.randrange(SIZE)
        size = rng.randint(1, SIZE - first)
        part = rng.randbytes(rng.randint(1, 100))[: SIZE - first]
        os.pwrite(fd, part, first)
        expected[first : first + len(part)] = part
        hole.punch(fd, first, size)
        expected[first : first + size] = bytes(size)
        assert contents(fd) == expected


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, None], ids=["no-holes", "no-such-call"])
def test_zeros_are_written_where_no_hole_can_be(
    fd: int, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    def refuse(*args: int) -> int:
        ctypes.set_errno(number or 0)
        return -1

    monkeypatch.setattr(hole, "_deallocate", refuse if number else None)
    monkeypatch.setattr(hole, "_ZEROS", bytes(1000))  # more than one write
    hole.punch(fd, 4096, 3 * 4096)
    assert contents(fd) == punched(4096, 4 * 4096)
    assert os.fstat(fd).st_blocks * 512 == SIZE


def test_an_interrupted_call_is_repeated(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = hole._deallocate, []
    assert real is not None

    def interrupted(*args: int) -> int:
        calls.append(args)
        if len(calls) < 3:
            ctypes.set_errno(errno.EINTR)
            return -1
        return int(real(*args))

    monkeypatch.setattr(hole, "_deallocate", interrupted)
    hole.punch(fd, 0, 4096)
    assert len(calls) == 3
    assert os.fstat(fd).st_blocks * 512 == SIZE - 4096


def test_other_errors_are_raised_with_their_number() -> None:
    theirs, ours = os.pipe()
    try:
        with pytest.raises(OSError, match="Illegal seek") as caught:
            hole.punch(ours, 0, 4096)
        assert caught.value.errno == errno.ESPIPE
    finally:
        os.close(ours)
        os.close(theirs)
    with pytest.raises(OSError, match="Bad file descriptor"):
        hole.punch(ours, 0, 4096)


def test_offsets_above_4_gib(fd: int) -> None:
    os.truncate(fd, 1 << 33)
    at = (1 << 32) + 4096
    os.pwrite(fd, b"x" * 8192, at)
    hole.punch(fd, at, 4096)
    assert os.pread(fd, 8192, at) == bytes(4096) + b"x" * 4096
    assert os.pread(fd, 8192, 0) == FULL[:8192]

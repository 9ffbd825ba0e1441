"""Pages taken out of a pipe into a file, and compared there."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import signal
import struct
from collections.abc import Iterator

import pytest
import xxhash

from bhystream.memory.page import PageHasher
from bhystream.memory.splice import place_spliced

from .pages import DATA, PAGE, ZERO, extents

SEED = 0x5EED
NPAGES = 64
BASE = 1000
OFFSET = 3 * PAGE
ITEMS = ((0, 1, DATA), (1, 3, ZERO), (4, 20, DATA), (30, 1, DATA), (40, 24, DATA))
COUNT = sum(count for _, count, kind in ITEMS if kind == DATA)
linux = pytest.mark.skipif(not hasattr(os, "splice"), reason="splice(2) is Linux's")


class Way:
    """A file with a segment in it, and what its pages come from.

    kind: "splice", a pipe; or "copy", a file, out of which splice(2) cannot move anything into
    another, so that it is read.
    """

    def __init__(self, kind: str) -> None:
        self.fd = os.memfd_create("segment")
        os.truncate(self.fd, OFFSET + (NPAGES + 2) * PAGE)
        self.segment = mmap.mmap(self.fd, NPAGES * PAGE, prot=mmap.PROT_READ, offset=OFFSET)
        self.is_pipe = kind == "splice"
        if self.is_pipe:
            self.source, self.end = os.pipe()
            fcntl.fcntl(self.end, fcntl.F_SETPIPE_SZ, 1 << 20)
        else:
            self.source = self.end = os.memfd_create("source")

    def close(self) -> None:
        self.segment.close()
        for fd in {self.fd, self.source, self.end}:
            os.close(fd)

    def give(self, data: bytes) -> None:
        if self.is_pipe:
            assert os.write(self.end, data) == len(data)
        else:
            os.pwrite(self.end, data, os.lseek(self.source, 0, os.SEEK_CUR))

    def take(
        self,
        nbytes: int,
        start: int,
        hashes: bytes,
        items: tuple[tuple[int, int, int], ...] = ITEMS,
        base: int = BASE,
    ) -> int:
        listed = extents(*((BASE + first, count, kind) for first, count, kind in items))
        return place_spliced(
            self.source,
            nbytes,
            self.fd,
            OFFSET,
            self.segment,
            base,
            listed,
            start,
            PageHasher(SEED),
            hashes,
        )

    def content(self) -> bytes:
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0)


@pytest.fixture(params=[pytest.param("splice", marks=linux), "copy"])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    made = Way(request.param)
    yield made
    made.close()


def pages_of(rng: random.Random, count: int = COUNT) -> bytes:
    return rng.randbytes(count * PAGE)


def hashes_of(data: bytes) -> bytes:
    found = [
        xxhash.xxh3_64_intdigest(data[at : at + PAGE], SEED) for at in range(0, len(data), PAGE)
    ]
    return struct.pack(f"<{len(found)}Q", *found)


def expected(data: bytes, items: tuple[tuple[int, int, int], ...] = ITEMS) -> bytes:
    """Return the file, with the pages where they belong, and zeros around them."""
    made, at = bytearray(OFFSET + (NPAGES + 2) * PAGE), 0
    for first, count, kind in items:
        if kind == DATA:
            start = OFFSET + first * PAGE
            made[start : start + count * PAGE] = data[at : at + count * PAGE]
            at += count * PAGE
    return bytes(made)


@pytest.mark.parametrize("seed", range(12))
def test_pages_are_placed_whatever_pieces_they_come_in(way: Way, seed: int) -> None:
    rng = random.Random(seed)
    data = pages_of(rng)
    hashes, at = hashes_of(data), 0
    while at < len(data):
        size = rng.choice([1, 7, PAGE - 1, PAGE, 3 * PAGE + 5, 16 * PAGE])
        piece = data[at : at + size]
        way.give(piece)
        assert way.take(len(piece), at, hashes) == -1
        at += len(piece)
    assert way.content() == expected(data)


def test_more_than_one_step_is_placed(way: Way) -> None:
    """The loop hashes 512 KiB at a time."""
    npages = 400
    os.truncate(way.fd, OFFSET + npages * PAGE)
    way.segment.close()
    way.segment = mmap.mmap(way.fd, npages * PAGE, prot=mmap.PROT_READ, offset=OFFSET)
    data, at = pages_of(random.Random(3), npages), 0
    while at < len(data):
        piece = data[at : at + 150 * PAGE + 1]
        way.give(piece)
        assert way.take(len(piece), at, hashes_of(data), ((0, npages, DATA),)) == -1
        at += len(piece)
    assert way.content()[OFFSET:] == data


@pytest.mark.parametrize("bad", [0, 1, 7, 20, 21, 22, COUNT - 1])
@pytest.mark.parametrize("byte", [0, PAGE - 1])
def test_the_first_page_that_is_not_what_was_sent_is_named(way: Way, bad: int, byte: int) -> None:
    data = pages_of(random.Random(1))
    hashes = hashes_of(data)
    wrong = bytearray(data)
    wrong[bad * PAGE + byte] ^= 1
    wrong[-2] ^= 1
    way.give(bytes(wrong))
    assert way.take(len(wrong), 0, hashes) == bad


def test_a_page_in_two_pieces_is_compared_with_its_second(way: Way) -> None:
    """What the page holds counts, not what came in one piece."""
    data = pages_of(random.Random(2))
    hashes = hashes_of(data)
    way.give(data[:100])
    assert way.take(100, 0, hashes) == -1
    os.pwrite(way.fd, b"!!", OFFSET)
    way.give(data[100 : PAGE + 1])
    assert way.take(PAGE - 99, 100, hashes) == 0


@pytest.mark.parametrize(
    "items",
    [
        ((NPAGES, 1, DATA),),
        ((0, NPAGES + 1, DATA),),
        ((NPAGES - 1, 2, DATA),),
        ((-1, 2, DATA),),
        ((2**64 - 1 - BASE, 2**32 - 1, DATA),),
        ((0, 2, 2),),
        ((0, 2, ZERO),),
        (),
    ],
)
def test_pages_that_no_extent_has_room_for_are_refused(
    way: Way, items: tuple[tuple[int, int, int], ...]
) -> None:
    data = pages_of(random.Random(8), 2)
    way.give(data)
    with pytest.raises(ValueError, match="list"):
        way.take(2 * PAGE, 0, hashes_of(data), items)
    assert not any(way.content())


def test_an_extent_may_end_the_guest(way: Way) -> None:
    """No sum wraps: these pages are the last ones that have a number."""
    listed = extents((2**64 - 2, 1, DATA))
    way.give(b"x" * PAGE)
    place_spliced(
        way.source,
        PAGE,
        way.fd,
        OFFSET,
        way.segment,
        2**64 - 1 - NPAGES,
        listed,
        0,
        PageHasher(SEED),
        hashes_of(b"x" * PAGE),
    )
    assert way.content().rstrip(b"\0").endswith(b"x" * PAGE)


def test_a_page_without_a_hash_is_refused(way: Way) -> None:
    data = pages_of(random.Random(4))
    way.give(data)
    with pytest.raises(ValueError, match="list"):
        way.take(len(data), 0, hashes_of(data)[:-8])


@pytest.mark.parametrize(
    ("fd", "offset", "base", "start", "nbytes"),
    [
        (-1, 0, BASE, 0, 0),
        (1 << 31, 0, BASE, 0, 0),
        (0, -1, BASE, 0, 0),
        (0, 1 << 63, BASE, 0, 0),
        (0, 0, -1, 0, 0),
        (0, 0, 1 << 64, 0, 0),
        (0, 0, BASE, -1, 0),
        (0, 0, BASE, 0, -1),
        (0, 0, BASE, 1 << 63, 0),
    ],
)
def test_numbers_out_of_range_are_refused(
    fd: int, offset: int, base: int, start: int, nbytes: int
) -> None:
    segment, hasher = bytes(PAGE), PageHasher(SEED)
    with pytest.raises(ValueError):
        place_spliced(0, nbytes, fd, offset, segment, base, b"", start, hasher, b"")
    with pytest.raises(ValueError, match="whole"):
        place_spliced(0, 0, 0, 0, segment, 0, b"1", 0, hasher, b"")
    with pytest.raises(ValueError, match="whole"):
        place_spliced(0, 0, 0, 0, segment, 0, b"", 0, hasher, b"1")


def test_a_file_that_takes_nothing_is_an_error(way: Way) -> None:
    data = pages_of(random.Random(5))
    way.give(data)
    os.close(way.fd)
    way.fd = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(OSError) as caught:
        way.take(len(data), 0, hashes_of(data))
    assert caught.value.errno == errno.EBADF


def test_a_pipe_that_has_too_little_is_an_error(way: Way) -> None:
    data = pages_of(random.Random(6))
    way.give(data[:PAGE])
    if way.is_pipe:
        os.close(way.end)
        way.end = way.source
    with pytest.raises(OSError) as caught:
        way.take(2 * PAGE, 0, hashes_of(data))
    assert caught.value.errno == errno.EIO


@linux
def test_a_signal_raises_out_of_a_call_that_waits() -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    way = Way("splice")
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(Interrupted):
            way.take(PAGE, 0, hashes_of(bytes(COUNT * PAGE)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        way.close()

"""Pages given to a pipe where they are: what arrives, what is refused, what a reader may see."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from bhystream.memory.inplace import PagesInPlace
from bhystream.memory.splice import splice_pages

PAGE = 4096
NPAGES = 64
BASE = 1000
DATA, ZERO = 0, 1
linux = pytest.mark.skipif(not hasattr(os, "splice"), reason="vmsplice(2) is Linux's")


@pytest.fixture
def memory() -> memoryview:
    made = mmap.mmap(-1, NPAGES * PAGE)
    made[:] = random.Random(7).randbytes(NPAGES * PAGE)
    return memoryview(made)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError as error:  # a test has closed it
            assert error.errno == errno.EBADF


def packed(*extents: tuple[int, int, int]) -> bytes:
    """Pack (first, count, kind); first is counted from the segment's first page."""
    return b"".join(
        struct.pack("<QII", BASE + first, count, kind) for first, count, kind in extents
    )


def expected(memory: memoryview, *extents: tuple[int, int, int]) -> bytes:
    return b"".join(
        bytes(memory[first * PAGE : (first + count) * PAGE])
        for first, count, kind in extents
        if kind == DATA
    )


def through(fds: tuple[int, int], pages: PagesInPlace) -> bytes:
    """Write all the pages; return what a reader at the other end has got."""
    found = bytearray()

    def read() -> None:
        while len(found) < len(pages):
            found.extend(os.read(fds[0], 1 << 16))

    reader = threading.Thread(target=read)
    reader.start()
    at = 0
    while at < len(pages):
        at += pages.write(fds[1], at)
    reader.join()
    return bytes(found)


MIXED = ((0, 1, DATA), (1, 3, ZERO), (4, 20, DATA), (30, 1, DATA), (40, 24, DATA))


@pytest.fixture(params=[pytest.param("vmsplice", marks=linux), "write"])
def ends(request: pytest.FixtureRequest, pipe: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Return both ends of a pipe, or of a socket, for which vmsplice(2) does not work."""
    if request.param == "vmsplice":
        yield pipe
        return
    here, there = socket.socketpair()
    with here, there:
        yield here.fileno(), there.fileno()


def test_the_data_pages_arrive_in_order(memory: memoryview, ends: tuple[int, int]) -> None:
    pages = PagesInPlace(memory, BASE, memoryview(packed(*MIXED)), 46)
    assert len(pages) == 46 * PAGE
    assert through(ends, pages) == expected(memory, *MIXED)


@pytest.mark.parametrize("start", [0, 1, PAGE - 1, PAGE, PAGE + 5, 21 * PAGE, 46 * PAGE - 1])
def test_a_write_goes_on_at_any_byte(memory: memoryview, ends: tuple[int, int], start: int) -> None:
    pages = PagesInPlace(memory, BASE, memoryview(packed(*MIXED)), 46)
    os.set_blocking(ends[1], False)
    taken = pages.write(ends[1], start)
    assert taken > 0
    assert os.read(ends[0], taken) == expected(memory, *MIXED)[start : start + taken]


@linux
def test_scattered_pages_are_more_than_one_call_takes(pipe: tuple[int, int]) -> None:
    made = memoryview(mmap.mmap(-1, 4096 * PAGE))
    made[:] = random.Random(8).randbytes(4096 * PAGE)
    extents = tuple((page, 1, DATA) for page in range(0, 4096, 2))
    pages = PagesInPlace(made, BASE, memoryview(packed(*extents)), 2048)
    assert through(pipe, pages) == expected(made, *extents)


def test_a_file_gets_the_pages_too(memory: memoryview) -> None:
    fd = os.memfd_create("stream")
    pages = PagesInPlace(memory, BASE, memoryview(packed(*MIXED)), 46)
    at = 0
    while at < len(pages):
        at += pages.write(fd, at)
    assert os.pread(fd, len(pages) + 1, 0) == expected(memory, *MIXED)
    os.close(fd)


@linux
def test_the_pipe_holds_the_pages_themselves(memory: memoryview, pipe: tuple[int, int]) -> None:
    """So they may not change: whoever reads late reads what was written later."""
    extents = packed((0, 1, DATA))
    assert splice_pages(pipe[1], memory, BASE, extents, 0) == PAGE
    memory[:4] = b"late"
    assert os.read(pipe[0], PAGE) == bytes(memory[:PAGE])


@linux
@pytest.mark.parametrize(
    "extents",
    [
        packed((NPAGES, 1, DATA)),
        packed((0, NPAGES + 1, DATA)),
        packed((NPAGES - 1, 2, DATA)),
        struct.pack("<QII", BASE - 1, 1, DATA),
        struct.pack("<QII", 2**64 - 1, 2**32 - 1, DATA),
        packed((0, 1, 2)),
        packed((0, 1, DATA))[:-1],
    ],
)
def test_an_extent_outside_of_the_segment_is_refused(
    memory: memoryview, pipe: tuple[int, int], extents: bytes
) -> None:
    with pytest.raises(ValueError, match="extent"):
        splice_pages(pipe[1], memory, BASE, extents, 0)


@pytest.mark.parametrize(("fd", "base", "start"), [(-1, BASE, 0), (1 << 31, BASE, 0), (1, -1, 0)])
def test_numbers_out_of_range_are_refused(
    memory: memoryview, fd: int, base: int, start: int
) -> None:
    with pytest.raises(ValueError, match=r"-1|2147483648"):
        splice_pages(fd, memory, base, b"", start)
    with pytest.raises(ValueError, match="-2 is not an offset"):
        splice_pages(1, memory, BASE, b"", -2)


@linux
def test_nobody_who_reads_is_an_error(memory: memoryview, pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    pages = PagesInPlace(memory, BASE, memoryview(packed((0, 1, DATA))), 1)
    before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        with pytest.raises(BrokenPipeError):
            pages.write(pipe[1], 0)
    finally:
        signal.signal(signal.SIGPIPE, before)


@linux
def test_a_full_pipe_is_waited_for_even_if_it_does_not_block(
    memory: memoryview, pipe: tuple[int, int]
) -> None:
    """Another process may have made a descriptor so that both share."""
    os.set_blocking(pipe[1], False)
    pages = PagesInPlace(memory, BASE, memoryview(packed((0, NPAGES, DATA))), NPAGES)
    assert through(pipe, pages) == bytes(memory)


@linux
def test_a_signal_raises_out_of_a_blocked_write(memory: memoryview, pipe: tuple[int, int]) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    pages = PagesInPlace(memory, BASE, memoryview(packed((0, NPAGES, DATA))), NPAGES)
    before = signal.signal(signal.SIGALRM, interrupt)
    # Again and again: the first may come before the pipe is full.
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(Interrupted):
            while True:
                pages.write(pipe[1], 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

"""The memory at the destination, compared with hashes of the source's."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import xxhash

from bhystream.backend.base import Target
from bhystream.memory.page import PageHasher
from bhystream.memory.target import Differing, FileTarget, MappedTarget

from .pages import DATA, PAGE, ZERO, extents

SEED = 0x5EED
BASE = 1000
NPAGES = 700
# The file begins before the segment, as that of a guest with two segments.
OFFSET = 3 * PAGE
# Runs longer and shorter than one step, and pages of zeros that were never placed.
ITEMS = [
    (BASE, 1, ZERO),
    (BASE + 1, 300, DATA),
    (BASE + 301, 1, DATA),
    (BASE + 302, 298, ZERO),
    (BASE + 600, 100, DATA),
]
NO_DIFFERENCE = Differing(0, -1)


class Memory:
    """A segment in a sparse file, and a target of one kind over it."""

    def __init__(self, kind: str, stack: ExitStack) -> None:
        self.steps = 0
        self.fd = os.memfd_create("segment")
        stack.callback(os.close, self.fd)
        os.truncate(self.fd, OFFSET + (NPAGES + 2) * PAGE)
        self.file = FileTarget(self.fd, OFFSET)
        self.target: Target = self.file
        if kind != "file":
            mapping = mmap.mmap(self.fd, NPAGES * PAGE, offset=OFFSET)
            file = self.file if kind == "mapping with a file" else None
            self.target = mapped = MappedTarget(memoryview(mapping), file)
            stack.callback(mapping.close)
            stack.callback(mapped.release)

    def fill(self) -> memoryview:
        """Place pages as ITEMS says, the first of them of zeros; return their hashes."""
        pages = [bytes(PAGE)] + [bytes([1 + n % 255]) * PAGE for n in range(400)]
        data = memoryview(b"".join(pages))
        self.target.place(BASE, NPAGES, memoryview(extents(*ITEMS)), data)
        found = [xxhash.xxh3_64_intdigest(page, SEED) for page in pages]
        return memoryview(struct.pack(f"<{len(found)}Q", *found))

    def flip(self, page: int) -> None:
        at = OFFSET + (page - BASE + 1) * PAGE - 1
        os.pwrite(self.fd, bytes([os.pread(self.fd, 1, at)[0] ^ 1]), at)

    def differing(self, hashes: memoryview) -> Differing:
        listed = memoryview(extents(*ITEMS))
        return self.target.differing(PageHasher(SEED), BASE, listed, hashes, self.step)

    def step(self) -> None:
        self.steps += 1

    def allocated_pages(self) -> int:
        return os.fstat(self.fd).st_blocks * 512 // PAGE


@pytest.fixture(params=["file", "mapping", "mapping with a file"])
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    with ExitStack() as stack:
        yield Memory(request.param, stack)


def test_what_was_placed_is_the_same(memory: Memory) -> None:
    assert memory.differing(memory.fill()) == NO_DIFFERENCE


@pytest.mark.parametrize("page", [0, 1, 128, 129, 300, 301, 302, 450, 599, 600, 699])
def test_one_bit_of_one_page_is_found(memory: Memory, page: int) -> None:
    hashes = memory.fill()
    memory.flip(BASE + page)
    assert memory.differing(hashes) == Differing(1, BASE + page)


@pytest.mark.parametrize("memory", ["mapping"], indirect=True)
def test_what_takes_long_is_done_in_steps(memory: Memory) -> None:
    """So that a source that waits hears something, and a signal can end it."""
    memory.differing(memory.fill())
    assert memory.steps == 1 + 3 + 1 + 3 + 1


def test_all_that_differ_are_counted_and_the_first_is_named(memory: Memory) -> None:
    hashes = memory.fill()
    wrong = [5, 6, 301, 302, 303, 599, 600, 699]
    for page in reversed(wrong):
        memory.flip(BASE + page)
    assert memory.differing(hashes) == Differing(len(wrong), BASE + 5)


def test_a_page_that_became_zero_is_read_too(memory: Memory) -> None:
    """No note of what was placed counts, only what the memory holds."""
    fill, zeros = memory.fill(), (BASE + 302, 298, ZERO)
    one = memoryview(extents((BASE + 310, 1, DATA)))
    memory.target.place(BASE, NPAGES, one, memoryview(b"\7" * PAGE))
    assert memory.differing(fill) == Differing(1, BASE + 310)
    memory.target.place(BASE, NPAGES, memoryview(extents(zeros)), memoryview(b""))
    assert memory.differing(fill) == NO_DIFFERENCE
    memory.flip(BASE + 310)
    assert memory.differing(fill) == Differing(1, BASE + 310)


def test_pages_beside_the_segment_do_not_count(memory: Memory) -> None:
    hashes = memory.fill()
    memory.flip(BASE - 1)
    memory.flip(BASE + NPAGES)
    assert memory.differing(hashes) == NO_DIFFERENCE


@pytest.mark.parametrize("memory", ["file", "mapping with a file"], indirect=True)
def test_memory_that_was_never_used_stays_a_hole(memory: Memory) -> None:
    hashes = memory.fill()
    before = memory.allocated_pages()
    assert before < NPAGES - 290
    assert memory.differing(hashes) == NO_DIFFERENCE
    assert memory.allocated_pages() == before


@pytest.mark.parametrize("memory", ["file"], indirect=True)
def test_without_knowledge_of_holes_all_is_read(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, at: int, how: int) -> int:
        raise OSError(errno.EINVAL, "no holes here")

    hashes = memory.fill()
    memory.flip(BASE + 450)
    monkeypatch.setattr(os, "lseek", refuse)
    assert memory.differing(hashes) == Differing(1, BASE + 450)


@pytest.mark.parametrize("memory", ["file"], indirect=True)
def test_a_read_may_be_short(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Callable[..., int] = os.preadv

    def some(fd: int, buffers: list[memoryview], at: int) -> int:
        return read(fd, [buffers[0][:1000]], at)

    hashes = memory.fill()
    monkeypatch.setattr(os, "preadv", some)
    assert memory.differing(hashes) == NO_DIFFERENCE
    memory.flip(BASE + 699)
    assert memory.differing(hashes) == Differing(1, BASE + 699)


@pytest.mark.parametrize("memory", ["file", "mapping with a file"], indirect=True)
def test_a_file_that_ends_too_early_is_an_error(memory: Memory) -> None:
    hashes = memory.fill()
    os.truncate(memory.fd, OFFSET + NPAGES * PAGE - 1)
    with pytest.raises(OSError, match="the file ends too early"):
        memory.differing(hashes)

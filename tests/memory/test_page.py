"""The loops that hash and compare pages, against plain Python and the xxhash module."""

from __future__ import annotations

import mmap
import random
import struct
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash

from bhystream.errors import GuestError
from bhystream.memory.page import (
    PageHasher,
    PageHashes,
    check_pages,
    count_bits,
    find_changed,
    mark_changed,
    mark_extents,
)
from bhystream.memory.scatter import scatter, scatter_into
from support.nogil import released

from .pages import (
    DATA,
    PAGE,
    WRONG_BUFFER,
    all_bits,
    bits,
    extents,
    hashes_in,
    pages_of,
    table_of,
    words,
)

SEED = 0xA5A5_0123_4567_89AB


@pytest.fixture(scope="module")
def hasher() -> PageHasher:
    return PageHasher(SEED)


def digest(page: bytes | memoryview, seed: int = SEED) -> int:
    return xxhash.xxh3_64_intdigest(page, seed=seed)


def digests(pages: bytes | memoryview) -> list[int]:
    return [digest(pages[i : i + PAGE]) for i in range(0, len(pages), PAGE)]


# The hash.


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_zero_hash_is_seeded(seed: int) -> None:
    assert PageHasher(seed).zero_hash == digest(bytes(PAGE), seed)


@pytest.mark.parametrize("seed", [-1, 2**64, -(2**80)])
def test_a_seed_is_a_u64(seed: int) -> None:
    with pytest.raises(ValueError, match="is not a u64"):
        PageHasher(seed)


@pytest.mark.parametrize("npages", [0, 1, 2, 3, 17])
@pytest.mark.parametrize("shift", [0, 1, 7, 8, 33])
def test_hash_pages_at_any_address(
    rng: random.Random, hasher: PageHasher, npages: int, shift: int
) -> None:
    room = bytearray(rng.randbytes(npages * PAGE + 64))
    pages = memoryview(room)[shift : shift + npages * PAGE]
    out = memoryview(bytearray((npages + 2) * 8 + 64))[shift : shift + (npages + 2) * 8].cast("Q")
    out[npages] = 77
    hasher.hash_pages(pages, out[:npages])
    assert out.tolist() == [*digests(pages), 77, 0]


def test_hash_pages_wants_one_word_a_page(hasher: PageHasher) -> None:
    for nbytes, nwords in ((PAGE, 0), (0, 1), (PAGE - 1, 1), (PAGE + 1, 1), (2 * PAGE, 1)):
        with pytest.raises(ValueError, match=f"{nbytes} bytes are not {nwords} pages"):
            hasher.hash_pages(bytes(nbytes), words(nwords))


def test_wrong_buffers_are_refused(hasher: PageHasher) -> None:
    strided = memoryview(bytearray(2 * PAGE))[::2]
    for bad in (strided, words(512)):
        with pytest.raises(WRONG_BUFFER):
            hasher.hash_pages(bad, words(1))
        with pytest.raises(WRONG_BUFFER):
            check_pages(hasher, bad, bytes(8))
        with pytest.raises(WRONG_BUFFER):
            scatter(0, 0, 0, 1, extents((0, 1, DATA)), bad)
    for out in (memoryview(words(1)).toreadonly(), bytearray(8), array("I", [0, 0])):
        with pytest.raises(WRONG_BUFFER):
            hasher.hash_pages(bytes(PAGE), out)
        with pytest.raises(WRONG_BUFFER):
            mark_extents([], out)
    with pytest.raises(TypeError):
        hasher.hash_pages(None, words(0))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        check_pages(None, b"", b"")  # type: ignore[arg-type]


def test_a_big_endian_host_is_refused() -> None:
    code = "import sys; sys.byteorder = 'big'; import bhystream.memory.page"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "ImportError: bhystream needs a little-endian host" in run.stderr


# check_pages.


def test_check_pages_finds_the_first_difference(rng: random.Random, hasher: PageHasher) -> None:
    npages = 9
    for shift in range(9):
        pages = memoryview(bytearray(rng.randbytes(npages * PAGE + 16)))[shift:][: npages * PAGE]
        listed = bytearray(16 + 8 * npages)
        hashes = memoryview(listed)[shift : shift + 8 * npages]
        hashes[:] = struct.pack(f"<{npages}Q", *digests(pages))
        assert check_pages(hasher, pages, hashes) == -1
        for bad in sorted(rng.sample(range(npages), 4), reverse=True):
            pages[bad * PAGE + rng.randrange(PAGE)] ^= 1 << rng.randrange(8)
            assert check_pages(hasher, pages, hashes) == bad
        hashes[8 * bad + 7] ^= 0x80
        assert check_pages(hasher, pages, hashes) == bad


def test_check_pages_of_no_pages(hasher: PageHasher) -> None:
    assert check_pages(hasher, b"", b"") == -1


@pytest.mark.parametrize("pages, hashes", [(PAGE, 0), (0, 8), (PAGE, 7), (PAGE, 16), (100, 0)])
def test_check_pages_wants_a_hash_a_page(hasher: PageHasher, pages: int, hashes: int) -> None:
    with pytest.raises(ValueError, match="bytes of hashes for"):
        check_pages(hasher, bytes(pages), bytes(hashes))


# Bitmaps.


@pytest.mark.parametrize("turn", range(20))
def test_extents_are_marked_and_counted(rng: random.Random, turn: int) -> None:
    npages = 64 * rng.randint(1, 9)
    cuts = sorted(rng.sample(range(npages + 1), 2 * rng.randint(0, 9)))
    items = list(zip(cuts[::2], cuts[1::2], strict=True))
    marked = {page for first, end in items for page in range(first, end)}
    kept = rng.randrange(npages)
    bitmap = bits(npages, [kept])
    assert mark_extents(iter(items), bitmap) == len(marked)
    assert pages_of(bitmap) == marked | {kept}
    for _ in range(20):
        first = rng.randint(0, npages)
        end = rng.randint(first, npages)
        assert count_bits(bitmap, first, end) == len((marked | {kept}) & {*range(first, end)})


@pytest.mark.parametrize("first, end", [(-1, 3), (0, 129), (5, 4), (129, 129), (2**64, 2**64)])
def test_pages_outside_of_a_bitmap_are_refused(first: int, end: int) -> None:
    bitmap = words(2)
    with pytest.raises(ValueError, match="are not within"):
        mark_extents([(0, 1), (first, end)], bitmap)
    with pytest.raises(ValueError, match="are not within"):
        count_bits(bitmap, first, end)
    assert pages_of(bitmap) == {0}


def test_what_the_extents_raise_comes_out() -> None:
    def broken() -> Iterator[tuple[int, int]]:
        yield 3, 5
        raise GuestError("gone")

    with pytest.raises(GuestError, match="gone"):
        mark_extents(broken(), words(1))


# The table.


@pytest.mark.parametrize("npages", [0, 1, 63, 64, 65, 1000])
def test_a_new_table_has_the_zero_page_everywhere(hasher: PageHasher, npages: int) -> None:
    table = PageHashes(hasher, npages)
    assert len(table) == npages
    assert hashes_in(table) == [digest(bytes(PAGE))] * npages
    for page in (-1, npages, 2**64):
        with pytest.raises(IndexError):
            table[page]


@pytest.mark.parametrize("npages", [-1, 1 << 40])
def test_a_table_of_no_guest_is_refused(hasher: PageHasher, npages: int) -> None:
    with pytest.raises(ValueError, match="no table has"):
        PageHashes(hasher, npages)


ALLOCATED = """
import mmap
from bhystream.memory.batch import Batch
from bhystream.memory.page import PageHasher, PageHashes, mark_extents

def resident_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

NPAGES, RUN, STEP = 16 << 18, 16, 1 << 12
hasher = PageHasher(1)
memory = memoryview(mmap.mmap(-1, NPAGES * 4096, flags=mmap.MAP_SHARED | mmap.MAP_ANON))
runs = [(first, first + RUN) for first in range(0, NPAGES, STEP)]
for first, end in runs:
    memory[first * 4096 : end * 4096] = b"r" * ((end - first) * 4096)
bitmap = memoryview(bytearray(NPAGES // 8)).cast("Q")
mark_extents(runs, bitmap)
batch = Batch(hasher, 64, 64)
before = resident_kib()
table = PageHashes(hasher, NPAGES)
for everything in (True, False, False):
    page = 0
    while page < NPAGES:
        page = batch.collect(memory, 0, page, NPAGES, table, bitmap, everything)
        batch.clear()
print(resident_kib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the figure is from /proc")
def test_the_table_takes_memory_only_for_what_was_touched() -> None:
    """16 GiB with 1024 runs of 64 KiB: 1024 blocks of 512 bytes, not 32 MiB."""
    run = subprocess.run([sys.executable, "-c", ALLOCATED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 4 << 10


# mark_changed, find_changed.


@pytest.mark.parametrize("turn", range(20))
def test_mark_changed_and_find_changed(rng: random.Random, hasher: PageHasher, turn: int) -> None:
    npages, base, shift = rng.randint(1, 250), rng.randint(0, 130), rng.randint(0, 9)
    room = memoryview(bytearray(npages * PAGE + 16))
    segment = room[shift : shift + npages * PAGE]
    total = base + npages
    table = table_of(hasher, rng.randbytes(base * PAGE) + bytes(segment))
    bitmap = words((total + 63) // 64)
    for page in rng.sample(range(npages), rng.randint(0, npages)):
        segment[page * PAGE + rng.randrange(PAGE)] = 1
    before = hashes_in(table)
    first = rng.randint(0, npages)
    end = rng.choice((first, npages, rng.randint(first, npages)))
    share = rng.choice((0.1, 0.5, 0.9, 1.0))
    touched = {page for page in range(total) if rng.random() < share}
    read = bits(total, touched)
    now = before.copy()
    for page in touched & {*range(base + first, base + end)}:
        now[page] = digest(segment[(page - base) * PAGE :][:PAGE])
    changed = {page for page in range(total) if now[page] != before[page]}
    marks = words((end - first + 63) // 64)
    found = find_changed(hasher, segment, base, first, end, table, read, marks)
    assert found == len(changed)
    assert {base + first + mark for mark in pages_of(marks)} == changed
    assert hashes_in(table) == before
    kept = rng.randrange(total)
    bitmap[kept // 64] |= 1 << kept % 64
    assert mark_changed(hasher, segment, base, first, end, table, read, bitmap) == len(changed)
    assert hashes_in(table) == now
    assert pages_of(bitmap) == changed | {kept}
    assert mark_changed(hasher, segment, base, first, end, table, read, bitmap) == 0


@pytest.mark.parametrize(
    "base, first, end, nentries, nwords",
    [
        (0, -1, 1, 2, 1),
        (0, 0, 3, 9, 1),
        (0, 2, 1, 9, 1),
        (-1, 0, 2, 9, 1),
        (1, 0, 2, 2, 1),
        (2**64 - 1, 0, 2, 9, 1),
        (63, 0, 2, 99, 1),
        (0, 0, 1, 9, 0),
    ],
)
def test_mark_changed_and_find_changed_refuse(
    hasher: PageHasher, base: int, first: int, end: int, nentries: int, nwords: int
) -> None:
    table, memory, enough = PageHashes(hasher, nentries), bytes(2 * PAGE), words(9)
    for touched, bitmap in ((words(nwords), enough), (enough, words(nwords))):
        with pytest.raises(ValueError, match="are not within"):
            mark_changed(hasher, memory, base, first, end, table, touched, bitmap)
    with pytest.raises(ValueError, match="are not within"):
        find_changed(hasher, memory, base, first, end, table, words(nwords), enough)


def test_find_changed_wants_a_bit_for_each_page(hasher: PageHasher) -> None:
    table = PageHashes(hasher, 65)
    with pytest.raises(ValueError, match="are not within"):
        find_changed(hasher, bytes(65 * PAGE), 0, 0, 65, table, words(2), words(1))


# The end of a buffer.

GUARD = """
import mmap, os, tempfile
from bhystream.memory.batch import Batch
from bhystream.memory.page import (
    PageHasher,
    PageHashes,
    check_pages,
    count_bits,
    find_changed,
    mark_changed,
    mark_extents,
)
from bhystream.memory.scatter import scatter, scatter_into

def guarded(nbytes):
    # What lies beyond the end of the file is SIGBUS to touch.
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * mmap.PAGESIZE)
        m = mmap.mmap(file.fileno(), 2 * mmap.PAGESIZE)
        os.ftruncate(file.fileno(), mmap.PAGESIZE)
    return memoryview(m)[mmap.PAGESIZE - nbytes : mmap.PAGESIZE]

hasher = PageHasher(1)
page, hashes = guarded(4096), guarded(8).cast("Q")
hasher.hash_pages(page, hashes)
check_pages(hasher, page, hashes.cast("B"))
bits = guarded(8).cast("Q")
for extents in ([], [(0, 64)]):
    mark_extents(extents, bits)
    count_bits(bits, 0, 64)
    table = PageHashes(hasher, 1)
    mark_changed(hasher, page, 0, 0, 1, table, bits, guarded(8).cast("Q"))
    find_changed(hasher, page, 0, 0, 1, table, bits, guarded(8).cast("Q"))
    for everything in (False, True):
        for marks in (None, bits):
            batch = Batch(hasher, 1, 1)
            batch.collect(page, 0, 0, 1, table, bits, everything, bits=marks)
with tempfile.TemporaryFile() as target:
    extents = guarded(16)
    extents[:] = bytes(8) + b"\\1" + bytes(7)
    scatter(target.fileno(), 0, 0, 1, extents, guarded(4096))
    scatter_into(guarded(4096), guarded(8).cast("Q"), 0, extents, guarded(4096))
    extents[12] = 1
    scatter_into(guarded(4096), guarded(8).cast("Q"), 0, extents, b"")
print("unharmed")
"""


def test_nothing_reads_beyond_its_buffers() -> None:
    run = subprocess.run([sys.executable, "-c", GUARD], capture_output=True, text=True)
    assert run.stdout == "unharmed\n", f"{run.returncode} {run.stderr}"


# The GIL.


@pytest.mark.parametrize(
    "name",
    ["hash_pages", "check_pages", "mark_changed", "find_changed", "scatter", "scatter_into"],
)
def test_the_gil_is_released(hasher: PageHasher, tmp_path: Path, name: str) -> None:
    npages = 1 << 14
    pages = memoryview(mmap.mmap(-1, npages * PAGE))
    hashes, table = words(npages), PageHashes(hasher, npages)
    hasher.hash_pages(pages, hashes)
    touched, bitmap = all_bits(npages), words(npages // 64)
    memory = memoryview(mmap.mmap(-1, npages * PAGE))
    with (tmp_path / "file").open("w+b") as file:
        calls: dict[str, Callable[[], object]] = {
            "hash_pages": lambda: hasher.hash_pages(pages, hashes),
            "check_pages": lambda: check_pages(hasher, pages, memoryview(hashes).cast("B")),
            "mark_changed": lambda: mark_changed(
                hasher, pages, 0, 0, npages, table, touched, bitmap
            ),
            "find_changed": lambda: find_changed(
                hasher, pages, 0, 0, npages, table, touched, bitmap
            ),
            "scatter": lambda: scatter(
                file.fileno(), 0, 0, npages, extents((0, npages, DATA)), pages
            ),
            "scatter_into": lambda: scatter_into(
                memory, words(npages // 64), 0, extents((0, npages, DATA)), pages
            ),
        }
        assert released(calls[name])

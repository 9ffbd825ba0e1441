"""The loops that hash and compare pages, against plain Python and the xxhash module."""

from __future__ import annotations

import mmap
import random
import struct
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from bhystream.memory.page import PageHasher, check_pages, mark_changed
from bhystream.memory.scatter import scatter, scatter_into
from support.nogil import released

from .pages import DATA, PAGE, WRONG_BUFFER, extents, words

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


@pytest.mark.parametrize("first, end", [(0, 0), (0, 9), (3, 3), (2, 5), (8, 9), (9, 9)])
def test_fill_sets_only_its_range(hasher: PageHasher, first: int, end: int) -> None:
    table = words(9, 5)
    hasher.fill(table, first, end)
    assert list(table) == [hasher.zero_hash if first <= i < end else 5 for i in range(9)]


@pytest.mark.parametrize("first, end", [(-1, 3), (0, 10), (5, 4), (10, 10), (2**64, 2**64)])
def test_fill_refuses_other_ranges(hasher: PageHasher, first: int, end: int) -> None:
    with pytest.raises(ValueError, match="are not within"):
        hasher.fill(words(9), first, end)


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
            hasher.fill(out, 0, 1)
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


# mark_changed.


@pytest.mark.parametrize("turn", range(10))
def test_mark_changed(rng: random.Random, hasher: PageHasher, turn: int) -> None:
    npages, base, shift = rng.randint(1, 150), rng.randint(0, 130), rng.randint(0, 9)
    room = memoryview(bytearray(npages * PAGE + 16))
    segment = room[shift : shift + npages * PAGE]
    total = base + npages
    table = words(total, 1)
    hasher.fill(table, base, total)
    bitmap = words((total + 63) // 64)
    for page in rng.sample(range(npages), rng.randint(0, npages)):
        segment[page * PAGE + rng.randrange(PAGE)] = 1
    before = table.tolist()
    first = rng.randint(0, npages)
    end = rng.choice((first, npages, rng.randint(first, npages)))
    now = before.copy()
    now[base + first : base + end] = digests(segment)[first:end]
    changed = [page for page in range(total) if now[page] != before[page]]
    kept = rng.randrange(total)
    bitmap[kept // 64] |= 1 << kept % 64
    assert mark_changed(hasher, segment, base, first, end, table, bitmap) == len(changed)
    assert table.tolist() == now
    bits = int.from_bytes(bitmap.tobytes(), "little")
    assert [page for page in range(64 * len(bitmap)) if bits >> page & 1] == sorted(
        {*changed, kept}
    )
    assert mark_changed(hasher, segment, base, first, end, table, bitmap) == 0


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
def test_mark_changed_refuses(
    hasher: PageHasher, base: int, first: int, end: int, nentries: int, nwords: int
) -> None:
    with pytest.raises(ValueError, match="are not within"):
        mark_changed(hasher, bytes(2 * PAGE), base, first, end, words(nentries), words(nwords))


# The end of a buffer.

GUARD = """
import mmap, os, tempfile
from bhystream.memory.batch import Batch
from bhystream.memory.page import PageHasher, check_pages, mark_changed
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
table = memoryview(bytearray(8)).cast("Q")
hasher.hash_pages(page, hashes)
check_pages(hasher, page, hashes.cast("B"))
mark_changed(hasher, page, 0, 0, 1, hashes, guarded(8).cast("Q"))
for everything in (False, True):
    Batch(hasher, 1, 1).collect(page, 0, 0, 1, table, everything)
    Batch(hasher, 1, 1).collect_absent(0, 0, 1, hashes, everything)
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
    "name", ["hash_pages", "fill", "check_pages", "mark_changed", "scatter", "scatter_into"]
)
def test_the_gil_is_released(hasher: PageHasher, tmp_path: Path, name: str) -> None:
    npages = 1 << 14
    pages = memoryview(mmap.mmap(-1, npages * PAGE))
    table = words(npages)
    hasher.fill(table, 0, npages)
    large = words(1 << 21)
    memory = memoryview(mmap.mmap(-1, npages * PAGE))
    with (tmp_path / "file").open("w+b") as file:
        calls: dict[str, Callable[[], object]] = {
            "hash_pages": lambda: hasher.hash_pages(pages, table),
            "fill": lambda: hasher.fill(large, 0, len(large)),
            "check_pages": lambda: check_pages(hasher, pages, memoryview(table).cast("B")),
            "mark_changed": lambda: mark_changed(hasher, pages, 0, 0, npages, table, large),
            "scatter": lambda: scatter(
                file.fileno(), 0, 0, npages, extents((0, npages, DATA)), pages
            ),
            "scatter_into": lambda: scatter_into(
                memory, words(npages // 64), 0, extents((0, npages, DATA)), pages
            ),
        }
        assert released(calls[name])

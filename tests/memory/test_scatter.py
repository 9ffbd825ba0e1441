"""The loops that put pages into files and into mapped memory, against plain Python."""

from __future__ import annotations

import errno
import mmap
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

from bhystream.backend.base import Target
from bhystream.memory.scatter import scatter, scatter_into
from bhystream.memory.target import FileTarget, MappedTarget

from .pages import DATA, PAGE, WRONG_BUFFER, ZERO, extents, words

# A pwrite(2) as with a slow file or with signals: it takes 1000 bytes at a time, and
# every third call fails with EINTR.  The calls are counted to show that it was used.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
static ssize_t slow(int fd, const void *p, size_t n, off_t at) {
    static int calls;
    static ssize_t (*next)(int, const void *, size_t, off_t);
    if (!next) next = (ssize_t (*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite");
    if (++calls % 3 == 0) { errno = EINTR; return -1; }
    if (getenv("SHIM_ZERO")) return 0;
    return next(fd, p, n > 1000 ? 1000 : n, at);
}
ssize_t pwrite(int fd, const void *p, size_t n, off_t at);
ssize_t pwrite(int fd, const void *p, size_t n, off_t at) { return slow(fd, p, n, at); }
ssize_t pwrite64(int fd, const void *p, size_t n, off_t at);
ssize_t pwrite64(int fd, const void *p, size_t n, off_t at) { return slow(fd, p, n, at); }
"""


# scatter.


def place(
    image: bytearray, offset: int, base: int, npages: int, listed: bytes, pages: bytes
) -> int:
    """Do what scatter() does, page by page."""
    source = written = 0
    for first, n, kind in struct.iter_unpack("<QII", listed):
        for page in range(first, first + n) if kind == DATA else ():
            if base <= page < base + npages:
                at = offset + (page - base) * PAGE
                image[at : at + PAGE] = pages[source : source + PAGE]
                written += 1
            source += PAGE
    return written


def random_extents(rng: random.Random, npages: int) -> list[tuple[int, int, int]]:
    items = []
    page = rng.randint(0, 3)
    while page < npages:
        n = min(rng.randint(1, 5), npages - page)
        items.append((page, n, rng.choice((DATA, ZERO))))
        page += n + rng.choice((0, 0, 1, 4))
    return items


@pytest.mark.parametrize("turn", range(10))
def test_scatter_over_segments(rng: random.Random, tmp_path: Path, turn: int) -> None:
    sizes = [rng.randint(1, 12) for _ in range(3)]
    items = random_extents(rng, sum(sizes))
    ndata = sum(n for _, n, kind in items if kind == DATA)
    pages = memoryview(rng.randbytes(ndata * PAGE + 8))[turn % 8 :][: ndata * PAGE]
    listed = memoryview(bytes(turn % 8) + extents(*items))[turn % 8 :]
    base = written = 0
    for number, npages in enumerate(sizes):
        offset = rng.choice((0, PAGE, 1000))
        image = bytearray(rng.randbytes(offset + (npages + 1) * PAGE))
        path = tmp_path / str(number)
        path.write_bytes(image)
        expected = place(image, offset, base, npages, bytes(listed), bytes(pages))
        with path.open("r+b") as file:
            assert scatter(file.fileno(), offset, base, npages, listed, pages) == expected
        assert path.read_bytes() == image
        base += npages
        written += expected
    assert written == ndata


def test_scatter_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("w+b") as file:
        assert scatter(file.fileno(), 0, 0, 0, b"", b"") == 0
        assert scatter(file.fileno(), 0, 0, 9, extents((1, 2**32 - 1, ZERO)), b"") == 0
        assert scatter(file.fileno(), 0, 5, 9, extents((2, 3, DATA)), bytes(3 * PAGE)) == 0
    assert path.stat().st_size == 0


@pytest.mark.parametrize(
    "listed, npages",
    [
        (extents((0, 1, DATA)), 0),
        (extents((0, 1, DATA)), 2),
        (extents((0, 2, DATA), (2, 2, DATA)), 3),
        (extents((0, 2**32 - 1, DATA)), 1),
        (extents((0, 2**32 - 1, DATA), (0, 2**32 - 1, DATA)), 1),
        (extents((0, 1, 2)), 1),
        (extents((0, 1, 2**31)), 1),
        (extents((2**64 - 1, 1, DATA)), 1),
        (extents((2**64 - 1, 5, ZERO)), 0),
        (b"", 1),
    ],
)
def test_scatter_refuses_a_list_that_does_not_fit(
    tmp_path: Path, listed: bytes, npages: int
) -> None:
    with (tmp_path / "file").open("w+b") as file, pytest.raises(ValueError, match="do not desc"):
        scatter(file.fileno(), 0, 0, 100, listed, b"x" * (npages * PAGE))


@pytest.mark.parametrize(
    "fd, offset, base, npages, nlist, nbytes",
    [
        (-1, 0, 0, 1, 0, 0),
        (2**31, 0, 0, 1, 0, 0),
        (0, -1, 0, 1, 0, 0),
        (0, 0, -1, 1, 0, 0),
        (0, 0, 0, -1, 0, 0),
        (0, 0, 2**64 - 1, 1, 0, 0),
        (0, 2**63 - 4096, 0, 1, 0, 0),
        (0, 0, 0, 2**51, 0, 0),
        (0, 0, 0, 1, 15, 0),
        (0, 0, 0, 1, 17, 0),
        (0, 0, 0, 1, 0, PAGE - 1),
    ],
)
def test_scatter_refuses(
    fd: int, offset: int, base: int, npages: int, nlist: int, nbytes: int
) -> None:
    with pytest.raises(ValueError):
        scatter(fd, offset, base, npages, bytes(nlist), bytes(nbytes))


def test_scatter_reports_errno(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError) as caught:
            scatter(writing, 0, 0, 1, extents((0, 1, DATA)), bytes(PAGE))
        assert caught.value.errno == errno.ESPIPE
        assert caught.value.strerror == os.strerror(errno.ESPIPE)
    finally:
        os.close(reading)
        os.close(writing)


def test_scatter_reports_a_file_that_is_full(tmp_path: Path) -> None:
    # The kernel first writes up to the limit, which is a short write, and then refuses.
    path = tmp_path / "file"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with path.open("w+b") as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
        try:
            with pytest.raises(OSError) as caught:
                scatter(file.fileno(), 0, 0, 2, extents((0, 2, DATA)), b"x" * (2 * PAGE))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"x" * 6000


@pytest.fixture(scope="module")
def slow_writes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Build the shim and return the environment that puts it before the C library."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    where = tmp_path_factory.mktemp("shim")
    (where / "shim.c").write_text(SHIM)
    library = str(where / "shim.so")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, str(where / "shim.c"), "-ldl"], check=True
    )
    before = os.environ.get("LD_PRELOAD", "")  # a sanitizer's library, which has to be the first
    return {**os.environ, "LD_PRELOAD": f"{before} {library}".strip()}


SLOW = """
import sys
from bhystream.memory.scatter import scatter
listed, pages = bytes.fromhex(sys.argv[2]), open(sys.argv[3], "rb").read()
with open(sys.argv[1], "r+b", buffering=0) as file:
    try:
        print(scatter(file.fileno(), 100, 5, 9, listed, pages))
    except OSError as error:
        print(error.errno)
"""


@pytest.mark.parametrize("nothing", [False, True])
def test_scatter_continues_short_writes_and_retries_eintr(
    rng: random.Random, tmp_path: Path, slow_writes: dict[str, str], nothing: bool
) -> None:
    listed = extents((3, 4, DATA), (8, 1, ZERO), (9, 2, DATA))
    pages = rng.randbytes(6 * PAGE)
    image = bytearray(10 * PAGE)
    target, source = tmp_path / "target", tmp_path / "source"
    target.write_bytes(image)
    source.write_bytes(pages)
    environment = {**slow_writes, **({"SHIM_ZERO": "1"} if nothing else {})}
    run = subprocess.run(
        [sys.executable, "-c", SLOW, str(target), listed.hex(), str(source)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    expected = errno.EIO if nothing else place(image, 100, 5, 9, listed, pages)
    assert run.stdout == f"{expected}\n", run.stderr
    assert target.read_bytes() == image


# scatter_into.


def place_into(memory: bytearray, placed: set[int], base: int, listed: bytes, pages: bytes) -> int:
    """Do what scatter_into() does, page by page.  placed: pages of the segment."""
    npages, source, written = len(memory) // PAGE, 0, 0
    for first, n, kind in struct.iter_unpack("<QII", listed):
        for page in range(first, first + n):
            at = (page - base) * PAGE
            is_here = base <= page < base + npages
            if kind == DATA:
                if is_here:
                    memory[at : at + PAGE] = pages[source : source + PAGE]
                    placed.add(page - base)
                    written += 1
                source += PAGE
            elif is_here and page - base in placed:
                memory[at : at + PAGE] = bytes(PAGE)
                placed.remove(page - base)
    return written


def bits_of(bitmap: array[int]) -> set[int]:
    bits = int.from_bytes(bitmap.tobytes(), "little")
    return {page for page in range(64 * len(bitmap)) if bits >> page & 1}


@pytest.mark.parametrize("turn", range(10))
def test_scatter_into_over_segments_and_rounds(rng: random.Random, turn: int) -> None:
    sizes = [rng.choice((1, 5, 63, 64, 65, 130)) for _ in range(3)]
    shift = turn % 8
    # Pages that were never placed are not zero here, to see that they are not touched.
    segments = [bytearray(rng.randbytes(npages * PAGE)) for npages in sizes]
    rooms = [bytearray(bytes(shift) + segment + b"end") for segment in segments]
    maps = [words((npages + 63) // 64) for npages in sizes]
    placed: list[set[int]] = [set() for _ in sizes]
    for _ in range(4):
        items = random_extents(rng, sum(sizes))
        ndata = sum(n for _, n, kind in items if kind == DATA)
        pages = memoryview(rng.randbytes(ndata * PAGE + 8))[shift:][: ndata * PAGE]
        listed = memoryview(bytes(shift) + extents(*items))[shift:]
        base = written = 0
        for number, npages in enumerate(sizes):
            memory = memoryview(rooms[number])[shift : shift + npages * PAGE]
            expected = place_into(
                segments[number], placed[number], base, bytes(listed), bytes(pages)
            )
            assert scatter_into(memory, maps[number], base, listed, pages) == expected
            assert rooms[number] == bytes(shift) + segments[number] + b"end"
            assert bits_of(maps[number]) == placed[number]
            base += npages
            written += expected
        assert written == ndata


def test_pages_that_nobody_placed_are_not_touched(tmp_path: Path) -> None:
    npages = 3 << 18
    with (tmp_path / "memory").open("w+b") as file:
        file.truncate(npages * PAGE)
        memory = mmap.mmap(file.fileno(), npages * PAGE)
        placed = words((npages + 63) // 64)
        zeros = extents((0, npages, ZERO))
        assert scatter_into(memory, placed, 0, zeros, b"") == 0
        assert os.fstat(file.fileno()).st_blocks == 0
        assert scatter_into(memory, placed, 0, extents((77, 1, DATA)), b"x" * PAGE) == 1
        assert scatter_into(memory, placed, 0, zeros, b"") == 0
        assert memory[77 * PAGE : 78 * PAGE] == bytes(PAGE)
        assert 0 < os.fstat(file.fileno()).st_blocks * 512 <= 64 << 10
        assert not any(placed)
        memory.close()


@pytest.mark.parametrize(
    "nbytes, nwords, base, nlist, npages",
    [
        (PAGE - 1, 1, 0, 0, 0),
        (PAGE, 0, 0, 0, 0),
        (PAGE, 2, 0, 0, 0),
        (65 * PAGE, 1, 0, 0, 0),
        (PAGE, 1, -1, 0, 0),
        (PAGE, 1, 2**64 - 1, 0, 0),
        (PAGE, 1, 0, 15, 0),
        (PAGE, 1, 0, 0, 1),
        (PAGE, 1, 0, 16, 0),
    ],
)
def test_scatter_into_refuses(nbytes: int, nwords: int, base: int, nlist: int, npages: int) -> None:
    listed = extents((0, 1, DATA))[:nlist]
    with pytest.raises(ValueError):
        scatter_into(bytearray(nbytes), words(nwords), base, listed, bytes(npages * PAGE))


def test_scatter_into_wants_to_write() -> None:
    listed = extents((0, 1, DATA))
    for memory, placed in ((bytes(PAGE), words(1)), (bytearray(PAGE), bytearray(8))):
        with pytest.raises(WRONG_BUFFER):
            scatter_into(memory, placed, 0, listed, bytes(PAGE))


def test_a_file_and_a_mapping_take_the_same_pages(rng: random.Random, tmp_path: Path) -> None:
    npages, base = 90, 7
    with (tmp_path / "file").open("w+b") as file:
        file.truncate((npages + 1) * PAGE)
        memory = bytearray(npages * PAGE)
        mapped = MappedTarget(memoryview(memory))
        targets: list[Target] = [FileTarget(file.fileno(), PAGE), mapped]
        for _ in range(4):
            items = [(first + base, n, kind) for first, n, kind in random_extents(rng, npages)]
            ndata = sum(n for _, n, kind in items if kind == DATA)
            pages = memoryview(rng.randbytes(ndata * PAGE))
            for target in targets:
                target.place(base, npages, memoryview(extents(*items)), pages)
            assert os.pread(file.fileno(), npages * PAGE, PAGE) == memory
            assert any(memory)
        with pytest.raises(ValueError, match="are not the segment"):
            mapped.place(base, npages - 1, memoryview(b""), memoryview(b""))
        mapped.release()

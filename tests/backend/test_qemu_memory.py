"""Memory that cannot be mapped, and memory in huge pages: a look at it must not allocate any."""

from __future__ import annotations

import mmap
import os
import subprocess
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.backend.base import Target
from bhystream.backend.qemu import ram
from bhystream.backend.qemu.sink import QemuSink
from bhystream.backend.qemu.source import QemuSource
from bhystream.errors import GuestError, as_error
from bhystream.guest import PAGE_BYTES
from bhystream.memory.extent import EXTENT, KIND_ZERO
from bhystream.memory.page import PageHasher
from bhystream.memory.target import Differing
from support.waiting import until

from .qemu_rig import DEADLINE_S, SIZE, Rig, copy_memory, monitor, peer, state_of

HUGE = 2 << 20
EACH = HUGE // PAGE_BYTES
RAM = "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M"
_MFD_HUGETLB_2M = 0x0004 | 21 << 26  # Source: Linux, include/uapi/linux/memfd.h
_POOL = Path("/proc/sys/vm/nr_hugepages")


def huge_pages(what: str) -> int:
    """Return a count of /proc/meminfo.  what: "Total" or "Free"."""
    [line] = [x for x in Path("/proc/meminfo").read_text().splitlines() if f"HugePages_{what}" in x]
    return int(line.split()[1])


@pytest.fixture
def pool() -> Iterator[None]:
    """Lend the host huge pages for two guests."""
    before = _POOL.read_text(encoding="ascii")
    wanted = int(before) + 2 * SIZE // HUGE
    try:
        _POOL.write_text(str(wanted), encoding="ascii")
    except OSError:
        pytest.skip("huge pages are root's to lend")
    try:
        if huge_pages("Total") < wanted:
            pytest.skip("this host has no room for huge pages")
        yield
    finally:
        _POOL.write_text(before, encoding="ascii")


def test_memory_that_cannot_be_mapped_is_no_fault_of_the_program(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, SIZE)
    for size in (1 << 50, SIZE + PAGE_BYTES):  # more than the address space, more than the file
        why = f"guest a: cannot map its memory of {size} bytes: "
        with pytest.raises(GuestError, match=why) as caught:
            ram.map_ram(fd, size, "guest a", mmap.PROT_READ)
        assert "ulimit -v" in caught.value.hint
    os.close(fd)


@pytest.mark.parametrize(
    "raised", [MemoryError(), ImportError("termios.so: failed to map segment from shared object")]
)
def test_a_program_without_memory_says_so(raised: Exception) -> None:
    error = as_error(raised)
    assert (error.status, str(error)) == (69, "there is not enough memory")
    assert "ulimit -v" in error.hint


def test_a_walk_by_a_thread_finds_what_extents_yields(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"x" * PAGE_BYTES, 5 * PAGE_BYTES)
    arguments = fd, 64 * PAGE_BYTES, os.getpid()
    with ram.Walk(*arguments) as walk:
        pass
    assert walk.found == list(ram.extents(*arguments)) != []
    os.close(fd)


def test_a_walk_that_fails_finds_nothing() -> None:
    with ram.Walk(-1, 64 * PAGE_BYTES, os.getpid()) as walk:
        pass
    assert walk.found is None


@pytest.mark.guest
def test_a_system_without_threads_left_walks_with_the_callers(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    source = QemuSource(rig.start("here"))
    until(lambda: list(source.touched()), "memory", DEADLINE_S)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        source.pause()
    assert list(source.touched()) == list(source.touched()) != []
    source.close()


def test_only_hugetlbfs_has_huge_pages(tmp_path: Path) -> None:
    for directory in (tmp_path, Path("/dev/shm")):
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR)
        assert not ram.is_huge(fd)
        os.close(fd)


@pytest.mark.guest  # must not run beside another test that sets up huge pages
def test_huge_pages_that_another_process_has_touched_are_found(pool: None) -> None:
    """QEMU's own page table does not show these pages."""
    fd = os.memfd_create("ram0", _MFD_HUGETLB_2M)
    os.ftruncate(fd, 8 * HUGE)
    other = subprocess.Popen(["sleep", "60"])
    with mmap.mmap(fd, 8 * HUGE) as memory:
        memory[3 * HUGE] = memory[4 * HUGE - 1] = memory[7 * HUGE + 5] = 1
        memory[HUGE] = 0  # allocates a page that is all zero
        free = huge_pages("Free")
        for pid, found in ((os.getpid(), [1, 3, 7]), (other.pid, [3, 7])):
            wanted = [(at * EACH, at * EACH + EACH) for at in found]
            assert list(ram.extents(fd, 8 * HUGE, pid)) == wanted
        memory[4 * HUGE] = 1
        assert list(ram.extents(fd, 8 * HUGE, other.pid)) == [
            (3 * EACH, 5 * EACH),
            (7 * EACH, 8 * EACH),
        ]
        assert huge_pages("Free") == free - 1
    other.kill()
    other.wait()
    os.close(fd)


@pytest.mark.guest
def test_looking_at_huge_pages_takes_none(rig: Rig, pool: None) -> None:
    source = QemuSource(rig.start("here", ram=RAM))
    until(lambda: list(source.touched()), "memory", DEADLINE_S)
    source.pause()
    free = huge_pages("Free")
    found = list(source.touched())
    [view] = source.memory()
    for first, end in found:
        assert len(bytes(view[first * PAGE_BYTES : end * PAGE_BYTES])) == (end - first) * PAGE_BYTES
    assert huge_pages("Free") == free
    assert 0 < sum(end - first for first, end in found) < SIZE // PAGE_BYTES
    inside = {page for first, end in found for page in range(first, end)}
    here = ram.open_ram(rig.processes["here"].pid, SIZE, os.O_RDONLY)
    for page in range(SIZE // PAGE_BYTES):
        assert page in inside or not any(os.pread(here, PAGE_BYTES, page * PAGE_BYTES))
    os.close(here)
    del view
    source.close()


def compared(source: QemuSource, target: Target) -> Differing:
    """Compare a target with the hashes of a paused guest."""
    [view] = source.memory()
    hasher, listed, hashes, done = PageHasher(7), bytearray(), array("Q"), 0
    for first, end in [*source.touched(), (SIZE // PAGE_BYTES,) * 2]:
        listed += EXTENT.pack(done, first - done, KIND_ZERO) + EXTENT.pack(first, end - first, 0)
        found = array("Q", bytes(8 * (end - first)))
        if found:
            hasher.hash_pages(view[first * PAGE_BYTES : end * PAGE_BYTES], found)
        hashes += found
        done = end
    packed = memoryview(hashes.tobytes())
    return target.differing(hasher, 0, memoryview(listed), packed, lambda: None)


@pytest.mark.guest
def test_a_guest_moves_into_huge_pages_that_wait(rig: Rig, pool: None) -> None:
    source = QemuSource(rig.start("here", ram=RAM))
    waiting = rig.start("wait", "-S", "-incoming", "defer", ram=RAM)
    for is_last in (False, True):  # an attempt that fails, and one more
        sink = QemuSink(waiting, {}, None, False, str(rig.state_dir))
        assert sink.check(source.head()) == []
        [destination] = sink.open(b"")
        copy_memory(source, destination)
        if not is_last:
            sink.abort()
            sink.abort()
    paused = source.pause()
    copy_memory(source, destination)
    there = ram.open_ram(peer(waiting), SIZE, os.O_RDONLY)
    here = ram.open_ram(rig.processes["here"].pid, SIZE, os.O_RDONLY)
    [view] = source.memory()
    for at in range(0, SIZE, HUGE):
        assert os.pread(there, HUGE, at) == os.pread(here, HUGE, at)
    blocks = os.fstat(there).st_blocks
    assert blocks * 512 < SIZE
    assert compared(source, destination) == Differing(0, -1)
    assert os.fstat(there).st_blocks == blocks
    sink.load(paused.states())
    sink.start()
    sink.settle()
    assert state_of(waiting) == "running"
    with monitor(waiting) as ask:
        ask("stop")
    os.close(here)
    os.close(there)
    del view
    source.close()

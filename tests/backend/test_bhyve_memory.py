"""A guest's mapped memory, and its pages that need not be read."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import cast

import pytest

from bhystream.backend.bhyve.host import Host, MemoryMap
from bhystream.backend.bhyve.memory import Memory, system_memory
from bhystream.errors import IncompatibleError

NPAGES = 4
SIZE = NPAGES * 4096


class StubVm:
    """A VM of four pages; only the second is resident."""

    def __init__(self, *, is_wired: bool) -> None:
        self._is_wired = is_wired

    def maps(self) -> Sequence[MemoryMap]:
        return [MemoryMap(0, 0, 0, SIZE, 7, self._is_wired)]

    def topology(self) -> tuple[int, int, int]:
        return 1, 1, 1

    def map(self, gpa: int, length_bytes: int) -> mmap.mmap:
        return mmap.mmap(-1, length_bytes)

    def resident(self, mapping: mmap.mmap, gpa: int) -> bytes:
        return b"\0\1\0\0"

    def close(self) -> None:
        pass


class StubHost:
    """The methods that Memory calls of a host; the host's swap is in use."""

    def __init__(self, *, is_wired: bool) -> None:
        self._is_wired = is_wired
        self.has_vm = True
        self.swap = 4096

    def open_vm(self, name: str) -> StubVm:
        return StubVm(is_wired=self._is_wired)

    def exists(self, name: str) -> bool:
        return self.has_vm

    def sysctl(self, name: str) -> str | None:
        return "0"

    def swap_used_bytes(self) -> int:
        return self.swap


@pytest.fixture
def host() -> StubHost:
    return StubHost(is_wired=True)


@pytest.fixture
def memory(host: StubHost) -> Iterator[Memory]:
    made = Memory(cast(Host, host), "web1")
    yield made
    made.close()


def test_pages_that_a_wired_guest_never_touched_are_not_read(memory: Memory) -> None:
    assert memory.is_wired
    assert list(memory.touched()) == [(1, 2)]


def test_a_guest_whose_vm_is_gone_is_not_wired_any_more(host: StubHost, memory: Memory) -> None:
    host.has_vm = False
    assert not memory.is_wired
    assert list(memory.touched()) == [(0, NPAGES)]


def test_without_swap_it_does_not_matter_that_the_vm_is_gone(
    host: StubHost, memory: Memory
) -> None:
    host.has_vm, host.swap = False, 0
    assert list(memory.touched()) == [(1, 2)]


GIB = 1 << 30


def entry(
    gpa: int, length: int, segid: int = 0, offset: int = 0, *, is_wired: bool = True
) -> MemoryMap:
    return MemoryMap(gpa, segid, offset, length, 7, is_wired)


def test_one_domain_is_lowmem_and_highmem() -> None:
    low, high = entry(0, 3 * GIB), entry(4 * GIB, GIB, 0, 3 * GIB)
    rom = entry((4 * GIB) - 4096, 4096, 8)
    assert system_memory([low, entry(3 * GIB, 4096, 9), rom, high], "g") == [low, high]


def test_domains_that_adjoin_are_one_map() -> None:
    """The second domain crosses 3 GiB, so it has two maps."""
    maps = [
        entry(0, 2 * GIB, 0),
        entry(2 * GIB, GIB, 1),
        entry((4 * GIB) - 4096, 4096, 8),
        entry(4 * GIB, GIB, 1, GIB),
        entry(5 * GIB, 2 * GIB, 2, is_wired=False),
    ]
    assert system_memory(maps, "g") == [
        entry(0, 3 * GIB, 0),
        entry(4 * GIB, 3 * GIB, 1, GIB, is_wired=False),
    ]


@pytest.mark.parametrize(
    "maps",
    [
        [],
        [entry(0, GIB), entry(2 * GIB, GIB, 1)],
        [entry(0, GIB), entry(4 * GIB, GIB, 1)],
        [entry(0, 3 * GIB), entry(5 * GIB, GIB, 1)],
        [entry(4096, GIB)],
    ],
)
def test_memory_that_lies_elsewhere_is_refused(maps: Sequence[MemoryMap]) -> None:
    with pytest.raises(IncompatibleError, match=r"^g: its memory lies at"):
        system_memory(maps, "g")

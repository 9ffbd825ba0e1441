"""The conditions under which mincore(2) is believed, and vectors of pages as extents."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import pytest

from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.residency import believes_mincore, dirty_extents, extents

VECTOR_OF_8_GIB = 2 << 20


@dataclass
class StubHost:
    """The methods that the functions call of a host."""

    sysctls: dict[str, str] = field(default_factory=dict)
    swap: int = 0

    def sysctl(self, name: str) -> str | None:
        return self.sysctls.get(name)

    def swap_used_bytes(self) -> int:
        return self.swap


def believed(mapped: str | None, swap: int, *, wired: bool) -> tuple[bool, str]:
    sysctls = {} if mapped is None else {"vm.mincore_mapped": mapped}
    return believes_mincore(cast(Host, StubHost(sysctls, swap)), wired)


def reference(marks: bytes, base_page: int) -> Iterator[tuple[int, int]]:
    """Compute the extents page by page, for comparison."""
    first = None
    for page, mark in enumerate(marks, base_page):
        if mark and first is None:
            first = page
        elif not mark and first is not None:
            yield first, page
            first = None
    if first is not None:
        yield first, base_page + len(marks)


@pytest.mark.parametrize(("swap", "wired"), [(0, False), (0, True), (4096, True)])
def test_mincore_is_believed_where_no_page_of_the_guest_can_be_in_swap(
    swap: int, wired: bool
) -> None:
    assert believed("0", swap, wired=wired) == (True, "")


def test_sysctl_prints_may_end_in_a_newline() -> None:
    assert believed("0\n", 0, wired=False) == (True, "")


def test_mincore_of_our_own_mappings_is_not_believed() -> None:
    assert believed("1", 0, wired=True) == (
        False,
        "vm.mincore_mapped: it is 1 here, not 0, so every page of the guest is read, and so"
        " allocated; sysctl vm.mincore_mapped=0 spares the pages never touched, and"
        " vm.mincore_mapped=0 in /etc/sysctl.conf keeps it so",
    )


def test_mincore_of_an_unknown_kind_is_not_believed() -> None:
    assert believed(None, 0, wired=True) == (
        False,
        "vm.mincore_mapped: this host has no such sysctl, so every page of the guest is read,"
        " and so allocated",
    )


def test_mincore_is_not_believed_where_pages_of_the_guest_may_be_in_swap() -> None:
    assert believed("0", 4096, wired=False) == (
        False,
        "swap: 4096 bytes are in use here, not 0, and the guest is not wired, so every page of"
        " the guest is read, and so allocated; to spare the pages never touched, use no swap"
        " (swapoff -a), or start it with memory.wired=true",
    )


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        (b"", []),
        (b"\0", []),
        (b"\1", [(7, 8)]),
        (b"\0\1\0", [(8, 9)]),
        (b"\1\0\1", [(7, 8), (9, 10)]),
        (b"\0\0\1\1", [(9, 11)]),
        (b"\1\x21\x60\xff", [(7, 11)]),
        (b"\x20\0\0\x80", [(7, 8), (10, 11)]),
    ],
)
def test_extents_are_the_pages_whose_byte_is_not_0(
    marks: bytes, expected: list[tuple[int, int]]
) -> None:
    assert list(extents(marks, 7)) == expected


def test_extents_agree_with_a_loop_over_the_pages() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(400):
        share = rng.choice((1, 8, 64, 128, 250, 255))
        mark = bytes(max(0, value - share) for value in range(256))
        marks = rng.randbytes(rng.randrange(600)).translate(mark)
        base_page = rng.randrange(1 << 40)
        assert list(extents(marks, base_page)) == list(reference(marks, base_page))


def test_extents_of_a_mostly_empty_guest_of_8_gib_take_no_time() -> None:
    marks = bytearray(VECTOR_OF_8_GIB)
    for first in range(0, VECTOR_OF_8_GIB, 1 << 10):
        marks[first : first + 40] = b"\x21" * 40
    vector = bytes(marks)
    best_ns = 1 << 62
    for _ in range(5):
        begin_ns = time.perf_counter_ns()
        count = sum(1 for _ in extents(vector, 0))
        best_ns = min(best_ns, time.perf_counter_ns() - begin_ns)
        assert count == 1 << 11
    assert best_ns < 50_000_000


def test_dirty_extents_do_not_cross_from_one_segment_to_the_next() -> None:
    assert list(dirty_extents([b"\0\1\1", b"\1\0\1"], [0, 3])) == [(1, 3), (3, 4), (5, 6)]


def test_dirty_extents_want_a_base_for_each_vector_before_the_walk() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        dirty_extents([b"\1", b"\1"], [0])

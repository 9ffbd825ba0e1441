"""The comparison of a guest's memory with the source's hashes: what a difference says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from bhystream.errors import ChecksumError
from bhystream.guest import Layout, Segment
from bhystream.memory.extent import EXTENT
from bhystream.memory.page import PageHasher
from bhystream.memory.target import Differing
from bhystream.recv.hashed import MemoryComparison
from bhystream.stream.verify import Hashes

LAYOUT = Layout((Segment("lowmem", 0, 500), Segment("highmem", 1 << 32, 500)))


class Told:
    """A target that says what it is told, and notes where its segment begins."""

    def __init__(self, *found: Differing) -> None:
        self.found = list(found)
        self.bases: list[int] = []

    def place(self, base_page: int, npages: int, extents: memoryview, pages: memoryview) -> None:
        raise AssertionError("nothing is to be placed")

    def differing(
        self,
        hasher: PageHasher,
        base_page: int,
        extents: memoryview,
        hashes: memoryview,
        on_step: Callable[[], None],
    ) -> Differing:
        assert hasher.zero_hash == PageHasher(7).zero_hash
        on_step()
        self.bases.append(base_page)
        return self.found.pop(0)


def compare(*found: Differing) -> MemoryComparison:
    """Compare four sections: three of the first segment, one of the second."""
    made, target = MemoryComparison(LAYOUT, 7), Told(*found)
    steps: list[int] = []
    for number, (first, count) in enumerate([(0, 100), (100, 300), (400, 100), (500, 500)]):
        extents = memoryview(EXTENT.pack(first, count, 1))
        event = Hashes(int(first == 500), extents, memoryview(b""), first == 500)
        where = f"section {number} (HASHES) at offset 0x{number:x}"
        made.compare(target, event, where, lambda: steps.append(1))
        assert made.is_done == event.is_last
    assert target.bases == [0, 0, 0, 500] and len(steps) == 4
    return made


SAME = Differing(0, -1)


def test_without_a_difference_it_is_done() -> None:
    assert compare(SAME, SAME, SAME, SAME).is_done


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            [SAME, SAME, SAME, Differing(1, 513)],
            "section 3 (HASHES) at offset 0x3: page 513, which is page 13 of segment highmem,"
            " is not what the source has; 1 of 1000 pages differ",
        ),
        (
            [Differing(1, 3), SAME, SAME, SAME],
            "section 0 (HASHES) at offset 0x0: page 3, which is page 3 of segment lowmem,"
            " is not what the source has; 1 of 1000 pages differ",
        ),
        (
            [SAME, Differing(2, 103), SAME, Differing(40, 500)],
            "section 1 (HASHES) at offset 0x1: page 103, which is page 103 of segment lowmem,"
            " is not what the source has; 42 of 1000 pages differ",
        ),
    ],
)
def test_the_first_page_is_named_and_all_are_counted(
    found: Sequence[Differing], message: str
) -> None:
    with pytest.raises(ChecksumError) as caught:
        compare(*found)
    assert str(caught.value) == message
    assert caught.value.status == 65

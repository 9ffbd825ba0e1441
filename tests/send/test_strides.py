"""strides(): the whole guest, in order, each page once; and a bit for each page."""

from __future__ import annotations

import random

import pytest

from bhystream.guest import Layout, Segment
from bhystream.send import strides as module
from bhystream.send.strides import bitmap, strides


def layout_of(sizes: list[int]) -> Layout:
    return Layout(tuple(Segment(f"s{i}", None, n) for i, n in enumerate(sizes)))


def test_a_stride_ends_at_the_border_of_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRIDE_PAGES", 3)
    assert list(strides(layout_of([7, 2]))) == [
        (0, 0, 0, 3),
        (0, 0, 3, 6),
        (0, 0, 6, 7),
        (1, 7, 0, 2),
    ]


def test_strides_cover_the_guest_exactly(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(500):
        monkeypatch.setattr(module, "STRIDE_PAGES", rng.randint(1, 50))
        sizes = [rng.choice([1, 2, rng.randint(1, 200)]) for _ in range(rng.randint(1, 6))]
        at = 0
        for segment, base, first, end in strides(layout_of(sizes)):
            assert base == sum(sizes[:segment])
            assert 0 <= first < end <= sizes[segment]
            assert base + first == at, "a gap, or twice"
            at = base + end
        assert at == sum(sizes)


@pytest.mark.parametrize("npages", [0, 1, 63, 64, 65])
def test_a_bitmap_has_a_bit_for_each_page(npages: int) -> None:
    made = bitmap(npages)
    assert npages <= 64 * len(made) <= npages + 64
    assert not any(made)

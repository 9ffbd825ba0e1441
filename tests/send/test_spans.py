"""spans(): the whole guest, in order, each page once."""

from __future__ import annotations

import random

from bhystream.guest import Layout, Segment
from bhystream.send.spans import Span, spans

TWO = Layout((Segment("a", None, 3), Segment("b", None, 2)))


def check_cover(sizes: list[int], touched: list[tuple[int, int]]) -> None:
    layout = Layout(tuple(Segment(f"s{i}", None, n) for i, n in enumerate(sizes)))
    at = 0
    present = []
    for span in spans(layout, iter(touched)):
        base = sum(sizes[: span.segment])
        assert span.base_page == base
        assert 0 <= span.first < span.end <= sizes[span.segment]
        assert base + span.first == at, "a gap, or twice"
        at = base + span.end
        if span.present:
            present.append((base + span.first, at))
    assert at == sum(sizes)
    assert present == touched


def test_spans_of_nothing_touched() -> None:
    assert list(spans(TWO, iter([]))) == [
        Span(0, 0, 0, 3, False),
        Span(1, 3, 0, 2, False),
    ]


def test_spans_of_everything_touched() -> None:
    assert list(spans(TWO, iter([(0, 3), (3, 5)]))) == [
        Span(0, 0, 0, 3, True),
        Span(1, 3, 0, 2, True),
    ]


def test_spans_cover_the_guest_exactly(rng: random.Random) -> None:
    for _ in range(2000):
        sizes = [rng.choice([1, 2, rng.randint(1, 200)]) for _ in range(rng.randint(1, 6))]
        touched: list[tuple[int, int]] = []
        base = 0
        for size in sizes:
            cuts = sorted(rng.sample(range(size + 1), min(size + 1, 2 * rng.randint(0, 5))))
            pairs = zip(cuts[::2], cuts[1::2], strict=False)
            touched += [(base + first, base + end) for first, end in pairs]
            base += size
        check_cover(sizes, touched)


def test_spans_of_neighbouring_extents() -> None:
    # Two extents may touch: a file system may report them so.
    check_cover([10], [(0, 4), (4, 10)])
    check_cover([4, 4], [(2, 4), (4, 6), (6, 8)])

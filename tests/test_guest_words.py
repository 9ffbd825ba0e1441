"""guest.py: pages, segments, and which page lies in which segment."""

from __future__ import annotations

from bhystream.guest import PAGE_BYTES, Layout, Segment


def test_pages_count_through_the_segments() -> None:
    sizes = [3, 1, 4]
    layout = Layout(tuple(Segment(f"s{at}", None, n) for at, n in enumerate(sizes)))
    assert (layout.npages, layout.size_bytes) == (8, 8 * PAGE_BYTES)
    assert layout.starts == (0, 3, 4)
    assert [layout.segment_of(page) for page in range(8)] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert [layout.end_of(segment) for segment in range(3)] == [3, 4, 8]
    assert list(layout.extents()) == [(0, 3), (3, 4), (4, 8)]


def test_a_layout_is_what_its_segments_are() -> None:
    one, other = Segment("a", 0, 1), Segment("b", None, 2)
    assert Layout((one, other)) == Layout((one, other)) != Layout((other, one))
    assert repr(Layout((one,))) == f"Layout(segments=({one!r},))"


def test_a_guest_without_memory_has_no_page() -> None:
    assert (Layout(()).npages, Layout(()).starts, list(Layout(()).extents())) == (0, (), [])

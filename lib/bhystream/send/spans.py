"""The guest's memory in the order of a round: spans, touched and untouched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bhystream.guest import Layout


class Span(NamedTuple):
    """A piece of one segment, in pages of that segment: [first, end).

    base_page: the segment's first page, in global pages.  present: the pages of the
    span may be other than zero, and may be read.
    """

    segment: int
    base_page: int
    first: int
    end: int
    present: bool


def spans(layout: Layout, touched: Iterator[tuple[int, int]]) -> Iterator[Span]:
    """Yield spans that cover the whole guest in order, touched and untouched.

    touched: extents [first, end) in global pages, which ascend; none crosses a segment
    border.  No span is empty.
    """
    pending = next(touched, None)
    for index, (base, border) in enumerate(layout.extents()):
        at = base
        while pending and pending[0] < border:
            first, end = pending
            if at < first:
                yield Span(index, base, at - base, first - base, False)
            yield Span(index, base, first - base, end - base, True)
            at = end
            pending = next(touched, None)
        if at < border:
            yield Span(index, base, at - base, border - base, False)

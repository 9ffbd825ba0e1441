"""A malformed stream for each rule of bhystream(5), HASHES; and sound ones."""

from __future__ import annotations

import pytest
import xxhash

from bhystream.errors import FormatError
from support.both import agree, refused_last
from support.streams import (
    DATA,
    END,
    HASHES,
    NO_MEMORY,
    SEED,
    TIME,
    ZERO,
    Extent,
    Maker,
    before,
    hashes,
    page,
)

# The guest of before(): 7 pages in one segment.
ALL: list[Extent] = [(0, 2, DATA), (2, 4, ZERO), (6, 1, DATA)]
PAGES = [page(1), page(2), page(3)]
PLACE = "the section may not stand here"
COUNT = "number of hashes is not that of the DATA extents"


def of(fill: int) -> int:
    return xxhash.xxh3_64_intdigest(page(fill), seed=SEED)


def two_segments() -> Maker:
    maker = Maker().head((b"a", 0, 3), (b"b", 1 << 32, 4)).memory(0, [(0, 3, ZERO)])
    return maker.memory(0, [(3, 4, ZERO)]).round_end(0, 0, 7, flags=1)


def test_both_readers_find_what_is_hashed() -> None:
    recorder, _ = agree(before(HASHES).hashes(ALL, PAGES).time().end().raw)
    assert recorder.hashes == [(0, 1, of(1)), (1, 1, of(2)), (2, 4, None), (6, 1, of(3))]


def test_the_pages_may_be_stated_in_any_pieces() -> None:
    maker = two_segments().hashes([(0, 1, ZERO), (1, 1, DATA)], [page(1)]).hashes([(2, 1, ZERO)])
    maker.add(0x80000ABC, b"new").hashes([(3, 3, ZERO)]).hashes([(6, 1, DATA)], [page(0)])
    recorder, _ = agree(maker.state(b"s", 0, b"x", flags=1).time().end().raw)
    assert [first for first, _, _ in recorder.hashes] == [0, 1, 2, 3, 6]


def test_a_stream_may_have_none() -> None:
    recorder, _ = agree(before(TIME).time().end().raw)
    assert recorder.hashes == []


@pytest.mark.parametrize(
    ("maker", "last"),
    [
        (Maker().head(), "HEAD_END"),
        (Maker().head().round_0(flags=0), "ROUND_END"),
        (before(HASHES).state(b"n", 0, b"x", flags=1), "STATE"),
        (before(HASHES).state_optional(b"n", 0, b"x", flags=1), "STATE_OPTIONAL"),
        (before(END), "TIME"),
        (before(END).end(), "END"),
        (Maker(mandatory=NO_MEMORY).head(), "HEAD_END"),
    ],
)
def test_it_stands_between_the_rounds_and_the_state(maker: Maker, last: str) -> None:
    refused_last(maker.hashes(ALL, PAGES), FormatError, f"it may not follow {last}", PLACE)


@pytest.mark.parametrize(
    ("raw", "message", "why"),
    [
        (hashes([], []), "0 extents are not 1 to 4096", "length is too short"),
        (hashes([(0, 7, ZERO)], [])[:-8], "length is 16, not 24", "length is too short"),
        (hashes(ALL, PAGES)[:-8], "length is 72, not 80", "wrong length"),
        (hashes(ALL, PAGES) + bytes(8), "length is 88, not 80", "wrong length"),
        (
            hashes(ALL, PAGES, nextents=4097),
            "4097 extents are not 1 to 4096",
            "number of extents is not 1 to 4096",
        ),
        (
            hashes(ALL, PAGES, nhashes=2**32 - 1),
            "4294967295 hashes are more than 16384",
            "more than 16384 hashes",
        ),
        (hashes([(0, 7, DATA)], PAGES), "3 hashes, but the extents hold 7 pages", COUNT),
        (hashes([(0, 7, ZERO)], PAGES), "3 hashes, but the extents hold 0 pages", COUNT),
        (hashes([(0, 7, 2)], []), "the extent at page 0 is of kind 2", "unknown kind of extent"),
        (hashes([(0, 0, ZERO)], []), "the extent at page 0 is empty", "empty extent"),
        (hashes([(1, 6, ZERO)], []), "HASHES leaves out page 0", "gap in HASHES"),
        (
            hashes([(0, 2, ZERO), (3, 4, ZERO)], []),
            "HASHES leaves out page 2",
            "gap in HASHES",
        ),
        (
            hashes([(0, 3, ZERO), (2, 5, ZERO)], []),
            "page 2 is stated again, or out of order",
            "extents do not ascend",
        ),
        (
            hashes([(0, 8, ZERO)], []),
            "the extent at page 0 leaves its segment",
            "extent is outside the guest",
        ),
        (
            hashes([(7, 1, ZERO)], []),
            "page 7 is outside the guest's 7 pages",
            "extent is outside the guest",
        ),
        (
            hashes([(2**64 - 1, 1, ZERO)], []),
            "page 18446744073709551615 is outside the guest's 7 pages",
            "extent is outside the guest",
        ),
    ],
)
def test_a_malformed_one_is_refused(raw: bytes, message: str, why: str) -> None:
    refused_last(before(HASHES).add(HASHES, raw), FormatError, message, why)


def test_one_section_has_pages_of_one_segment() -> None:
    maker = two_segments().hashes([(0, 3, ZERO), (3, 4, ZERO)])
    message = "the extent at page 3 leaves its segment"
    refused_last(maker, FormatError, message, "extents are not in one segment")


@pytest.mark.parametrize(
    ("again", "message", "why"),
    [
        (0, "page 0 is stated again, or out of order", "extents do not ascend"),
        (2, "page 2 is stated again, or out of order", "extents do not ascend"),
        (4, "HASHES leaves out page 3", "gap in HASHES"),
    ],
)
def test_a_later_section_begins_where_the_one_before_ends(
    again: int, message: str, why: str
) -> None:
    maker = before(HASHES).hashes([(0, 3, ZERO)]).hashes([(again, 7 - again, ZERO)])
    refused_last(maker, FormatError, message, why)


def test_no_page_is_stated_after_the_last() -> None:
    message = "page 0 is stated again, or out of order"
    maker = before(HASHES).hashes([(0, 7, ZERO)]).hashes([(0, 7, ZERO)])
    refused_last(maker, FormatError, message, "extents do not ascend")


def test_the_last_pages_are_not_left_out() -> None:
    maker = before(HASHES).hashes([(0, 6, ZERO)]).time()
    refused_last(maker, FormatError, "HASHES leaves out page 6", "gap in HASHES")
    maker = before(HASHES).hashes([(0, 6, ZERO)]).state(b"s", 0, b"x", flags=1).time()
    refused_last(maker, FormatError, "HASHES leaves out page 6", "gap in HASHES")

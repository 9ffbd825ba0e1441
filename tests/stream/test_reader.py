"""Reader alone: what a section looks like, and what Reader asks of its input.

The test_malformed files have what Reader refuses, with Walk on top of it.
"""

from __future__ import annotations

import io
import os

import pytest
import xxhash

from bhystream.errors import FormatError, TruncatedError
from bhystream.stream.format import Feature, Form, Header, Type
from bhystream.stream.reader import Reader, place
from support.both import LARGEST_CAP, Input
from support.streams import (
    ABORT,
    CAPS,
    DATA,
    HOST_JSON,
    IDENT,
    MEMORY,
    OPTIONAL,
    PAD,
    SEED,
    ZERO,
    ZSTD,
    Maker,
    abort,
    before,
    header,
    memory_list,
    page,
)


def test_a_place_is_named_as_in_the_page() -> None:
    assert place(7, Type.MEMORY, 0x1F3000) == "section 7 (MEMORY) at offset 0x1f3000"
    assert place(7, None, 0x1F3000) == "section 7 at offset 0x1f3000"


def test_the_header_is_read_at_once_and_no_more() -> None:
    source = Input(Maker(2, ZSTD).head().raw)
    reader = Reader(source)
    assert reader.header == Header(Form.KEPT, Feature.ZSTD, IDENT, SEED)
    assert source.offset == reader.offset_bytes == 72
    assert reader.sequence == 0


def test_optional_features_are_not_looked_at() -> None:
    assert Reader(Input(header(optional=2**64 - 1))).header.form is Form.PLAIN


def test_a_section_has_its_frame_and_its_payload() -> None:
    maker = Maker().host().add(OPTIONAL, b"new", flags=9)
    reader = Reader(Input(maker.raw))
    first = reader.next()
    assert first is not None
    assert (first.type, first.flags, first.sequence, first.offset_bytes) == (1, 0, 0, 72)
    assert bytes(first.payload) == HOST_JSON
    assert bytes(first.body) == b""
    second = reader.next()
    assert second is not None
    assert (second.type, second.flags, second.sequence) == (OPTIONAL, 9, 1)
    assert second.offset_bytes == maker.last[2]
    assert bytes(second.payload) == b"new"
    assert reader.next() is None
    assert reader.offset_bytes == len(maker.raw)
    assert reader.sequence == 2


def test_a_memory_section_is_its_list_and_its_body() -> None:
    extents = [(0, 1, DATA), (1, 6, ZERO)]
    for frame in (b"", b"not looked at here"):
        maker = before(MEMORY, mandatory=ZSTD)
        if frame:
            maker.zstd(extents, [page(1)], frame)
        else:
            maker.memory(0, extents, [page(1)])
        reader = Reader(Input(maker.raw))
        section = [one for _ in range(maker.count) if (one := reader.next())][-1]
        assert bytes(section.payload) == memory_list(0, extents, [page(1)])
        assert bytes(section.body) == (frame or page(1))


def test_counts_are_refused_as_soon_as_they_are_there() -> None:
    """The rest of the list may never come."""
    head = memory_list(0, [(0, 1, DATA)], [page(1)], zero=7)[:16]
    maker = before(MEMORY).add(MEMORY, head, length=4268048)
    fds = os.pipe()
    os.write(fds[1], maker.raw)
    with io.FileIO(fds[0]) as source, pytest.raises(FormatError, match="reserved field"):
        reader = Reader(source)
        while reader.next():
            pass
    os.close(fds[1])


def test_the_digest_is_over_the_checksums_before_end() -> None:
    maker = Maker().full()
    sums = maker.sums
    reader = Reader(Input(maker.end().raw))
    while reader.next():
        pass
    assert reader.digest.digest() == xxhash.xxh3_128_digest(sums, SEED)


def test_a_later_section_does_not_show_in_an_earlier_ones_length() -> None:
    maker = Maker().host().add(PAD, bytes(1 << 20)).add(PAD, b"short").add(PAD)
    reader = Reader(Input(maker.raw))
    sizes = [len(one.payload) for _ in range(4) if (one := reader.next())]
    assert sizes == [len(HOST_JSON), 1 << 20, 5, 0]


@pytest.mark.parametrize(("kind", "cap"), CAPS)
def test_no_read_is_larger_than_the_cap(kind: int, cap: int) -> None:
    """The length is within the cap, and no byte follows: no read asks for more than the cap."""
    maker = before(kind).add(kind, length=cap)
    source = Input(maker.raw)
    reader = Reader(source)
    with pytest.raises(TruncatedError):
        while reader.next():
            pass
        raise TruncatedError("a section without payload is whole")
    assert source.largest <= max(cap, 65536) <= LARGEST_CAP


def test_a_pipe_is_read_and_left_open() -> None:
    fds = os.pipe()
    raw = Maker().host().add(ABORT, abort(b"x")).raw
    os.write(fds[1], raw)
    os.close(fds[1])
    with io.FileIO(fds[0]) as source:
        reader = Reader(source)
        assert [one.type for _ in range(2) if (one := reader.next())] == [1, ABORT]
        assert reader.next() is None
        assert not source.closed

"""A malformed stream for each rule of bhystream(5): MEMORY, ROUND_END."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import pytest
import zstandard

from bhystream.errors import ChecksumError, FormatError, TruncatedError
from support.both import Input, Recorder, agree, refused, refused_last, where
from support.streams import (
    DATA,
    MEMORY,
    ROUND_END,
    ZERO,
    ZSTD,
    Extent,
    Maker,
    before,
    memory_list,
    page,
    round_end,
)

CHECKSUM = (ChecksumError, "checksum differs", "wrong checksum")
EXTENTS = "number of extents is not 1 to 4096"
RESERVED = "reserved field is not zero"


# The list of a MEMORY section.  The guest has 7 pages in one segment.


@pytest.mark.parametrize(
    ("payload", "message", "why"),
    [
        (memory_list(0, [], []), "0 extents are not 1 to 4096", EXTENTS),
        (memory_list(0, [(0, 1, ZERO)], [], nextents=0), "0 extents are not 1 to 4096", EXTENTS),
        (memory_list(0, [(0, 1, ZERO)], [], nextents=4097), "4097 extents are not 1 to 4096",
         EXTENTS),
        (memory_list(0, [], [], nextents=2**32 - 1), "4294967295 extents are not 1 to 4096",
         EXTENTS),
        (memory_list(0, [(0, 1, DATA)], [], npages=1025), "1025 pages are more than 1024",
         "more than 1024 pages"),
        (memory_list(0, [(0, 1, DATA)], [], npages=2**32 - 1),
         "4294967295 pages are more than 1024", "more than 1024 pages"),
        (memory_list(0, [(0, 1, ZERO)], []) + bytes(8), "length 40 does not fit 0 pages",
         "wrong length"),
        (memory_list(0, [(0, 1, ZERO)], [])[:-1], "length 31 does not fit 0 pages",
         "wrong length"),
        (memory_list(0, [(0, 1, DATA)], [page(1)]), "length 40 does not fit 1 pages",
         "wrong length"),
        (memory_list(0, [(0, 1, DATA)], [page(1)]) + bytes(4095),
         "length 4135 does not fit 1 pages", "wrong length"),
        (memory_list(0, [(0, 7, ZERO)], [], zero=1), RESERVED, RESERVED),
        (memory_list(0, [(0, 7, ZERO)], [], zero=2**31), RESERVED, RESERVED),
        (memory_list(1, [(0, 7, ZERO)], []), "round 1, but round 0 is under way", "wrong round"),
        (memory_list(2**32 - 1, [(0, 7, ZERO)], []),
         "round 4294967295, but round 0 is under way", "wrong round"),
        (memory_list(0, [(0, 1, 2)], []), "the extent at page 0 is of kind 2",
         "unknown kind of extent"),
        (memory_list(0, [(0, 1, 2**31)], []), "the extent at page 0 is of kind 2147483648",
         "unknown kind of extent"),
        (memory_list(0, [(0, 0, ZERO)], []), "the extent at page 0 is empty", "empty extent"),
        (memory_list(0, [(0, 1, ZERO), (1, 0, DATA)], []), "the extent at page 1 is empty",
         "empty extent"),
        (memory_list(0, [(0, 8, ZERO)], []), "the extent at page 0 leaves its segment",
         "extent is outside the guest"),
        (memory_list(0, [(0, 7, ZERO), (7, 1, ZERO)], []),
         "the extent at page 7 leaves its segment", "extent is outside the guest"),
        (memory_list(0, [(0, 2**32 - 1, ZERO)], []), "the extent at page 0 leaves its segment",
         "extent is outside the guest"),
        (memory_list(0, [(7, 1, ZERO)], []), "page 7 is outside the guest's 7 pages",
         "extent is outside the guest"),
        (memory_list(0, [(2**64 - 1, 2, ZERO)], []),
         "page 18446744073709551615 is outside the guest's 7 pages",
         "extent is outside the guest"),
        (memory_list(0, [(0, 2, ZERO), (1, 1, ZERO)], []),
         "page 1 is stated again, or out of order", "extents do not ascend"),
        (memory_list(0, [(0, 2, ZERO), (0, 1, ZERO)], []),
         "page 0 is stated again, or out of order", "extents do not ascend"),
        (memory_list(0, [(1, 1, ZERO)], []), "round 0 leaves out page 0", "gap in round 0"),
        (memory_list(0, [(0, 1, ZERO), (2, 1, ZERO)], []), "round 0 leaves out page 1",
         "gap in round 0"),
        (memory_list(0, [(0, 1, DATA)], []), "0 pages, but the extents hold 1",
         "number of pages is not that of the DATA extents"),
        (memory_list(0, [(0, 7, ZERO)], [page(1)]) + page(1), "1 pages, but the extents hold 0",
         "number of pages is not that of the DATA extents"),
        (memory_list(0, [(0, 2, DATA)], [page(1)]) + page(1), "1 pages, but the extents hold 2",
         "number of pages is not that of the DATA extents"),
    ],
)  # fmt: skip
def test_bad_list_is_refused(payload: bytes, message: str, why: str) -> None:
    _, nextents, npages, _ = struct.unpack_from("<IIII", payload)
    covered = 16 + 16 * nextents + 8 * npages
    maker = before(MEMORY).add(MEMORY, payload, covered=covered)
    refused_last(maker, FormatError, message, why)


@pytest.mark.parametrize(
    ("first", "second", "message", "why"),
    [
        ((0, 2, ZERO), (1, 1, ZERO), "page 1 is stated again, or out of order",
         "extents do not ascend"),
        ((0, 2, ZERO), (0, 2, ZERO), "page 0 is stated again, or out of order",
         "extents do not ascend"),
        ((0, 2, ZERO), (3, 1, ZERO), "round 0 leaves out page 2", "gap in round 0"),
    ],
)  # fmt: skip
def test_extents_ascend_over_the_sections_of_round_0(
    first: Extent, second: Extent, message: str, why: str
) -> None:
    maker = before(MEMORY).memory(0, [first]).memory(0, [second])
    refused_last(maker, FormatError, message, why)


@pytest.mark.parametrize("second", [(3, 1, ZERO), (2, 2, ZERO), (0, 1, ZERO)])
def test_extents_ascend_over_the_sections_of_a_later_round(second: Extent) -> None:
    maker = Maker().head().round_0(flags=0).memory(1, [(3, 1, ZERO)]).memory(1, [second])
    message = f"page {second[0]} is stated again, or out of order"
    refused_last(maker, FormatError, message, "extents do not ascend")


@pytest.mark.parametrize(
    "extents",
    [
        [(0, 6, ZERO)],
        [(0, 5, ZERO), (5, 1, ZERO)],
        [(0, 4, ZERO), (4, 2, ZERO)],
        [(0, 7, ZERO)],
    ],
)
def test_extents_of_a_section_lie_in_one_segment(extents: list[Extent]) -> None:
    maker = Maker().head((b"ram", 0, 5), (b"rom", 2**40, 2)).memory(0, extents)
    message = f"the extent at page {extents[-1][0]} leaves its segment"
    refused_last(maker, FormatError, message, "extents are not in one segment")
    maker = Maker().head((b"a", 0, 1), (b"ram", 4096, 5), (b"rom", 2**40, 2))
    maker.memory(0, [(0, 1, ZERO)]).memory(0, [(at + 1, n, kind) for at, n, kind in extents])
    message = f"the extent at page {extents[-1][0] + 1} leaves its segment"
    refused_last(maker, FormatError, message, "extents are not in one segment")


def test_the_round_number_follows_the_rounds() -> None:
    for number in (0, 2):
        maker = Maker().head().round_0(flags=0).memory(number, [(0, 1, ZERO)])
        message = f"round {number}, but round 1 is under way"
        refused_last(maker, FormatError, message, "wrong round")


def test_a_list_is_believed_only_after_its_checksum() -> None:
    maker = before(MEMORY).memory(0, [(0, 1, DATA)], [page(1)], flip=1)
    refused_last(maker, *CHECKSUM)
    # The checksum is checked before any page byte is read: here there is none.
    head = memory_list(0, [(0, 1, DATA)], [page(1)])
    maker = before(MEMORY).add(MEMORY, head, length=len(head) + 4096, flip=1)
    refused_last(maker, *CHECKSUM)
    maker = before(MEMORY).add(MEMORY, head, length=len(head) + 4096)
    refused_last(
        maker, TruncatedError, "the stream ends 4096 bytes early", "the payload is incomplete"
    )


def test_a_list_is_checked_before_a_page_byte_is_read() -> None:
    """The stream has no page byte, and what is wrong is the flags or the extents."""
    head = memory_list(0, [(0, 1, DATA), (0, 1, DATA)], [page(1), page(2)])
    maker = before(MEMORY).add(MEMORY, head, length=len(head) + 2 * 4096)
    why = "extents do not ascend"
    refused_last(maker, FormatError, "page 0 is stated again, or out of order", why)
    head = memory_list(0, [(0, 1, DATA)], [page(1)])
    maker = before(MEMORY).add(MEMORY, head, length=len(head) + 4096, flags=2)
    refused_last(maker, FormatError, "flags 0x2 are not known", "unknown flag")


def test_counts_are_checked_if_the_stream_ends_behind_them() -> None:
    """The counts are wrong, whatever would have followed."""
    head = memory_list(0, [(0, 1, DATA)], [page(1)], npages=2)
    for size in (16, 24, len(head)):
        maker = before(MEMORY).add(MEMORY, head[:size], length=len(head) + 4096)
        refused_last(maker, FormatError, "length 4136 does not fit 2 pages", "wrong length")
    head = memory_list(0, [(0, 1, DATA)], [page(1)])
    for size in (0, 8, 16, 32):
        maker = before(MEMORY).add(MEMORY, head[:size], length=len(head) + 4096)
        message = f"the stream ends {len(head) - size} bytes early"
        refused_last(maker, TruncatedError, message, "the payload is incomplete")


def test_counts_are_believed_only_if_the_length_fits() -> None:
    # 4268048 bytes are within the cap, but the stream has no list of 4096 extents to read.
    maker = before(MEMORY).add(MEMORY, memory_list(0, [], [], nextents=4096), length=4268048)
    refused_last(maker, FormatError, "length 4268048 does not fit 0 pages", "wrong length")


@pytest.mark.parametrize("flags", [2, 3, 2**31])
def test_unknown_flag_of_memory_is_refused(flags: int) -> None:
    if flags & 1:
        payload = memory_list(0, [(0, 1, DATA)], [page(1)]) + zstandard.compress(page(1))
        maker = before(MEMORY, mandatory=ZSTD).add(MEMORY, payload, flags=flags)
    else:
        maker = before(MEMORY).memory(0, [(0, 1, ZERO)], flags=flags)
    refused_last(maker, FormatError, f"flags 0x{flags:x} are not known", "unknown flag")


@pytest.mark.parametrize(
    ("extents", "bad", "named"),
    [
        ([(0, 3, DATA)], 0, 0),
        ([(0, 3, DATA)], 2, 2),
        ([(0, 2, ZERO), (2, 1, DATA), (3, 1, ZERO), (4, 2, DATA)], 0, 2),
        ([(0, 2, ZERO), (2, 1, DATA), (3, 1, ZERO), (4, 2, DATA)], 2, 5),
    ],
)
def test_changed_page_bytes_are_refused_by_the_page_hash(
    extents: list[Extent], bad: int, named: int
) -> None:
    pages = [page(1), page(2), page(3)]
    head = memory_list(0, extents, pages)
    pages[bad] = pages[bad][:-1] + b"!"
    maker = before(MEMORY).add(MEMORY, head + b"".join(pages), covered=len(head))
    message = f"the bytes of page {named} are not what was sent"
    refused_last(maker, ChecksumError, message, "wrong page hash")


def test_the_checksum_ends_before_the_page_bytes() -> None:
    head = memory_list(0, [(0, 1, DATA)], [page(1)])
    refused_last(before(MEMORY).add(MEMORY, head + page(1)), *CHECKSUM)


# zstd


def frame_of(pages: list[bytes], **more: Any) -> bytes:
    return zstandard.ZstdCompressor(**more).compress(b"".join(pages))


def blocks(stated: int, *sizes: int, window: int | None = None) -> bytes:
    """Return a frame of RLE blocks of `sizes` bytes; window: its descriptor, else one segment."""
    descriptor = b"\xa0" if window is None else bytes((0x80, window))
    frame = b"\x28\xb5\x2f\xfd" + descriptor + struct.pack("<I", stated)
    for at, size in enumerate(sizes):
        last = at == len(sizes) - 1
        frame += (size << 3 | 1 << 1 | last).to_bytes(3, "little") + b"\1"
    return frame


# A frame that states the dictionary number 0, which is none.
NO_DICTIONARY = b"\x28\xb5\x2f\xfd\xa1\0" + blocks(4096, 4096)[5:]
WINDOW_8_MIB = 13 << 3  # 2^(10 + 13) bytes, RFC 8878, 3.1.1.1.2


@pytest.mark.parametrize(
    "frame",
    [blocks(4096, 4096), blocks(4096, 4000, 96), blocks(4096, 4096, window=WINDOW_8_MIB),
     frame_of([page(1)]), frame_of([page(1)], write_checksum=True), frame_of([page(1)], level=19),
     NO_DICTIONARY],
)  # fmt: skip
def test_sound_frames_are_taken(frame: bytes) -> None:
    maker = Maker(mandatory=ZSTD).head().zstd([(0, 1, DATA), (1, 6, ZERO)], [page(1)], frame)
    walked, _ = agree(maker.round_end(0, 1, 6, flags=1).time().end().raw)
    assert walked.memory == {0: page(1)}


def test_the_padding_of_a_frame_is_checked_before_its_checksum() -> None:
    frame = frame_of([page(1)])
    payload = memory_list(0, [(0, 1, DATA), (1, 6, ZERO)], [page(1)]) + frame
    size = -len(payload) % 8
    assert size, "this frame needs no padding"
    maker = before(MEMORY, mandatory=ZSTD)
    maker.add(MEMORY, payload, flags=1, filler=b"\1" * size, flip=1)
    refused_last(maker, FormatError, "padding is not zero", "the padding is not zero")
    maker = before(MEMORY, mandatory=ZSTD).add(MEMORY, payload, flags=1, flip=1)
    refused_last(maker, *CHECKSUM)


SIZE = ("the zstd frame does not state 4096 bytes", "zstd frame does not state the content size")
BROKEN = "the zstd frame is broken: ..."  # "..." stands for the words of libzstd
PART = (BROKEN, "zstd frame is incomplete")
MORE = (BROKEN, "bytes after the zstd frame")
DAMAGE = (BROKEN, "zstd frame is damaged")
DICTIONARY = b"\x28\xb5\x2f\xfd\xa1\x07" + blocks(4096, 4096)[5:]


@pytest.mark.parametrize(
    ("frame", "message", "why"),
    [
        (page(1)[:4000], BROKEN, "not a zstd frame"),
        (b"\x28\xb5\x2f\xfd", BROKEN, "not a zstd frame"),
        (struct.pack("<II", 0x184D2A50, 8) + bytes(8), SIZE[0], "not a zstd frame"),
        (struct.pack("<II", 0x184D2A50, 8) + bytes(8) + blocks(4096, 4096), SIZE[0],
         "not a zstd frame"),
        (frame_of([page(1)], write_content_size=False), *SIZE),
        (blocks(4095, 4095), *SIZE),
        (blocks(2**32 - 1, 4096), *SIZE),
        (frame_of([page(1), page(1)]), *SIZE),
        (DICTIONARY, BROKEN, "zstd frame names a dictionary"),
        (blocks(4096, 4096, window=WINDOW_8_MIB + 1),
         "the zstd frame needs a window of 9437184 bytes", "zstd frame needs a window over 8 MiB"),
        (blocks(4096, 4096, window=21 << 3), "the zstd frame needs a window of 2147483648 bytes",
         "zstd frame needs a window over 8 MiB"),
        (frame_of([page(1)])[:-1], *PART),
        (blocks(4096, 4096)[:9], *PART),
        (frame_of([page(1)], write_checksum=True)[:-4], *PART),
        (frame_of([page(1)], write_checksum=True)[:-1], *PART),
        (blocks(4096, 4096, 0)[:-4], *PART),
        (frame_of([page(1)]) + b"\0", *MORE),
        (blocks(4096, 4096) * 2, *MORE),
        (blocks(4096, 4096) + struct.pack("<II", 0x184D2A50, 0), *MORE),
        (blocks(4096, 4096) + blocks(0, 0), *MORE),
        (blocks(4096, 4095), *DAMAGE),
        (blocks(4096, 4097), *DAMAGE),
        (blocks(4096, 4096, 1), *DAMAGE),
        (blocks(4096, *[4096] * 500), *DAMAGE),
        (frame_of([page(1)], write_checksum=True)[:-1] + b"?", *DAMAGE),
    ],
)  # fmt: skip
def test_bad_frame_is_refused(frame: bytes, message: str, why: str) -> None:
    maker = Maker(mandatory=ZSTD).head().zstd([(0, 1, DATA)], [page(1)], frame)
    refused_last(maker, FormatError, message, why)


def test_the_pages_of_a_frame_have_hashes_too() -> None:
    maker = Maker(mandatory=ZSTD).head().zstd([(0, 1, DATA)], [page(1)], frame_of([page(2)]))
    message = "the bytes of page 0 are not what was sent"
    refused_last(maker, ChecksumError, message, "wrong page hash")


def test_a_bomb_is_refused_without_room_for_what_it_makes() -> None:
    # A section within its cap has a million blocks of 128 KiB: 128 GiB from 4 MB.
    pages = [page(1)] * 1024
    frame = blocks(4 << 20, *[1 << 17] * 32)[:-4] + (1 << 20 | 2).to_bytes(3, "little") + b"\1"
    frame += ((1 << 20 | 2).to_bytes(3, "little") + b"\1") * 1_000_000
    maker = Maker(mandatory=ZSTD).head((b"ram", 0, 1024)).zstd([(0, 1024, DATA)], pages, frame)
    source = Input(maker.raw)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="the zstd frame is broken"):
            Recorder(source).run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
    refused_last(maker, FormatError, PART[0], "zstd frame is incomplete")


@pytest.mark.parametrize("size", [0, 4096, 4097])
def test_a_frame_is_smaller_than_its_pages(size: int) -> None:
    # The longest frame that may stand for one page has 4095 bytes.
    maker = Maker(mandatory=ZSTD).head().zstd([(0, 1, DATA)], [page(1)], bytes(size))
    message = f"length {40 + size} does not fit 1 pages"
    refused_last(maker, FormatError, message, "wrong length")


def test_zstd_takes_the_feature_and_pages() -> None:
    maker = before(MEMORY).zstd([(0, 1, DATA)], [page(1)])
    message = "compressed, but the header does not have ZSTD"
    refused_last(maker, FormatError, message, "ZSTD without the stream's feature")
    maker = before(MEMORY, mandatory=ZSTD).zstd([(0, 1, ZERO)], [], b"")
    refused_last(maker, FormatError, "length 32 does not fit 0 pages", "ZSTD without pages")


def test_a_frame_is_under_the_checksum() -> None:
    maker = before(MEMORY, mandatory=ZSTD).zstd([(0, 1, DATA)], [page(1)])
    for at in (maker.last[2] + 32, maker.last[2] + 32 + 40):  # the round, the frame
        raw = bytearray(maker.raw)
        raw[at] ^= 1
        refused(bytes(raw), where(maker), *CHECKSUM)


# ROUND_END

COUNTS = "counts {} data and {} zero pages, but the round had 0 and 7"


@pytest.mark.parametrize(
    ("payload", "message", "why"),
    [
        (round_end(1, 0, 7), "round 1, but round 0 is under way", "wrong round"),
        (round_end(0, 0, 7, zero=1), RESERVED, RESERVED),
        (round_end(0, 1, 7), COUNTS.format(1, 7), "wrong count of data pages"),
        (round_end(0, 0, 6), COUNTS.format(0, 6), "wrong count of zero pages"),
        (round_end(0, 7, 0), COUNTS.format(7, 0), "wrong count of data pages"),
    ],
)
def test_bad_round_end_is_refused(payload: bytes, message: str, why: str) -> None:
    maker = before(MEMORY).memory(0, [(0, 7, ZERO)])
    refused_last(maker.add(ROUND_END, payload, flags=1), FormatError, message, why)


def test_round_0_states_every_page() -> None:
    maker = before(MEMORY).memory(0, [(0, 6, ZERO)]).round_end(0, 0, 6)
    refused_last(maker, FormatError, "round 0 leaves out page 6", "gap in round 0")
    maker = before(MEMORY).round_end(0, 0, 0)
    refused_last(maker, FormatError, "round 0 leaves out page 0", "gap in round 0")


def test_counts_are_of_one_round() -> None:
    maker = Maker().head().round_0(flags=0).round_end(1, 3, 4, flags=1)
    message = "counts 3 data and 4 zero pages, but the round had 0 and 0"
    refused_last(maker, FormatError, message, "wrong count of data pages")

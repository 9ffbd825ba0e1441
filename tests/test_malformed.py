"""A malformed stream for each rule of bhystream(5): the header, the frame of sections, the trailer.

Each is sound but for that one rule, its checksums and digest included, and both readers refuse
it: Walk with the message, the section and the offset asserted here, spec_reader for the reason
beside it.  The head's contents are in test_malformed_head.py, the rounds and the states in
test_malformed_memory.py.
"""

from __future__ import annotations

import struct

import pytest

from bhystream.errors import AbortedError, BhyError, ChecksumError, FormatError, TruncatedError
from both import Input, Make, Recorder, refused, refused_last, spec_refused, where
from spec_reader import Refused
from streams import (
    ABORT, ANSWERED, CAPS, CONFIG, DEVICES, END, GO, HEAD_END, HOST, HOST_JSON, KEPT, LAYOUT,
    MEMORY, NAMES, NO_MEMORY, NONCE, OPTIONAL, PAD, PLAIN, ROUND_END, SHORTEST, STATE, TIME, Maker,
    abort, before, header, page,
)  # fmt: skip

SOUND = Maker().full().end().raw
NOT_STREAM = "this is not a bhystream(5)"
TEXT_MODE = "the transport changed line ends or the high bit: it is in text mode"
CHECKSUM = (ChecksumError, "checksum differs", "wrong checksum")


# The header


@pytest.mark.parametrize(
    ("raw", "error", "message", "why"),
    [
        (b"", TruncatedError, "the stream ends after 0 bytes of 72", "incomplete"),
        (b"\x89BHS", TruncatedError, "the stream ends after 4 bytes of 72", "incomplete"),
        (header()[:71], TruncatedError, "the stream ends after 71 bytes of 72", "incomplete"),
        (b"HTTP/1", FormatError, NOT_STREAM, "incomplete"),
        (b"The text of a password prompt: " * 9, FormatError, NOT_STREAM, "wrong magic"),
        (header(magic=b"\x89BHT\r\n\x1a\n"), FormatError, NOT_STREAM, "wrong magic"),
        (header(magic=b"\x89BHS\n\n\x1a\n"), FormatError, TEXT_MODE, "wrong magic"),
        (SOUND.replace(b"\n", b"\r\n"), FormatError, TEXT_MODE, "wrong magic"),
        (SOUND.replace(b"\r\n", b"\n"), FormatError, TEXT_MODE, "wrong magic"),
        (SOUND.replace(b"\x1a", b""), FormatError, TEXT_MODE, "wrong magic"),
        (bytes(byte & 127 for byte in SOUND), FormatError, TEXT_MODE, "wrong magic"),
        (header(flip=1), ChecksumError, "checksum differs", "wrong header checksum"),
        (header(version=0), FormatError, "version 0 of the stream is not known here (known: 1)",
         "unknown version"),
        (header(version=2), FormatError, "version 2 of the stream is not known here (known: 1)",
         "unknown version"),
        (header(0), FormatError, "form 0 is not known", "unknown form"),
        (header(4), FormatError, "form 4 is not known", "unknown form"),
        (header(mandatory=5), FormatError, "mandatory features 0x4 are not known",
         "unknown mandatory feature"),
        (header(mandatory=2**63), FormatError,
         "mandatory features 0x8000000000000000 are not known", "unknown mandatory feature"),
        (header(reserved=b"\0\0\0\0\0\0\0\1"), FormatError, "reserved field is not zero",
         "reserved field is not zero"),
        # In this order: the first that is broken is named.
        (header(flip=1, version=2), ChecksumError, "checksum differs", "wrong header checksum"),
        (header(9, version=2), FormatError, "version 2 of the stream is not known here (known: 1)",
         "unknown version"),
        (header(9, mandatory=4), FormatError, "form 9 is not known", "unknown form"),
        (header(mandatory=4, reserved=b"\1" * 8), FormatError,
         "mandatory features 0x4 are not known", "unknown mandatory feature"),
    ],
)  # fmt: skip
def test_bad_header_is_refused(raw: bytes, error: type[BhyError], message: str, why: str) -> None:
    why = "the stream's header is incomplete" if why == "incomplete" else why
    refused(raw, "header at offset 0x0", error, message, why)


# What all sections share


def test_a_section_header_has_to_be_complete() -> None:
    message = (TruncatedError, "its header is cut short", "the section header is incomplete")
    refused_last(Maker().host().then(bytes(31)), *message)
    refused_last(Maker().then(b"\1"), *message)


@pytest.mark.parametrize("make", [Maker, Maker().host, Maker(NO_MEMORY).head, Maker().full])
def test_end_of_file_is_not_a_trailer(make: Make) -> None:
    refused_last(
        make().then(b""),
        TruncatedError,
        "the stream ends here, without an END section",
        "the section header is incomplete",
    )


@pytest.mark.parametrize("kind", [0, 14, 0x7FFFFFFF])
def test_unknown_section_is_refused(kind: int) -> None:
    refused_last(
        Maker().host().add(kind),
        FormatError,
        "a mandatory section that is not known here",
        "unknown section type",
    )


@pytest.mark.parametrize(("kind", "cap"), CAPS)
@pytest.mark.parametrize("beyond", [1, 2**24, 2**63, 2**64 - 2**24])
def test_length_over_the_cap_is_refused_unread(kind: int, cap: int, beyond: int) -> None:
    maker = before(kind).add(kind, length=cap + beyond)
    message = f"length {cap + beyond} is over the cap of {cap}"
    refused_last(maker, FormatError, message, "length is over the cap")
    source = Input(maker.raw + bytes(100))
    with pytest.raises(FormatError):
        Recorder(source).run()
    assert source.offset == len(maker.raw)
    assert source.largest <= 65536


@pytest.mark.parametrize(
    ("kind", "length", "message"),
    [
        (LAYOUT, 7, "length is too small"), (MEMORY, 15, "length is too small"),
        (ROUND_END, 23, "length is 23, not 24"), (STATE, 7, "length is too small"),
        (TIME, 8, "length is 8, not 16"), (END, 56, "length is 56, not 64"),
        (GO, 15, "length is 15, not 16"), (ABORT, 8, "length is too small"),
    ],
)  # fmt: skip
def test_length_that_is_too_short_is_refused(kind: int, length: int, message: str) -> None:
    why = "wrong length" if kind == LAYOUT else "length is too short"
    refused_last(before(kind).add(kind, bytes(length)), FormatError, message, why)


@pytest.mark.parametrize("kind", [kind for kind, _ in CAPS])
@pytest.mark.parametrize("wrong", [-1, 1, 2**32])
def test_wrong_sequence_number_is_refused(kind: int, wrong: int) -> None:
    maker = before(kind)
    number = (maker.count + wrong) % 2**64
    maker.add(kind, bytes(SHORTEST.get(kind, 0)), sequence=number)
    message = f"sequence number is {number}"
    refused_last(maker, FormatError, message, "wrong sequence number")


@pytest.mark.parametrize("kind", [HOST, LAYOUT, PAD, OPTIONAL, STATE, ABORT])
def test_a_payload_has_to_be_complete(kind: int) -> None:
    maker = before(kind).add(kind, bytes(8), length=56)
    refused_last(
        maker, TruncatedError, "the stream ends 48 bytes early", "the payload is incomplete"
    )


def test_padding_has_to_be_complete_and_zero() -> None:
    assert len(HOST_JSON) % 8 == 3
    maker = Maker().add(HOST, HOST_JSON, filler=bytes(4))
    refused_last(
        maker, TruncatedError, "the stream ends 1 bytes early", "the padding is incomplete"
    )
    for at in range(5):
        filler = bytes(at) + b"\1" + bytes(4 - at)
        maker = Maker().add(HOST, HOST_JSON, filler=filler)
        refused_last(maker, FormatError, "padding is not zero", "the padding is not zero")


@pytest.mark.parametrize("kind", [kind for kind, _ in CAPS if kind != MEMORY])
def test_wrong_checksum_is_refused(kind: int) -> None:
    maker = before(kind)
    refused_last(maker.add(kind, bytes(SHORTEST.get(kind, 0)), flip=1), *CHECKSUM)
    # The sections of another stream: its id is under the checksum too.
    maker = before(kind)
    maker.add(kind, bytes(SHORTEST.get(kind, 0)))
    raw = maker.raw[: maker.last[2]] + maker.raw[maker.last[2] :].replace(b"\0", b"\1", 0)
    start = maker.last[2]
    raw = raw[: start + 4] + b"\1" + raw[start + 5 :]  # a flag, under the old checksum
    refused(raw, where(maker), *CHECKSUM)


@pytest.mark.parametrize("kind", [kind for kind, _ in CAPS if kind not in (MEMORY, OPTIONAL)])
@pytest.mark.parametrize("flags", [1, 2, 2**31])
def test_unknown_flag_is_refused(kind: int, flags: int) -> None:
    if kind in (ROUND_END, STATE):
        flags |= 2
    maker = before(kind).add(kind, bytes(SHORTEST.get(kind, 0)), flags=flags)
    refused_last(maker, FormatError, f"flags 0x{flags:x} are not known", "unknown flag")


# The order.  What may stand at a place, and how Walk names what may not.
PLACES: list[tuple[Make, list[int], str]] = [
    (Maker, [HOST, ABORT], "the header"),
    (lambda: Maker().host(), [LAYOUT, PAD, OPTIONAL, ABORT], "HOST"),
    (lambda: before(CONFIG), [CONFIG, PAD, OPTIONAL, ABORT], "LAYOUT"),
    (lambda: before(DEVICES), [DEVICES, PAD, OPTIONAL, ABORT], "CONFIG"),
    (lambda: before(HEAD_END), [HEAD_END, PAD, OPTIONAL, ABORT], "DEVICES"),
    (lambda: before(MEMORY), [MEMORY, ROUND_END, PAD, OPTIONAL, ABORT], "HEAD_END"),
    (lambda: before(MEMORY).memory(0, [(0, 1, 1)]), [MEMORY, ROUND_END, PAD, OPTIONAL, ABORT],
     "MEMORY"),
    (lambda: Maker().head().round_0(flags=0), [MEMORY, ROUND_END, PAD, OPTIONAL, ABORT],
     "ROUND_END"),
    (lambda: before(STATE), [STATE, TIME, PAD, OPTIONAL, ABORT], "ROUND_END"),
    (lambda: before(STATE).add(PAD), [STATE, TIME, PAD, OPTIONAL, ABORT], "ROUND_END"),
    (lambda: before(STATE).state(b"s", 0, b"1", flags=1), [STATE, TIME, PAD, OPTIONAL, ABORT],
     "STATE"),
    (lambda: before(END), [END, PAD, OPTIONAL, ABORT], "TIME"),
    (lambda: Maker(mandatory=NO_MEMORY).head(), [END, PAD, OPTIONAL, ABORT], "HEAD_END"),
    (lambda: before(GO), [GO, PAD], "END"),
    (lambda: before(GO).add(PAD), [GO, PAD], "END"),
    (lambda: before(GO).add(GO, NONCE), [PAD], "GO"),
    (lambda: before(GO).add(GO, NONCE).add(PAD), [PAD], "GO"),
    (lambda: Maker(ANSWERED, NO_MEMORY).head().end(), [PAD], "END"),
    (lambda: Maker(PLAIN).full().end(), [], "END"),
    (lambda: Maker(KEPT).full().end(), [], "END"),
    (lambda: Maker(PLAIN, NO_MEMORY).head().end(), [], "END"),
]  # fmt: skip


def misplaced(kind: int, after: str) -> str:
    if kind == ABORT:
        return "it follows END"
    if kind in (PAD, OPTIONAL):
        return "it stands before HOST" if after == "the header" else "it follows END"
    return f"it may not follow {after}"


@pytest.mark.parametrize("at", range(len(PLACES)))
@pytest.mark.parametrize("kind", [kind for kind, _ in CAPS])
def test_section_in_the_wrong_place_is_refused(at: int, kind: int) -> None:
    make, allowed, after = PLACES[at]
    maker = make()
    ended = maker.form != ANSWERED and after == "END"
    why = "bytes after the last section" if ended else "the section may not stand here"
    if kind not in allowed:
        maker.add(kind, bytes(SHORTEST.get(kind, 0)))
        refused_walk(maker, misplaced(kind, after))
        spec_refused(maker.raw, where(maker.unnamed() if ended else maker), why)
        return
    # In place: what is found then is the wrong sequence number.
    maker.add(kind, sequence=99)
    refused_last(maker, FormatError, "sequence number is 99", "wrong sequence number")


def refused_walk(maker: Maker, message: str) -> None:
    recorder = Recorder(Input(maker.raw))
    with pytest.raises(FormatError) as caught:
        recorder.run()
    assert str(caught.value) == f"{where(maker)}: {message}"


@pytest.mark.parametrize("form", [PLAIN, KEPT])
@pytest.mark.parametrize("more", [b"\0", bytes(31)])
def test_bytes_after_the_trailer_are_refused(form: int, more: bytes) -> None:
    refused(
        (maker := Maker(form).full().end().then(more)).raw,
        where(maker),
        TruncatedError,
        "its header is cut short",
        "bytes after the last section",
    ) if form == 0 else trailing(Maker(form).full().end().then(more))


def trailing(maker: Maker) -> None:
    recorder = Recorder(Input(maker.raw))
    with pytest.raises(TruncatedError) as caught:
        recorder.run()
    assert str(caught.value) == f"{where(maker)}: its header is cut short"
    spec_refused(maker.raw, where(maker), "bytes after the last section")

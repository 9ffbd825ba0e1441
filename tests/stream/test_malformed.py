"""A malformed stream for each rule of bhystream(5): the header, the frame of sections, the trailer.

Each stream breaks only that one rule: its checksums and digest are right.  Both readers refuse the
stream: Walk with the message, the section and the offset asserted here, spec_reader for the reason
beside them.  The head's contents are in test_malformed_head.py, the rounds in
test_malformed_memory.py, the states in test_malformed_state.py.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest
import xxhash

from bhystream.errors import AbortedError, BhyError, ChecksumError, FormatError, TruncatedError
from spec_reader import read
from support.both import Input, Make, Recorder, refused, refused_last, where
from support.streams import (
    ABORT,
    ANSWERED,
    CAPS,
    CONFIG,
    CONFIG_JSON,
    DEVICES,
    DEVICES_JSON,
    DISKS,
    END,
    GO,
    HASHES,
    HEAD_END,
    HOST,
    HOST_JSON,
    IDENT,
    KEPT,
    LAYOUT,
    MEMORY,
    NAMES,
    NO_MEMORY,
    NONCE,
    OPTIONAL,
    PAD,
    PLAIN,
    REHEARSAL,
    ROUND_END,
    SEED,
    SHORTEST,
    STATE,
    STATE_OPTIONAL,
    STATE_ZEROS,
    TIME,
    Maker,
    abort,
    before,
    disks,
    header,
    layout,
    page,
    state,
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
        # The checks have this order; the error names the first rule that is broken.
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


# Rules of all sections


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
        (STATE_ZEROS, 7, "length is too small"), (STATE_OPTIONAL, 7, "length is too small"),
        (REHEARSAL, 0, "it is empty"),
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
    # A flag is set, and the checksum, which covers the section header too, stays the old one.
    maker = before(kind)
    raw = bytearray(maker.add(kind, bytes(SHORTEST.get(kind, 0))).raw)
    raw[maker.last[2] + 4] ^= 1
    refused(bytes(raw), where(maker), *CHECKSUM)


@pytest.mark.parametrize("kind", [kind for kind, _ in CAPS if kind not in (MEMORY, OPTIONAL)])
@pytest.mark.parametrize("flags", [1, 2, 2**31])
def test_unknown_flag_is_refused(kind: int, flags: int) -> None:
    if kind in (ROUND_END, STATE, STATE_ZEROS, STATE_OPTIONAL):
        flags |= 2
    maker = before(kind).add(kind, bytes(SHORTEST.get(kind, 0)), flags=flags)
    refused_last(maker, FormatError, f"flags 0x{flags:x} are not known", "unknown flag")


# The order of sections: a stream so far, the types that may follow, and Walk's name for the place.
STATES = [STATE, STATE_ZEROS, STATE_OPTIONAL, TIME, PAD, OPTIONAL, ABORT]
PLACES: list[tuple[Make, list[int], str]] = [
    (Maker, [HOST, ABORT], "the header"),
    (lambda: Maker().host(), [LAYOUT, PAD, OPTIONAL, ABORT], "HOST"),
    (lambda: before(CONFIG), [CONFIG, PAD, OPTIONAL, ABORT], "LAYOUT"),
    (lambda: before(DEVICES), [DEVICES, PAD, OPTIONAL, ABORT], "CONFIG"),
    (lambda: before(HEAD_END), [HEAD_END, PAD, OPTIONAL, ABORT], "DEVICES"),
    (lambda: before(MEMORY), [REHEARSAL, MEMORY, ROUND_END, PAD, OPTIONAL, ABORT], "HEAD_END"),
    (lambda: before(MEMORY).add(PAD).add(OPTIONAL),
     [REHEARSAL, MEMORY, ROUND_END, PAD, OPTIONAL, ABORT], "HEAD_END"),
    (lambda: before(MEMORY).add(REHEARSAL, b"{}"), [MEMORY, ROUND_END, PAD, OPTIONAL, ABORT],
     "REHEARSAL"),
    (lambda: before(MEMORY).memory(0, [(0, 1, 1)]), [MEMORY, ROUND_END, PAD, OPTIONAL, ABORT],
     "MEMORY"),
    (lambda: Maker().head().round_0(flags=0), [MEMORY, ROUND_END, PAD, OPTIONAL, ABORT],
     "ROUND_END"),
    (lambda: before(STATE), [HASHES, *STATES], "ROUND_END"),
    (lambda: before(STATE).add(PAD), [HASHES, *STATES], "ROUND_END"),
    (lambda: before(HASHES).hashes([(0, 1, 1)]).add(PAD), [HASHES, *STATES], "HASHES"),
    (lambda: before(STATE).state(b"s", 0, b"1", flags=1), STATES, "STATE"),
    (lambda: before(STATE).state_zeros(b"s", 0, 1, flags=1), STATES, "STATE_ZEROS"),
    (lambda: before(STATE).state_optional(b"s", 0, b"1", flags=1),
     [STATE_OPTIONAL, TIME, PAD, OPTIONAL, ABORT], "STATE_OPTIONAL"),
    (lambda: before(STATE).state_optional(b"s", 0, b"", flags=1).add(PAD),
     [STATE_OPTIONAL, TIME, PAD, OPTIONAL, ABORT], "STATE_OPTIONAL"),
    (lambda: before(END), [DISKS, END, PAD, OPTIONAL, ABORT], "TIME"),
    (lambda: before(DISKS).add(DISKS, disks((b"d", 512, [(0, 512, 0)]))),
     [END, PAD, OPTIONAL, ABORT], "DISKS"),
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
    ended = not allowed
    started = after == "GO" or (ended and not maker.dry)
    if kind in allowed:  # the readers then find the wrong sequence number
        maker.add(kind, sequence=99)
        message = "sequence number is 99"
        refused_last(maker, FormatError, message, "wrong sequence number", started=started)
        return
    why = "bytes after the last section" if ended else "the section may not stand here"
    maker.add(kind, bytes(SHORTEST.get(kind, 0)))
    refused_last(maker, FormatError, misplaced(kind, after), why, started=started)


@pytest.mark.parametrize("form", [PLAIN, KEPT])
@pytest.mark.parametrize("more", [b"\0", bytes(31)])
def test_bytes_after_the_trailer_are_refused(form: int, more: bytes) -> None:
    refused_last(
        Maker(form).full().end().then(more),
        TruncatedError,
        "its header is cut short",
        "bytes after the last section",
        started=True,
    )


def test_a_second_section_of_the_head_is_refused() -> None:
    ram = layout((b"ram", 0, 7))
    sound = {HOST: HOST_JSON, LAYOUT: ram, CONFIG: CONFIG_JSON, DEVICES: DEVICES_JSON}
    for kind in (HOST, LAYOUT, CONFIG, DEVICES, HEAD_END):
        maker = before(kind)
        for _ in range(2):
            maker.add(kind, sound.get(kind, b""))
        message = f"it may not follow {NAMES[kind]}"
        refused_last(maker, FormatError, message, "the section may not stand here")


# TIME, END, GO, ABORT


def test_a_pause_of_some_length_at_no_time_is_refused() -> None:
    maker = before(TIME).time(0, 1)
    refused_last(maker, FormatError, "the pause has a duration, but no time", "paused never")


@pytest.mark.parametrize(
    ("wrong", "message", "why"),
    [
        ({"what": 5}, "what is 5, but counted 1", "unknown bit in what"),
        ({"what": 0}, "what is 0, but counted 1", "wrong MAY_START"),
        ({"what": 3}, "what is 3, but counted 1", "wrong NO_MEMORY"),
        ({"rounds": 2}, "rounds is 2, but counted 1", "wrong number of rounds"),
        ({"sections": 11}, "sections is 11, but counted 10", "wrong number of sections"),
        ({"offset": 0}, "offset_bytes is 0, but counted {offset}", "wrong offset"),
        ({"data": 4}, "data_pages is 4, but counted 3", "wrong data pages"),
        ({"zeros": 3}, "zero_pages is 3, but counted 4", "wrong zero pages"),
        ({"states": 4}, "state_bytes is 4, but counted 3", "wrong state bytes"),
        ({"digest": bytes(16)}, f"digest is {'0' * 32}, but counted {{digest}}", "wrong digest"),
    ],
)
def test_bad_end_is_refused(wrong: dict[str, Any], message: str, why: str) -> None:
    digest = Maker().full().end().raw[-16:].hex()
    maker = Maker().full().end(**wrong)
    message = message.format(offset=maker.last[2], digest=digest)
    refused_last(maker, ChecksumError, message, why)


@pytest.mark.parametrize(
    ("form", "mandatory", "what", "sound", "why"),
    [
        (KEPT, 0, 0, 1, "wrong MAY_START"),
        (ANSWERED, 0, 1, 0, "wrong MAY_START"),
        (PLAIN, NO_MEMORY, 3, 2, "wrong MAY_START"),
        (ANSWERED, NO_MEMORY, 3, 2, "wrong MAY_START"),
        (PLAIN, NO_MEMORY, 0, 2, "wrong NO_MEMORY"),
        (ANSWERED, 0, 2, 0, "wrong NO_MEMORY"),
    ],
)
def test_what_follows_from_form_and_feature(
    form: int, mandatory: int, what: int, sound: int, why: str
) -> None:
    maker = Maker(form, mandatory)
    maker = (maker.head() if mandatory else maker.full()).end(what=what)
    refused_last(maker, ChecksumError, f"what is {what}, but counted {sound}", why)


def test_digest_of_the_low_half_first_is_refused() -> None:
    digest = Maker().full().end().raw[-16:]
    swapped = digest[8:] + digest[:8]
    message = f"digest is {swapped.hex()}, but counted {digest.hex()}"
    refused_last(Maker().full().end(digest=swapped), ChecksumError, message, "wrong digest")


def test_the_digest_is_over_sections_of_every_type() -> None:
    # The digest is that of a stream in which a PAD stands in place of the section of `kind`.
    for kind in (PAD, OPTIONAL, STATE, STATE_OPTIONAL):
        short = Maker().head().round_0()
        long = Maker().head().round_0()
        for _ in range(2):
            short.add(PAD)
        long.add(PAD)
        is_state = kind in (STATE, STATE_OPTIONAL)
        long.add(kind, state(b"s", 0, b"") if is_state else b"x", flags=is_state)
        wrong = short.time().end().raw[-16:]
        right = long.time().raw and Maker.end(long).raw[-16:]
        assert wrong != right
        raw = long.raw[:-16] + wrong
        start = long.last[2]
        head = raw[start : start + 24]
        checksum = xxhash.xxh3_64_intdigest(IDENT + head + raw[start + 32 :], seed=SEED)
        raw = raw[: start + 24] + struct.pack("<Q", checksum) + raw[start + 32 :]
        message = f"digest is {wrong.hex()}, but counted {right.hex()}"
        refused(raw, where(long), ChecksumError, message, "wrong digest")


@pytest.mark.parametrize(
    ("payload", "message", "why"),
    [
        (abort(b"x", status=63), "status 63 is not 64 to 77", "status is not 64 to 77"),
        (abort(b"x", status=78), "status 78 is not 64 to 77", "status is not 64 to 77"),
        (abort(b"x", zero=1), "reserved field is not zero", "reserved field is not zero"),
        (abort(b"\xff"), "the text is not UTF-8", "text is not UTF-8"),
        (abort(b"a\nb"), "the text has control characters", "control character in the text"),
        (abort(b"a\0"), "the text has control characters", "control character in the text"),
        (abort(b"\x1f"), "the text has control characters", "control character in the text"),
        (abort(b"\x7f"), "the text has control characters", "control character in the text"),
        (abort("\x80".encode()), "the text has control characters",
         "control character in the text"),
        (abort("\x9f".encode()), "the text has control characters",
         "control character in the text"),
    ],
)  # fmt: skip
def test_bad_abort_is_refused(payload: bytes, message: str, why: str) -> None:
    refused_last(before(ABORT).add(ABORT, payload), FormatError, message, why)


ABORTS: list[Make] = [
    Maker, lambda: Maker().host(), lambda: Maker().head(),
    lambda: Maker().head().memory(0, [(0, 1, 0)], [page(1)]),
    lambda: before(STATE).state(b"s", 0, b"1"), lambda: Maker().full(),
    lambda: Maker(mandatory=NO_MEMORY).head(), lambda: Maker().host().add(PAD),
]  # fmt: skip


@pytest.mark.parametrize("make", ABORTS)
@pytest.mark.parametrize("more", [b"", b"\0", bytes(32)])
def test_an_aborted_stream_starts_nothing(make: Make, more: bytes) -> None:
    text = "interrupted: \N{SNOWMAN} \xa0~"
    maker = make().add(ABORT, abort(text.encode(), status=77))
    recorder = Recorder(Input(maker.raw + more))
    with pytest.raises(AbortedError) as caught:
        recorder.run()
    assert str(caught.value) == f"the source gave up (status 77): {text}"
    assert caught.value.status == 69
    assert not recorder.started
    assert recorder.input.offset == len(maker.raw)
    assert read(io.BytesIO(maker.raw + more)).abort == (77, text)


def test_the_longest_text_of_an_abort_is_taken() -> None:
    maker = Maker().add(ABORT, abort(b"x" * 1016, status=64))
    with pytest.raises(AbortedError, match=r"\(status 64\): x{1016}$"):
        Recorder(Input(maker.raw)).run()


# The order of the checks if two rules are broken at once.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Maker().add(99, length=2**63), "a mandatory section that is not known here"),
        (lambda: Maker().add(LAYOUT, length=2**63), "it may not follow the header"),
        (lambda: Maker().add(HOST, length=2**63, sequence=5),
         "length 9223372036854775808 is over the cap of 65536"),
        (lambda: Maker().add(HOST, b"{", length=9, sequence=5), "sequence number is 5"),
        (lambda: Maker().add(HOST, b"{", length=9, flip=1), "the stream ends 1 bytes early"),
        (lambda: Maker().add(HOST, b"{", filler=b"\1" * 7, flip=1), "padding is not zero"),
        (lambda: Maker().add(HOST, b"{", flip=1, flags=1), "checksum differs"),
        (lambda: Maker().add(HOST, b"{", flags=1), "flags 0x1 are not known"),
    ],
)  # fmt: skip
def test_the_first_broken_rule_is_named(make: Make, message: str) -> None:
    maker = make()
    with pytest.raises(BhyError) as caught:
        Recorder(Input(maker.raw)).run()
    assert str(caught.value) == f"{where(maker)}: {message}"

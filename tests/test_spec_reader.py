"""Tests of spec_reader.py, with streams built here by struct.pack from bhystream(5).

Every byte is packed in this file: nothing is taken from the reader but `read` and `Refused`, nor
from the package.  `Maker` writes what it is told, right or wrong; a test of a rule breaks exactly
that rule, and asserts the section, its type and the reason.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
import xxhash
import zstandard

from spec_reader import Refused, Stream, read

IDENT = bytes(range(16))
SEED = 0x0123456789ABCDEF
NONCE = bytes(range(100, 116))
PLAIN, KEPT, ANSWERED = 1, 2, 3
HOST, LAYOUT, CONFIG, DEVICES, HEAD_END, PAD, MEMORY = 1, 2, 3, 4, 5, 6, 7
ROUND_END, STATE, TIME, END, GO, ABORT = 8, 9, 10, 11, 12, 13
OPTIONAL = 0x80000ABC
NAMES = {
    1: "HOST", 2: "LAYOUT", 3: "CONFIG", 4: "DEVICES", 5: "HEAD_END", 6: "PAD", 7: "MEMORY",
    8: "ROUND_END", 9: "STATE", 10: "TIME", 11: "END", 12: "GO", 13: "ABORT",
}  # fmt: skip
HOST_JSON = b'{"hypervisor": "qemu", "program": "test 1"}'

Extent = tuple[int, int, int]


def page(fill: int) -> bytes:
    return bytes([fill]) * 4096


def header(form: int = PLAIN, **wrong: Any) -> bytes:
    raw = struct.pack(
        "<8sIIQQ16sQ8s",
        wrong.get("magic", b"\x89\x42\x48\x53\x0d\x0a\x1a\x0a"),
        wrong.get("version", 1),
        form,
        wrong.get("mandatory", 0),
        wrong.get("optional", 0),
        IDENT,
        SEED,
        wrong.get("reserved", bytes(8)),
    )
    checksum = xxhash.xxh3_64_intdigest(raw, seed=0) ^ wrong.get("flip", 0)
    return raw + struct.pack("<Q", checksum)


def layout(*segments: tuple[bytes, int, int], size: int = 4096) -> bytes:
    raw = struct.pack("<II", size, len(segments))
    return raw + b"".join(struct.pack("<32sQQ", *segment) for segment in segments)


def memory_list(
    number: int, extents: list[Extent], pages: list[bytes], zero: int = 0, npages: int | None = None
) -> bytes:
    npages = len(pages) if npages is None else npages
    raw = struct.pack("<IIII", number, len(extents), npages, zero)
    raw += b"".join(struct.pack("<QII", *extent) for extent in extents)
    return raw + b"".join(
        struct.pack("<Q", xxhash.xxh3_64_intdigest(one, seed=SEED)) for one in pages
    )


def state(name: bytes, part: int, raw: bytes, zero: int = 0) -> bytes:
    head = struct.pack("<HHI", len(name), zero, part)
    return head + name + bytes(-len(name) % 8) + raw


class Maker:
    """A stream under construction; `last` is the section that a test breaks."""

    def __init__(self, form: int = PLAIN, mandatory: int = 0, optional: int = 0) -> None:
        self.form = form
        self.dry = bool(mandatory & 2)
        self.raw = header(form, mandatory=mandatory, optional=optional)
        self.sums = self.raw[64:72]
        self.count = 0
        self.rounds = self.data = self.zeros = self.state_bytes = 0
        self.last: tuple[int | None, str | None, int] = (None, None, 0)

    def add(
        self,
        kind: int,
        payload: bytes = b"",
        *,
        flags: int = 0,
        covered: int | None = None,
        length: int | None = None,
        sequence: int | None = None,
        flip: int = 0,
        filler: bytes | None = None,
    ) -> Maker:
        """Add a section; `covered` payload bytes are under its checksum, all if None."""
        self.last = (self.count, NAMES.get(kind), len(self.raw))
        head = struct.pack(
            "<IIQQ",
            kind,
            flags,
            len(payload) if length is None else length,
            self.count if sequence is None else sequence,
        )
        body = payload if covered is None else payload[:covered]
        checksum = struct.pack(
            "<Q", xxhash.xxh3_64_intdigest(IDENT + head + body, seed=SEED) ^ flip
        )
        self.sums += checksum
        self.raw += head + checksum + payload
        self.raw += bytes(-len(payload) % 8) if filler is None else filler
        self.count += 1
        return self

    def host(self) -> Maker:
        return self.add(HOST, HOST_JSON)

    def layout(self) -> Maker:
        return self.add(LAYOUT, layout((b"ram", 0, 7)))

    def config(self) -> Maker:
        return self.add(CONFIG, b'{"name": "web1", "smp": 2}')

    def devices(self) -> Maker:
        return self.add(DEVICES, b'["uart", "rtc"]')

    def head(self) -> Maker:
        return self.host().layout().config().devices().add(HEAD_END)

    def memory(self, number: int, extents: list[Extent], pages: list[bytes], **more: Any) -> Maker:
        head = memory_list(number, extents, pages)
        self.data += len(pages)
        self.zeros += sum(count for _, count, kind in extents if kind == 1)
        return self.add(MEMORY, head + b"".join(pages), covered=len(head), **more)

    def zstd(self, extents: list[Extent], pages: list[bytes], frame: bytes | None = None) -> Maker:
        frame = zstandard.compress(b"".join(pages)) if frame is None else frame
        self.data += len(pages)
        self.zeros += sum(count for _, count, kind in extents if kind == 1)
        return self.add(MEMORY, memory_list(self.rounds, extents, pages) + frame, flags=1)

    def round_end(self, number: int, data: int, zeros: int, *, flags: int = 0) -> Maker:
        self.rounds += 1
        return self.add(ROUND_END, struct.pack("<IIQQ", number, 0, data, zeros), flags=flags)

    def round_0(self, *, flags: int = 1) -> Maker:
        """Pages 0, 1 and 6 have bytes, 2 to 5 are zero."""
        self.memory(0, [(0, 2, 0), (2, 4, 1)], [page(1), page(2)])
        return self.memory(0, [(6, 1, 0)], [page(3)]).round_end(0, 3, 4, flags=flags)

    def state(self, name: bytes, part: int, raw: bytes, *, flags: int = 0) -> Maker:
        self.state_bytes += len(raw)
        return self.add(STATE, state(name, part, raw), flags=flags)

    def time(self) -> Maker:
        return self.add(TIME, struct.pack("<QQ", 1_700_000_000_000_000_000, 5_000_000))

    def end(self, *, flags: int = 0, **wrong: Any) -> Maker:
        what = (2 if self.dry else 0) | (1 if self.form != ANSWERED and not self.dry else 0)
        digest = xxhash.xxh3_128_intdigest(self.sums, seed=SEED)
        payload = struct.pack(
            "<IIQQQQQ16s",
            wrong.get("what", what),
            wrong.get("rounds", self.rounds),
            wrong.get("sections", self.count),
            wrong.get("offset", len(self.raw)),
            wrong.get("data", self.data),
            wrong.get("zeros", self.zeros),
            wrong.get("states", self.state_bytes),
            wrong.get("digest", digest.to_bytes(16, "big")),
        )
        return self.add(END, payload, flags=flags)

    def full(self) -> Maker:
        """All up to where END is due."""
        return self.head().round_0().state(b"cpu0", 0, b"abc", flags=1).time()

    def read(self, **more: Any) -> Stream:
        return read(io.BytesIO(self.raw), **more)


def refuse(raw: bytes, number: int | None, name: str | None, offset: int, why: str) -> None:
    with pytest.raises(Refused) as caught:
        read(io.BytesIO(raw))
    found = caught.value
    assert found.why == why
    assert (found.section_number, found.type_name, found.offset) == (number, name, offset)


def refuse_last(maker: Maker, why: str) -> None:
    number, name, offset = maker.last
    refuse(maker.raw, number, name, offset, why)


# Sound streams


def test_the_examples_of_the_page_hold() -> None:
    assert xxhash.xxh3_64_intdigest(bytes(4096), seed=0) == 0x93D76FE148C689BA
    assert xxhash.xxh3_64_intdigest(bytes(4096), seed=SEED) == 0x22CE630F38BF6769


def test_dry_run() -> None:
    maker = Maker(mandatory=2).host()
    maker.add(LAYOUT, layout((b"ram", 0, 5), (b"rom", 2**64 - 1, 2)))
    found = maker.config().devices().add(HEAD_END).end().read()
    assert found.what == 2
    assert found.host == {"hypervisor": "qemu", "program": "test 1"}
    assert found.config == {"name": "web1", "smp": 2}
    assert found.devices == ["uart", "rtc"]
    assert [tuple(segment) for segment in found.layout] == [("ram", 0, 0, 5), ("rom", None, 5, 2)]
    assert (found.memory, found.rounds, found.states, found.time) == ({}, [], {}, None)
    assert found.sections == 6


@pytest.mark.parametrize("form", [PLAIN, KEPT])
def test_small_stream(form: int) -> None:
    found = Maker(form).full().end().read()
    assert (found.header.form, found.header.stream_id, found.header.seed) == (form, IDENT, SEED)
    assert found.memory == {0: page(1), 1: page(2), 6: page(3)}
    assert [tuple(one) for one in found.rounds] == [(3, 4, True)]
    assert found.states == {"cpu0": b"abc"}
    assert found.time == (1_700_000_000_000_000_000, 5_000_000)
    assert found.what == 1
    assert found.digest is not None


def test_second_round_states_pages_again() -> None:
    maker = Maker().head().round_0(flags=0)
    maker.memory(1, [(0, 1, 1), (3, 1, 0)], [page(9)]).memory(1, [(6, 1, 0)], [page(0)])
    found = maker.round_end(1, 2, 1, flags=1).time().end().read()
    assert found.memory == {1: page(2), 3: page(9)}
    assert [one.last for one in found.rounds] == [False, True]


def test_later_round_may_be_empty() -> None:
    maker = Maker().head().round_0(flags=0).round_end(1, 0, 0, flags=1).time().end()
    assert maker.read().memory == {0: page(1), 1: page(2), 6: page(3)}


@pytest.mark.parametrize("checksum", [False, True])
def test_zstd_section(checksum: bool) -> None:
    pages = [page(1), page(2)]
    frame = zstandard.ZstdCompressor(write_checksum=checksum).compress(b"".join(pages))
    maker = Maker(mandatory=1).head().zstd([(0, 2, 0), (2, 5, 1)], pages, frame)
    found = maker.round_end(0, 2, 5, flags=1).time().end().read()
    assert found.memory == {0: page(1), 1: page(2)}


def test_pad_and_unknown_optional_sections_are_skipped() -> None:
    maker = Maker()
    fill: Callable[[], Maker] = lambda: maker.add(PAD, b"noise").add(  # noqa: E731
        OPTIONAL, b"new", flags=0xFFFFFFFF
    )
    maker.host()
    for step in (maker.layout, maker.config, maker.devices, lambda: maker.add(HEAD_END)):
        fill()
        step()
    fill()
    maker.memory(0, [(0, 7, 1)], [])
    fill()
    maker.round_end(0, 0, 7, flags=1)
    fill()
    maker.state(b"dev", 0, b"1")
    fill()
    maker.state(b"dev", 1, b"2", flags=1).time()
    fill()
    found = maker.end().read()
    assert found.states == {"dev": b"12"}
    assert set(found.skipped) == {OPTIONAL}


def test_state_names_of_every_length_and_empty_states() -> None:
    maker = Maker().head().round_0()
    for length in (1, 7, 8, 9, 255):
        maker.state(b"n" * length, 0, b"", flags=1)
    found = maker.time().end().read()
    assert found.states == {"n" * length: b"" for length in (1, 7, 8, 9, 255)}


def test_longest_sections_are_taken() -> None:
    maker = Maker().host()
    maker.add(LAYOUT, layout((b"big", 0, 4096), *((b"s%d" % at, 0, 1) for at in range(63))))
    maker.config().devices().add(HEAD_END).add(PAD, bytes(1048576))
    extents = [(at, 1, 1) for at in range(3072)] + [(3072 + at, 1, 0) for at in range(1024)]
    maker.memory(0, extents, [page(7)] * 1024)
    for at in range(63):
        maker.memory(0, [(4096 + at, 1, 1)], [])
    maker.round_end(0, 1024, 3135, flags=1)
    maker.state(b"n" * 255, 0, bytes(1048576), flags=1)
    assert len(maker.time().end().read().memory) == 1024


def test_largest_guest_is_taken_without_memory_of_its_size() -> None:
    maker = Maker().host().add(LAYOUT, layout((b"ram", 0, 2**36))).config().devices().add(HEAD_END)
    step = 2**32 - 1
    extents = [(at, min(step, 2**36 - at), 1) for at in range(0, 2**36, step)]
    maker.memory(0, extents, []).round_end(0, 0, 2**36, flags=1)
    assert maker.time().end().read().npages == 2**36


def test_optional_features_are_ignored() -> None:
    assert Maker(optional=2**64 - 1).full().end().read().header.optional == 2**64 - 1


@pytest.mark.parametrize("steps", range(6))
def test_abort_is_the_last_section(steps: int) -> None:
    maker = Maker()
    for step in (maker.host, maker.layout, maker.config, maker.devices, maker.round_0)[:steps]:
        if step == maker.round_0:
            maker.add(HEAD_END)
        step()
    found = maker.add(ABORT, struct.pack("<II", 75, 0) + "zu groß".encode()).read()
    assert found.abort == (75, "zu groß")
    assert found.what is None


def test_abort_within_a_state() -> None:
    maker = Maker().head().round_0().state(b"cpu0", 0, b"x")
    assert maker.add(ABORT, struct.pack("<II", 64, 0) + b"x").read().states == {}


def test_answered_without_go() -> None:
    found = Maker(ANSWERED).full().end().add(PAD, bytes(3)).read()
    assert (found.what, found.nonce) == (0, None)


def test_answered_with_go() -> None:
    maker = Maker(ANSWERED).full().end().add(PAD, bytes(3)).add(GO, NONCE).add(PAD, bytes(3))
    assert maker.read().nonce == NONCE
    assert maker.read(nonce=NONCE).nonce == NONCE
    with pytest.raises(Refused, match=r"\(GO\).*wrong nonce"):
        maker.read(nonce=bytes(16))


def test_short_reads_are_joined() -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 7))

    assert read(Trickle(Maker().full().end().raw)).what == 1


def test_json_limits_are_inclusive() -> None:
    nested = '{"hypervisor":"q","program":"p","a":' + "[" * 15 + "]" * 15
    nested += f',"b":[{-(2**63)},{2**63 - 1}],"c":"[[[[[[[[[[[[[[[[[[[\\"["}}'
    maker = Maker(mandatory=2).add(HOST, nested.encode()).layout()
    maker.add(CONFIG, json.dumps({"name": "x" * 64}).encode())
    maker.add(DEVICES, json.dumps(["d" * 128] + ["e"] * 1023).encode()).add(HEAD_END)
    assert len(maker.end().read().devices) == 1024


# The header


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "the stream's header is incomplete"),
        (header()[:71], "the stream's header is incomplete"),
        (header(magic=b"\x89BHS\n\n\x1a\n"), "wrong magic"),
        (header(magic=b"\x09BHS\r\n\x1a\n"), "wrong magic"),
        (header(version=0), "unknown version"),
        (header(version=2), "unknown version"),
        (header(flip=1), "wrong header checksum"),
        (header(0), "unknown form"),
        (header(4), "unknown form"),
        (header(mandatory=4), "unknown mandatory feature"),
        (header(mandatory=2**63), "unknown mandatory feature"),
        (header(reserved=b"\0\0\0\0\0\0\0\1"), "reserved field is not zero"),
    ],
)
def test_bad_header_is_refused(raw: bytes, why: str) -> None:
    refuse(raw, None, None, 0, why)


# What all sections share


def test_every_truncation_is_refused() -> None:
    raw = Maker().full().end().raw
    for length in [*range(900), *range(900, len(raw) - 400, 97), *range(len(raw) - 400, len(raw))]:
        with pytest.raises(Refused, match="incomplete"):
            read(io.BytesIO(raw[:length]))


def test_every_flipped_byte_is_refused() -> None:
    raw = Maker().full().end().raw
    for at in [*range(900), *range(900, len(raw) - 400, 97), *range(len(raw) - 400, len(raw))]:
        with pytest.raises(Refused):
            read(io.BytesIO(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :]))


def test_a_length_without_bytes_is_refused() -> None:
    maker = Maker().head().add(PAD, length=1048576)
    refuse_last(maker, "the payload is incomplete")


def test_the_section_header_has_to_be_complete() -> None:
    raw = Maker().host().raw
    refuse(raw + bytes(31), 1, None, len(raw), "the section header is incomplete")
    refuse(raw, 1, None, len(raw), "the section header is incomplete")


def test_the_padding_has_to_be_complete_and_zero() -> None:
    refuse_last(Maker().add(HOST, HOST_JSON, filler=bytes(4)), "the padding is incomplete")
    refuse_last(Maker().add(HOST, HOST_JSON, filler=b"\0\0\0\0\1"), "the padding is not zero")


@pytest.mark.parametrize("kind", [0, 14, 0x7FFFFFFF])
def test_unknown_section_is_refused(kind: int) -> None:
    refuse_last(Maker().host().add(kind), "unknown section type")


CAPS = [
    (HOST, 65536), (LAYOUT, 3080), (CONFIG, 65536), (DEVICES, 65536), (HEAD_END, 0),
    (PAD, 1048576), (MEMORY, 4268048), (ROUND_END, 24), (STATE, 1048840), (TIME, 16), (END, 64),
    (GO, 16), (ABORT, 1024), (OPTIONAL, 1048576),
]  # fmt: skip


def before(kind: int) -> Maker:
    """Return a sound stream up to where `kind` may stand."""
    maker = Maker(ANSWERED)
    if kind == HOST:
        return maker
    maker.host()
    if kind in (LAYOUT, PAD, OPTIONAL, ABORT):
        return maker
    for due, step in ((CONFIG, maker.layout), (DEVICES, maker.config), (HEAD_END, maker.devices)):
        step()
        if kind == due:
            return maker
    maker.add(HEAD_END)
    if kind in (MEMORY, ROUND_END):
        return maker
    maker.round_0()
    if kind in (STATE, TIME):
        return maker
    maker.time()
    return maker if kind == END else maker.end()


@pytest.mark.parametrize(("kind", "cap"), CAPS)
@pytest.mark.parametrize("beyond", [1, 2**64 - 2**24])
def test_length_over_the_cap_is_refused(kind: int, cap: int, beyond: int) -> None:
    refuse_last(before(kind).add(kind, length=cap + beyond), "length is over the cap")


@pytest.mark.parametrize(
    ("kind", "length"),
    [(LAYOUT, 8), (MEMORY, 31), (ROUND_END, 23), (STATE, 15), (TIME, 8), (END, 56), (GO, 15),
     (ABORT, 8)],
)  # fmt: skip
def test_length_that_is_too_short_is_refused(kind: int, length: int) -> None:
    refuse_last(before(kind).add(kind, bytes(length)), "length is too short")


@pytest.mark.parametrize("kind", [kind for kind, _ in CAPS])
def test_wrong_sequence_number_is_refused(kind: int) -> None:
    maker = before(kind)
    payload = bytes({LAYOUT: 56, MEMORY: 32, ROUND_END: 24, STATE: 16, END: 64}.get(kind, 16))
    payload = b"" if kind == HEAD_END else payload
    refuse_last(maker.add(kind, payload, sequence=maker.count + 1), "wrong sequence number")


@pytest.mark.parametrize("kind", [HOST, HEAD_END, PAD, OPTIONAL, TIME, END, GO])
def test_wrong_checksum_is_refused(kind: int) -> None:
    payload = bytes({HOST: 3, HEAD_END: 0, END: 64}.get(kind, 16))
    refuse_last(before(kind).add(kind, payload, flip=1), "wrong checksum")


@pytest.mark.parametrize(
    ("kind", "flags"),
    [(HOST, 1), (LAYOUT, 1), (CONFIG, 1), (DEVICES, 1), (HEAD_END, 1), (PAD, 1), (ROUND_END, 2),
     (STATE, 2), (TIME, 1), (END, 1), (GO, 1), (ABORT, 1)],
)  # fmt: skip
def test_unknown_flag_is_refused(kind: int, flags: int) -> None:
    size = {LAYOUT: 56, HEAD_END: 0, ROUND_END: 24, END: 64}.get(kind, 16)
    refuse_last(before(kind).add(kind, bytes(size), flags=flags), "unknown flag")


def test_unknown_flag_of_memory_is_refused() -> None:
    refuse_last(before(MEMORY).memory(0, [(0, 1, 1)], [], flags=2), "unknown flag")
    refuse_last(before(MEMORY).memory(0, [(0, 1, 1)], [], flags=3), "unknown flag")


PLACES: list[tuple[Callable[[], Maker], list[int]]] = [
    (Maker, [HOST, ABORT]),
    (lambda: Maker().host(), [LAYOUT, PAD, OPTIONAL, ABORT]),
    (lambda: before(CONFIG), [CONFIG, PAD, OPTIONAL, ABORT]),
    (lambda: before(DEVICES), [DEVICES, PAD, OPTIONAL, ABORT]),
    (lambda: before(HEAD_END), [HEAD_END, PAD, OPTIONAL, ABORT]),
    (lambda: before(MEMORY), [MEMORY, ROUND_END, PAD, OPTIONAL, ABORT]),
    (lambda: Maker().head().round_0(flags=0), [MEMORY, ROUND_END, PAD, OPTIONAL, ABORT]),
    (lambda: before(STATE), [STATE, TIME, PAD, OPTIONAL, ABORT]),
    (lambda: before(STATE).state(b"s", 0, b""), [STATE, PAD, OPTIONAL, ABORT]),
    (lambda: before(END), [END, PAD, OPTIONAL, ABORT]),
    (lambda: Maker(mandatory=2).head(), [END, PAD, OPTIONAL, ABORT]),
    (lambda: before(GO), [GO, PAD]),
    (lambda: before(GO).add(GO, NONCE), [PAD]),
    (lambda: Maker(ANSWERED, mandatory=2).head().end(), [PAD]),
]


@pytest.mark.parametrize("place", range(len(PLACES)))
@pytest.mark.parametrize("kind", [kind for kind, _ in CAPS])
def test_section_in_the_wrong_place_is_refused(place: int, kind: int) -> None:
    make, allowed = PLACES[place]
    maker = make()
    if kind not in allowed:
        refuse_last(maker.add(kind), "the section may not stand here")
        return
    with pytest.raises(Refused) as caught:  # a wrong number is found after the place
        read(io.BytesIO(maker.add(kind, bytes(64), sequence=99, length=64).raw))
    assert caught.value.why != "the section may not stand here"


@pytest.mark.parametrize("more", [b"\0", bytes(32)])
def test_bytes_after_the_last_section_are_refused(more: bytes) -> None:
    for maker in (
        Maker(PLAIN).full().end(),
        Maker(KEPT).full().end(),
        Maker().host().add(ABORT, struct.pack("<II", 64, 0) + b"x"),
    ):
        refuse(maker.raw + more, maker.count, None, len(maker.raw), "bytes after the last section")


def test_end_of_file_is_not_a_trailer() -> None:
    maker = Maker().full()
    refuse(maker.raw, maker.count, None, len(maker.raw), "the section header is incomplete")


# JSON, HOST, CONFIG, DEVICES

BAD_JSON: list[tuple[bytes, str]] = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"{} {}", "not JSON"),
    (b'{"a": NaN}', "not JSON"),
    (b'{"a": -Infinity}', "not JSON"),
    (b'{"a": "\n"}', "not JSON"),
    (b'{"a": 01}', "not JSON"),
    (b'{"a": "\xff"}', "JSON is not UTF-8"),
    (b'{"a": "\xed\xa0\x80"}', "JSON is not UTF-8"),
    (b"\xef\xbb\xbf{}", "JSON has a byte order mark"),
    (b'{"a": 1, "a": 1}', "JSON name occurs twice in an object"),
    (b'{"a": [{"b": 1, "\\u0062": 1}]}', "JSON name occurs twice in an object"),
    (b'{"a": 9223372036854775808}', "JSON number out of range"),
    (b'{"a": -9223372036854775809}', "JSON number out of range"),
    (b'{"a": ' + b"9" * 5000 + b"}", "JSON number out of range"),
    (b'{"a": 1.0}', "JSON number is not an integer"),
    (b'{"a": 1e3}', "JSON number is not an integer"),
    (b"[" * 17 + b"]" * 17, "JSON nests too deep"),
    (b"[" * 65536, "JSON nests too deep"),
    (b'["' + b'\\"' * 32767, "not JSON"),
    (b'["\\', "not JSON"),
]


@pytest.mark.parametrize("kind", [HOST, CONFIG, DEVICES])
@pytest.mark.parametrize(("payload", "why"), BAD_JSON)
def test_bad_json_is_refused(kind: int, payload: bytes, why: str) -> None:
    refuse_last(before(kind).add(kind, payload), why)


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        (HOST, [], "HOST is not an object"),
        (HOST, {"program": "p"}, "HOST has no string hypervisor"),
        (HOST, {"program": "p", "hypervisor": 1}, "HOST has no string hypervisor"),
        (HOST, {"hypervisor": "q"}, "HOST has no string program"),
        (CONFIG, "web1", "CONFIG is not an object"),
        (CONFIG, {}, "bad name of the guest"),
        (CONFIG, {"name": 1}, "bad name of the guest"),
        (CONFIG, {"name": ""}, "bad name of the guest"),
        (CONFIG, {"name": "x" * 65}, "bad name of the guest"),
        (CONFIG, {"name": "a/b"}, "bad name of the guest"),
        (CONFIG, {"name": "a\n"}, "bad name of the guest"),
        (CONFIG, {"name": "ä"}, "bad name of the guest"),
        (DEVICES, {}, "DEVICES is not an array"),
        (DEVICES, ["d"] * 1025, "more than 1024 devices"),
        (DEVICES, ["a", 1], "device name is not a string"),
        (DEVICES, ["d" * 129], "device name over 128 characters"),
    ],
)
def test_wrong_value_is_refused(kind: int, value: object, why: str) -> None:
    refuse_last(before(kind).add(kind, json.dumps(value).encode()), why)


def test_hypervisor_without_support_is_refused() -> None:
    maker = Maker().full().end()
    assert maker.read(hypervisors={"qemu"}).what == 1
    with pytest.raises(Refused, match=r"section 0 \(HOST\) at offset 0x48: .*not supported"):
        maker.read(hypervisors={"bhyve"})


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (layout((b"ram", 0, 1), size=8192), "page size is not 4096"),
        (struct.pack("<II", 4096, 0) + bytes(48), "number of segments is not 1 to 64"),
        (struct.pack("<II", 4096, 65) + bytes(48), "number of segments is not 1 to 64"),
        (struct.pack("<II", 4096, 2) + bytes(48), "wrong length"),
        (layout((b"ram", 0, 1)) + bytes(8), "wrong length"),
        (layout((b"", 0, 1)), "bad segment name"),
        (layout((b"x" * 32, 0, 1)), "bad segment name"),
        (layout((b"a b", 0, 1)), "bad segment name"),
        (layout((b"a\x7f", 0, 1)), "bad segment name"),
        (layout((b"a\0b", 0, 1)), "bad segment name"),
        (layout((b"a", 0, 1), (b"a", 4096, 1)), "segment name occurs twice"),
        (layout((b"a", 4095, 1)), "gpa is not a multiple of 4096"),
        (layout((b"a", 2**64 - 2, 1)), "gpa is not a multiple of 4096"),
        (layout((b"a", 0, 0)), "segment without pages"),
        (layout((b"a", 0, 2**36), (b"b", 0, 1)), "more than 2^36 pages"),
        (layout((b"a", 0, 2**63), (b"b", 0, 2**63)), "more than 2^36 pages"),
    ],
)
def test_bad_layout_is_refused(payload: bytes, why: str) -> None:
    refuse_last(before(LAYOUT).add(LAYOUT, payload), why)


# MEMORY and ROUND_END


def add_list(payload: bytes) -> Maker:
    return before(MEMORY).add(MEMORY, payload)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (struct.pack("<IIII", 0, 0, 2, 0) + bytes(16), "number of extents is not 1 to 4096"),
        (struct.pack("<IIII", 0, 4097, 0, 0) + bytes(16), "number of extents is not 1 to 4096"),
        (
            struct.pack("<IIII", 0, 2**32 - 1, 0, 0) + bytes(16),
            "number of extents is not 1 to 4096",
        ),
        (struct.pack("<IIII", 0, 1, 1025, 0) + bytes(16), "more than 1024 pages"),
        (memory_list(0, [(0, 1, 1)], []) + bytes(8), "wrong length"),
        (memory_list(0, [(0, 1, 0)], [page(1)]), "wrong length"),
        (memory_list(1, [(0, 1, 1)], []), "wrong round"),
        (memory_list(0, [(0, 1, 1)], [], zero=1), "reserved field is not zero"),
        (memory_list(0, [(0, 1, 2)], []), "unknown kind of extent"),
        (memory_list(0, [(0, 0, 1)], []), "empty extent"),
        (memory_list(0, [(0, 8, 1)], []), "extent is outside the guest"),
        (memory_list(0, [(7, 1, 1)], []), "extent is outside the guest"),
        (memory_list(0, [(2**64 - 1, 2, 1)], []), "extent is outside the guest"),
        (memory_list(0, [(0, 2, 1), (1, 1, 1)], []), "extents do not ascend"),
        (memory_list(0, [(1, 1, 1)], []), "gap in round 0"),
        (memory_list(0, [(0, 1, 1), (2, 1, 1)], []), "gap in round 0"),
        (memory_list(0, [(0, 1, 0)], []), "number of pages is not that of the DATA extents"),
    ],
)
def test_bad_list_is_refused(payload: bytes, why: str) -> None:
    refuse_last(add_list(payload), why)


def test_the_list_is_checked_before_a_page_is_read() -> None:
    head = memory_list(0, [(1, 1, 0)], [page(1)])
    maker = before(MEMORY).add(MEMORY, head, length=len(head) + 4096)
    # The checksum is of a section with this length, and no page follows.
    refuse_last(maker, "gap in round 0")


@pytest.mark.parametrize("extents", [[(0, 6, 1)], [(0, 5, 1), (5, 1, 1)]])
def test_extents_of_a_section_lie_in_one_segment(extents: list[Extent]) -> None:
    segments = layout((b"ram", 0, 5), (b"rom", 2**64 - 1, 2))
    maker = Maker().host().add(LAYOUT, segments).config().devices().add(HEAD_END)
    refuse_last(maker.memory(0, extents, []), "extents are not in one segment")


def test_checksum_of_a_list_is_checked() -> None:
    refuse_last(before(MEMORY).memory(0, [(0, 1, 0)], [page(1)], flip=1), "wrong checksum")


def test_page_bytes_are_not_under_the_checksum_but_under_the_hash() -> None:
    head = memory_list(0, [(0, 2, 0)], [page(1), page(2)])
    maker = before(MEMORY).add(MEMORY, head + page(1) + page(3), covered=len(head))
    refuse_last(maker, "wrong page hash")
    maker = before(MEMORY).add(MEMORY, head + page(1) + page(2))
    refuse_last(maker, "wrong checksum")


def test_extents_ascend_over_the_sections_of_a_round() -> None:
    maker = before(MEMORY).memory(0, [(0, 2, 1)], [])
    refuse_last(maker.memory(0, [(1, 1, 1)], []), "extents do not ascend")
    maker = before(MEMORY).memory(0, [(0, 2, 1)], [])
    refuse_last(maker.memory(0, [(3, 1, 1)], []), "gap in round 0")
    maker = Maker().head().round_0(flags=0).memory(1, [(3, 1, 1)], [])
    refuse_last(maker.memory(1, [(3, 1, 1)], []), "extents do not ascend")


def zstd_frame(pages: list[bytes], **more: Any) -> bytes:
    return zstandard.ZstdCompressor(**more).compress(b"".join(pages))


def raw_blocks(pages: list[bytes]) -> bytes:
    """A frame of uncompressed blocks, so longer than the pages."""
    joined = b"".join(pages)
    frame = b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", len(joined))
    return frame + (len(joined) << 3 | 1).to_bytes(3, "little") + joined


def rle_block(stated: int, size: int) -> bytes:
    return b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", stated) + (
        size << 3 | 1 << 1 | 1
    ).to_bytes(3, "little") + b"\1"  # fmt: skip


def test_rle_frame_of_the_tests_is_sound() -> None:
    maker = Maker(mandatory=1).head().zstd([(0, 1, 0), (1, 6, 1)], [page(1)], rle_block(4096, 4096))
    assert maker.round_end(0, 1, 6, flags=1).time().end().read().memory == {0: page(1)}


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"", "not a zstd frame"),
        (page(1), "not a zstd frame"),
        (struct.pack("<II", 0x184D2A50, 8) + bytes(8), "not a zstd frame"),
        (b"\x28\xb5\x2f\xfd", "not a zstd frame"),
        (
            zstd_frame([page(1)], write_content_size=False),
            "zstd frame does not state the content size",
        ),
        (zstd_frame([page(1), page(1)]), "zstd frame does not state the content size"),
        (raw_blocks([page(1)]), "zstd frame is not smaller than its pages"),
        (zstd_frame([page(1)])[:-1], "zstd frame is incomplete"),
        (rle_block(4096, 4096)[:9], "zstd frame is incomplete"),
        (zstd_frame([page(1)], write_checksum=True)[:-4], "zstd frame is incomplete"),
        (zstd_frame([page(1)]) + b"\0", "bytes after the zstd frame"),
        (zstd_frame([page(1)]) * 2, "bytes after the zstd frame"),
        (rle_block(4096, 4095), "zstd frame is damaged"),
        (rle_block(4096, 4097), "zstd frame is damaged"),
        (rle_block(4096, 131072), "zstd frame is damaged"),
        (zstd_frame([page(1)], write_checksum=True)[:-1] + b"?", "zstd frame is damaged"),
        (zstd_frame([page(2)]), "wrong page hash"),
    ],
)
def test_bad_frame_is_refused(frame: bytes, why: str) -> None:
    refuse_last(Maker(mandatory=1).head().zstd([(0, 1, 0)], [page(1)], frame), why)


def test_zstd_takes_the_feature_and_pages() -> None:
    maker = Maker(mandatory=0).head().zstd([(0, 1, 0)], [page(1)])
    refuse_last(maker, "ZSTD without the stream's feature")
    maker = Maker(mandatory=1).head().zstd([(0, 1, 1)], [], b"")
    refuse_last(maker, "ZSTD without pages")
    payload = memory_list(0, [(0, 1, 0)], [page(1)])[:-8]
    maker = Maker(mandatory=1).head().add(MEMORY, payload, flags=1)
    refuse_last(maker, "wrong length")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ((1, 0, 0, 7), "wrong round"),
        ((0, 1, 0, 7), "reserved field is not zero"),
        ((0, 0, 1, 7), "wrong count of data pages"),
        ((0, 0, 0, 6), "wrong count of zero pages"),
    ],
)
def test_bad_round_end_is_refused(fields: tuple[int, int, int, int], why: str) -> None:
    maker = before(MEMORY).memory(0, [(0, 7, 1)], [])
    refuse_last(maker.add(ROUND_END, struct.pack("<IIQQ", *fields), flags=1), why)


def test_round_0_states_every_page() -> None:
    maker = before(MEMORY).memory(0, [(0, 6, 1)], [])
    refuse_last(maker.round_end(0, 0, 6), "gap in round 0")
    refuse_last(before(MEMORY).round_end(0, 0, 0), "gap in round 0")


def test_counts_are_of_one_round() -> None:
    maker = Maker().head().round_0(flags=0).round_end(1, 3, 4, flags=1)
    refuse_last(maker, "wrong count of data pages")


# STATE


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (struct.pack("<HHI8s", 0, 0, 0, b""), "state name is not 1 to 255 bytes"),
        (struct.pack("<HHI256s", 256, 0, 0, b"n" * 256), "state name is not 1 to 255 bytes"),
        (state(b"n", 0, b"", zero=1), "reserved field is not zero"),
        (struct.pack("<HHI8s", 9, 0, 0, b"n" * 8), "wrong length"),
        (state(b"a b", 0, b""), "bad state name"),
        (state(b"a\0", 0, b""), "bad state name"),
        (state(b"\xe4", 0, b""), "bad state name"),
        (
            struct.pack("<HHI8s", 1, 0, 0, b"n\0\0\0\0\0\0\1"),
            "filling of the state name is not zero",
        ),
        (state(b"n", 0, bytes(1048577)), "part of a state is too long"),
        (state(b"n", 1, b""), "wrong part of a state"),
    ],
)
def test_bad_state_is_refused(payload: bytes, why: str) -> None:
    refuse_last(before(STATE).add(STATE, payload, flags=1), why)


def test_states_do_not_mix() -> None:
    maker = before(STATE).state(b"a", 0, b"1").state(b"b", 0, b"2")
    refuse_last(maker, "state is incomplete")
    maker = before(STATE).state(b"a", 0, b"1").state(b"a", 2, b"2")
    refuse_last(maker, "wrong part of a state")
    maker = before(STATE).state(b"a", 0, b"1", flags=1).state(b"a", 0, b"2", flags=1)
    refuse_last(maker, "state name comes back")
    maker = before(STATE).state(b"a", 0, b"1", flags=1).state(b"a", 1, b"2", flags=1)
    refuse_last(maker, "state name comes back")


def test_number_of_states_is_capped() -> None:
    parts = [state(b"s%d" % at, 0, b"") for at in range(4097)]
    maker = before(STATE)
    chunks = bytearray(maker.raw)
    for at, payload in enumerate(parts):
        head = struct.pack("<IIQQ", STATE, 1, len(payload), maker.count + at)
        checksum = xxhash.xxh3_64_intdigest(IDENT + head + payload, seed=SEED)
        offset = len(chunks)
        chunks += head + struct.pack("<Q", checksum) + payload
    refuse(bytes(chunks), maker.count + 4096, "STATE", offset, "more than 4096 states")


def test_length_of_all_states_is_capped() -> None:
    class Endless(io.RawIOBase):
        """129 parts of 1 MiB, made as they are read, so that the test holds only one."""

        def __init__(self) -> None:
            self.maker = before(STATE)
            self.left = 0
            self.have = io.BytesIO(self.maker.raw)

        def read(self, size: int = -1) -> bytes:
            got = self.have.read(size)
            if got or self.left == 129:
                return got
            payload = state(b"big", self.left, bytes(1048576))
            head = struct.pack("<IIQQ", STATE, 0, len(payload), self.maker.count + self.left)
            checksum = xxhash.xxh3_64_intdigest(IDENT + head + payload, seed=SEED)
            self.have = io.BytesIO(head + struct.pack("<Q", checksum) + payload)
            self.left += 1
            return self.have.read(size)

    stream: Any = Endless()
    with pytest.raises(Refused) as caught:
        read(stream)
    assert caught.value.why == "states are too long"
    assert caught.value.section_number == stream.maker.count + 128


# END, ABORT


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"what": 5}, "unknown bit in what"),
        ({"what": 0}, "wrong MAY_START"),
        ({"what": 3}, "wrong NO_MEMORY"),
        ({"rounds": 2}, "wrong number of rounds"),
        ({"sections": 11}, "wrong number of sections"),
        ({"offset": 0}, "wrong offset"),
        ({"data": 4}, "wrong data pages"),
        ({"zeros": 3}, "wrong zero pages"),
        ({"states": 4}, "wrong state bytes"),
        ({"digest": bytes(16)}, "wrong digest"),
    ],
)
def test_bad_end_is_refused(wrong: dict[str, Any], why: str) -> None:
    refuse_last(Maker().full().end(**wrong), why)


@pytest.mark.parametrize(
    ("form", "mandatory", "what", "why"),
    [
        (KEPT, 0, 0, "wrong MAY_START"),
        (ANSWERED, 0, 1, "wrong MAY_START"),
        (PLAIN, 2, 3, "wrong MAY_START"),
        (ANSWERED, 2, 3, "wrong MAY_START"),
        (PLAIN, 2, 0, "wrong NO_MEMORY"),
        (ANSWERED, 0, 2, "wrong NO_MEMORY"),
    ],
)
def test_what_follows_from_form_and_feature(form: int, mandatory: int, what: int, why: str) -> None:
    maker = Maker(form, mandatory)
    maker = maker.head() if mandatory else maker.full()
    refuse_last(maker.end(what=what), why)


def test_digest_of_the_low_half_first_is_refused() -> None:
    maker = Maker().full()
    digest = xxhash.xxh3_128_intdigest(maker.sums, seed=SEED).to_bytes(16, "big")
    refuse_last(maker.end(digest=digest[8:] + digest[:8]), "wrong digest")


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (struct.pack("<II", 63, 0) + b"x", "status is not 64 to 77"),
        (struct.pack("<II", 78, 0) + b"x", "status is not 64 to 77"),
        (struct.pack("<II", 64, 1) + b"x", "reserved field is not zero"),
        (struct.pack("<II", 64, 0) + b"\xff", "text is not UTF-8"),
        (struct.pack("<II", 64, 0) + b"a\nb", "control character in the text"),
        (struct.pack("<II", 64, 0) + b"a\0", "control character in the text"),
        (struct.pack("<II", 64, 0) + b"\x7f", "control character in the text"),
        (struct.pack("<II", 64, 0) + "\x9b".encode(), "control character in the text"),
    ],
)
def test_bad_abort_is_refused(payload: bytes, why: str) -> None:
    refuse_last(before(ABORT).add(ABORT, payload), why)

"""format.py against the drawings and tables of bhystream(5): sizes, byte order, round trips."""

from __future__ import annotations

import random
import re
import struct
from pathlib import Path

import pytest

from bhystream.errors import FormatError
from bhystream.guest import Layout, Segment
from bhystream.stream import format as fmt
from bhystream.stream.format import Feature, Form, Header, Type
from bhystream.strict_json import pack_json, unpack_json

PAGE_5 = Path(__file__).parents[2] / "man" / "bhystream.5"
STRUCTS = {name: value for name, value in vars(fmt).items() if isinstance(value, struct.Struct)}
SIZES = {
    "HEADER": 72,
    "SECTION": 32,
    "LAYOUT_HEAD": 8,
    "LAYOUT_SEGMENT": 48,
    "MEMORY_HEAD": 16,
    "HASHES_HEAD": 8,
    "EXTENT": 16,
    "ROUND_END": 24,
    "STATE_HEAD": 8,
    "STATE_COUNT": 8,
    "TIME": 16,
    "END": 64,
    "ABORT_HEAD": 8,
}


def test_every_struct_has_its_size() -> None:
    assert {name: value.size for name, value in STRUCTS.items()} == SIZES


@pytest.mark.parametrize("name", STRUCTS)
def test_every_struct_is_little_endian_and_packed(name: str) -> None:
    made = STRUCTS[name]
    assert made.format.startswith("<")
    assert struct.calcsize("=" + made.format[1:]) == made.size
    raw = bytes(range(made.size))
    at = 0
    for value in made.unpack(raw):
        if isinstance(value, bytes):
            assert value == raw[at : at + len(value)]
            at += len(value)
            continue
        width = next(w for w in (2, 4, 8) if value < 1 << 8 * w)
        assert value == int.from_bytes(raw[at : at + width], "little")
        at += width
    assert at == made.size


def test_header_as_drawn() -> None:
    header = Header(Form.KEPT, Feature(2), bytes(range(16)), 0x0102030405060708)
    packed = fmt.pack_header(header, 0x1112131415161718)
    assert packed == bytes.fromhex(
        "894248530d0a1a0a 01000000 02000000 0200000000000000 0000000000000000"
        "000102030405060708090a0b0c0d0e0f 0807060504030201 0000000000000000 1817161514131211"
    )
    assert fmt.unpack_header(packed) == (header, 0x1112131415161718)


def test_section_header_as_drawn() -> None:
    packed = fmt.pack_section(7, 1, 0x0203, 0x0405, 0x0607)
    assert packed == bytes.fromhex(
        "07000000 01000000 0302000000000000 0504000000000000 0706000000000000"
    )


def test_layout_as_drawn() -> None:
    packed = fmt.pack_layout(Layout((Segment("ram", 0x1000, 2), Segment("r", None, 3))))
    assert packed == bytes.fromhex(
        "00100000 02000000"
        + b"ram".hex() + "00" * 29 + "0010000000000000 0200000000000000"
        + b"r".hex() + "00" * 31 + "ffffffffffffffff 0300000000000000"
    )  # fmt: skip


def test_state_as_drawn() -> None:
    packed = fmt.pack_state("cpu0", 0x0102, b"xyz")
    assert packed == bytes.fromhex("0400 0000 02010000 6370753000000000 78797a")
    assert fmt.unpack_state(packed) == ("cpu0", 0x0102, b"xyz")
    assert fmt.pack_state("eightchr", 0, b"x")[8:] == b"eightchrx"


def test_zeros_of_a_state_as_drawn() -> None:
    packed = fmt.pack_state_zeros("cpu0", 0x0102, 0x030405)
    assert packed == bytes.fromhex("0400 0000 02010000 6370753000000000 0504030000000000")
    assert fmt.unpack_state_zeros(packed) == ("cpu0", 0x0102, 0x030405)


def test_the_table_is_that_of_the_page() -> None:
    row = r"^\.It (0x\w{8}) Ta (\w+) Ta ([\d ]+) Ta (\S+) Ta "
    rows = re.findall(row, PAGE_5.read_text(), re.MULTILINE)
    assert [(int(number, 16), name) for number, name, _, _ in rows] == [
        (type_.value, type_.name) for type_ in Type
    ]
    caps = [int(cap.replace(" ", "")) for _, _, cap, _ in rows]
    assert caps == [fmt.CAPS[type_] for type_ in Type]
    flags = {"ZSTD": 1, "LAST": 1, r"\(en": 0}
    assert [flags[flag] for *_, flag in rows] == [fmt.FLAGS.get(type_, 0) for type_ in Type]


def test_the_caps_are_the_sums_of_their_parts() -> None:
    assert fmt.CAPS == {
        Type.HOST: 65536,
        Type.LAYOUT: 3080,
        Type.CONFIG: 65536,
        Type.DEVICES: 65536,
        Type.HEAD_END: 0,
        Type.PAD: 1048576,
        Type.MEMORY: 4268048,
        Type.ROUND_END: 24,
        Type.STATE: 1048840,
        Type.TIME: 16,
        Type.END: 64,
        Type.GO: 16,
        Type.ABORT: 1024,
        Type.STATE_ZEROS: 272,
        Type.STATE_OPTIONAL: 1048840,
        Type.REHEARSAL: 1048576,
        Type.DISKS: 262144,
        Type.HASHES: 196616,
    }
    assert fmt.cap(Type.MEMORY) == 4268048
    assert fmt.cap(1 << 31) == fmt.cap((1 << 32) - 1) == 1048576
    assert fmt.cap(0) is None and fmt.cap(14) is None


def test_numbers_of_the_page() -> None:
    assert [form.value for form in Form] == [1, 2, 3]
    assert (Feature.ZSTD, Feature.NO_MEMORY) == (1, 2)
    flags = dict.fromkeys((Type.STATE, Type.STATE_ZEROS, Type.STATE_OPTIONAL), 1)
    flags |= {Type.MEMORY: 1, Type.ROUND_END: 1}
    assert flags == fmt.FLAGS
    assert (fmt.KIND_DATA, fmt.KIND_ZERO) == (0, 1)
    assert bytes.fromhex("894248530d0a1a0a") == fmt.MAGIC
    assert fmt.VERSION == 1
    assert fmt.MAX_STATE_BYTES == 134217728
    assert fmt.MAX_OPTIONAL_STATE_BYTES == 4194304
    later = (Type.STATE_ZEROS, Type.STATE_OPTIONAL, Type.REHEARSAL)
    assert later == (0x0F, 0x80000009, 0x8000000E)


def test_names_in_messages() -> None:
    assert fmt.type_name(7) == "MEMORY"
    assert fmt.type_name(0x80000ABC) == "type 0x80000abc"
    assert fmt.type_name(0) == "type 0x00000000"


def test_padding_fills_up_to_8() -> None:
    for length in range(100):
        assert (length + fmt.padding_bytes(length)) % 8 == 0
        assert 0 <= fmt.padding_bytes(length) <= 7


@pytest.mark.parametrize(
    ("form", "features", "what"),
    [(1, 0, 1), (2, 0, 1), (3, 0, 0), (1, 2, 2), (2, 2, 2), (3, 2, 2), (1, 1, 1), (3, 3, 2)],
)
def test_end_allows_the_start_in_two_forms_only(form: int, features: int, what: int) -> None:
    assert fmt.end_flags(Form(form), Feature(features)) == what


def test_headers_round_trip(rng: random.Random) -> None:
    for _ in range(200):
        header = Header(
            Form(rng.randint(1, 3)), Feature(rng.randint(0, 3)), rng.randbytes(16),
            rng.getrandbits(64),
        )  # fmt: skip
        checksum = rng.getrandbits(64)
        assert fmt.unpack_header(fmt.pack_header(header, checksum)) == (header, checksum)


def test_unknown_features_are_refused_bit_by_bit() -> None:
    for bit in range(64):
        packed = bytearray(fmt.pack_header(Header(Form.PLAIN, Feature(0), bytes(16), 0), 0))
        struct.pack_into("<Q", packed, 16, 1 << bit)
        if bit < 2:
            assert fmt.unpack_header(bytes(packed))[0].features == 1 << bit
            continue
        with pytest.raises(FormatError, match=f"mandatory features 0x{1 << bit:x} are not known"):
            fmt.unpack_header(bytes(packed))


def test_layouts_round_trip(rng: random.Random) -> None:
    printable = [chr(code) for code in range(0x21, 0x7F)]
    for _ in range(200):
        segments, gpa = [], 0
        for number in range(rng.randint(1, 64)):
            name = f"{number}{''.join(rng.choices(printable, k=rng.randint(0, 29)))}"
            gpa += 4096 * rng.randrange(3)
            npages = rng.randint(1, 1 << 20)
            segments.append(Segment(name, gpa if rng.random() < 0.8 else None, npages))
            gpa += 4096 * npages
        rng.shuffle(segments)
        names = {segment.name for segment in segments}
        if len(names) == len(segments):
            made = Layout(tuple(segments))
            assert fmt.unpack_layout(fmt.pack_layout(made)) == made


def scalar(rng: random.Random) -> object:
    code = rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
    numbers = [0, -1, 2**63 - 1, -(2**63), rng.randrange(-(2**63), 2**63)]
    return rng.choice([None, True, False, chr(code) * 3, '"\\', *numbers])


def value(rng: random.Random, depth: int) -> object:
    kind = rng.randrange(3) if depth else 2
    if kind == 0:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 1:
        return {str(scalar(rng)): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    return scalar(rng)


def test_json_round_trips(rng: random.Random) -> None:
    for _ in range(300):
        made = value(rng, 6)
        packed = pack_json(made)
        assert packed.isascii()
        assert unpack_json(packed) == made


def test_states_round_trip(rng: random.Random) -> None:
    for length in range(1, 256):
        name = "".join(chr(rng.randint(0x21, 0x7E)) for _ in range(length))
        part, data = rng.getrandbits(32), rng.randbytes(rng.randrange(40))
        packed = fmt.pack_state(name, part, memoryview(data))
        assert (len(packed) - len(data)) % 8 == 0
        assert fmt.unpack_state(packed) == (name, part, data)
        count = rng.getrandbits(64)
        packed = fmt.pack_state_zeros(name, part, count)
        assert len(packed) <= fmt.CAPS[Type.STATE_ZEROS]
        assert fmt.unpack_state_zeros(packed) == (name, part, count)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gone", "gone"),
        ("", "?"),
        ("a\nb\x00c\x7fd\x9be", "a?b?c?d?e"),
        ("snow \N{SNOWMAN}", "snow \N{SNOWMAN}"),
        ("lone \ud800", "lone ?"),
        ("x" * 2000, "x" * 1016),
        # 339 times 3 bytes are 1017, one byte too many: the last character is dropped as a whole.
        ("\N{SNOWMAN}" * 400, "\N{SNOWMAN}" * 338),
        ("\N{SNOWMAN}" * 338 + "xyz", "\N{SNOWMAN}" * 338 + "xy"),
    ],
)
def test_an_abort_says_what_fits_and_can_be_shown(text: str, told: str) -> None:
    packed = fmt.pack_abort(70, text)
    assert len(packed) <= fmt.CAPS[Type.ABORT]
    assert fmt.unpack_abort(packed) == (70, told)


def test_an_abort_keeps_to_its_room() -> None:
    for room in range(1, 40):
        packed = fmt.pack_abort(64, "\N{SNOWMAN}ab" * 20, room)
        assert 8 < len(packed) <= 8 + room
        fmt.unpack_abort(packed)
    assert len(fmt.pack_abort(64, "x" * 2000, 5000)) == 1024

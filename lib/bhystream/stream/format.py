"""Every constant and structure of bhystream(5) but those in disks.py, and nothing else.

Pure functions between bytes and values: no I/O, no state, no policy.  The
functions check what a structure demands of its own bytes, and raise FormatError
without a place; the reader adds the section and the offset.  reader.py and
verify.py check what one section demands of another (order, rounds, totals).

The writer uses pack_*, the reader unpack_*; both read the same tables, so a
change of the format is one change here, one in bhystream(5), and a new golden
stream.
"""

from __future__ import annotations

import re
import struct
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple, NoReturn

from bhystream.errors import FormatError
from bhystream.guest import GUEST_NAME, MAX_GUEST_PAGES, PAGE_BYTES, Layout, Segment
from bhystream.guest import MAX_OPTIONAL_STATE_BYTES as MAX_OPTIONAL_STATE_BYTES
from bhystream.guest import MAX_STATE_BYTES as MAX_STATE_BYTES
from bhystream.memory.extent import EXTENT as EXTENT
from bhystream.memory.extent import KIND_DATA as KIND_DATA
from bhystream.memory.extent import KIND_ZERO as KIND_ZERO
from bhystream.strict_json import unpack_json

MAGIC = b"\x89BHS\r\n\x1a\n"
VERSION = 1

HEADER = struct.Struct("<8sIIQQ16sQQQ")
SECTION = struct.Struct("<IIQQQ")
LAYOUT_HEAD = struct.Struct("<II")
LAYOUT_SEGMENT = struct.Struct("<32sQQ")
MEMORY_HEAD = struct.Struct("<IIII")
HASHES_HEAD = struct.Struct("<II")
ROUND_END = struct.Struct("<IIQQ")
STATE_HEAD = struct.Struct("<HHI")
STATE_COUNT = struct.Struct("<Q")
TIME = struct.Struct("<QQ")
END = struct.Struct("<IIQQQQQ16s")
ABORT_HEAD = struct.Struct("<II")

ALIGN_BYTES = 8
CHECKED_HEADER_BYTES = 24  # the part of a section header that the section checksum covers
HASH_BYTES = 8
STREAM_ID_BYTES = 16
NONCE_BYTES = 16

MAX_SEGMENTS = 64
MAX_EXTENTS = 4096
MAX_MEMORY_PAGES = 1024
MAX_HASHES = 16384  # in one section
MAX_WINDOW_BYTES = 8 << 20  # of a zstd frame
MAX_STATES = 4096
MAX_STATE_PART_BYTES = 1 << 20
MAX_STATE_NAME_BYTES = 255
MAX_PAD_BYTES = 1 << 20
MAX_ABORT_TEXT_BYTES = 1016
MAX_DEVICES = 1024
GPA_UNSTATED = (1 << 64) - 1

MAX_NAME_CHARS = 128  # in the name of a device, a hypervisor or a program
TOKEN = re.compile(rb"[\x21-\x7e]+")


class Form(IntEnum):
    """Who decides that the destination starts the guest."""

    PLAIN = 1
    KEPT = 2
    ANSWERED = 3


class Feature(IntFlag):
    """Mandatory feature bits of the header."""

    ZSTD = 1
    NO_MEMORY = 2


# A plain int, because ~ of an IntFlag has only known bits, and would hide the unknown ones.
KNOWN_FEATURES = int(Feature.ZSTD | Feature.NO_MEMORY)


OPTIONAL = 1 << 31  # in a type: a reader that does not know the type skips the section
OPTIONAL_CAP = 1 << 20


class Type(IntEnum):
    """Section types."""

    HOST = 0x01
    LAYOUT = 0x02
    CONFIG = 0x03
    DEVICES = 0x04
    HEAD_END = 0x05
    PAD = 0x06
    MEMORY = 0x07
    ROUND_END = 0x08
    STATE = 0x09
    TIME = 0x0A
    END = 0x0B
    GO = 0x0C
    ABORT = 0x0D
    STATE_ZEROS = 0x0F
    STATE_OPTIONAL = OPTIONAL | 0x09
    REHEARSAL = OPTIONAL | 0x0E
    DISKS = OPTIONAL | 0x10
    HASHES = OPTIONAL | 0x11


_STATE_NAME_CAP = STATE_HEAD.size + 256  # the name and its padding

CAPS: dict[int, int] = {
    Type.HOST: 1 << 16,
    Type.LAYOUT: LAYOUT_HEAD.size + MAX_SEGMENTS * LAYOUT_SEGMENT.size,
    Type.CONFIG: 1 << 16,
    Type.DEVICES: 1 << 16,
    Type.HEAD_END: 0,
    Type.PAD: MAX_PAD_BYTES,
    Type.MEMORY: MEMORY_HEAD.size
    + MAX_EXTENTS * EXTENT.size
    + MAX_MEMORY_PAGES * (HASH_BYTES + PAGE_BYTES),
    Type.ROUND_END: ROUND_END.size,
    Type.STATE: _STATE_NAME_CAP + MAX_STATE_PART_BYTES,
    Type.TIME: TIME.size,
    Type.END: END.size,
    Type.GO: NONCE_BYTES,
    Type.ABORT: ABORT_HEAD.size + MAX_ABORT_TEXT_BYTES,
    Type.STATE_ZEROS: _STATE_NAME_CAP + STATE_COUNT.size,
    Type.STATE_OPTIONAL: _STATE_NAME_CAP + MAX_STATE_PART_BYTES,
    Type.REHEARSAL: 1 << 20,
    Type.DISKS: 1 << 18,
    Type.HASHES: HASHES_HEAD.size + MAX_EXTENTS * EXTENT.size + MAX_HASHES * HASH_BYTES,
}

FLAG_ZSTD = 1  # MEMORY
FLAG_LAST = 1  # ROUND_END, and the parts of states
FLAGS: dict[int, int] = {
    Type.MEMORY: FLAG_ZSTD,
    Type.ROUND_END: FLAG_LAST,
    Type.STATE: FLAG_LAST,
    Type.STATE_ZEROS: FLAG_LAST,
    Type.STATE_OPTIONAL: FLAG_LAST,
}


END_MAY_START = 1
END_NO_MEMORY = 2


class Header(NamedTuple):
    """The first 72 bytes.  stream_id: 16 bytes; seed: u64."""

    form: Form
    features: Feature
    stream_id: bytes
    seed: int
    version: int = VERSION


class RoundEnd(NamedTuple):
    """The counts of one round, in pages.  is_last: the guest was paused in it."""

    round: int
    data_pages: int
    zero_pages: int
    is_last: bool = False


class Time(NamedTuple):
    """When the source paused the guest, in ns since the Epoch, and for how long so far, in ns."""

    paused_at_ns: int
    paused_for_ns: int


class End(NamedTuple):
    """The trailer: the totals of all sections before END, and the digest; in END's order."""

    what: int
    rounds: int
    sections: int
    offset_bytes: int
    data_pages: int
    zero_pages: int
    state_bytes: int
    digest: bytes


def padding_bytes(length: int) -> int:
    """Return how many zero bytes follow a payload of `length` bytes: 0 to 7."""
    return -length % ALIGN_BYTES


def cap(type_: int) -> int | None:
    """Return the largest payload of a section type in bytes, None if unknown."""
    known = CAPS.get(type_)
    if known is None and type_ & OPTIONAL:
        return OPTIONAL_CAP
    return known


def type_name(type_: int) -> str:
    """Return the name of a section type as messages show it."""
    if type_ in CAPS:
        return Type(type_).name
    return f"type 0x{type_:08x}"


def end_flags(form: Form, features: Feature) -> int:
    """Return the value that END's `what` field must have in such a stream."""
    if features & Feature.NO_MEMORY:
        return END_NO_MEMORY
    return 0 if form == Form.ANSWERED else END_MAY_START


def pack_header(header: Header, checksum: int) -> bytes:
    """Pack the header; checksum: XXH3-64 with seed 0 of its first 64 bytes."""
    return HEADER.pack(
        MAGIC,
        header.version,
        header.form,
        header.features,
        0,
        header.stream_id,
        header.seed,
        0,
        checksum,
    )


def unpack_header(data: bytes) -> tuple[Header, int]:
    """Unpack 72 bytes into the header and its checksum.

    Raises FormatError for another magic, version, form, or mandatory feature.
    The caller compares the checksum before, but only if the magic is right: a
    wrong magic has to show whether a transport in text mode mangled the stream.
    """
    magic, version, form, features, _, stream_id, seed, reserved, checksum = HEADER.unpack(data)
    if magic != MAGIC:
        _refuse_magic(magic)
    if version != VERSION:
        raise FormatError(f"version {version} of the stream is not known here (known: {VERSION})")
    if form not in set(Form):
        raise FormatError(f"form {form} is not known")
    if features & ~KNOWN_FEATURES:
        raise FormatError(f"mandatory features 0x{features & ~KNOWN_FEATURES:x} are not known")
    if reserved:
        raise FormatError("reserved field is not zero")
    return Header(Form(form), Feature(features), stream_id, seed, version), checksum


def _refuse_magic(magic: bytes) -> NoReturn:
    """Raise FormatError, which tells a stream mangled as text from what is no stream."""
    if magic[1:4] == MAGIC[1:4]:
        raise FormatError("the transport changed line ends or the high bit: it is in text mode")
    raise FormatError("this is not a bhystream(5)")


def pack_section(type_: int, flags: int, length: int, sequence: int, checksum: int) -> bytes:
    """Pack a section header of 32 bytes."""
    return SECTION.pack(type_, flags, length, sequence, checksum)


def unpack_host(data: bytes) -> dict[str, Any]:
    """Unpack HOST: an object with the strings hypervisor and program.  Raises FormatError."""
    value = _unpack_object(data)
    for key in ("hypervisor", "program"):
        if not _is_name(value.get(key)):
            raise FormatError(f"{key} is missing or not a name")
    return value


def _has_control(text: str) -> bool:
    return any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_NAME_CHARS and not _has_control(value)


def unpack_config(data: bytes) -> dict[str, Any]:
    """Unpack CONFIG: an object with the guest's name.  Raises FormatError."""
    value = _unpack_object(data)
    name = value.get("name")
    if not isinstance(name, str) or not GUEST_NAME.fullmatch(name):
        raise FormatError("name is missing or not a guest's name")
    return value


def _unpack_object(data: bytes) -> dict[str, Any]:
    value = unpack_json(data)
    if not isinstance(value, dict):
        raise FormatError("not a JSON object")
    return value


def unpack_devices(data: bytes) -> tuple[str, ...]:
    """Unpack DEVICES: an array of names.  Raises FormatError."""
    value = unpack_json(data)
    if not isinstance(value, list) or len(value) > MAX_DEVICES:
        raise FormatError(f"not an array of at most {MAX_DEVICES} names")
    for name in value:
        if not _is_name(name):
            raise FormatError(f"not a name of 1 to {MAX_NAME_CHARS} printable characters")
    return tuple(value)


def pack_layout(layout: Layout) -> bytes:
    """Pack LAYOUT from 1 to 64 segments."""
    parts = [LAYOUT_HEAD.pack(PAGE_BYTES, len(layout.segments))]
    for segment in layout.segments:
        gpa = GPA_UNSTATED if segment.gpa is None else segment.gpa
        parts.append(LAYOUT_SEGMENT.pack(segment.name.encode(), gpa, segment.npages))
    return b"".join(parts)


def unpack_layout(data: bytes) -> Layout:
    """Unpack LAYOUT into 1 to 64 segments.  Raises FormatError."""
    if len(data) < LAYOUT_HEAD.size:
        raise FormatError("length is too small")
    page_bytes, count = LAYOUT_HEAD.unpack_from(data)
    if page_bytes != PAGE_BYTES:
        raise FormatError(f"page size is {page_bytes}, not {PAGE_BYTES}")
    if not 1 <= count <= MAX_SEGMENTS:
        raise FormatError(f"{count} segments are not 1 to {MAX_SEGMENTS}")
    if len(data) != LAYOUT_HEAD.size + count * LAYOUT_SEGMENT.size:
        raise FormatError(f"length does not fit {count} segments")
    segments = tuple(
        _unpack_segment(*fields) for fields in LAYOUT_SEGMENT.iter_unpack(data[LAYOUT_HEAD.size :])
    )
    if len({segment.name for segment in segments}) != count:
        raise FormatError("two segments have the same name")
    layout = Layout(segments)
    if layout.npages > MAX_GUEST_PAGES:
        raise FormatError("the guest has more than 2^36 pages")
    _check_addresses(segments)
    return layout


def _check_addresses(segments: tuple[Segment, ...]) -> None:
    """Refuse segments whose guest physical addresses overlap or overflow."""
    stated = sorted((s.gpa, s.npages * PAGE_BYTES, s.name) for s in segments if s.gpa is not None)
    at = 0
    for gpa, size, name in stated:
        if gpa < at:
            raise FormatError(f"segment {name} overlaps another")
        at = gpa + size
    if at > 1 << 64:
        raise FormatError(f"segment {stated[-1][2]} ends above 2^64")


def _unpack_segment(raw: bytes, gpa: int, npages: int) -> Segment:
    name = raw.rstrip(b"\0")
    if len(name) > 31 or not TOKEN.fullmatch(name):
        raise FormatError("a segment's name is not 1 to 31 printable characters")
    if gpa != GPA_UNSTATED and gpa % PAGE_BYTES:
        raise FormatError(f"segment {name.decode()}: gpa 0x{gpa:x} is not a multiple of 4096")
    if npages == 0:
        raise FormatError(f"segment {name.decode()} has no pages")
    return Segment(name.decode(), None if gpa == GPA_UNSTATED else gpa, npages)


def pack_state(name: str, part: int, data: memoryview | bytes) -> bytes:
    """Pack the payload of one STATE or STATE_OPTIONAL section."""
    raw = name.encode()
    head = STATE_HEAD.pack(len(raw), 0, part)
    return b"".join((head, raw, bytes(padding_bytes(len(raw))), data))


def pack_state_zeros(name: str, part: int, count: int) -> bytes:
    """Pack the payload of one STATE_ZEROS section, which stands for `count` zero bytes."""
    return pack_state(name, part, STATE_COUNT.pack(count))


def unpack_state(data: bytes) -> tuple[str, int, bytes]:
    """Unpack STATE or STATE_OPTIONAL into the state's name, the part number and the bytes.

    Raises FormatError.
    """
    name, part, rest = _unpack_part(data)
    if len(rest) > MAX_STATE_PART_BYTES:
        raise FormatError(f"a part has more than {MAX_STATE_PART_BYTES} bytes")
    return name, part, rest


def unpack_state_zeros(data: bytes) -> tuple[str, int, int]:
    """Unpack STATE_ZEROS into the state's name, the part number and a count of 0 to 2^64 - 1.

    Raises FormatError.
    """
    name, part, rest = _unpack_part(data)
    if len(rest) != STATE_COUNT.size:
        raise FormatError(f"length does not fit a name of {len(name)} characters and a count")
    return name, part, int(STATE_COUNT.unpack(rest)[0])


def _unpack_part(data: bytes) -> tuple[str, int, bytes]:
    """Unpack a part of a state into the name, the part number and what follows the name."""
    if len(data) < STATE_HEAD.size:
        raise FormatError("length is too small")
    length, reserved, part = STATE_HEAD.unpack_from(data)
    start = STATE_HEAD.size + length + padding_bytes(length)
    name = data[STATE_HEAD.size : STATE_HEAD.size + length]
    if reserved:
        raise FormatError("reserved field is not zero")
    if len(data) < start or length > MAX_STATE_NAME_BYTES or not TOKEN.fullmatch(name):
        raise FormatError(f"the name is not 1 to {MAX_STATE_NAME_BYTES} printable characters")
    if any(data[STATE_HEAD.size + length : start]):
        raise FormatError("padding after the name is not zero")
    return name.decode(), part, data[start:]


def pack_abort(status: int, text: str, room_bytes: int = MAX_ABORT_TEXT_BYTES) -> bytes:
    """Pack ABORT; the text is cut to room_bytes, and to MAX_ABORT_TEXT_BYTES."""
    raw = text.encode("utf-8", "replace")[: min(room_bytes, MAX_ABORT_TEXT_BYTES)]
    clean = "".join(c if c.isprintable() else "?" for c in raw.decode("utf-8", "ignore"))
    return ABORT_HEAD.pack(status, 0) + (clean or "?").encode()


def unpack_abort(data: bytes) -> tuple[int, str]:
    """Unpack ABORT into the sender's exit status and its words.  Raises FormatError."""
    if len(data) <= ABORT_HEAD.size:
        raise FormatError("length is too small")
    status, reserved = ABORT_HEAD.unpack_from(data)
    if reserved:
        raise FormatError("reserved field is not zero")
    if not 64 <= status <= 77:
        raise FormatError(f"status {status} is not 64 to 77")
    try:
        text = data[ABORT_HEAD.size :].decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError("the text is not UTF-8") from None
    if _has_control(text):
        raise FormatError("the text has control characters")
    return status, text

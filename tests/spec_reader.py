"""A strict reader of bhystream(5), made from the page alone.

It shares no code with the package: where the two disagree about a stream, one of them differs
from the page.  It favours plainness over speed, and keeps the guest's data pages in a dict, so it
is for the small streams of the tests.

Data flow: `_Source` reads exact lengths and keeps the offset; `_Reader.run` reads one section
after another and checks what all sections share; one method for each type checks the contents and
stores them in `Stream`.  Nothing is allocated by a length of the stream before that length is
within its cap, and then only as the bytes arrive.

Choices where the page leaves one:

- A fixed length is checked with the cap; MEMORY's list after its checksum if that does not cover
  pages still to come.
- PAD and unknown optional sections may stand in a dry run; PAD may follow GO; GO may not follow
  the END of a dry run, as nothing can be READY there.
- The last round has the LAST flag; a state is complete before TIME.
- After the last section of a plain, kept or aborted stream only end of file is accepted.
- Each JSON array and object is one level of nesting; a number with a fraction or an exponent is
  not an integer.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final, NamedTuple, Never

import xxhash
import zstandard

PAGE: Final = 4096
PLAIN, KEPT, ANSWERED = 1, 2, 3
ZSTD, NO_MEMORY = 1, 2
MAY_START = 1
LAST = 1
NO_GPA: Final = 0xFFFFFFFFFFFFFFFF
OPTIONAL: Final = 0x80000000

HEADER: Final = struct.Struct("<8sIIQQ16sQ8sQ")
SECTION: Final = struct.Struct("<IIQQQ")
SEGMENT: Final = struct.Struct("<32sQQ")
MEMORY_HEAD: Final = struct.Struct("<IIII")
EXTENT: Final = struct.Struct("<QII")
END_BODY: Final = struct.Struct("<IIQQQQQ16s")


class Refused(Exception):
    """The stream breaks a rule of bhystream(5).

    `section_number` is the expected sequence number, None in the stream's header; `type_name` is
    None there, for a section of unknown type, and where the section header is incomplete;
    `offset` is that of the section's header in bytes.
    """

    def __init__(
        self, section_number: int | None, type_name: str | None, offset: int, why: str
    ) -> None:
        where = "header" if section_number is None else f"section {section_number}"
        name = "" if type_name is None else f" ({type_name})"
        super().__init__(f"{where}{name} at offset {offset:#x}: {why}")
        self.section_number = section_number
        self.type_name = type_name
        self.offset = offset
        self.why = why


class _Wrong(Exception):
    """A broken rule; `_Reader.run` adds where."""


def _need(condition: bool, why: str) -> None:
    if not condition:
        raise _Wrong(why)


@dataclass(frozen=True)
class Header:
    form: int
    mandatory: int
    optional: int
    stream_id: bytes
    seed: int
    checksum: bytes


class Segment(NamedTuple):
    """`first` is the page number of the first page; `gpa` None where none is stated."""

    name: str
    gpa: int | None
    first: int
    npages: int


class Round(NamedTuple):
    data_pages: int
    zero_pages: int
    last: bool


class Time(NamedTuple):
    paused_at_ns: int
    paused_for_ns: int


class Abort(NamedTuple):
    status: int
    text: str


@dataclass
class Stream:
    """What a sound stream holds.

    `memory` maps a page number to its 4096 bytes after all rounds; a page of zeros is absent.
    `what` and `digest` are END's, None in a stream that ends with ABORT.  `skipped` holds the
    types of the unknown optional sections.  `sections` counts all, END, GO and ABORT included.
    """

    header: Header
    host: dict[str, Any] | None = None
    layout: list[Segment] = field(default_factory=list)
    config: dict[str, Any] | None = None
    devices: list[str] = field(default_factory=list)
    memory: dict[int, bytes] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    states: dict[str, bytes] = field(default_factory=dict)
    time: Time | None = None
    what: int | None = None
    digest: bytes | None = None
    nonce: bytes | None = None
    abort: Abort | None = None
    skipped: list[int] = field(default_factory=list)
    sections: int = 0

    @property
    def npages(self) -> int:
        return sum(segment.npages for segment in self.layout)


class _Source:
    """Exact reads, in steps, so that a length costs no memory before its bytes are there."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.offset = 0

    def upto(self, length: int) -> bytes:
        """Return `length` bytes, fewer only at the end of file."""
        got = bytearray()
        while len(got) < length:
            step = self._stream.read(min(length - len(got), 65536))
            if not step:
                break
            got += step
        self.offset += len(got)
        return bytes(got)

    def exactly(self, length: int, what: str) -> bytes:
        got = self.upto(length)
        _need(len(got) == length, f"{what} is incomplete")
        return got


def _read_header(source: _Source) -> Header:
    raw = source.exactly(HEADER.size, "the stream's header")
    magic, version, form, mandatory, optional, ident, seed, reserved, checksum = HEADER.unpack(raw)
    _need(magic == b"\x89BHS\r\n\x1a\n", "wrong magic")
    _need(version == 1, "unknown version")
    _need(xxhash.xxh3_64_intdigest(raw[:64], seed=0) == checksum, "wrong header checksum")
    _need(PLAIN <= form <= ANSWERED, "unknown form")
    _need(not mandatory & ~(ZSTD | NO_MEMORY), "unknown mandatory feature")
    _need(reserved == bytes(8), "reserved field is not zero")
    return Header(form, mandatory, optional, ident, seed, raw[64:])


# JSON: json.loads accepts more than RFC 8259 and the page do; each excess is refused here.


def _check_depth(text: str) -> None:
    # A string without an end takes the rest, so that the search stays linear.
    bare = re.sub(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)', "", text, flags=re.DOTALL)
    depth = 0
    for char in bare:
        if char in "[{":
            depth += 1
            _need(depth <= 16, "JSON nests too deep")
        elif char in "]}":
            depth -= 1


def _json_int(digits: str) -> int:
    _need(len(digits) <= 20 and -(2**63) <= int(digits) < 2**63, "JSON number out of range")
    return int(digits)


def _json_float(digits: str) -> Never:
    raise _Wrong("JSON number is not an integer")


def _json_constant(name: str) -> Never:
    raise _Wrong("not JSON")


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    _need(len(made) == len(pairs), "JSON name occurs twice in an object")
    return made


def _json(payload: bytes) -> Any:
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError:
        raise _Wrong("JSON is not UTF-8") from None
    _need(not text.startswith("\ufeff"), "JSON has a byte order mark")
    _check_depth(text)
    try:
        return json.loads(
            text,
            parse_int=_json_int,
            parse_float=_json_float,
            parse_constant=_json_constant,
            object_pairs_hook=_json_object,
        )
    except ValueError:
        raise _Wrong("not JSON") from None


def _is_name(raw: bytes) -> bool:
    """Printable ASCII without space."""
    return all(0x21 <= byte <= 0x7E for byte in raw)


def _unzstd(frame: bytes, size: int) -> bytes:
    """Return the `size` bytes of the one zstd frame that `frame` has to be.

    The blocks are walked first (RFC 8878, 3.1.1), as a decoder does not say where a frame ends.
    """
    _need(frame[:4] == b"\x28\xb5\x2f\xfd", "not a zstd frame")
    try:
        parameters = zstandard.get_frame_parameters(frame)
        at = zstandard.frame_header_size(frame)
    except zstandard.ZstdError:
        raise _Wrong("not a zstd frame") from None
    _need(parameters.content_size == size, "zstd frame does not state the content size")
    _need(len(frame) < size, "zstd frame is not smaller than its pages")
    last = 0
    while not last:
        block = int.from_bytes(frame[at : at + 3], "little")
        _need(at + 3 <= len(frame), "zstd frame is incomplete")
        last, kind = block & 1, block >> 1 & 3
        at += 3 + (1 if kind == 1 else block >> 3)
    at += 4 if parameters.has_checksum else 0
    _need(at <= len(frame), "zstd frame is incomplete")
    _need(at == len(frame), "bytes after the zstd frame")
    try:
        # One shot: the output has the stated size, which the caller capped, or this fails.
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=size)
    except zstandard.ZstdError:
        raise _Wrong("zstd frame is damaged") from None


class _Type(NamedTuple):
    name: str
    shortest: int
    cap: int
    flags: int
    parse: Callable[[_Reader, bytes, int], None]
    phase: str  # the phase in which the type may stand, "" if there are several


class _Reader:
    """`phase` names what is due: the grammar of "Overall structure" as one word."""

    def __init__(
        self, source: _Source, header: Header, hypervisors: Container[str] | None,
        nonce: bytes | None,
    ) -> None:  # fmt: skip
        self.source = source
        self.header = header
        self.hypervisors = hypervisors
        self.nonce = nonce
        self.out = Stream(header)
        self.phase = "HOST"
        self.number = 0
        self.start = source.offset
        self.name: str | None = None
        self.digest = xxhash.xxh3_128(header.checksum, seed=header.seed)
        self.cursor = 0  # the first page that the round has not passed
        self.data_pages = 0  # of this round
        self.zero_pages = 0
        self.part = 0  # the part that is due of the state `open`
        self.open: str | None = None
        self.state_bytes = 0
        self.parts: dict[str, list[bytes]] = {}

    def run(self) -> Stream:
        try:
            while self.section():
                self.number += 1
        except _Wrong as wrong:
            raise Refused(self.number, self.name, self.start, str(wrong)) from None
        self.out.sections = self.number
        return self.out

    def section(self) -> bool:
        """Read one section; return False at a lawful end of file."""
        self.start, self.name = self.source.offset, None
        raw = self.source.upto(SECTION.size)
        if not raw and self.phase in ("GO", "AFTER GO", "NOTHING"):
            return False
        _need(self.phase != "NOTHING", "bytes after the last section")
        _need(len(raw) == SECTION.size, "the section header is incomplete")
        kind, flags, length, sequence, checksum = SECTION.unpack(raw)
        known = TYPES.get(kind)
        _need(known is not None or kind & OPTIONAL != 0, "unknown section type")
        self.name = known.name if known else None
        self.check_place(known)
        _need(length <= (known.cap if known else 1048576), "length is over the cap")
        _need(known is None or length >= known.shortest, "length is too short")
        _need(sequence == self.number, "wrong sequence number")

        over = xxhash.xxh3_64(self.header.stream_id + raw[:24], seed=self.header.seed)
        if known and known.name == "MEMORY" and not flags & ZSTD:
            self.plain_memory(length, flags, over, checksum)
        else:
            payload = self.source.exactly(length, "the payload")
            self.padding(length)
            over.update(payload)
            _need(over.intdigest() == checksum, "wrong checksum")
            if known:
                _need(not flags & ~known.flags, "unknown flag")
                known.parse(self, payload, flags)
            else:
                self.out.skipped.append(kind)
        self.digest.update(raw[24:])
        return True

    def check_place(self, known: _Type | None) -> None:
        after_end = self.phase in ("GO", "AFTER GO")
        if known and known.phase:
            # An open state has to be completed before TIME.
            fits = known.phase == self.phase and not (known.name == "TIME" and self.open)
        elif known and known.name == "PAD":
            fits = self.phase != "HOST"
        elif known:  # ABORT
            fits = not after_end
        else:
            fits = self.phase != "HOST" and not after_end
        _need(fits, "the section may not stand here")

    def padding(self, length: int) -> None:
        pad = self.source.exactly(-length % 8, "the padding")
        _need(not any(pad), "the padding is not zero")

    # The head

    def host(self, payload: bytes, _flags: int) -> None:
        value = _json(payload)
        _need(isinstance(value, dict), "HOST is not an object")
        for key in ("hypervisor", "program"):
            _need(isinstance(value.get(key), str), f"HOST has no string {key}")
        _need(
            self.hypervisors is None or value["hypervisor"] in self.hypervisors,
            "hypervisor is not supported",
        )
        self.out.host, self.phase = value, "LAYOUT"

    def layout(self, payload: bytes, _flags: int) -> None:
        page_size, count = struct.unpack_from("<II", payload)
        _need(page_size == PAGE, "page size is not 4096")
        _need(1 <= count <= 64, "number of segments is not 1 to 64")
        _need(len(payload) == 8 + 48 * count, "wrong length")
        first, names = 0, set()
        for raw, gpa, npages in SEGMENT.iter_unpack(payload[8:]):
            name = raw.rstrip(b"\0")
            _need(1 <= len(name) <= 31 and _is_name(name), "bad segment name")
            _need(name not in names, "segment name occurs twice")
            _need(gpa == NO_GPA or gpa % PAGE == 0, "gpa is not a multiple of 4096")
            _need(npages >= 1, "segment without pages")
            names.add(name)
            stated = None if gpa == NO_GPA else gpa
            self.out.layout.append(Segment(name.decode("ascii"), stated, first, npages))
            first += npages
        _need(first <= 2**36, "more than 2^36 pages")
        self.phase = "CONFIG"

    def config(self, payload: bytes, _flags: int) -> None:
        value = _json(payload)
        _need(isinstance(value, dict), "CONFIG is not an object")
        name = value.get("name")
        good = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name)
        _need(bool(good), "bad name of the guest")
        self.out.config, self.phase = value, "DEVICES"

    def devices(self, payload: bytes, _flags: int) -> None:
        value = _json(payload)
        _need(isinstance(value, list), "DEVICES is not an array")
        _need(len(value) <= 1024, "more than 1024 devices")
        _need(all(isinstance(name, str) for name in value), "device name is not a string")
        _need(all(len(name) <= 128 for name in value), "device name over 128 characters")
        self.out.devices, self.phase = value, "HEAD_END"

    def head_end(self, _payload: bytes, _flags: int) -> None:
        self.phase = "END" if self.header.mandatory & NO_MEMORY else "ROUNDS"

    def pad(self, _payload: bytes, _flags: int) -> None:
        pass

    # The rounds

    def plain_memory(self, length: int, flags: int, over: xxhash.xxh3_64, checksum: int) -> None:
        """Read a MEMORY section without the ZSTD flag: the list first, then the pages."""
        head = self.source.exactly(MEMORY_HEAD.size, "the payload")
        _, nextents, npages, _ = MEMORY_HEAD.unpack(head)
        size = self.list_size(nextents, npages)
        _need(length == size + npages * PAGE, "wrong length")
        raw = head + self.source.exactly(size - len(head), "the payload")
        over.update(raw)
        _need(over.intdigest() == checksum, "wrong checksum")
        _need(not flags, "unknown flag")
        extents = self.extents(raw)
        pages = self.source.exactly(npages * PAGE, "the payload")
        self.padding(length)
        self.apply(raw, extents, pages)

    def zstd_memory(self, payload: bytes, _flags: int) -> None:
        _need(bool(self.header.mandatory & ZSTD), "ZSTD without the stream's feature")
        _, nextents, npages, _ = MEMORY_HEAD.unpack_from(payload)
        size = self.list_size(nextents, npages)
        _need(len(payload) >= size, "wrong length")
        _need(npages > 0, "ZSTD without pages")
        extents = self.extents(payload)
        self.apply(payload, extents, _unzstd(payload[size:], npages * PAGE))

    def list_size(self, nextents: int, npages: int) -> int:
        """Return the bytes before the first page byte."""
        _need(1 <= nextents <= 4096, "number of extents is not 1 to 4096")
        _need(npages <= 1024, "more than 1024 pages")
        return MEMORY_HEAD.size + nextents * EXTENT.size + npages * 8

    def extents(self, raw: bytes) -> list[tuple[int, int, bool]]:
        """Check the list and return its extents as (first, end, is_data)."""
        number, nextents, npages, zero = MEMORY_HEAD.unpack_from(raw)
        _need(number == len(self.out.rounds), "wrong round")
        _need(zero == 0, "reserved field is not zero")
        made, at, data, total = [], self.cursor, 0, self.out.npages
        upto = MEMORY_HEAD.size + nextents * EXTENT.size
        for first, count, kind in EXTENT.iter_unpack(raw[MEMORY_HEAD.size : upto]):
            _need(kind in (0, 1), "unknown kind of extent")
            _need(count >= 1, "empty extent")
            _need(first + count <= total, "extent is outside the guest")
            _need(first >= at, "extents do not ascend")
            _need(number > 0 or first == at, "gap in round 0")
            at = first + count
            data += 0 if kind else count
            made.append((first, at, kind == 0))
        segment = next(one for one in self.out.layout if made[0][0] < one.first + one.npages)
        _need(at <= segment.first + segment.npages, "extents are not in one segment")
        _need(data == npages, "number of pages is not that of the DATA extents")
        return made

    def apply(self, raw: bytes, extents: list[tuple[int, int, bool]], pages: bytes) -> None:
        """Check the page hashes, then let the statements of the section take effect."""
        npages = len(pages) // PAGE
        upto = MEMORY_HEAD.size + len(extents) * EXTENT.size
        hashes = struct.unpack_from(f"<{npages}Q", raw, upto)
        cut = [pages[at : at + PAGE] for at in range(0, len(pages), PAGE)]
        for page, expected in zip(cut, hashes, strict=True):
            digest = xxhash.xxh3_64_intdigest(page, seed=self.header.seed)
            _need(digest == expected, "wrong page hash")
        given = iter(cut)
        for first, end, is_data in extents:
            if is_data:
                for number in range(first, end):
                    self.put(number, next(given))
                self.data_pages += end - first
            else:
                self.put_zeros(first, end)
                self.zero_pages += end - first
        self.cursor = extents[-1][1]

    def put(self, number: int, page: bytes) -> None:
        if any(page):
            self.out.memory[number] = page
        else:
            self.out.memory.pop(number, None)

    def put_zeros(self, first: int, end: int) -> None:
        # An extent may have 2^32 - 1 pages: never walk more than what is held.
        memory = self.out.memory
        if end - first > len(memory):
            gone = [number for number in memory if first <= number < end]
        else:
            gone = [number for number in range(first, end) if number in memory]
        for number in gone:
            del memory[number]

    def round_end(self, payload: bytes, flags: int) -> None:
        number, zero, data_pages, zero_pages = struct.unpack("<IIQQ", payload)
        _need(number == len(self.out.rounds), "wrong round")
        _need(zero == 0, "reserved field is not zero")
        _need(number > 0 or self.cursor == self.out.npages, "gap in round 0")
        _need(data_pages == self.data_pages, "wrong count of data pages")
        _need(zero_pages == self.zero_pages, "wrong count of zero pages")
        self.out.rounds.append(Round(data_pages, zero_pages, bool(flags & LAST)))
        self.cursor = self.data_pages = self.zero_pages = 0
        if flags & LAST:
            self.phase = "STATE"

    # The state

    def state(self, payload: bytes, flags: int) -> None:
        length, zero, part = struct.unpack_from("<HHI", payload)
        _need(1 <= length <= 255, "state name is not 1 to 255 bytes")
        _need(zero == 0, "reserved field is not zero")
        start = 8 + length + -length % 8
        _need(len(payload) >= start, "wrong length")
        name = payload[8 : 8 + length]
        _need(_is_name(name), "bad state name")
        _need(not any(payload[8 + length : start]), "filling of the state name is not zero")
        _need(len(payload) - start <= 1048576, "part of a state is too long")
        text = name.decode("ascii")
        if self.open is None:
            _need(text not in self.parts, "state name comes back")
            _need(len(self.parts) < 4096, "more than 4096 states")
            self.parts[text] = []
        else:
            _need(text == self.open, "state is incomplete")
        _need(part == self.part, "wrong part of a state")
        self.state_bytes += len(payload) - start
        _need(self.state_bytes <= 134217728, "states are too long")
        if start < len(payload):  # empty parts are lawful, and must not fill a list
            self.parts[text].append(payload[start:])
        self.open, self.part = text, part + 1
        if flags & LAST:
            self.out.states[text] = b"".join(self.parts[text])
            self.parts[text] = []
            self.open, self.part = None, 0

    def time(self, payload: bytes, _flags: int) -> None:
        self.out.time = Time(*struct.unpack("<QQ", payload))
        self.phase = "END"

    # The trailer

    def end(self, payload: bytes, _flags: int) -> None:
        what, rounds, sections, offset, data, zeros, states, digest = END_BODY.unpack(payload)
        dry = bool(self.header.mandatory & NO_MEMORY)
        start = self.header.form != ANSWERED and not dry
        _need(not what & ~(MAY_START | NO_MEMORY), "unknown bit in what")
        _need(bool(what & MAY_START) == start, "wrong MAY_START")
        _need(bool(what & NO_MEMORY) == dry, "wrong NO_MEMORY")
        _need(rounds == len(self.out.rounds), "wrong number of rounds")
        _need(sections == self.number, "wrong number of sections")
        _need(offset == self.start, "wrong offset")
        _need(data == sum(one.data_pages for one in self.out.rounds), "wrong data pages")
        _need(zeros == sum(one.zero_pages for one in self.out.rounds), "wrong zero pages")
        _need(states == self.state_bytes, "wrong state bytes")
        _need(digest == self.digest.digest(), "wrong digest")
        self.out.what, self.out.digest = what, digest
        if self.header.form != ANSWERED:
            self.phase = "NOTHING"
        else:
            self.phase = "AFTER GO" if dry else "GO"

    def go(self, payload: bytes, _flags: int) -> None:
        _need(self.nonce is None or payload == self.nonce, "wrong nonce")
        self.out.nonce, self.phase = payload, "AFTER GO"

    def abort(self, payload: bytes, _flags: int) -> None:
        status, zero = struct.unpack_from("<II", payload)
        _need(64 <= status <= 77, "status is not 64 to 77")
        _need(zero == 0, "reserved field is not zero")
        try:
            text = payload[8:].decode("utf-8")
        except UnicodeDecodeError:
            raise _Wrong("text is not UTF-8") from None
        _need(re.search(r"[\x00-\x1f\x7f-\x9f]", text) is None, "control character in the text")
        self.out.abort, self.phase = Abort(status, text), "NOTHING"


TYPES: Final = {
    0x1: _Type("HOST", 0, 65536, 0, _Reader.host, "HOST"),
    0x2: _Type("LAYOUT", 56, 3080, 0, _Reader.layout, "LAYOUT"),
    0x3: _Type("CONFIG", 0, 65536, 0, _Reader.config, "CONFIG"),
    0x4: _Type("DEVICES", 0, 65536, 0, _Reader.devices, "DEVICES"),
    0x5: _Type("HEAD_END", 0, 0, 0, _Reader.head_end, "HEAD_END"),
    0x6: _Type("PAD", 0, 1048576, 0, _Reader.pad, ""),
    0x7: _Type("MEMORY", 32, 4268048, ZSTD, _Reader.zstd_memory, "ROUNDS"),
    0x8: _Type("ROUND_END", 24, 24, LAST, _Reader.round_end, "ROUNDS"),
    0x9: _Type("STATE", 16, 1048840, LAST, _Reader.state, "STATE"),
    0xA: _Type("TIME", 16, 16, 0, _Reader.time, "STATE"),
    0xB: _Type("END", 64, 64, 0, _Reader.end, "END"),
    0xC: _Type("GO", 16, 16, 0, _Reader.go, "GO"),
    0xD: _Type("ABORT", 9, 1024, 0, _Reader.abort, ""),
}


def read(
    stream: BinaryIO, *, hypervisors: Container[str] | None = None, nonce: bytes | None = None
) -> Stream:
    """Read a whole stream up to the end of file and return what it holds.

    `hypervisors` are those that are supported, `nonce` the 16 bytes of READY; None takes any.
    Raises Refused for whatever bhystream(5) does not allow.
    """
    source = _Source(stream)
    try:
        header = _read_header(source)
    except _Wrong as wrong:
        raise Refused(None, None, 0, str(wrong)) from None
    return _Reader(source, header, hypervisors, nonce).run()

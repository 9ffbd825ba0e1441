"""The sections in their order, the rounds, the state, the trailer."""

from __future__ import annotations

import struct
from collections.abc import Callable, Container
from typing import BinaryIO, Final, NamedTuple

import xxhash

from spec_reader import values
from spec_reader.disks import disks
from spec_reader.found import (
    ANSWERED,
    NO_MEMORY,
    PAGE,
    PLAIN,
    ZSTD,
    Abort,
    Header,
    Refused,
    Round,
    Stream,
    Time,
    Wrong,
    need,
)
from spec_reader.frame import unzstd

MAY_START = 1
LAST = 1
OPTIONAL: Final = 0x80000000

HEADER: Final = struct.Struct("<8sIIQQ16sQ8sQ")
SECTION: Final = struct.Struct("<IIQQQ")
MEMORY_HEAD: Final = struct.Struct("<IIII")
EXTENT: Final = struct.Struct("<QII")
END_BODY: Final = struct.Struct("<IIQQQQQ16s")


class Source:
    """Exact reads in steps, so that a length takes no memory before its bytes have come."""

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
        need(len(got) == length, f"{what} is incomplete")
        return got


def _read_header(source: Source) -> Header:
    raw = source.exactly(HEADER.size, "the stream's header")
    magic, version, form, mandatory, optional, ident, seed, reserved, checksum = HEADER.unpack(raw)
    need(magic == b"\x89BHS\r\n\x1a\n", "wrong magic")
    need(xxhash.xxh3_64_intdigest(raw[:64], seed=0) == checksum, "wrong header checksum")
    need(version == 1, "unknown version")
    need(PLAIN <= form <= ANSWERED, "unknown form")
    need(not mandatory & ~(ZSTD | NO_MEMORY), "unknown mandatory feature")
    need(reserved == bytes(8), "reserved field is not zero")
    return Header(form, mandatory, optional, ident, seed, raw[64:])


class _Type(NamedTuple):
    name: str
    shortest: int
    cap: int
    flags: int
    parse: Callable[[Reader, bytes, int], None]
    phases: tuple[str, ...]  # the phases in which the type may stand; () for a rule of its own


class Reader:
    """`phase` names the section that is due, by the grammar of "Overall structure"."""

    def __init__(
        self, source: Source, header: Header, hypervisors: Container[str] | None,
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
        self.hashed = 0  # the first page that no HASHES section has stated
        self.data_pages = 0  # so far in this round
        self.zero_pages = 0
        self.part = 0  # the part of the state `open` that is due
        self.open: str | None = None
        self.open_optional = False
        self.state_bytes = 0
        self.optional_bytes = 0
        self.parts: dict[str, list[bytes]] = {}

    def run(self) -> Stream:
        try:
            while self.section():
                self.number += 1
        except Wrong as wrong:
            raise Refused(self.number, self.name, self.start, str(wrong)) from None
        self.out.sections = self.number
        return self.out

    def section(self) -> bool:
        """Read one section; return False if the file may end here, and does."""
        self.start, self.name = self.source.offset, None
        if self.phase == "ABORTED":
            return False
        raw = self.source.upto(SECTION.size)
        if not raw and self.phase in ("GO", "AFTER GO", "NOTHING"):
            return False
        if len(raw) == SECTION.size:
            kind, flags, length, sequence, checksum = SECTION.unpack(raw)
            known = TYPES.get(kind)
            self.name = known.name if known else f"type 0x{kind:08x}"
        need(self.phase != "NOTHING", "bytes after the last section")
        need(len(raw) == SECTION.size, "the section header is incomplete")
        need(known is not None or kind & OPTIONAL != 0, "unknown section type")
        self.check_place(known)
        need(length <= (known.cap if known else 1048576), "length is over the cap")
        need(sequence == self.number, "wrong sequence number")

        over = xxhash.xxh3_64(self.header.stream_id + raw[:24], seed=self.header.seed)
        if known and known.name == "MEMORY":
            self.memory(length, flags, over, checksum)
        else:
            payload = self.source.exactly(length, "the payload")
            self.padding(length)
            over.update(payload)
            need(over.intdigest() == checksum, "wrong checksum")
            if known:
                need(not flags & ~known.flags, "unknown flag")
                need(length >= known.shortest, "length is too short")
                known.parse(self, payload, flags)
            else:
                self.out.skipped.append(kind)
        self.digest.update(raw[24:])
        return True

    def check_place(self, known: _Type | None) -> None:
        after_end = self.phase in ("GO", "AFTER GO")
        if known and known.phases:
            # An open state has to be completed before TIME.
            fits = self.phase in known.phases and not (known.name == "TIME" and self.open)
        elif known and known.name == "PAD":
            fits = self.phase != "HOST"
        elif known:  # ABORT
            fits = not after_end
        else:
            fits = self.phase != "HOST" and not after_end
        need(fits, "the section may not stand here")

    def padding(self, length: int) -> None:
        pad = self.source.exactly(-length % 8, "the padding")
        need(not any(pad), "the padding is not zero")

    # The head

    def host(self, payload: bytes, _flags: int) -> None:
        value = values.host(payload)
        known = self.hypervisors is None or value["hypervisor"] in self.hypervisors
        need(known, "hypervisor is not supported")
        self.out.host, self.phase = value, "LAYOUT"

    def layout(self, payload: bytes, _flags: int) -> None:
        self.out.layout, self.phase = values.layout(payload), "CONFIG"

    def config(self, payload: bytes, _flags: int) -> None:
        self.out.config, self.phase = values.config(payload), "DEVICES"

    def devices(self, payload: bytes, _flags: int) -> None:
        self.out.devices, self.phase = values.devices(payload), "HEAD_END"

    def head_end(self, _payload: bytes, _flags: int) -> None:
        self.phase = "END" if self.header.mandatory & NO_MEMORY else "REHEARSAL"

    def rehearsal(self, payload: bytes, _flags: int) -> None:
        self.out.rehearsal, self.phase = payload, "ROUNDS"

    def pad(self, _payload: bytes, _flags: int) -> None:
        pass

    # The rounds

    def memory(self, length: int, flags: int, over: xxhash.xxh3_64, checksum: int) -> None:
        """Read a MEMORY section: the counts, the list, then the pages or the frame."""
        need(length >= MEMORY_HEAD.size, "length is too short")
        head = self.source.exactly(MEMORY_HEAD.size, "the payload")
        _, nextents, npages, _ = MEMORY_HEAD.unpack(head)
        size = self.list_size(nextents, npages)
        rest = length - size
        if flags & ZSTD:
            need(npages > 0, "ZSTD without pages")
            need(0 < rest < npages * PAGE, "wrong length")
        else:
            need(rest == npages * PAGE, "wrong length")
        raw = head + self.source.exactly(size - len(head), "the payload")
        over.update(raw)
        is_frame = flags & ZSTD != 0
        extents = [] if is_frame else self.listed(raw, flags, over, checksum)
        body = self.source.exactly(rest, "the payload")
        self.padding(length)
        if is_frame:
            over.update(body)
            extents = self.listed(raw, flags, over, checksum)
        self.apply(raw, extents, unzstd(body, npages * PAGE) if is_frame else body)

    def listed(
        self, raw: bytes, flags: int, over: xxhash.xxh3_64, checksum: int
    ) -> list[tuple[int, int, bool]]:
        """Check the checksum, the flags and the list; return its extents."""
        need(over.intdigest() == checksum, "wrong checksum")
        need(not flags & ~ZSTD, "unknown flag")
        need(not flags or self.header.mandatory & ZSTD != 0, "ZSTD without the stream's feature")
        return self.extents(raw)

    def list_size(self, nextents: int, npages: int) -> int:
        """Return the bytes before the first page byte."""
        need(1 <= nextents <= 4096, "number of extents is not 1 to 4096")
        need(npages <= 1024, "more than 1024 pages")
        return MEMORY_HEAD.size + nextents * EXTENT.size + npages * 8

    def extents(self, raw: bytes) -> list[tuple[int, int, bool]]:
        """Check the list and return its extents as (first, end, is_data)."""
        number, nextents, npages, zero = MEMORY_HEAD.unpack_from(raw)
        need(number == len(self.out.rounds), "wrong round")
        need(zero == 0, "reserved field is not zero")
        upto = MEMORY_HEAD.size + nextents * EXTENT.size
        gap = "" if number else "gap in round 0"
        made = self.checked(raw[MEMORY_HEAD.size : upto], self.cursor, gap)
        data = sum(end - first for first, end, is_data in made if is_data)
        need(data == npages, "number of pages is not that of the DATA extents")
        return made

    def checked(self, raw: bytes, at: int, gap: str) -> list[tuple[int, int, bool]]:
        """Return the extents of a list, none of which begins before page `at`.

        gap: what to say of a page that is left out; "" if it may be.
        """
        made, total = [], self.out.npages
        for first, count, kind in EXTENT.iter_unpack(raw):
            need(kind in (0, 1), "unknown kind of extent")
            need(count >= 1, "empty extent")
            need(first + count <= total, "extent is outside the guest")
            need(first >= at, "extents do not ascend")
            need(not gap or first == at, gap)
            at = first + count
            made.append((first, at, kind == 0))
        segment = next(one for one in self.out.layout if made[0][0] < one.first + one.npages)
        need(at <= segment.first + segment.npages, "extents are not in one segment")
        return made

    def apply(self, raw: bytes, extents: list[tuple[int, int, bool]], pages: bytes) -> None:
        """Check the page hashes, then put the section's pages into the memory."""
        npages = len(pages) // PAGE
        upto = MEMORY_HEAD.size + len(extents) * EXTENT.size
        hashes = struct.unpack_from(f"<{npages}Q", raw, upto)
        cut = [pages[at : at + PAGE] for at in range(0, len(pages), PAGE)]
        for page, expected in zip(cut, hashes, strict=True):
            digest = xxhash.xxh3_64_intdigest(page, seed=self.header.seed)
            need(digest == expected, "wrong page hash")
        given = iter(cut)
        for first, end, is_data in extents:
            if is_data:
                for number in range(first, end):
                    self.put(number, next(given))
                self.data_pages += end - first
            else:
                self.put_zeros(first, end)
                self.zero_pages += end - first
        self.cursor, self.phase = extents[-1][1], "ROUNDS"

    def put(self, number: int, page: bytes) -> None:
        if any(page):
            self.out.memory[number] = page
        else:
            self.out.memory.pop(number, None)

    def put_zeros(self, first: int, end: int) -> None:
        # An extent may have 2^32 - 1 pages: never look at more pages than the dict has.
        memory = self.out.memory
        if end - first > len(memory):
            gone = [number for number in memory if first <= number < end]
        else:
            gone = [number for number in range(first, end) if number in memory]
        for number in gone:
            del memory[number]

    def round_end(self, payload: bytes, flags: int) -> None:
        number, zero, data_pages, zero_pages = struct.unpack("<IIQQ", payload)
        need(number == len(self.out.rounds), "wrong round")
        need(zero == 0, "reserved field is not zero")
        need(number > 0 or self.cursor == self.out.npages, "gap in round 0")
        need(data_pages == self.data_pages, "wrong count of data pages")
        need(zero_pages == self.zero_pages, "wrong count of zero pages")
        self.out.rounds.append(Round(data_pages, zero_pages, bool(flags & LAST)))
        self.cursor = self.data_pages = self.zero_pages = 0
        if flags & LAST:
            self.phase = "HASHES"

    def hashes(self, payload: bytes, _flags: int) -> None:
        nextents, nhashes = struct.unpack_from("<II", payload)
        need(1 <= nextents <= 4096, "number of extents is not 1 to 4096")
        need(nhashes <= 16384, "more than 16384 hashes")
        upto = 8 + nextents * EXTENT.size
        need(len(payload) == upto + 8 * nhashes, "wrong length")
        made = self.checked(payload[8:upto], self.hashed, "gap in HASHES")
        data = sum(end - first for first, end, is_data in made if is_data)
        need(data == nhashes, "number of hashes is not that of the DATA extents")
        given = iter(struct.unpack_from(f"<{nhashes}Q", payload, upto))
        for first, end, is_data in made:
            pages = range(first, end) if is_data else ()
            self.out.hashes += [(number, 1, next(given)) for number in pages]
            self.out.hashes += [] if is_data else [(first, end - first, None)]
        self.hashed = made[-1][1]

    # The state

    def state(self, payload: bytes, flags: int) -> None:
        self.phase = "STATE"
        name, part, raw = self.part_of(payload)
        need(len(raw) <= 1048576, "part of a state is too long")
        self.begin_part(name, part, optional=False)
        self.state_bytes += len(raw)
        need(self.state_bytes <= 134217728, "states are too long")
        need(bool(raw) or (part == 0 and flags & LAST != 0), "empty part of a state")
        self.end_part(name, raw, flags)

    def state_zeros(self, payload: bytes, flags: int) -> None:
        self.phase = "STATE"
        name, part, raw = self.part_of(payload)
        need(len(raw) == 8, "wrong length")
        (count,) = struct.unpack("<Q", raw)
        self.begin_part(name, part, optional=False)
        self.state_bytes += count
        need(self.state_bytes <= 134217728, "states are too long")
        need(count >= 1, "empty part of a state")
        self.end_part(name, bytes(count), flags)

    def state_optional(self, payload: bytes, flags: int) -> None:
        name, part, raw = self.part_of(payload)
        need(len(raw) <= 1048576, "part of a state is too long")
        self.begin_part(name, part, optional=True)
        self.optional_bytes += len(raw)
        need(self.optional_bytes <= 4194304, "optional states are too long")
        need(bool(raw) or (part == 0 and flags & LAST != 0), "empty part of a state")
        self.phase = "OPTIONAL"
        self.end_part(name, raw, flags)

    def part_of(self, payload: bytes) -> tuple[str, int, bytes]:
        """Return the name, the part number, and what follows the name."""
        length, zero, part = struct.unpack_from("<HHI", payload)
        need(1 <= length <= 255, "state name is not 1 to 255 bytes")
        need(zero == 0, "reserved field is not zero")
        start = 8 + length + -length % 8
        need(len(payload) >= start, "wrong length")
        name = payload[8 : 8 + length]
        need(values.is_token(name), "bad state name")
        need(not any(payload[8 + length : start]), "filling of the state name is not zero")
        return name.decode("ascii"), part, payload[start:]

    def begin_part(self, name: str, part: int, *, optional: bool) -> None:
        whole = self.out.optional_states if optional else self.out.states
        if self.open is None:
            need(name not in self.parts, "state name comes back")
            need(len(whole) < 4096, "more than 4096 states")
            self.parts[name] = []
        else:
            same = name == self.open and optional == self.open_optional
            need(same, "state is incomplete")
        need(part == self.part, "wrong part of a state")
        self.open, self.open_optional = name, optional

    def end_part(self, name: str, raw: bytes, flags: int) -> None:
        self.parts[name].append(raw)
        self.part += 1
        if flags & LAST:
            whole = self.out.optional_states if self.open_optional else self.out.states
            whole[name] = b"".join(self.parts[name])
            self.parts[name] = []
            self.open, self.part = None, 0

    def time(self, payload: bytes, _flags: int) -> None:
        self.out.time = Time(*struct.unpack("<QQ", payload))
        need(self.hashed in (0, self.out.npages), "gap in HASHES")
        need(self.out.time.paused_at_ns > 0 or self.out.time.paused_for_ns == 0, "paused never")
        self.phase = "DISKS"

    def disks(self, payload: bytes, _flags: int) -> None:
        self.out.disks, self.phase = disks(payload), "END"

    # The trailer

    def end(self, payload: bytes, _flags: int) -> None:
        what, rounds, sections, offset, data, zeros, states, digest = END_BODY.unpack(payload)
        dry = bool(self.header.mandatory & NO_MEMORY)
        start = self.header.form != ANSWERED and not dry
        need(not what & ~(MAY_START | NO_MEMORY), "unknown bit in what")
        need(bool(what & MAY_START) == start, "wrong MAY_START")
        need(bool(what & NO_MEMORY) == dry, "wrong NO_MEMORY")
        need(rounds == len(self.out.rounds), "wrong number of rounds")
        need(sections == self.number, "wrong number of sections")
        need(offset == self.start, "wrong offset")
        need(data == sum(one.data_pages for one in self.out.rounds), "wrong data pages")
        need(zeros == sum(one.zero_pages for one in self.out.rounds), "wrong zero pages")
        need(states == self.state_bytes, "wrong state bytes")
        need(digest == self.digest.digest(), "wrong digest")
        self.out.what, self.out.digest = what, digest
        if self.header.form != ANSWERED:
            self.phase = "NOTHING"
        else:
            self.phase = "AFTER GO" if dry else "GO"

    def go(self, payload: bytes, _flags: int) -> None:
        need(self.nonce is None or payload == self.nonce, "wrong nonce")
        self.out.nonce, self.phase = payload, "AFTER GO"

    def abort(self, payload: bytes, _flags: int) -> None:
        status, zero = struct.unpack_from("<II", payload)
        need(64 <= status <= 77, "status is not 64 to 77")
        need(zero == 0, "reserved field is not zero")
        try:
            text = payload[8:].decode("utf-8")
        except UnicodeDecodeError:
            raise Wrong("text is not UTF-8") from None
        need(values.CONTROL.search(text) is None, "control character in the text")
        self.out.abort, self.phase = Abort(status, text), "ABORTED"


ROUNDS: Final = ("REHEARSAL", "ROUNDS")
TYPES: Final = {
    0x1: _Type("HOST", 0, 65536, 0, Reader.host, ("HOST",)),
    0x2: _Type("LAYOUT", 0, 3080, 0, Reader.layout, ("LAYOUT",)),
    0x3: _Type("CONFIG", 0, 65536, 0, Reader.config, ("CONFIG",)),
    0x4: _Type("DEVICES", 0, 65536, 0, Reader.devices, ("DEVICES",)),
    0x5: _Type("HEAD_END", 0, 0, 0, Reader.head_end, ("HEAD_END",)),
    0x6: _Type("PAD", 0, 1048576, 0, Reader.pad, ()),
    0x7: _Type("MEMORY", 0, 4268048, ZSTD, Reader.pad, ROUNDS),  # parsed by Reader.memory
    0x8: _Type("ROUND_END", 24, 24, LAST, Reader.round_end, ROUNDS),
    0x9: _Type("STATE", 16, 1048840, LAST, Reader.state, ("HASHES", "STATE")),
    0xA: _Type("TIME", 16, 16, 0, Reader.time, ("HASHES", "STATE", "OPTIONAL")),
    0xB: _Type("END", 64, 64, 0, Reader.end, ("END", "DISKS")),
    0xC: _Type("GO", 16, 16, 0, Reader.go, ("GO",)),
    0xD: _Type("ABORT", 9, 1024, 0, Reader.abort, ()),
    0xF: _Type("STATE_ZEROS", 24, 272, LAST, Reader.state_zeros, ("HASHES", "STATE")),
    0x80000009: _Type(
        "STATE_OPTIONAL", 16, 1048840, LAST, Reader.state_optional, ("HASHES", "STATE", "OPTIONAL")
    ),
    0x8000000E: _Type("REHEARSAL", 1, 1048576, 0, Reader.rehearsal, ("REHEARSAL",)),
    0x80000010: _Type("DISKS", 8, 262144, 0, Reader.disks, ("DISKS",)),
    0x80000011: _Type("HASHES", 24, 196616, 0, Reader.hashes, ("HASHES",)),
}


def read(
    stream: BinaryIO, *, hypervisors: Container[str] | None = None, nonce: bytes | None = None
) -> Stream:
    """Read a whole stream, up to the end of file or to ABORT, and return what it holds.

    hypervisors: the supported ones.  nonce: the 16 bytes of READY.  None allows any.
    Raises Refused for anything that bhystream(5) does not allow.
    """
    source = Source(stream)
    try:
        header = _read_header(source)
    except Wrong as wrong:
        raise Refused(None, None, 0, str(wrong)) from None
    return Reader(source, header, hypervisors, nonce).run()

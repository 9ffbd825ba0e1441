"""Streams for the tests, packed byte by byte from bhystream(5).

No code here comes from the package or from spec_reader.  `Maker` writes what a test asks for, right
or wrong, with the matching checksums, totals and digest.  So a test of a rule breaks exactly that
rule, in the section that was added last.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import xxhash
import zstandard

IDENT = bytes(range(16))
SEED = 0x0123456789ABCDEF
NONCE = bytes(range(100, 116))
PLAIN, KEPT, ANSWERED = 1, 2, 3
ZSTD, NO_MEMORY = 1, 2
HOST, LAYOUT, CONFIG, DEVICES, HEAD_END, PAD, MEMORY = 1, 2, 3, 4, 5, 6, 7
ROUND_END, STATE, TIME, END, GO, ABORT = 8, 9, 10, 11, 12, 13
STATE_ZEROS, STATE_OPTIONAL, REHEARSAL, DISKS = 15, 0x80000009, 0x8000000E, 0x80000010
HASHES = 0x80000011
OPTIONAL = 0x80000ABC
NAMES = {
    1: "HOST", 2: "LAYOUT", 3: "CONFIG", 4: "DEVICES", 5: "HEAD_END", 6: "PAD", 7: "MEMORY",
    8: "ROUND_END", 9: "STATE", 10: "TIME", 11: "END", 12: "GO", 13: "ABORT",
    STATE_ZEROS: "STATE_ZEROS", STATE_OPTIONAL: "STATE_OPTIONAL", REHEARSAL: "REHEARSAL",
    DISKS: "DISKS", HASHES: "HASHES",
}  # fmt: skip
HOST_JSON = b'{"hypervisor": "qemu", "program": "test 1"}'
CONFIG_JSON = b'{"name": "web1", "smp": 2}'
DEVICES_JSON = b'["uart", "rtc"]'
NO_GPA = 2**64 - 1
PAUSED_AT, PAUSED_FOR = 1_700_000_000_000_000_000, 5_000_000

DATA, ZERO = 0, 1
Extent = tuple[int, int, int]  # first, count, kind


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


def layout(*segments: tuple[bytes, int, int], size: int = 4096, count: int | None = None) -> bytes:
    """Pack LAYOUT; a segment is (name, gpa, npages)."""
    raw = struct.pack("<II", size, len(segments) if count is None else count)
    return raw + b"".join(struct.pack("<32sQQ", *segment) for segment in segments)


def memory_list(
    number: int,
    extents: Sequence[Extent],
    pages: Sequence[bytes],
    *,
    zero: int = 0,
    npages: int | None = None,
    nextents: int | None = None,
) -> bytes:
    """Pack the payload of MEMORY up to the first page byte; the counts may be wrong."""
    npages = len(pages) if npages is None else npages
    nextents = len(extents) if nextents is None else nextents
    raw = struct.pack("<IIII", number, nextents, npages, zero)
    raw += b"".join(struct.pack("<QII", *extent) for extent in extents)
    return raw + b"".join(
        struct.pack("<Q", xxhash.xxh3_64_intdigest(one, seed=SEED)) for one in pages
    )


def hashes(
    extents: Sequence[Extent],
    pages: Sequence[bytes],
    *,
    nextents: int | None = None,
    nhashes: int | None = None,
) -> bytes:
    """Pack HASHES; pages: of the DATA extents.  The counts may be wrong."""
    nextents = len(extents) if nextents is None else nextents
    raw = struct.pack("<II", nextents, len(pages) if nhashes is None else nhashes)
    raw += b"".join(struct.pack("<QII", *extent) for extent in extents)
    return raw + b"".join(
        struct.pack("<Q", xxhash.xxh3_64_intdigest(one, seed=SEED)) for one in pages
    )


def state(name: bytes, part: int, raw: bytes, *, zero: int = 0, length: int | None = None) -> bytes:
    head = struct.pack("<HHI", len(name) if length is None else length, zero, part)
    return head + name + bytes(-len(name) % 8) + raw


def state_zeros(name: bytes, part: int, count: int, **wrong: Any) -> bytes:
    return state(name, part, struct.pack("<Q", count), **wrong)


Sample = tuple[int, int, int]  # offset, length, hash


def disks(
    *given: tuple[bytes, int, Sequence[Sample]], zero: int = 0, count: int | None = None
) -> bytes:
    """Pack DISKS; a disk is (name, size, samples)."""
    return struct.pack("<II", len(given) if count is None else count, zero) + b"".join(
        disk(*one) for one in given
    )


def disk(
    name: bytes, size: int, samples: Sequence[Sample], *, zero: int = 0, sample_zero: int = 0
) -> bytes:
    raw = struct.pack("<HHIQ", len(name), len(samples), zero, size) + name + bytes(-len(name) % 8)
    return raw + b"".join(
        struct.pack("<QIIQ", at, length, sample_zero, digest) for at, length, digest in samples
    )


def round_end(number: int, data: int, zeros: int, *, zero: int = 0) -> bytes:
    return struct.pack("<IIQQ", number, zero, data, zeros)


def abort(text: bytes, *, status: int = 75, zero: int = 0) -> bytes:
    return struct.pack("<II", status, zero) + text


class Maker:
    """A stream under construction; `last` is the section that a test breaks.

    `last`: its number, type and offset; the type is None if no section header was written.
    """

    def __init__(self, form: int = PLAIN, mandatory: int = 0, optional: int = 0) -> None:
        self.form = form
        self.dry = bool(mandatory & NO_MEMORY)
        self.raw = header(form, mandatory=mandatory, optional=optional)
        self.sums = self.raw[64:72]
        self.count = 0
        self.rounds = self.data = self.zeros = self.state_bytes = 0
        self.last: tuple[int, int | None, int] = (0, None, len(self.raw))

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
        """Add a section; its checksum covers `covered` payload bytes, all if None."""
        self.last = (self.count, kind, len(self.raw))
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

    def then(self, raw: bytes) -> Maker:
        """Add bytes that are not a whole section; `last` is the section that they begin."""
        self.last = (self.count, None, len(self.raw))
        self.raw += raw
        return self

    def host(self) -> Maker:
        return self.add(HOST, HOST_JSON)

    def layout(self, *segments: tuple[bytes, int, int]) -> Maker:
        return self.add(LAYOUT, layout(*(segments or [(b"ram", 0, 7)])))

    def config(self) -> Maker:
        return self.add(CONFIG, CONFIG_JSON)

    def devices(self) -> Maker:
        return self.add(DEVICES, DEVICES_JSON)

    def head(self, *segments: tuple[bytes, int, int]) -> Maker:
        return self.host().layout(*segments).config().devices().add(HEAD_END)

    def memory(
        self, number: int, extents: Sequence[Extent], pages: Sequence[bytes] = (), **more: Any
    ) -> Maker:
        head = memory_list(number, extents, pages)
        self.data += len(pages)
        self.zeros += sum(count for _, count, kind in extents if kind == ZERO)
        return self.add(MEMORY, head + b"".join(pages), covered=len(head), **more)

    def zstd(
        self, extents: Sequence[Extent], pages: Sequence[bytes], frame: bytes | None = None
    ) -> Maker:
        frame = zstandard.compress(b"".join(pages)) if frame is None else frame
        self.data += len(pages)
        self.zeros += sum(count for _, count, kind in extents if kind == ZERO)
        return self.add(MEMORY, memory_list(self.rounds, extents, pages) + frame, flags=1)

    def round_end(self, number: int, data: int, zeros: int, *, flags: int = 0) -> Maker:
        self.rounds += 1
        return self.add(ROUND_END, round_end(number, data, zeros), flags=flags)

    def round_0(self, *, flags: int = 1) -> Maker:
        """Add round 0: pages 0, 1 and 6 have bytes, pages 2 to 5 are zero."""
        self.memory(0, [(0, 2, DATA), (2, 4, ZERO)], [page(1), page(2)])
        return self.memory(0, [(6, 1, DATA)], [page(3)]).round_end(0, 3, 4, flags=flags)

    def hashes(self, extents: Sequence[Extent], pages: Sequence[bytes] = ()) -> Maker:
        return self.add(HASHES, hashes(extents, pages))

    def state(self, name: bytes, part: int, raw: bytes, *, flags: int = 0) -> Maker:
        self.state_bytes += len(raw)
        return self.add(STATE, state(name, part, raw), flags=flags)

    def state_zeros(self, name: bytes, part: int, count: int, *, flags: int = 0) -> Maker:
        self.state_bytes += count
        return self.add(STATE_ZEROS, state_zeros(name, part, count), flags=flags)

    def state_optional(self, name: bytes, part: int, raw: bytes, *, flags: int = 0) -> Maker:
        return self.add(STATE_OPTIONAL, state(name, part, raw), flags=flags)

    def time(self, at: int = PAUSED_AT, for_: int = PAUSED_FOR) -> Maker:
        return self.add(TIME, struct.pack("<QQ", at, for_))

    def end(self, *, flags: int = 0, **wrong: Any) -> Maker:
        what = 2 if self.dry else 1 if self.form != ANSWERED else 0
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
        """Add every section before END."""
        return self.head().round_0().state(b"cpu0", 0, b"abc", flags=1).time()


def before(kind: int, form: int = ANSWERED, mandatory: int = 0) -> Maker:
    """Return a sound stream up to where `kind` may stand."""
    maker = Maker(form, mandatory)
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
    if kind in (REHEARSAL, MEMORY, ROUND_END):
        return maker
    maker.round_0()
    if kind in (HASHES, STATE, STATE_ZEROS, STATE_OPTIONAL, TIME):
        return maker
    maker.time()
    return maker if kind in (END, DISKS) else maker.end()


# The shortest payload of each type, in bytes; the payloads of other types may be empty.
SHORTEST = {
    LAYOUT: 56, MEMORY: 32, ROUND_END: 24, STATE: 16, TIME: 16, END: 64, GO: 16, ABORT: 9,
    STATE_ZEROS: 24, STATE_OPTIONAL: 16, REHEARSAL: 1, DISKS: 8,
    HASHES: 24,
}  # fmt: skip
CAPS = [
    (HOST, 65536), (LAYOUT, 3080), (CONFIG, 65536), (DEVICES, 65536), (HEAD_END, 0),
    (PAD, 1048576), (MEMORY, 4268048), (ROUND_END, 24), (STATE, 1048840), (TIME, 16), (END, 64),
    (GO, 16), (ABORT, 1024), (OPTIONAL, 1048576), (STATE_ZEROS, 272), (STATE_OPTIONAL, 1048840),
    (REHEARSAL, 1048576), (DISKS, 262144), (HASHES, 196616),
]  # fmt: skip

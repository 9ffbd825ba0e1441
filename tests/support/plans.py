"""A stream as a list of its sections, which a test changes and puts together again.

assemble() numbers the sections, and gives them the checksums, totals and digest of what they hold,
so that a reader gets past these and looks at what was changed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from support.streams import (
    ANSWERED,
    DATA,
    END,
    GO,
    KEPT,
    MEMORY,
    NO_MEMORY,
    NONCE,
    OPTIONAL,
    PAD,
    PLAIN,
    REHEARSAL,
    ROUND_END,
    STATE,
    STATE_ZEROS,
    ZERO,
    ZSTD,
    Maker,
    page,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One section.  covered: how many bytes of the payload its checksum covers, all if None."""

    kind: int
    payload: bytes = b""
    flags: int = 0
    covered: int | None = None


@dataclass(frozen=True)
class Plan:
    """One stream: the header's fields, the sections, and what END says beside the truth."""

    form: int
    mandatory: int
    parts: tuple[Part, ...]
    lies: tuple[tuple[str, int], ...] = ()


def plan_of(maker: Maker) -> Plan:
    """Return the plan of a sound stream that ends with END, or with sections behind END."""
    parts, at = [], 72
    while at < len(maker.raw):
        kind, flags, length = struct.unpack_from("<IIQ", maker.raw, at)
        payload = maker.raw[at + 32 : at + 32 + length]
        covered = None
        if kind == MEMORY and not flags:
            _, nextents, npages = struct.unpack_from("<III", payload)
            covered = 16 + 16 * nextents + 8 * npages
        parts.append(Part(kind, payload, flags, covered))
        at += 32 + length + -length % 8
    mandatory = int.from_bytes(maker.raw[16:24], "little")
    return Plan(maker.form, mandatory, tuple(parts))


def assemble(plan: Plan) -> bytes:
    """Return the bytes of a plan, with the checksums and totals of its parts."""
    maker = Maker(plan.form, plan.mandatory)
    for part in plan.parts:
        if part.kind == END and len(part.payload) == 64:
            maker.end(flags=part.flags, **dict(plan.lies))
            continue
        maker.add(part.kind, part.payload, flags=part.flags, covered=part.covered)
        _count(maker, part)
    return maker.raw


def _count(maker: Maker, part: Part) -> None:
    if part.kind == ROUND_END and len(part.payload) == 24:
        maker.rounds += 1
        _, _, data, zeros = struct.unpack("<IIQQ", part.payload)
        maker.data = (maker.data + data) % 2**64
        maker.zeros = (maker.zeros + zeros) % 2**64
    elif part.kind in (STATE, STATE_ZEROS) and len(part.payload) >= 8:
        length = int.from_bytes(part.payload[:2], "little")
        rest = part.payload[8 + length + -length % 8 :]
        nbytes = int.from_bytes(rest[:8], "little") if part.kind == STATE_ZEROS else len(rest)
        maker.state_bytes = (maker.state_bytes + nbytes) % 2**64


def _several() -> Maker:
    """Return an answered stream with each type of section, two segments and three rounds."""
    maker = Maker(ANSWERED, ZSTD).head((b"a", 0, 3), (b"b", 1 << 32, 4)).add(REHEARSAL, b"plan")
    maker.memory(0, [(0, 1, DATA), (1, 1, ZERO), (2, 1, DATA)], [page(1), page(2)])
    maker.zstd([(3, 2, DATA), (5, 2, ZERO)], [page(3), page(0)]).round_end(0, 4, 3)
    maker.add(PAD, b"pad").memory(1, [(1, 1, DATA), (2, 1, ZERO)], [page(4)])
    maker.memory(1, [(6, 1, ZERO)]).round_end(1, 1, 2).round_end(2, 0, 0, flags=1)
    maker.state(b"one", 0, b"1").state_zeros(b"one", 1, 9).state(b"one", 2, b"2", flags=1)
    maker.state(b"two", 0, b"", flags=1).state_optional(b"fpu/0", 0, b"f", flags=1)
    return maker.add(OPTIONAL, b"new", flags=3).time().end().add(PAD).add(GO, NONCE)


SOUND = [
    plan_of(one)
    for one in (
        _several(), Maker(PLAIN).full().end(), Maker(KEPT, ZSTD).full().end(),
        Maker(ANSWERED, NO_MEMORY).head().end(), Maker(PLAIN, NO_MEMORY).head().end(),
    )
]  # fmt: skip

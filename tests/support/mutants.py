"""Streams that are almost sound: sections of sound ones, changed, moved, spliced, sealed again."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace

from hypothesis import strategies as st

from support.plans import SOUND, Part, Plan, assemble
from support.streams import (
    ABORT,
    ANSWERED,
    CAPS,
    CONFIG,
    DATA,
    DEVICES,
    HOST,
    KEPT,
    MEMORY,
    PLAIN,
    ZERO,
    Extent,
    abort,
    header,
    memory_list,
    page,
)  # fmt: skip

INTERESTING = [
    *range(10), 16, 255, 256, 1016, 1024, 1025, 4095, 4096, 4097, 2**16 - 1, 2**20, 2**20 + 1,
    2**31 - 1, 2**31, 2**32 - 1, 2**36, 2**36 + 1, 2**63 - 1, 2**63, 2**64 - 4096, 2**64 - 1,
]  # fmt: skip
KINDS = [kind for kind, _ in CAPS] + [0, 14, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
END_FIELDS = ("what", "rounds", "sections", "offset", "data", "zeros", "states")

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) - 1, 2**63) | st.floats() | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
)
_BOMBS = [
    b"[" * 60000, b'{"a":' * 12000, b"[" * 16 + b"]" * 16, b"[" * 17 + b"]" * 17,
    b'{"name": "a", "x": ' + b"9" * 60000 + b"}", b'{"name": "a", "name": "b"}',
    b'{"name": "a", "\\u006eame": "b"}', b'{"name": "\\ud800"}', b'["\\udc00\\ud800"]', b"1e400",
    b'{"name": "a", "x": [-9223372036854775808, 9223372036854775807]}', b"\xef\xbb\xbf{}", b"",
    b'{"name": "a", "x": 1.0}', b'["' + b"d" * 129 + b'"]', b"[" + b'"d",' * 1024 + b'"d"]',
]  # fmt: skip


def _json_value(value: object) -> bytes:
    return json.dumps(value).encode()


Change = Callable[[st.DrawFn, Plan], Plan]


def _changed(plan: Plan, parts: Sequence[Part]) -> Plan:
    return replace(plan, parts=tuple(parts))


def _index(draw: st.DrawFn, plan: Plan) -> int:
    return draw(st.integers(0, max(len(plan.parts) - 1, 0)))


def _swap(plan: Plan, at: int, part: Part) -> Plan:
    return _changed(plan, [*plan.parts[:at], part, *plan.parts[at + 1 :]])


def _drop(draw: st.DrawFn, plan: Plan) -> Plan:
    at = _index(draw, plan)
    return _changed(plan, [*plan.parts[:at], *plan.parts[at + 1 :]])


def _repeat(draw: st.DrawFn, plan: Plan) -> Plan:
    at, to = _index(draw, plan), _index(draw, plan)
    return _changed(plan, [*plan.parts[:to], *plan.parts[at : at + 1], *plan.parts[to:]])


def _move(draw: st.DrawFn, plan: Plan) -> Plan:
    at, parts = _index(draw, plan), list(plan.parts)
    moved = parts[at : at + 1]
    del parts[at : at + 1]
    to = draw(st.integers(0, len(parts)))
    return _changed(plan, [*parts[:to], *moved, *parts[to:]])


def _splice(draw: st.DrawFn, plan: Plan) -> Plan:
    other = draw(st.sampled_from(SOUND)).parts
    first, end = sorted((draw(st.integers(0, len(other))), draw(st.integers(0, len(other)))))
    at, to = sorted((_index(draw, plan), _index(draw, plan)))
    return _changed(plan, [*plan.parts[:at], *other[first:end], *plan.parts[to:]])


def _insert(draw: st.DrawFn, plan: Plan) -> Plan:
    kind = draw(st.sampled_from(KINDS))
    payload = abort(b"x") if kind == ABORT else draw(st.binary(max_size=40))
    at = _index(draw, plan)
    made = Part(kind, payload, draw(st.sampled_from([0, 1, 2, 2**31])))
    return _changed(plan, [*plan.parts[:at], made, *plan.parts[at:]])


def _retype(draw: st.DrawFn, plan: Plan) -> Plan:
    at = _index(draw, plan)
    if not plan.parts:
        return plan
    kind = draw(st.sampled_from([plan.parts[at].kind, *KINDS]))
    flags = draw(st.sampled_from([0, 1, 2, 3, 2**31]))
    return _swap(plan, at, replace(plan.parts[at], kind=kind, flags=flags, covered=None))


def _bomb(draw: st.DrawFn, plan: Plan) -> Plan:
    places = [at for at, one in enumerate(plan.parts) if one.kind in (HOST, CONFIG, DEVICES)]
    if not places:
        return plan
    payload = draw(st.sampled_from(_BOMBS) | _JSON.map(_json_value))
    at = draw(st.sampled_from(places))
    return _swap(plan, at, replace(plan.parts[at], payload=payload))


def _number(draw: st.DrawFn, plan: Plan) -> Plan:
    """Put a number into a payload, in the place of an aligned field."""
    at = _index(draw, plan)
    if not plan.parts or len(plan.parts[at].payload) < 8:
        return plan
    raw = bytearray(plan.parts[at].payload)
    size = draw(st.sampled_from([2, 4, 8]))
    place = draw(st.integers(0, min(len(raw), 160) // size - 1)) * size
    value = draw(st.sampled_from(INTERESTING) | st.integers(0, 2**64 - 1)) % (1 << 8 * size)
    raw[place : place + size] = value.to_bytes(size, "little")
    return _swap(plan, at, replace(plan.parts[at], payload=bytes(raw)))


def _extents(draw: st.DrawFn, plan: Plan) -> Plan:
    """Change the extents of a MEMORY section: they overlap, run back, or past the end."""
    places = [at for at, one in enumerate(plan.parts) if one.kind == MEMORY]
    if not places:
        return plan
    at = draw(st.sampled_from(places))
    number, nextents = struct.unpack_from("<II", plan.parts[at].payload.ljust(8, b"\0"))
    listed = plan.parts[at].payload[16 : 16 + 16 * min(nextents, 4)]
    extents = list(struct.iter_unpack("<QII", listed[: len(listed) // 16 * 16]))
    for _ in range(draw(st.integers(1, 2))):
        extents = _change_extent(draw, extents)
    npages = sum(count for _, count, kind in extents if kind == DATA)
    pages = [page(7)] * (npages if npages < 20 else draw(st.integers(0, 3)))
    head = memory_list(number, extents, pages)
    return _swap(plan, at, Part(MEMORY, head + b"".join(pages), 0, len(head)))


def _change_extent(draw: st.DrawFn, extents: list[Extent]) -> list[Extent]:
    """Change one extent by a little or much, repeat it, drop it, or put one behind all."""
    if not extents:
        return [(draw(st.integers(0, 9)), 1, ZERO)]
    at = draw(st.integers(0, len(extents) - 1))
    first, count, kind = extents[at]
    near, far = st.integers(-2, 2), st.sampled_from(INTERESTING)
    match draw(st.sampled_from(["first", "count", "kind", "far", "repeat", "drop", "behind"])):
        case "first":
            made = [((first + draw(near)) % 2**64, count, kind)]
        case "count":
            made = [(first, (count + draw(near)) % 2**32, kind)]
        case "kind":
            made = [(first, count, draw(st.sampled_from([DATA, ZERO, 2])))]
        case "far":
            made = [(draw(far), draw(far) % 2**32, kind)]
        case "repeat":
            made = [(first, count, kind)] * 2
        case "drop":
            made = []
        case _:
            behind = (first + count + draw(near) * (first > 2)) % 2**64
            return [*extents, (behind, 1, ZERO)]
    return [*extents[:at], *made, *extents[at + 1 :]]


def _resize(draw: st.DrawFn, plan: Plan) -> Plan:
    at = _index(draw, plan)
    if not plan.parts:
        return plan
    raw = plan.parts[at].payload
    by = draw(st.integers(-9, 9))
    raw = raw[:by] if by < 0 else raw + bytes(by)
    return _swap(plan, at, replace(plan.parts[at], payload=raw))


def _lie(draw: st.DrawFn, plan: Plan) -> Plan:
    field = draw(st.sampled_from(END_FIELDS))
    most = 2**32 if field in ("what", "rounds") else 2**64
    return replace(plan, lies=((field, draw(st.sampled_from(INTERESTING)) % most),))


def _feature(draw: st.DrawFn, plan: Plan) -> Plan:
    form = draw(st.sampled_from([PLAIN, KEPT, ANSWERED, 0, 4]))
    return replace(plan, form=form, mandatory=draw(st.sampled_from([0, 1, 2, 3, 4, 2**63])))


CHANGES: list[Change] = [
    _drop, _repeat, _move, _splice, _insert, _retype, _bomb, _number, _number, _resize, _lie,
    _feature, _extents, _extents, _extents,
]  # fmt: skip


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """Draw a stream to which up to three changes were made; cut short, or of a later version."""
    plan = draw(st.sampled_from(SOUND))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        plan = draw(st.sampled_from(CHANGES))(draw, plan)
    raw = assemble(plan)
    match draw(st.sampled_from(["whole", "whole", "whole", "whole", "cut", "version", "byte"])):
        case "cut":
            raw = raw[: draw(st.integers(0, len(raw)))]
        case "version":
            version = draw(st.sampled_from([0, 1, 2, 2**32 - 1]))
            raw = header(plan.form, version=version, mandatory=plan.mandatory) + raw[72:]
        case "byte":
            at = draw(st.integers(0, len(raw) - 1))
            raw = raw[:at] + bytes([raw[at] ^ draw(st.integers(1, 255))]) + raw[at + 1 :]
    return raw

"""Streams of bhyve guests, byte by byte from bhystream(5), for the tests of their contents.

The right contents are those of snapshot_files.py: a guest of 16 MiB whose memory is zero.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from bhystream.backend.bhyve import snapshot
from bhystream.guest import State
from support.streams import CONFIG, DEVICES, HEAD_END, HOST, KEPT, LAYOUT, REHEARSAL, Maker, layout

from .snapshot_files import CONFIG as SECTION
from .snapshot_files import DEVICES as NAMES
from .snapshot_files import MEMORY, Json, made, text_of

PART_BYTES = 1 << 20
META, KERN = made()
FPU = State("fpu/1", bytes(8 + 512), is_optional=True)
SEGMENTS = ((b"lowmem", 0, MEMORY // 4096),)


def states_of(meta: Json = META, kern: bytes = KERN) -> list[State]:
    """Return the states of a snapshot."""
    return snapshot.cut(text_of(meta), kern)


def head(maker: Maker, **other: Any) -> Maker:
    """Add the head.  other: hypervisor, config, devices, segments that replace the right ones."""
    host = {"hypervisor": other.get("hypervisor", "bhyve"), "program": "test 1"}
    maker.add(HOST, json.dumps(host).encode())
    maker.add(LAYOUT, layout(*other.get("segments", SEGMENTS)))
    maker.add(CONFIG, json.dumps(other.get("config", SECTION)).encode())
    return maker.add(DEVICES, json.dumps(other.get("devices", NAMES)).encode()).add(HEAD_END)


def whole(
    states: Sequence[State] | None = None,
    *,
    plan: bytes | None = None,
    form: int = KEPT,
    **other: Any,
) -> Maker:
    """Return a stream of a guest with these states, or with the right states if None."""
    maker = head(Maker(form), **other)
    if plan is not None:
        maker.add(REHEARSAL, plan)
    npages = sum(segment[2] for segment in other.get("segments", SEGMENTS))
    maker.memory(0, [(0, npages, 1)]).round_end(0, 0, npages, flags=1)
    for one in [*states_of(), FPU] if states is None else states:
        name, rest = one.name.encode(), len(one.data) - PART_BYTES
        if rest > 0:  # the rest of the state is zeros
            maker.state(name, 0, one.data[:PART_BYTES]).state_zeros(name, 1, rest, flags=1)
            continue
        add = maker.state_optional if one.is_optional else maker.state
        add(name, 0, one.data, flags=1)
    return maker.time(0, 0).end()

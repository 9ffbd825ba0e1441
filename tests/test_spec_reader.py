"""Tests of spec_reader: what it finds in sound streams.

What it refuses stands in the test_malformed files, beside what the package's own reader says.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable

import pytest
import xxhash
import zstandard

from spec_reader import Refused, Stream
from spec_reader import read as read_stream
from streams import (
    ABORT, ANSWERED, CONFIG, DEVICES, GO, HEAD_END, HOST, IDENT, KEPT, LAYOUT, NO_GPA, NONCE,
    OPTIONAL, PAD, PLAIN, SEED, Maker, layout, page,
)  # fmt: skip


def read(maker: Maker, **more: object) -> Stream:
    return read_stream(io.BytesIO(maker.raw), **more)


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



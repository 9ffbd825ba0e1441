"""Tests of spec_reader alone, with no line of the package.

test_verify.py and test_golden.py compare it with the package's own reader on sound streams; the
test_malformed files have what spec_reader refuses, beside the words of the package's reader.
"""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
import xxhash

import spec_reader
from spec_reader import Refused, read
from support.streams import (
    ABORT,
    ANSWERED,
    GO,
    IDENT,
    KEPT,
    NO_GPA,
    NO_MEMORY,
    NONCE,
    OPTIONAL,
    PAD,
    PAUSED_AT,
    PAUSED_FOR,
    PLAIN,
    SEED,
    Maker,
    abort,
    before,
    page,
)


def stream(maker: Maker) -> io.BytesIO:
    return io.BytesIO(maker.raw)


def test_it_shares_no_code_with_the_package() -> None:
    for path in Path(spec_reader.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [one.name for one in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.startswith("bhystream") for name in names), path


def test_the_examples_of_the_page_hold() -> None:
    assert xxhash.xxh3_64_intdigest(bytes(4096), seed=0) == 0x93D76FE148C689BA
    assert xxhash.xxh3_64_intdigest(bytes(4096), seed=SEED) == 0x22CE630F38BF6769


def test_dry_run() -> None:
    found = read(stream(Maker(mandatory=NO_MEMORY).head((b"ram", 0, 5), (b"rom", NO_GPA, 2)).end()))
    assert found.what == 2
    assert found.host == {"hypervisor": "qemu", "program": "test 1"}
    assert found.config == {"name": "web1", "smp": 2}
    assert found.devices == ["uart", "rtc"]
    assert [tuple(segment) for segment in found.layout] == [("ram", 0, 0, 5), ("rom", None, 5, 2)]
    assert (found.memory, found.rounds, found.states, found.time) == ({}, [], {}, None)
    assert found.sections == 6


@pytest.mark.parametrize("form", [PLAIN, KEPT])
def test_small_stream(form: int) -> None:
    maker = Maker(form).full().add(OPTIONAL, b"new", flags=7).end()
    found = read(stream(maker))
    assert (found.header.form, found.header.stream_id, found.header.seed) == (form, IDENT, SEED)
    assert found.memory == {0: page(1), 1: page(2), 6: page(3)}
    assert [tuple(one) for one in found.rounds] == [(3, 4, True)]
    assert found.states == {"cpu0": b"abc"}
    assert found.time == (PAUSED_AT, PAUSED_FOR)
    assert found.what == 1
    assert found.digest == maker.raw[-16:]
    assert found.skipped == [OPTIONAL]
    assert found.sections == maker.count


def test_a_later_round_states_pages_again() -> None:
    maker = Maker().head().round_0(flags=0)
    maker.memory(1, [(0, 1, 1), (3, 1, 0)], [page(9)]).memory(1, [(6, 1, 0)], [page(0)])
    found = read(stream(maker.round_end(1, 2, 1, flags=1).time().end()))
    assert found.memory == {1: page(2), 3: page(9)}
    assert [one.last for one in found.rounds] == [False, True]


def test_abort_is_kept() -> None:
    maker = before(10).state(b"cpu0", 0, b"x").add(ABORT, abort("zu groß".encode()))
    found = read(stream(maker))
    assert found.abort == (75, "zu groß")
    assert (found.states, found.what) == ({}, None)


def test_only_the_nonce_of_ready_is_taken() -> None:
    maker = Maker(ANSWERED).full().end().add(PAD, bytes(3))
    assert (read(stream(maker)).what, read(stream(maker)).nonce) == (0, None)
    maker.add(GO, NONCE).add(PAD, bytes(3))
    assert read(stream(maker)).nonce == NONCE
    assert read(stream(maker), nonce=NONCE).nonce == NONCE
    with pytest.raises(Refused, match=r"\(GO\).*wrong nonce"):
        read(stream(maker), nonce=bytes(16))


def test_a_hypervisor_without_support_is_refused() -> None:
    maker = Maker().full().end()
    assert read(stream(maker), hypervisors={"qemu"}).what == 1
    with pytest.raises(Refused, match=r"section 0 \(HOST\) at offset 0x48: .*not supported"):
        read(stream(maker), hypervisors={"bhyve"})


def test_short_reads_are_joined() -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 7))

    assert read(Trickle(Maker().full().end().raw)).what == 1


def test_a_length_costs_no_memory_before_its_bytes_are_there() -> None:
    class Noting(io.BytesIO):
        largest = 0

        def read(self, size: int | None = -1) -> bytes:
            self.largest = max(self.largest, size or 0)
            return super().read(size)

    source = Noting(Maker().host().add(PAD, length=1 << 20).raw)
    with pytest.raises(Refused, match="the payload is incomplete"):
        read(source)
    assert source.largest <= 65536


def test_cuts_and_changes_are_refused() -> None:
    raw = Maker().full().end().raw
    places = [*range(900), *range(900, len(raw) - 400, 97), *range(len(raw) - 400, len(raw))]
    for at in places:
        with pytest.raises(Refused, match="incomplete"):
            read(io.BytesIO(raw[:at]))
        with pytest.raises(Refused):
            read(io.BytesIO(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :]))

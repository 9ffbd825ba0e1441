"""Streams that are almost sound: both readers agree about each, within the bound of memory."""

from __future__ import annotations

import collections

import pytest
from hypothesis import HealthCheck, given, settings

from fuzz.streams import READ_BYTES
from fuzz.target import limited
from support.both import Recorder, compare
from support.mutants import mutants
from support.plans import SOUND, assemble
from support.streams import ANSWERED, CAPS, Maker, before, header

FEW = settings(
    max_examples=1000,
    deadline=None,  # another process may need the processor
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def both(raw: bytes) -> Recorder | None:
    return compare(raw, lambda: limited(READ_BYTES))


def test_the_streams_that_are_changed_are_sound() -> None:
    for plan in SOUND:
        found = both(assemble(plan))
        assert found is not None and found.ended is not None


@FEW
@given(mutants())
def test_no_change_is_read_in_two_ways(raw: bytes) -> None:
    both(raw)


def test_the_changes_reach_every_part_of_a_stream() -> None:
    """A mutation that never passes the first check tests nothing."""
    seen: collections.Counter[str] = collections.Counter()

    @settings(FEW, max_examples=300, derandomize=True)
    @given(mutants())
    def look(raw: bytes) -> None:
        found = both(raw)
        seen["sound" if found else "refused"] += 1
        seen["started"] += bool(found and found.started)

    look()
    assert min(seen["sound"], seen["refused"], seen["started"]) > 9, seen


@pytest.mark.parametrize(("kind", "cap"), CAPS)
@pytest.mark.parametrize("beyond", [-1, 0, 1])
@pytest.mark.parametrize("fill", [b"\0", b"1", b"\xff"])
def test_a_payload_about_as_long_as_its_cap(kind: int, cap: int, beyond: int, fill: bytes) -> None:
    if cap + beyond >= 0:
        maker = before(kind).add(kind, fill * (cap + beyond))
        found = both(maker.raw)
        assert found is None or beyond <= 0


@pytest.mark.parametrize("version", [0, 2, 3, 2**31, 2**32 - 1])
def test_another_version_is_refused(version: int) -> None:
    raw = Maker(ANSWERED).full().end().raw
    assert both(header(ANSWERED, version=version) + raw[72:]) is None

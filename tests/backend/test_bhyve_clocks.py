"""The clocks of a snapshot, moved on: the TSC of each vCPU, and the HPET with its timers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from bhystream.backend.bhyve import clocks
from bhystream.backend.bhyve.freebsd import CLOCKS
from bhystream.backend.bhyve.host import ClockLayout
from bhystream.backend.bhyve.snapshot import Item, Meta
from bhystream.errors import IncompatibleError

LAYOUT = ClockLayout(vcpu_bytes=40, tsc_at=24, vm_tail_bytes=16, hpet_tail_bytes=3)
RELEASE, HZ = 1501000, 2_000_000_000
HPET_HZ = 1 << 24
# struct vhpet as vhpet_snapshot() saves it.
HEAD, TIMER = struct.Struct("<qQQI"), struct.Struct("<QQIIq")
ONE_SHOT, PERIODIC = 0, 1 << 20
SECOND = 10**9


@dataclass(frozen=True)
class FakeHost:
    """What clocks.moved_on() asks of a host."""

    layout: ClockLayout | None = LAYOUT
    osreldate: str = str(RELEASE)
    tsc_freq: str | None = str(HZ)

    def clock_layout(self) -> ClockLayout | None:
        return self.layout

    def sysctl(self, name: str) -> str | None:
        return {"kern.osreldate": self.osreldate, "machdep.tsc_freq": self.tsc_freq}[name]


def vm_of(tscs: Sequence[int]) -> bytes:
    return b"".join(b"\xaa" * 24 + tsc.to_bytes(8, "little") + b"\xbb" * 8 for tsc in tscs) + bytes(
        16
    )


def hpet_of(
    counter: int,
    timers: Sequence[tuple[int, int]] = (),
    *,
    enabled: bool = True,
    tick_sbt: int = 256,
) -> bytes:
    """timers: comparator and period of the first ones."""
    rest = [(0, 0)] * (8 - len(timers))
    found = HEAD.pack(tick_sbt, 3 if enabled else 2, 5, counter)
    for index, (comparator, period) in enumerate([*timers, *rest]):
        found += TIMER.pack(0x40 + index, 77 + index, comparator, period, -index)
    return found + b"xyz"


def moved(ns: int, *, vm: bytes, hpet: bytes, host: FakeHost = FakeHost()) -> tuple[bytes, bytes]:
    """Return both structures after the changes, made in a whole FILE.kern."""
    kern = [b"front", hpet, b"between", vm, b"end"]
    names = ("first", "vhpet", "vioapic", "vm", "vmcx")
    items, at = [], 0
    for name, blob in zip(names, kern, strict=True):
        items.append(Item("dev" if name == "first" else "kern", name, len(blob), at))
        at += len(blob)
    meta = Meta("g", (len(vm) - 16) // 40, 1 << 20, 0, tuple(items))
    whole = bytearray(b"".join(kern))
    source = {"kern.osreldate": RELEASE}
    saved = clocks.Saved.of(meta, kern, [clocks.state_of(0)])
    for offset, data in clocks.moved_on(host, source, saved, ns):  # type: ignore[arg-type]
        whole[offset : offset + len(data)] = data
    assert len(whole) == at
    pieces = [bytes(whole[i.offset_bytes : i.offset_bytes + i.size_bytes]) for i in items]
    assert (pieces[0], pieces[2], pieces[4]) == (b"front", b"between", b"end")
    return pieces[3], pieces[1]


def test_the_tsc_of_each_vcpu_moves_on_by_its_own_rate() -> None:
    found, _ = moved(SECOND // 4, vm=vm_of([7, 1 << 40, 0]), hpet=hpet_of(0))
    assert found == vm_of([7 + HZ // 4, (1 << 40) + HZ // 4, HZ // 4])


def test_a_tsc_turns_over() -> None:
    found, _ = moved(SECOND, vm=vm_of([2**64 - 1]), hpet=hpet_of(0))
    assert found == vm_of([HZ - 1])


def test_a_pause_of_a_day_is_exact() -> None:
    day = 86_400 * SECOND
    found, _ = moved(day, vm=vm_of([0]), hpet=hpet_of(0))
    assert found == vm_of([86_400 * HZ])


def test_the_hpet_moves_on_by_its_own_rate() -> None:
    _, found = moved(SECOND // 2, vm=vm_of([0]), hpet=hpet_of(1000))
    assert HEAD.unpack_from(found) == (256, 3, 5, 1000 + HPET_HZ // 2)


def test_the_hpet_turns_over() -> None:
    _, found = moved(SECOND, vm=vm_of([0]), hpet=hpet_of(2**32 - 1))
    assert HEAD.unpack_from(found)[3] == HPET_HZ - 1


def test_a_hpet_that_stands_still_is_left() -> None:
    saved = hpet_of(1000, [(2000, 0)], enabled=False)
    _, found = moved(SECOND, vm=vm_of([0]), hpet=saved)
    assert found == saved


@pytest.mark.parametrize(
    ("comparator", "period", "expected"),
    [
        # Passed meanwhile: it comes a moment after the start, not after a turn of 256 s.
        (1001, ONE_SHOT, "soon"),
        (1000, ONE_SHOT, "soon"),
        (1000 + HPET_HZ, ONE_SHOT, "soon"),
        # Not reached yet, or passed before the pause: left as it is.
        (1001 + HPET_HZ, ONE_SHOT, "same"),
        (999, ONE_SHOT, "same"),
        # vmm computes the next time of a periodic timer.
        (1001, PERIODIC, "same"),
    ],
)
def test_a_comparator_stays_ahead_of_the_counter(
    comparator: int, period: int, expected: str
) -> None:
    _, found = moved(SECOND, vm=vm_of([0]), hpet=hpet_of(1000, [(0, 1), (comparator, period)]))
    now = HEAD.unpack_from(found)[3]
    flags, message, value, kept, due = TIMER.unpack_from(found, HEAD.size + TIMER.size)
    assert (flags, message, kept, due) == (0x41, 78, period, -1)
    if expected == "same":
        assert value == comparator
    else:
        assert 0 < value - now < HPET_HZ // 100


def test_a_comparator_stays_ahead_when_the_counter_turns_over() -> None:
    counter = 2**32 - HPET_HZ // 2
    _, found = moved(SECOND, vm=vm_of([0]), hpet=hpet_of(counter, [(5, 0)]))
    now = HEAD.unpack_from(found)[3]
    assert now == HPET_HZ // 2
    assert 0 < TIMER.unpack_from(found, HEAD.size)[2] - now < HPET_HZ // 100


@pytest.mark.parametrize(
    ("host", "why"),
    [
        (FakeHost(layout=None), "this kernel"),
        (FakeHost(osreldate="1501001"), "this kernel"),
        (FakeHost(tsc_freq=None), "TSC"),
        (FakeHost(tsc_freq="0"), "TSC"),
        (FakeHost(layout=LAYOUT._replace(vcpu_bytes=48)), "structure vm has 56 bytes, not 64"),
        (FakeHost(layout=LAYOUT._replace(hpet_tail_bytes=0)), "vhpet has 287 bytes, not 284"),
    ],
)
def test_what_is_not_known_for_sure_is_left(host: FakeHost, why: str) -> None:
    with pytest.raises(IncompatibleError, match=why):
        moved(SECOND, vm=vm_of([0]), hpet=hpet_of(0), host=host)


def test_a_hpet_without_a_rate_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="no rate"):
        moved(SECOND, vm=vm_of([0]), hpet=hpet_of(0, tick_sbt=0))


def test_a_snapshot_without_a_hpet_is_refused() -> None:
    meta = Meta("g", 1, 1 << 20, 0, (Item("kern", "vm", 56, 0),))
    host = replace(FakeHost(), layout=LAYOUT)
    with pytest.raises(IncompatibleError, match="vhpet has 0 bytes"):
        saved = clocks.Saved.of(meta, [vm_of([0])], [])
        clocks.moved_on(host, {"kern.osreldate": RELEASE}, saved, 1)  # type: ignore[arg-type]


def test_the_layout_of_freebsd_is_that_of_its_structures() -> None:
    """x2apic_state, exitintinfo, 3 ints, xcr0, struct vm_exit of 136 bytes, nextrip, tsc."""
    saved = struct.Struct("<IQiiIQ136sQQ")
    layout = CLOCKS["1501000"]
    assert (layout.vcpu_bytes, layout.tsc_at) == (saved.size, saved.size - 8)

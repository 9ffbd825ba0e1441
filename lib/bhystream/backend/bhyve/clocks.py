"""The clocks of a guest in bhyve's snapshot, moved on by the length of a pause.

A restored guest goes on with the TSC and the HPET that it had in the pause, so the
clock of its operating system falls behind by the pause.  bhyve takes both from
FILE.kern at the very end of a restore, so a change there, just before, moves them on.

    vm      for each vCPU, among others, its TSC: rdtsc() plus the vCPU's offset
    vhpet   the main counter, and for each timer the comparator

A one-shot comparator that the counter would have passed is set a moment ahead of
the counter: its interrupt would otherwise come only after the counter's next turn,
256 s later.  A periodic timer finds its next time by itself.  A counter that stands
still stays as it is.

The clocks go on for a moment after the guest was told to stop, until bhyve saves them.  How
long that took is an optional state, "clock": without it they would be moved too far.

The ACPI timer is left alone: bhyve saves nothing of it but a constant, and each
restore begins it anew (sys/amd64/vmm/io/vpmtmr.c, vpmtmr_snapshot()).

Neither structure says where its fields are, and both change with the kernel.  So
only kernels are known here on which this was run, and the sizes must be theirs.
Source: sys/amd64/vmm/vmm.c, vm_snapshot_vcpus(), vm_restore_time();
sys/amd64/vmm/io/vhpet.c, vhpet_snapshot(), vhpet_restore_time(), FreeBSD 15.1.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.identity import integer
from bhystream.backend.bhyve.snapshot import Meta
from bhystream.errors import FormatError, IncompatibleError
from bhystream.guest import Json, State

STATE = "clock"  # u64: ns
_NS = struct.Struct("<Q")
_TSC = struct.Struct("<Q")
_HPET_HEAD = struct.Struct("<qQQI")  # ticks as sbintime_t, configuration, interrupts, counter
_HPET_TIMER = struct.Struct("<QQIIq")  # configuration, message, comparator, period, due time
_HPET_TIMERS = 8
HPET_BYTES = _HPET_HEAD.size + _HPET_TIMERS * _HPET_TIMER.size
_HPET_ENABLE = 1
_SBT_SECOND = 1 << 32
_TURN = 1 << 32  # the counter and the comparators have 32 bits
_MOMENT_S = 0.001
_MAX_TSC_HZ = 1 << 40


def state_of(ns: int) -> State:
    """Return the state that says for how long the clocks went on after the stop."""
    return State(STATE, _NS.pack(ns), is_optional=True)


def ran_on_ns(states: Sequence[State]) -> int | None:
    """Return what the state says, None if there is none.  Raises FormatError if it is not valid."""
    for state in states:
        if state.is_optional and state.name == STATE:
            if len(state.data) != _NS.size:
                raise FormatError(f"state {STATE} has {len(state.data)} bytes, not {_NS.size}")
            return int(_NS.unpack(state.data)[0])
    return None


@dataclass(frozen=True)
class Saved:
    """The clocks of one snapshot, as they were saved.

    vm, hpet: the structures, b"" if there is none.  vm_at, hpet_at: where they begin in
    FILE.kern.  ran_on_ns: for how long they went on after the stop; None if nobody has said so.
    """

    ncpus: int
    vm: bytes
    vm_at: int
    hpet: bytes
    hpet_at: int
    ran_on_ns: int | None

    @classmethod
    def of(cls, meta: Meta, kern: Sequence[bytes], states: Sequence[State]) -> Saved:
        """Find the structures in a snapshot.

        meta, kern: as snapshot.join() returns them for the states.  Raises FormatError.
        """
        found = {
            item.name: (blob, item.offset_bytes)
            for item, blob in zip(meta.items, kern, strict=True)
            if item.kind == "kern" and item.name in ("vm", "vhpet")
        }
        nothing = (b"", 0)
        vm, hpet = found.get("vm", nothing), found.get("vhpet", nothing)
        return cls(meta.ncpus, *vm, *hpet, ran_on_ns(states))

    def behind_ns(self, ns: int) -> int:
        """Return by how many ns the clocks are behind if the guest was stopped ns ago.

        Raises IncompatibleError if that is not known, or not at all.
        """
        if self.ran_on_ns is None:
            raise IncompatibleError("the stream does not say since when they stand still")
        if self.ran_on_ns >= ns:
            raise IncompatibleError("they went on for as long as the guest stands still")
        return ns - self.ran_on_ns


def moved_on(host: Host, source: Json, saved: Saved, ns: int) -> list[tuple[int, bytes]]:
    """Return what to write into FILE.kern, each with its offset, to move the clocks on by ns.

    host: where the guest is restored.  source: the HOST section.  Raises IncompatibleError if
    that cannot be done safely.
    """
    layout = host.clock_layout()
    if layout is None or source.get("kern.osreldate") != integer(host.sysctl("kern.osreldate")):
        raise IncompatibleError("where this kernel keeps them is not known here")
    tsc_hz = integer(host.sysctl("machdep.tsc_freq")) or 0
    if not 0 < tsc_hz < _MAX_TSC_HZ:
        raise IncompatibleError("this host does not tell the rate of its TSC (machdep.tsc_freq)")
    for name, blob, expected in (
        ("vm", saved.vm, saved.ncpus * layout.vcpu_bytes + layout.vm_tail_bytes),
        ("vhpet", saved.hpet, HPET_BYTES + layout.hpet_tail_bytes),
    ):
        if len(blob) != expected:
            raise IncompatibleError(f"structure {name} has {len(blob)} bytes, not {expected}")
    if _HPET_HEAD.unpack_from(saved.hpet)[0] <= 0:
        raise IncompatibleError("structure vhpet has no rate")
    found = []
    for vcpu in range(saved.ncpus):
        at = vcpu * layout.vcpu_bytes + layout.tsc_at
        tsc = _TSC.unpack_from(saved.vm, at)[0] + ns * tsc_hz // 10**9
        found.append((saved.vm_at + at, _TSC.pack(tsc % 2**64)))
    if hpet := _hpet_moved_on(saved.hpet, ns):
        found.append((saved.hpet_at, hpet))
    return found


def _hpet_moved_on(saved: bytes, ns: int) -> bytes:
    """Return the HPET's head and timers, moved on; b"" if its counter stands still."""
    tick_sbt, config, interrupts, counter = _HPET_HEAD.unpack_from(saved)
    if not config & _HPET_ENABLE:
        return b""
    ticks = ns * _SBT_SECOND // (10**9 * tick_sbt)
    moment = int(_MOMENT_S * _SBT_SECOND) // tick_sbt
    later = (counter + ticks) % _TURN
    out = bytearray(saved)
    _HPET_HEAD.pack_into(out, 0, tick_sbt, config, interrupts, later)
    for index in range(_HPET_TIMERS):
        at = _HPET_HEAD.size + index * _HPET_TIMER.size
        flags, message, comparator, period, due = _HPET_TIMER.unpack_from(saved, at)
        if not period and (comparator - counter) % _TURN <= ticks:
            comparator = (later + moment) % _TURN
        _HPET_TIMER.pack_into(out, at, flags, message, comparator, period, due)
    return bytes(out)

"""The TSC and the HPET of a guest, at the places that CLOCKS names.

    vm      u64 TSC for each vCPU, then the blob of blob.py
    vhpet   the HPET as vmm saves it, then the blob of blob.py

The host's TSC is its monotonic clock at the rate of machdep.tsc_freq, and the HPET
counts the same clock, so a guest that has never stood still has offsets of 0.
The cpu file has the offsets, as vmm keeps vcpu->tsc_offset.
"""

from __future__ import annotations

import struct
import time

from bhystream.backend.bhyve.host import ClockLayout

from .blob import DEFAULT_BYTES, SIZES_BYTES, unpack_blob
from .cpu import Cpus

_TSC = struct.Struct("<Q")
_HPET = struct.Struct("<qQQI" + 8 * "QQIIq")
_SBT_TICK = 256
_HPET_HZ = 1 << 24
_ENABLED = 1

CLOCKS = ClockLayout(
    vcpu_bytes=_TSC.size,
    tsc_at=0,
    vm_tail_bytes=SIZES_BYTES["vm"],
    hpet_tail_bytes=DEFAULT_BYTES,
)


class GuestClocks:
    """The clocks of one guest."""

    def __init__(self, cpus: Cpus, tsc_hz: int) -> None:
        self._cpus = cpus
        self._tsc_hz = tsc_hz
        self._saved: dict[str, bytes] = {}

    def save(self, name: str) -> bytes:
        """Return what stands before a kernel structure's blob, b"" for most."""
        now_ns = time.monotonic_ns()
        if name == "vm":
            tsc = _count(now_ns, self._tsc_hz)
            return b"".join(_TSC.pack((tsc + cpu.get("tsc_offset")) % 2**64) for cpu in self._cpus)
        if name == "vhpet":
            counter = (_count(now_ns, _HPET_HZ) + self._cpus.hpet_offset) % 2**32
            return _HPET.pack(_SBT_TICK, _ENABLED, 0, counter, *8 * (0, 0, 0, 0, 0))
        return b""

    def load(self, name: str, blob: bytes) -> bytes:
        """Take over what save() has returned; return the rest of the blob.

        The blob of another structure is left whole: its name tells whose it is.
        """
        if unpack_blob(blob):
            return blob
        size = {"vm": _TSC.size * self._cpus.ncpus, "vhpet": _HPET.size}.get(name, 0)
        self._saved[name] = blob[:size]
        return blob[size:]

    def go_on(self) -> None:
        """Set the offsets so that the clocks go on from what load() has taken."""
        now_ns = time.monotonic_ns()
        vm, hpet = self._saved.get("vm", b""), self._saved.get("vhpet", b"")
        if len(vm) == _TSC.size * self._cpus.ncpus:
            for cpu, (saved,) in zip(self._cpus, _TSC.iter_unpack(vm), strict=True):
                cpu.put("tsc_offset", (saved - _count(now_ns, self._tsc_hz)) % 2**64)
        if len(hpet) == _HPET.size:
            counter = _HPET.unpack(hpet)[3]
            self._cpus.hpet_offset = (counter - _count(now_ns, _HPET_HZ)) % 2**32


def _count(ns: int, hz: int) -> int:
    return ns * hz // 10**9

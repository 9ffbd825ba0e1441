"""Can bhyve send the guest from here, can it be taken there?  The reasons against it.

Each reason is one line: its key, the two values, and what helps.  Where a
function returns (hard, soft), hard reasons stand and -f overrules soft ones.
Hard is what would make a second copy or cannot work at all; soft is what is
likely to fail or to harm the guest, on evidence that may be wrong.

Nothing here changes anything.  A snapshot's blobs are the kernel's and bhyve's
own structures without a version, and a restore believes them: this verdict is
the only thing between a guest and a host that reads them otherwise.

Source: usr.sbin/bhyve, lib/libvmmapi, sys/dev/vmm and sys/amd64/vmm of FreeBSD 15.1, read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bhystream.backend.bhyve import keys as known
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.identity import integer
from bhystream.backend.bhyve.residency import believes_mincore
from bhystream.backend.bhyve.supervisors import reasons as supervisor_reasons
from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest
from bhystream.guest import Json

MIN_OSRELDATE = 1400000  # FreeBSD 14.0, the first with the checkpoint messages that we speak

# Two hosts of one CPU model show frequencies that differ by their calibration,
# at most some hundred ppm; other models differ by percents.  bhyve restores the
# guest's TSC but not its rate, so the guest's clock runs wrong by the
# difference, and NTP mends up to 500 ppm.  Unverified: from general knowledge.
TSC_TOLERANCE_PPM = 500

# Devices without pe_pause, and with threads of their own.  virtio-rnd and lpc
# have none either, but act only when a vCPU makes them (unverified).
# Source: usr.sbin/bhyve/pci_*.c.
UNPAUSED = frozenset({"e1000", "fbuf", "xhci"})

_HARD = {
    "hypervisor": "only a host of the same hypervisor can take it",
    "hw.machine": "only a host of the same architecture can take it",
    "hw.pagesize": "only a host of the same page size can take it",
    "cpu.vendor": "the saved vCPUs mean nothing to the other",
}

_MAX_SHOWN_CHARS = 60


def host_reasons(head_host: Json, here: Json) -> tuple[list[str], list[str]]:
    """Compare the sending host with this one: (hard, soft).

    head_host: the stream's HOST section, not to be trusted.  here: of
    identity.describe().
    """
    hard = [
        _difference(key, head_host, here, cure)
        for key, cure in _HARD.items()
        if head_host.get(key) is None or head_host[key] != here.get(key)
    ]
    if head_host.get("hypervisor") != here.get("hypervisor"):
        return hard[:1], []  # nothing else of it can be compared
    has_ids = "kern.build_id" in head_host and "kern.build_id" in here
    kernel = "kern.build_id" if has_ids else "kern.osreldate"
    cures = {
        "hw.model": "the guest may use what this CPU has not",
        kernel: "install the same kernel on both hosts",
        "bhyve.hash": "install the same bhyve on both hosts",
    }
    # A vmm that is part of the kernel has no hash, and is told by the kernel's;
    # nor had hosts of an earlier version one.
    if "vmm.hash" in head_host and "vmm.hash" in here:
        cures["vmm.hash"] = "load the same vmm.ko on both hosts"
    soft = [
        _difference(key, head_host, here, f"{cure}; -f overrules")
        for key, cure in cures.items()
        if head_host.get(key) != here.get(key)
    ]
    return hard, soft + _tsc_reasons(head_host, here)


def _tsc_reasons(theirs: Json, here: Json) -> list[str]:
    key = "machdep.tsc_freq"
    a, b = theirs.get(key), here.get(key)
    if type(a) is int and type(b) is int:
        if abs(a - b) * 1_000_000 <= max(a, b) * TSC_TOLERANCE_PPM:
            return []
    elif a is None and b is None:
        return []
    cure = "the guest's clock would run wrong by the difference; -f overrules"
    return [_difference(key, theirs, here, cure)]


def _difference(key: str, theirs: Json, here: Json, cure: str) -> str:
    a, b = _shown(theirs.get(key)), _shown(here.get(key))
    return f"{key}: the source has {a}, this host {b}; {cure}"


def _shown(value: Any) -> str:
    """Return a value of a stream so that it does no harm to a terminal."""
    return "none" if value is None else ascii(value)[:_MAX_SHOWN_CHARS]


def ability_reasons(host: Host) -> tuple[list[str], list[str]]:
    """Check that this host's bhyve takes and loads snapshots, whatever the guest: (hard, soft).

    For both ends.  All of the kernel's half is in vmm.ko, whatever kernel it
    is loaded into.  Source: sys/modules/vmm/Makefile, FreeBSD 15.1.
    """
    hard, soft = [], []
    machine = (host.sysctl("hw.machine") or "").strip()
    if machine != "amd64":
        hard.append(
            f"hw.machine: this host has {_shown(machine or None)}, bhyve's snapshots need 'amd64';"
            " shut the guest down and move its disks"
        )
    date = integer(host.sysctl("kern.osreldate"))
    if date is None or date < MIN_OSRELDATE:
        hard.append(
            f"kern.osreldate: this host has {_shown(date)}, {MIN_OSRELDATE} is needed;"
            " upgrade it to FreeBSD 14 or later"
        )
    can = host.can_snapshot()
    if can is None:
        soft.append(
            "vmm: it is not seen whether the one here has snapshots;"
            " kldload vmm, keep debug.link_elf_obj_leak_locals at 1, or -f"
        )
    elif not can:
        soft.append(
            "vmm: the one here has no snapshots; build and install vmm.ko, bhyve and bhyvectl"
            " with WITH_BHYVE_SNAPSHOT=yes (the kernel stays), or -f"
        )
    return hard, soft


def source_reasons(
    host: Host, pid: int, *, manager: VmBhyveGuest | None
) -> tuple[list[str], list[str]]:
    """Say why a guest of this host cannot be sent: (hard, soft).

    pid: of its bhyve.  manager: vm-bhyve's guest, where it is one.
    """
    hard, soft = ability_reasons(host)
    more_hard, more_soft = supervisor_reasons(
        host.parent_command(pid), manager, host.knows_suspending_lock()
    )
    return hard + more_hard, soft + more_soft


def guest_reasons(host: Host, config: Json) -> list[str]:
    """Say why this host cannot take a guest, whatever is lent to it; they are hard.

    config: a validated CONFIG section, whole.
    """
    ncpus, most = int(config["keys"]["cpus"]), integer(host.sysctl("hw.vmm.maxcpu"))
    if most is None or ncpus <= most:
        return []
    return [
        f"cpus: the guest has {ncpus}, hw.vmm.maxcpu is {most} here;"
        f" set hw.vmm.maxcpu={ncpus} in loader.conf and load vmm anew"
    ]


def _named(keys: Mapping[str, str], kinds: frozenset[str]) -> str:
    """Return the devices of these kinds as bhyve names them, in slot order."""
    devices = known.pci_devices(keys)
    return ", ".join(f"{kind}@{slot}" for slot, kind in devices.items() if kind in kinds)


def warnings(config: Json, host: Host, *, is_wired: bool = False) -> list[str]:
    """Return what neither end can mend, to be said once before the source's guest is paused.

    config: the CONFIG section.  is_wired: as in residency.believes_mincore().
    Nothing here speaks against a move; each line begins with its key.
    """
    out = ["clock: the guest's clock falls behind by the length of the pause; let it run NTP"]
    if host.cpu_vendor() == "amd":
        # Source: reviews.freebsd.org/D19495; ASID and lastcpu are restored as they were.
        out.append(
            "cpu.vendor: it is 'amd' here; restores were run on an emulated AMD processor only,"
            " and on real ones Linux guests were reported to freeze after one"
        )
    unpaused = _named(config["keys"], UNPAUSED)
    if unpaused:
        out.append(
            f"devices: bhyve does not stop {unpaused} while it saves; what they do in that moment"
            " may be lost to the guest, virtio devices are stopped"
        )
    if "bootvars" in config["resources"]:
        out.append(
            "bootvars: the boot variables are a file that the guest writes and no snapshot holds;"
            " copy it with the disks"
        )
    is_believed, why = believes_mincore(host, is_wired)
    return out if is_believed else [*out, why]


def room_reasons(needed_bytes: int, free_bytes: int, what: str, path: str) -> list[str]:
    """Compare what is to be written with what is free where it goes.

    what: the reason's key, as "staging".  path: a directory.
    """
    if needed_bytes <= free_bytes:
        return []
    return [
        f"{what}: {path} has {free_bytes} bytes free, {needed_bytes} are needed;"
        " make room there, or name another directory"
    ]


def needed_memory_bytes(guest_bytes: int, *, is_staged_in_memory: bool) -> int:
    """Return the most memory that a destination needs at one time.

    bhyve -r reads the memory file into the guest's own memory, and only then
    can the file go: twice the guest where the file is on a tmpfs.  It is the
    most, because holes of the file take none there; they do in the guest.
    """
    return guest_bytes * 2 if is_staged_in_memory else guest_bytes


def memory_reasons(free_bytes: int, needed_bytes: int) -> list[str]:
    """Compare the destination's free memory with needed_memory_bytes()."""
    if needed_bytes <= free_bytes:
        return []
    return [
        f"memory: this host has {free_bytes} bytes free, up to {needed_bytes} are needed until"
        " the guest runs; stop another guest, or stage on a disk (BHYRECV_STAGING), or -f"
    ]

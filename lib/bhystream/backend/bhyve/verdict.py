"""The reasons why the source cannot send a guest, or why the destination cannot take it.

Each reason is one line: its key, the two values, and the cure.  If a function
returns (hard, soft), -f overrules the soft reasons, but not the hard ones.
A reason is hard if the move would make a second copy or cannot work at all.  It
is soft if the move is likely to fail or to harm the guest, on evidence that may
be wrong.

These functions change nothing.  A snapshot's blobs are the kernel's and bhyve's
own structures without a version, and a restore believes them: only this verdict
protects a guest from a host that reads the blobs differently.

Source: usr.sbin/bhyve, lib/libvmmapi, sys/dev/vmm and sys/amd64/vmm of FreeBSD 15.1, read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bhystream.backend.bhyve import keys as known
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.identity import integer
from bhystream.backend.bhyve.residency import believes_mincore
from bhystream.backend.bhyve.supervisors import reasons as supervisor_reasons
from bhystream.errors import Reason
from bhystream.guest import Json

if TYPE_CHECKING:
    from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest

MIN_OSRELDATE = 1400000  # FreeBSD 14.0, the first with the checkpoint messages of nvlist.py

# Two hosts of one CPU model show frequencies that differ by their calibration,
# at most some hundred ppm; other models differ by several percent.  bhyve
# restores the guest's TSC but not its rate, so the guest's clock runs too fast or
# too slow by the difference; NTP corrects up to 500 ppm.  Unverified: from
# general knowledge.
TSC_TOLERANCE_PPM = 500

# Devices without pe_pause that have threads of their own.  virtio-rnd and lpc
# have no pe_pause either, but act only if a vCPU makes them act (unverified).
# Source: usr.sbin/bhyve/pci_*.c.
UNPAUSED = frozenset({"e1000", "fbuf", "xhci"})

_HARD = {
    "hypervisor": "only a host of the same hypervisor can take it",
    "hw.machine": "only a host of the same architecture can take it",
    "hw.pagesize": "only a host of the same page size can take it",
    "cpu.vendor": "vCPUs saved on the one cannot be restored on the other",
}

_MAX_SHOWN_CHARS = 60
_NTP = "let it run NTP, or see bhyrecv --advance-clock"


def host_reasons(head_host: Json, here: Json) -> tuple[list[str], list[str]]:
    """Compare the sending host with this one; return the reasons (hard, soft).

    head_host: the stream's HOST section, not to be trusted.  here: from
    identity.describe().
    """
    hard = [
        _difference(key, head_host, here, cure)
        for key, cure in _HARD.items()
        if head_host.get(key) is None or head_host[key] != here.get(key)
    ]
    if head_host.get("hypervisor") != here.get("hypervisor"):
        return hard[:1], []  # hosts of two hypervisors have nothing else to compare
    has_ids = "kern.build_id" in head_host and "kern.build_id" in here
    kernel = "kern.build_id" if has_ids else "kern.osreldate"
    cures = {
        "hw.model": "the guest may use features that this CPU lacks",
        kernel: "install the same kernel on both hosts",
        "bhyve.hash": "install the same bhyve on both hosts",
    }
    # A vmm that is part of the kernel has no hash of its own: the kernel's key covers it.  An
    # earlier version of bhysend sent no vmm.hash.
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
    """Return a value of a stream in a form that does no harm to a terminal."""
    return "none" if value is None else ascii(value)[:_MAX_SHOWN_CHARS]


def ability_reasons(host: Host) -> tuple[list[Reason], list[Reason]]:
    """Return why this host's bhyve cannot save or restore any guest: (hard, soft).

    Used at both ends.  All of the kernel's part of snapshots is in vmm.ko,
    whatever kernel vmm.ko is loaded into.  Source: sys/modules/vmm/Makefile,
    FreeBSD 15.1.
    """
    hard: list[Reason] = []
    soft: list[Reason] = []
    machine = (host.sysctl("hw.machine") or "").strip()
    if machine != "amd64":
        what = f"this host has {_shown(machine or None)}, bhyve's snapshots need 'amd64'"
        hard.append(Reason(f"hw.machine: {what}", "shut the guest down and move its disks"))
    date = integer(host.sysctl("kern.osreldate"))
    if date is None or date < MIN_OSRELDATE:
        what = f"this host has {_shown(date)}, {MIN_OSRELDATE} is needed"
        hard.append(Reason(f"kern.osreldate: {what}", "upgrade it to FreeBSD 14 or later"))
    can = host.can_snapshot()
    if can is None:
        what = "vmm: it cannot be seen whether the vmm here has snapshots"
        cure = "kldload vmm, sysctl debug.link_elf_obj_leak_locals=1, or -f"
        soft.append(Reason(what, cure))
    elif not can:
        what = "vmm: the vmm here has no snapshots"
        cure = (
            "build and install vmm.ko, bhyve and bhyvectl with WITH_BHYVE_SNAPSHOT=yes (the kernel"
            " stays), by the commands of bhysend-bhyve(7), or -f"
        )
        soft.append(Reason(what, cure))
    return hard, soft


def source_reasons(
    host: Host, pid: int, *, manager: VmBhyveGuest | None
) -> tuple[list[Reason], list[Reason]]:
    """Say why a guest of this host cannot be sent: (hard, soft).

    pid: the process id of the guest's bhyve.  manager: vm-bhyve's guest, or None if
    vm-bhyve does not manage the guest.  Raises what supervisors.reasons() raises.
    """
    hard, soft = ability_reasons(host)
    more_hard, more_soft = supervisor_reasons(
        host.parent_command(pid), manager, host.knows_suspending_lock()
    )
    return hard + more_hard, soft + more_soft


def guest_reasons(host: Host, config: Json) -> list[str]:
    """Return the hard reasons why this host cannot take a guest with any resources.

    config: a validated CONFIG section, whole.
    """
    ncpus, most = int(config["keys"]["cpus"]), integer(host.sysctl("hw.vmm.maxcpu"))
    if most is None or ncpus <= most:
        return []
    return [
        f"cpus: the guest has {ncpus}, hw.vmm.maxcpu is {most} here;"
        f" set hw.vmm.maxcpu={ncpus} in loader.conf and load vmm anew"
    ]


def _unpaused(keys: Mapping[str, str]) -> list[Reason]:
    """Return a warning if there are devices that bhyve does not stop, in slot order."""
    found = {slot: kind for slot, kind in known.pci_devices(keys).items() if kind in UNPAUSED}
    if not found:
        return []
    from bhystream.backend.bhyve.cures import of_keys

    names = ", ".join(f"{kind}@{slot}" for slot, kind in found.items())
    about = [f"{slot}.device" for slot in found]
    what = (
        f"devices: bhyve does not stop {names} while it saves, so the guest may lose what they do"
        " in that moment"
    )
    return [Reason(what, f"if that matters, {of_keys(keys, about)}", *about)]


def warnings(config: Json, host: Host, *, is_wired: bool = False) -> list[Reason]:
    """Return what neither end can repair, to be said once before the source's guest is paused.

    config: the CONFIG section.  is_wired: as in residency.believes_mincore().
    No warning is a reason against a move; each is one line that begins with its key.
    """
    out = [Reason("clock: the guest's clock falls behind by the length of the pause", _NTP)]
    if host.cpu_vendor() == "amd":
        # Source: reviews.freebsd.org/D19495; ASID and lastcpu are restored as they were.
        out.append(
            Reason(
                "cpu.vendor: it is 'amd' here; restores were run on an emulated AMD processor only,"
                " and on real ones Linux guests were reported to freeze after one"
            )
        )
    out += _unpaused(config["keys"])
    if "bootvars" in config["resources"]:
        what = "bootvars: the guest writes the boot variables into a file, which is in no snapshot"
        out.append(Reason(what, "copy this file with the disks"))
    is_believed, why = believes_mincore(host, is_wired)
    return out if is_believed else [*out, why]


def room_reasons(needed_bytes: int, free_bytes: int, what: str, path: str) -> list[Reason]:
    """Compare the bytes to be written with those that are free in a directory.

    what: the reason's key, like "staging".  path: the directory.
    """
    if needed_bytes <= free_bytes:
        return []
    return [
        Reason(
            f"{what}: {path} has {free_bytes} bytes free, {needed_bytes} are needed",
            "make room there, or name another directory",
        )
    ]


def needed_memory_bytes(guest_bytes: int, *, is_staged_in_memory: bool) -> int:
    """Return the most memory that a destination needs at one time, in bytes.

    bhyve -r reads the memory file into the guest's own memory, and only then
    can the file be removed: so twice the guest's memory if the file is on a
    tmpfs.  Less is needed if the file has holes, which take no memory on a
    tmpfs, but do in the guest.
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

"""Can bhyve send the guest from here, can it be taken there?  The reasons against it.

Each reason is one line: its key, the two values, and what helps.  Where a
function returns (hard, soft), hard reasons stand and -f overrules soft ones.
Hard is what would make a second copy or cannot work at all; soft is what is
likely to fail or to harm the guest, on evidence that may be wrong.

Nothing here changes anything.  A snapshot's blobs are the kernel's and bhyve's
own structures without a version, and a restore believes them: this verdict is
the only thing between a guest and a host that reads them otherwise.

Source: FreeBSD's bhyve and vmm as read; nothing here was run on FreeBSD.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bhystream.backend.base import Json
from bhystream.backend.bhyve import keys as known
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.identity import integer
from bhystream.backend.bhyve.residency import believes_mincore

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

_SNAPSHOT_OPTION = re.compile(r"^(?!\s*nooptions?\b)[^#\n]*\bBHYVE_SNAPSHOT\b", re.MULTILINE)
_MAX_SHOWN_CHARS = 60
# Of a bhyve that was started by hand.  "" is init: its parent has ended.
_SHELLS = frozenset({"sh", "csh", "tcsh", "bash", "zsh", "ksh", "mksh", "fish", "dash"})
_HARMLESS = frozenset(
    {"", "doas", "init", "login", "screen", "script", "sshd", "su", "sudo", "tmux"}
)


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

    For both ends.  A kernel without its configuration in kern.conftxt says
    nothing about BHYVE_SNAPSHOT.
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
    config = host.sysctl("kern.conftxt")
    if config and not _SNAPSHOT_OPTION.search(config):
        soft.append(
            "kern.conftxt: this kernel has no BHYVE_SNAPSHOT, snapshots need it; build the"
            " kernel with options BHYVE_SNAPSHOT and the world with WITH_BHYVE_SNAPSHOT=yes,"
            " or -f"
        )
    return hard, soft


def source_reasons(host: Host, pid: int, *, is_managed: bool) -> tuple[list[str], list[str]]:
    """Say why a guest of this host cannot be sent: (hard, soft).

    pid: of its bhyve.  is_managed: it is vm-bhyve's.  What starts a guest again
    when its process ends would make a second copy of one that was suspended.
    """
    hard, soft = ability_reasons(host)
    parent = host.parent_command(pid)
    if _program(parent) == "bhyve":
        hard.append(
            "monitor: the guest's bhyve runs in monitor mode, a suspend needs one that does not:"
            " its parent would start the guest again; start the guest without monitor mode"
        )
    elif is_managed and not host.knows_suspending_lock():
        hard.append(
            "vm-bhyve: this host's is older than 1.7.0, or not where the port puts it: it would"
            " start the guest again after the suspend; update it"
        )
    elif not is_managed and _may_start_again(parent):
        soft.append(
            f"supervisor: the guest's bhyve was started by {_shown(parent)}, which may start it"
            " again when it ends: a second copy; end that first, or -f if it does not"
        )
    return hard, soft


def _program(command: str) -> str:
    """Return the name of a command line's program: also of a login shell, and of a title."""
    words = command.split()
    return words[0].rpartition("/")[2].lstrip("-").rstrip(":") if words else ""


def _may_start_again(command: str) -> bool:
    """Say whether a parent is more than a terminal's: a script, or a program not known."""
    name = _program(command)
    if name in _SHELLS:
        return any(not word.startswith("-") for word in command.split()[1:])
    return name not in _HARMLESS


def _named(keys: Mapping[str, str], kinds: frozenset[str]) -> str:
    """Return the devices of these kinds as bhyve names them, in slot order."""
    devices = known.pci_devices(keys)
    return ", ".join(f"{kind}@{slot}" for slot, kind in devices.items() if kind in kinds)


def warnings(config: Json, host: Host, *, is_wired: bool = False) -> list[str]:
    """Return what neither end can mend, to be said once before the source's guest is paused.

    config: the CONFIG section.  is_wired: as in residency.believes_mincore().
    Nothing here speaks against a move; each line begins with its key.
    """
    out = [
        "fpu: bhyve's snapshots leave the guest's FPU and vector registers out; what computes"
        " with them at the pause may go on with wrong values, so let the guest be idle then",
        "clock: the guest's clock falls behind by the length of the pause; let it run NTP",
    ]
    vendor = host.cpu_vendor()
    if vendor == "amd":
        out.append(
            "cpu.vendor: it is 'amd' here, bhyve's snapshots were tried on 'intel';"
            " Linux guests were seen to freeze after a restore"
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

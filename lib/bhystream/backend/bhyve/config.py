"""A bhyve guest's configuration: bhyve_config(5) text, and the CONFIG section made from it.

No version of bhyve stores the configuration in the snapshot, and the argv of a
running bhyve is lost (setproctitle).  So the configuration comes from a file, a
manager's log (vmbhyve.py), or a command line (argv.py), and always becomes a
flat mapping of keys here.  GuestConfig has the configuration in two forms:

    full      the source's own, with the source's paths and taps
    section   {"name", "keys", "resources"}: what travels; no path, tap or address.
              backing.py adds "disks" and "nets": what stands behind the resources

bhyve expands %(name) when bhyve reads a value; this module expands it before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bhystream.backend.bhyve import keys as known
from bhystream.backend.bhyve.defaults import explicit, memory_bytes
from bhystream.backend.bhyve.keys import refuse, shown, told
from bhystream.backend.refusals import Refusals

MAX_FILE_BYTES = 256 << 10
_MAX_DEPTH = 16
_MAX_VALUE = 1023
_NO_REFERENCE = "write the value itself instead of a reference"
# New name -> old name.  Later versions of bhyve know both names and prefer the new one.
# All versions know the old name, so the old name travels; command.py writes both.
# Source: usr.sbin/bhyve/amd64/bhyverun_machdep.c, end of bhyve_optparse(), FreeBSD
# 15.1; virtio.msix is from FreeBSD 16.
_RENAMED = {
    "bootrom": "lpc.bootrom",
    "bootvars": "lpc.bootvars",
    "virtio.msix": "virtio_msix",
}
_TESTDEV = "lpc.pc-testdev"


class GuestConfig(NamedTuple):
    """One guest's configuration, in both forms.

    name: [A-Za-z0-9._-]{1,64}.  full: every key with its value, so that no
    default depends on the host.  section: the CONFIG section.  computed: the
    keys of full that nobody set and bhyve's defaults gave.
    """

    name: str
    full: Mapping[str, str]
    section: Mapping[str, Any]
    computed: frozenset[str] = frozenset()

    def resources(self) -> dict[str, str]:
        """Return the resource keys with the values of this host: paths, taps, addresses."""
        wanted = self.section["resources"].values()
        return {key: self.full[key] for key in wanted if key in self.full}


def parse(text: str) -> dict[str, str]:
    """Return the keys of a bhyve_config(5) file, each with its last value, not expanded.

    Raises IncompatibleError, with the line's number, for a line that is wrong,
    and for a text longer than MAX_FILE_BYTES or with too many keys.
    Source: freebsd/freebsd-src@0040b685 usr.sbin/bhyve/bhyverun.c, parse_simple_config_file():
    a line is a comment only if "#" is its first character, and no space is removed.
    """
    if len(text) > MAX_FILE_BYTES:
        raise refuse(f"the file is longer than {MAX_FILE_BYTES} bytes")
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.startswith("#"):
            continue
        key, _, value = line.partition("=")
        if not key or not value:
            raise refuse(
                f"line {number}: {shown(line)} is not key=value",
                f"correct line {number}, or put # in front of it",
            )
        if not known.KEY.fullmatch(key):
            raise refuse(f"line {number}: {shown(key)} is no key")
        found[key] = value
        if len(found) > known.MAX_KEYS:
            raise refuse(f"line {number}: more than {known.MAX_KEYS} keys")
    return found


def expand(keys: Mapping[str, str], against: Refusals | None = None) -> dict[str, str]:
    """Return the keys with every %(key) replaced, as bhyve does when bhyve reads the values.

    against: gets an error for each key that is then left out, because its value refers to
    a key that is not set, runs in a circle, grows beyond 1,023 characters, or has any
    other "%", on which bhyve's manual page and bhyve's code differ.  Without it, raises
    IncompatibleError for these.
    """
    found = against or Refusals()
    out: dict[str, str] = {}
    for key, value in keys.items():
        with found.collecting():
            out[key] = _expanded(keys, key, value, 0)
    if against is None:
        found.require_none()
    return out


def _expanded(keys: Mapping[str, str], key: str, value: str, depth: int) -> str:
    if depth > _MAX_DEPTH:
        raise refuse(f"{key}: its references do not end", _NO_REFERENCE)
    out = ""
    rest = value
    while "%" in rest:
        before, _, rest = rest.partition("%")
        name, bracket, behind = rest[1:].partition(")")
        if not rest.startswith("(") or not bracket or "\\" in value:
            raise refuse(f"{told(key, value)}: a % that is no reference", _NO_REFERENCE)
        if name not in keys:
            what = f"{told(key, f'%({name})')} refers to a key that is not set"
            raise refuse(what, _NO_REFERENCE)
        out += before + _expanded(keys, key, keys[name], depth + 1)
        if len(out) > _MAX_VALUE:
            break
        rest = behind
    out += rest
    if not known.VALUE.fullmatch(out):
        raise refuse(f"{told(key, out)} is empty, too long, or not printable")
    return out


def read(text: str, name: str) -> GuestConfig:
    """Return the configuration of a bhyve_config(5) file.

    name: the guest's name, which wins over the file's.  Raises what parse()
    and split() raise.
    """
    return split(parse(text), name)


def split(
    keys: Mapping[str, str], name: str | None = None, against: Refusals | None = None
) -> GuestConfig:
    """Part a source's keys: resources stay here, and keys that describe the guest travel.

    keys: as parse() or argv.parse_argv() returns them.  name: wins over the key "name".
    against: gets an error for each key and device that cannot travel, which the section
    then lacks.  Without it, raises IncompatibleError for these; and in any case for a name
    that no guest can have.
    """
    found = against or Refusals()
    if name is not None:
        keys = {**keys, "name": _guest_name(name)}
    full = expand(keys, found)
    name = _guest_name(full.pop("name", ""))
    _settle(full)
    kept = _without_unsaved(full, found)
    devices = known.pci_devices(kept)
    with found.collecting():
        known.shape_of(kept, devices)
    added = explicit(kept, devices, name, found)
    full |= added
    kept |= added
    _refuse_other_nets(kept, devices, found)
    guest, resources = _sort(kept, devices, found)
    words = known.words(guest, devices, resources)
    if against is None:
        found.require_none()
    section = {"name": name, "keys": guest, "resources": words}
    return GuestConfig(name, full, section, frozenset(added))


def _guest_name(name: str) -> str:
    if not known.NAME.fullmatch(name):
        raise refuse(f"name: {shown(name)} cannot be a guest's")
    return name


def _settle(full: dict[str, str]) -> None:
    """Remove the keys that only matter while bhyve starts, and rename keys with two names.

    A monitor (FreeBSD 16, bhyve -M) belongs to the source host.  A monitor
    starts the guest again after a reset only, so a monitor does not disturb a
    move, which kills bhyve (D53731).
    """
    for key in ("config.dump", "monitor", "monitor.enabled", "monitor.no_reboot"):
        full.pop(key, None)
    for key in list(full):
        place = known.where(key)
        if place and place[1] == "tcp":
            full.setdefault(f"{place[0]}.rfb", full.pop(key))
    for new, old in _RENAMED.items():
        if new in full:
            full[old] = full.pop(new)


def _without_unsaved(full: Mapping[str, str], against: Refusals) -> dict[str, str]:
    """Return the keys without those of devices that bhyve does not save, or that are not known."""
    lost = {}
    gone = []
    for slot, kind in known.pci_devices(full).items():
        if kind not in known.SAVED:
            gone.append(f"{slot}.")
        if kind in known.UNSAVED:
            lost[f"{slot}.device"] = f"{kind}@{slot}"
        elif kind not in known.SAVED:
            key = f"{slot}.device"
            what = f"{told(key, kind)} is not allowed"
            against.add(refuse(what, f"start it without {slot}", key))
    if any(key.startswith("tpm.") for key in full):
        gone.append("tpm.")
        lost["tpm"] = "tpm"
    if known.boolean(full.get(_TESTDEV, "false")) == "true":
        gone.append(_TESTDEV)
        lost[_TESTDEV] = _TESTDEV
    if lost:
        from bhystream.backend.bhyve.cures import of_keys

        for key, what in lost.items():
            against.add(refuse(f"bhyve does not save {what}", of_keys(full, [key]), key))
    return {key: value for key, value in full.items() if not key.startswith(tuple(gone))}


def _refuse_other_nets(
    full: Mapping[str, str], devices: Mapping[known.Slot, str], against: Refusals
) -> None:
    """Refuse backends whose offloads the card has offered to the guest: netmap, vale.

    bhyve's restore compares what a virtio-net card offers with the card's saved
    state.  Source: usr.sbin/bhyve/virtio.c, vi_pci_snapshot_consts(), FreeBSD 15.1.
    """
    for net in known.nets(devices):
        kind = full.get(f"{net}.type", full.get(f"{net}.backend", "tap"))
        if not kind.startswith(known.BACKENDS):
            key = f"{net}.backend"
            what = f"{key}: {shown(kind)} cannot travel, only {', '.join(known.BACKENDS)}"
            against.add(refuse(what, f"start it with {key}=tapN", key))


def _sort(
    full: Mapping[str, str], devices: Mapping[known.Slot, str], against: Refusals
) -> tuple[dict[str, str], set[str]]:
    """Return the guest's keys with cleaned values, and the names of the resource keys."""
    guest: dict[str, str] = {}
    resources = set()
    for key, value in sorted(full.items()):
        rule = known.rule_of(key, devices)
        if rule is None:
            against.add(known.unknown(key))
        elif rule.role == "resource":
            resources.add(key)
        elif rule.role == "guest":
            with against.collecting():
                guest[key] = _cleaned(key, value, rule)
    return guest, resources


def _cleaned(key: str, value: str, rule: known.Rule) -> str:
    """Return the value in the form that travels.  Raises IncompatibleError if it has none."""
    is_size = key == "memory.size" or known.is_domain_size(key)
    cleaned = rule.clean(str(memory_bytes(value)) if is_size else value)
    if cleaned is None:
        raise refuse(f"{told(key, value)} is not allowed", f"start it with another {key}")
    return cleaned


def devices(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the devices that FILE.meta names, in FILE.meta's order, for the DEVICES section.

    config: a CONFIG section.  PCI devices come first, by bus, slot and function,
    in the form "virtio-blk@pci.0.3.0"; then "atkbdc", which every amd64 bhyve has.
    Source: fel1x-developer/freebsd-src@2d614aa2 usr.sbin/bhyve/snapshot.c,
    vm_snapshot_devices(), and pci_emul.c; the order is inferred from pci_next().
    """
    slots = known.pci_devices(config["keys"])
    return (*(f"{device}@{slot}" for slot, device in slots.items()), "atkbdc")

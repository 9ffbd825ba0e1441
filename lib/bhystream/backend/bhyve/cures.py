"""The edit that lets a guest of bhyve move: a key of bhyve_config(5), or a line of NAME.conf.

A reason names the keys that its cure changes (Reason.about).  of_keys() makes the cure
of these keys; for a guest of vm-bhyve, translated() replaces the cure by the lines of
NAME.conf from which vm-bhyve makes the keys.  bhyve reads its configuration at its start
only, and vm-bhyve reads NAME.conf at `vm start` only, so that each of these cures ends
with a start of the guest.

    device           bhyve_config(5)             NAME.conf
    nvme             device=virtio-blk           diskN_type="virtio-blk"
    e1000            device=virtio-net           networkN_type="virtio-net"
    passthru         without it                  passthruN=""
    virtio-console   without it                  virt_console0=""
    hda              without it                  sound="no"
    fbuf             without it                  graphics="no"
    xhci             without it                  xhci_mouse="no"

vm-bhyve numbers disks, cards and devices that are passed through in the order of their
slots.  If NAME.conf has another number of them than the guest, bhyve_options makes some.

Source: freebsd/vm-bhyve@89c21d0e, lib/vm-run, vm::run(), vm::bhyve_device_*(), and
sample-templates/config.sample; usr.sbin/bhyve/bhyve_config.5, FreeBSD 15.1.  Read, not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bhystream.backend.bhyve import keys as known
from bhystream.errors import Reason

_REPLACED = {"nvme": "virtio-blk", "e1000": "virtio-net"}
_NUMBERED = {"nvme": "disk{}_type", "e1000": "network{}_type", "passthru": "passthru{}"}
_SWITCHES = {
    "virtio-console": 'virt_console0=""',
    "hda": 'sound="no"',
    "fbuf": 'graphics="no"',
    "xhci": 'xhci_mouse="no"',
}
_MAX_LINES = 64
_START = "start it "


def of_keys(keys: Mapping[str, str], about: Sequence[str]) -> str:
    """Return the cure in terms of bhyve_config(5).

    keys: the guest's configuration.  about: keys of it, or the names of parts that have to go.
    """
    return f"{_START}{' and '.join(_of_key(keys, key) for key in about)}"


def _of_key(keys: Mapping[str, str], key: str) -> str:
    part, _, last = key.rpartition(".")
    if last == "device":
        new = _REPLACED.get(keys.get(key, ""))
        return f"with {key}={new}" if new else f"without {part}"
    if last == "backend":
        return f"with {key}=tapN"
    if key == "memory.wired":
        return "with memory.wired=true"
    return f"with {key}" if "=" in key else f"without {key}"


def translated(
    reason: Reason, name: str, conf: Mapping[str, str], keys: Mapping[str, str]
) -> Reason:
    """Return a reason whose cure is an edit of vm-bhyve's NAME.conf.

    reason: its cure may end with that of of_keys(), which is replaced.  name: the guest's.
    conf: its NAME.conf.  keys: its configuration.
    """
    if not reason.about:
        return reason
    edits = [_edit(conf, keys, key) for key in reason.about]
    sets = [text for text, is_line in edits if is_line]
    others = [text for text, is_line in edits if not is_line]
    found = [f"set {' and '.join(sets)}"] if sets else []
    found += [f"take {' and '.join(others)} out of bhyve_options"] if others else []
    before, _, _ = reason.cure.partition(_START)
    cure = f"{' and '.join(found)} in {name}.conf, then vm stop {name} and vm start {name}"
    return Reason(reason.what, before + cure, *reason.about)


def _edit(conf: Mapping[str, str], keys: Mapping[str, str], key: str) -> tuple[str, bool]:
    """Return (the line to set, True), or (what has to go from bhyve_options, False)."""
    part, _, last = key.rpartition(".")
    # A key that is not known may end as one that is.
    devices = {str(slot): kind for slot, kind in known.pci_devices(keys).items()}
    kind = devices.get(part, "") if last == "device" else ""
    line = _SWITCHES.get(kind, "")
    if line and _is_on(conf, line.partition("=")[0]):
        return line, True
    if kind in _NUMBERED:
        slots = [slot for slot, one in devices.items() if one == kind]
        lines = _numbered(conf, _NUMBERED[kind], "" if kind == "passthru" else kind)
        if len(lines) == len(slots):
            return f'{lines[slots.index(part)]}="{_REPLACED.get(kind, "")}"', True
    if last == "backend":
        nets = known.nets(known.pci_devices(keys))
        lines = _numbered(conf, "network{}_type", "")
        if part in nets and len(lines) == len(nets):
            line = lines[nets.index(part)].replace("_type", "_switch")
            return f"{line} to a switch of another type than vale", True
    if key == "memory.wired":
        return 'wired_memory="yes"', True
    if key.startswith("cpus="):
        return f'cpu="{key.removeprefix("cpus=")}"', True
    return part if kind else key, False


def _is_on(conf: Mapping[str, str], key: str) -> bool:
    return conf.get(key, "").lower() not in ("", "no", "off", "false", "0")


def _numbered(conf: Mapping[str, str], pattern: str, kind: str) -> list[str]:
    """Return the keys of numbered lines, in order, of which the values are of one kind.

    kind: "" for every value.
    """
    found = []
    for number in range(_MAX_LINES):
        value = conf.get(pattern.format(number))
        if not value:
            break
        if kind in ("", value):
            found.append(pattern.format(number))
    return found

"""Two configurations of a guest, and how they differ.

bhyve loads a snapshot into a machine with another topology, or another serial
number, without a word, and the guest breaks later.  So where the destination
has a description of its own (vm-bhyve's guest of that name) only its resources
are used, and the rest is compared with the stream key by key.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_NONE = "nothing"
# Source: bhyve_config(5), freebsd/freebsd-src@0487408a.  acpi_tables has changed its default.
_DEFAULTS = {
    "memory.wired": "false",
    "memory.guest_in_core": "false",
    "destroy_on_poweroff": "false",
    "rtc.use_localtime": "true",
    "virtio_msix": "true",
    "x86.mptable": "true",
    "x86.x2apic": "false",
    "x86.strictio": "false",
    "x86.strictmsr": "true",
    "x86.vmexit_on_hlt": "false",
    "x86.vmexit_on_pause": "false",
    "lpc.fwcfg": "bhyve",
    "lpc.pc-testdev": "false",
}
# What the guest never sees of its devices.
_DISK_DEFAULTS = dict.fromkeys(("nocache", "nodelete", "sync", "direct", "ro"), "false")


def differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], computed: Collection[str] = ()
) -> list[str]:
    """Return one line for each key that differs; [] means the same machine.

    ours: the stream's section.  theirs: the section of this host's own
    description.  computed: keys of theirs that only bhyve's defaults gave
    (GuestConfig.computed): the stream's values are used in their place.
    The name and the resources' values are not compared; whether there is a
    resource is.
    """
    left, right = dict(ours["keys"]), dict(theirs["keys"])
    lines = []
    for key in sorted(left.keys() | right.keys()):
        a, b = left.get(key, _default(key)), right.get(key, _default(key))
        if a != b and not (key in computed and key in left):
            lines.append(f"{key}: the stream says {a}, here {b}")
    wanted, lent = ours["resources"], theirs["resources"]
    for word in sorted(wanted.keys() | lent.keys()):
        a, b = wanted.get(word, _NONE), lent.get(word, _NONE)
        if a != b:
            lines.append(f"{word}: the stream says {a}, here {b}")
    return lines


def _default(key: str) -> str:
    return _DEFAULTS.get(key) or _DISK_DEFAULTS.get(key.rpartition(".")[2], _NONE)

"""Two configurations of a guest, and how they differ.

bhyve loads a snapshot into a machine with another topology, or another serial
number, without a complaint, and the guest breaks later.  So if the destination
has its own description of the guest (vm-bhyve's guest of that name), bhyrecv
uses only the description's resources, and compares its other keys with the
stream's one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bhystream.errors import IncompatibleError

_NONE = "nothing"
# Source: bhyve_config(5), freebsd/freebsd-src@0487408a.  acpi_tables is missing because
# its default has changed.
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
# The keys of a disk that the guest never sees.
_DISK_DEFAULTS = dict.fromkeys(("nocache", "nodelete", "sync", "direct", "ro"), "false")


def differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], computed: Collection[str] = ()
) -> list[str]:
    """Return one line for each key that differs; [] means the same machine.

    ours: the stream's section.  theirs: the section of this host's own
    description.  computed: the keys of theirs that nobody set and bhyve's
    defaults gave (GuestConfig.computed), for which the stream's values are used.
    The name and the values of the resources are not compared.  A resource that
    only one section has is a difference.
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


def another_machine(name: str, reasons: Sequence[str]) -> IncompatibleError:
    """Return the error for a guest that vm-bhyve would not start as the stream's machine."""
    return IncompatibleError(
        f"guest {name}: vm-bhyve starts another machine: {'; '.join(reasons)}",
        f"edit {name}.conf to match",
    )


def _default(key: str) -> str:
    return _DEFAULTS.get(key) or _DISK_DEFAULTS.get(key.rpartition(".")[2], _NONE)

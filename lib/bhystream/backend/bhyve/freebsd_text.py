"""What programs and files of a FreeBSD host say, read: pure functions of text.

Their formats were read in manual pages and recorded output, named at each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bhystream.errors import GuestError

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One line of the mount table.  special: a device, a dataset, or a word as "tmpfs"."""

    special: str
    directory: str
    fstype: str


def swap_used_bytes(text: str) -> int:
    """Return the swap in use.  text: of `swapinfo -k`.

    One line a device below a headline, used KiB in the third column, and a
    line "Total" from two devices on.  Source: swapinfo(8), usr.sbin/pstat;
    recorded on 14.4.
    """
    lines = text.splitlines()
    if not lines or "Used" not in lines[0].split():
        raise GuestError(f"cannot read what swapinfo says: {text[:80]!r}")
    used_kib = 0
    for line in lines[1:]:
        words = line.split()
        if words and words[0] != "Total":
            if len(words) < 3 or not (words[2].isascii() and words[2].isdigit()):
                raise GuestError(f"cannot read what swapinfo says: {line!r}")
            used_kib += int(words[2])
    return used_kib * 1024


def mounts(text: str) -> list[Mount]:
    r"""Return the mount table.  text: of `mount -p`, in the form of fstab(5), spaces as \040.

    Source: mount(8), fstab(5); recorded on 14.4.
    """
    found = []
    for line in text.splitlines():
        words = [_OCTAL.sub(lambda match: chr(int(match[1], 8)), word) for word in line.split()]
        if len(words) >= 3:
            found.append(Mount(*words[:3]))
    return found


def store_path(spec: str, table: Sequence[Mount]) -> str | None:
    """Return the directory of a datastore, None for one that holds no guests.

    spec: a directory, "zfs:DATASET", "iso:DIRECTORY" or "img:DIRECTORY".  A
    dataset is where it is mounted now.
    Source: vm-bhyve lib/vm-datastore, datastore::__resolve_path.
    """
    kind, colon, rest = spec.partition(":")
    if colon and kind in ("iso", "img"):
        return None
    if colon and kind == "zfs":
        return next((mount.directory for mount in table if mount.special == rest), None)
    return spec if spec.startswith("/") else None


def more_stores(config: Mapping[str, str], table: Sequence[Mount]) -> list[str]:
    """Return the directories of the datastores beside the default one.

    config: of vm_dir/.config/system.conf: datastore_list, and path_NAME each.
    Source: vm-bhyve lib/vm-datastore, datastore::get_guest.
    """
    found = []
    for name in config.get("datastore_list", "").split():
        path = store_path(config.get(f"path_{name}", ""), table)
        if name != "default" and path:
            found.append(path)
    return found


def vendor(model: str, vmx: str | None) -> str:
    """Return "intel", "amd", or the first word of another CPU's name, in lower case.

    model: hw.model.  vmx: hw.vmm.vmx.initialized, which is 1 where bhyve uses
    VT-x: it decides where the name, as a hypervisor below us may give it, does not.
    """
    lower = model.lower()
    for word in ("intel", "amd"):
        if re.search(rf"\b{word}\b", lower):
            return word
    if vmx == "1":
        return "intel"
    return (lower.split() or ["unknown"])[0]

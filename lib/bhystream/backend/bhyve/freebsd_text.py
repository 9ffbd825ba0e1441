"""Parsers of what programs and files of a FreeBSD host say: pure functions of text.

The formats were read in manual pages and in recorded output, named at each
function.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bhystream.errors import GuestError

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One line of the mount table.  special: a device, a dataset, or a word like "tmpfs"."""

    special: str
    directory: str
    fstype: str


def swap_used_bytes(text: str) -> int:
    """Return the bytes of swap in use.  text: the output of `swapinfo -k`.

    The output has a headline, then one line per device with the used KiB in
    the third column, and a line "Total" if there are two devices or more.
    Raises GuestError if the text cannot be read.
    Source: swapinfo(8), usr.sbin/pstat; recorded on FreeBSD 14.4.
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
    r"""Return the mount table.  text: the output of `mount -p`.

    The output has the form of fstab(5), with spaces in names as \040.
    Source: mount(8), fstab(5); recorded on FreeBSD 14.4.
    """
    found = []
    for line in text.splitlines():
        words = [_OCTAL.sub(lambda match: chr(int(match[1], 8)), word) for word in line.split()]
        if len(words) >= 3:
            found.append(Mount(*words[:3]))
    return found


def store_path(spec: str, table: Sequence[Mount]) -> str | None:
    """Return the directory of a datastore, None for a datastore without guests.

    spec: a directory, "zfs:DATASET", "iso:DIRECTORY" or "img:DIRECTORY".
    table: the mount table, which tells the directory of a dataset.
    Source: vm-bhyve lib/vm-datastore, datastore::__resolve_path.
    """
    kind, colon, rest = spec.partition(":")
    if colon and kind in ("iso", "img"):
        return None
    if colon and kind == "zfs":
        return next((mount.directory for mount in table if mount.special == rest), None)
    return spec if spec.startswith("/") else None


def more_stores(config: Mapping[str, str], table: Sequence[Mount]) -> list[str]:
    """Return the directories of all datastores but the default one.

    config: the keys of vm_dir/.config/system.conf: datastore_list, and
    path_NAME for each datastore.  table: the mount table.
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

    model: hw.model.  vmx: hw.vmm.vmx.initialized, which is 1 if bhyve uses
    VT-x.  vmx decides if model does not name the vendor, as under a hypervisor
    that gives the CPU another name.
    """
    lower = model.lower()
    for word in ("intel", "amd"):
        if re.search(rf"\b{word}\b", lower):
            return word
    if vmx == "1":
        return "intel"
    return (lower.split() or ["unknown"])[0]

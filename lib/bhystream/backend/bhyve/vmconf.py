"""vm-bhyve's files NAME.conf and system.conf, read by vm-bhyve's rules, and the disks in them.

A line counts if it begins with a lower-case letter.  The text from the first "#"
on is a comment, also within quotes.  Then spaces at the end are removed, then
every double quote; nothing else is special.  The key is the text before the
first "=".  If a key has several lines, the first line counts.  A line without
"=" is both key and value.  NULs are dropped: no value of a shell holds one.

Source: freebsd/vm-bhyve@89c21d0e, lib/vm-config, config::load(), config::get(),
config::core::load(); lib/vm-run, vm::bhyve_device_disks(), vm::get_disk_path(),
vm::bhyve_device_networking(), vm::uefi(); read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

MAX_CONF_BYTES = 256 << 10
# What travels of a NAME.conf, for people to read and to copy into another one: keys that say
# what the guest is, none that runs a command or names a file outside of the guest's directory.
_KEYS = re.compile(
    "loader|loader_timeout|cpu(_sockets|_cores|_threads)?|memory|wired_memory|utctime|uuid|hostbridge"
    "|network[0-9]{1,3}_(type|switch|mac|name)|disk[0-9]{1,3}_(type|name|dev|size)|xhci_mouse"
    "|graphics(_res|_vga|_wait|_listen)?|virt_random|debug|ahci_device_limit|sound|on_fault"
)
_TEXT = re.compile("[A-Za-z0-9 ,._:/@+-]{0,300}")
_MAX_KEYS = 100
_LINE = re.compile("[a-z]")
_NO = frozenset({"", "no", "false", "off", "0"})
_ZVOL = ("zvol", "sparse-zvol")
_ANYWHERE = "iscsi"


def parse(text: str) -> dict[str, str]:
    """Return the keys of a file with their values."""
    found: dict[str, str] = {}
    for line in text.replace("\0", "").split("\n"):
        if _LINE.match(line):
            kept = line.partition("#")[0].rstrip(" ").replace('"', "")
            key, equals, value = kept.partition("=")
            found.setdefault(key, value if equals else kept)
    return found


def shareable(conf: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys that say what a guest is, with values that are plain words.

    conf: from parse(), or out of a stream and not to be trusted.  Whoever copies the lines has
    read them: they name switches, and disks below the guest's directory.
    """
    plain = ((key, value) for key, value in conf.items() if _is_plain(key, value))
    return dict(islice(plain, _MAX_KEYS))


def _is_plain(key: str, value: Any) -> bool:
    if not isinstance(value, str) or not _KEYS.fullmatch(key) or not _TEXT.fullmatch(value):
        return False
    # A disk of another kind than a file or volume of the guest may be any device of the host.
    if key.endswith("_dev"):
        return value in ("file", *_ZVOL)
    return not key.endswith("_name") or ("/" not in value and ".." not in value)


def disks(conf: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each disk's name and kind, as in ("disk0.img", "file")."""
    number = 0
    while conf.get(f"disk{number}_name") and conf.get(f"disk{number}_type"):
        yield conf[f"disk{number}_name"], conf.get(f"disk{number}_dev", "")
        number += 1


def cards(conf: Mapping[str, str]) -> int:
    """Return how many network cards there are."""
    number = 0
    while conf.get(f"network{number}_type"):
        number += 1
    return number


def changes(
    conf: Mapping[str, str],
    directory: Path,
    had_disks: Sequence[str],
    had_cards: int,
    roms: tuple[str | None, str | None],
) -> list[str]:
    """Say how a .conf differs from a start, one line each.

    directory: the guest's.  had_disks: the paths of the guest's disks at the
    start, in the order of their slots.  had_cards: the number of its network
    cards at the start.  roms: the paths of its boot ROM and variables at the
    start.  What the .conf does not name is not compared.
    """
    out = []
    wanted = list(disks(conf))
    if wanted and len(wanted) != len(had_disks):
        out.append(f"it has {len(wanted)} disks, the last start had {len(had_disks)}")
    for number, ((name, kind), path) in enumerate(zip(wanted, had_disks, strict=False)):
        if not _is_at(name, kind, directory, path):
            out.append(f"its disk{number} is {name} ({kind or 'file'}), the last start had {path}")
    if cards(conf) and cards(conf) != had_cards:
        out.append(f"it has {cards(conf)} network cards, the last start had {had_cards}")
    if loader := conf.get("loader"):
        is_uefi = loader.partition("-")[0] == "uefi"
        if is_uefi != (roms[0] is not None):
            out.append(f"its loader is {loader}, the last start had boot ROM {roms[0] or 'none'}")
        elif is_uefi and (conf.get("uefi_vars", "").lower() not in _NO) != (roms[1] is not None):
            out.append(f"its uefi_vars has changed, the last start had {roms[1] or 'none'}")
    return out


def _is_at(name: str, kind: str, directory: Path, path: str) -> bool:
    """Say whether a disk of the .conf is at a path."""
    if kind == _ANYWHERE:
        return True
    if kind in _ZVOL:
        return path.startswith("/dev/zvol/") and path.endswith(f"/{directory.name}/{name}")
    wanted = name if kind in ("custom", "9p") else os.path.join(directory, name)
    return path == wanted or os.path.realpath(path) == os.path.realpath(wanted)

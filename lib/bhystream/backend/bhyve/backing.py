"""What stands behind a guest's disks and network cards, as far as its saved state depends on it.

    source        described()   each disk's and card's facts here -> CONFIG, "disks" and "nets"
                  missing()     the resources that are not there at all
    destination   reasons()     the facts of the resources lent there, compared with CONFIG's

A disk's facts are what bhyve finds when bhyve opens the disk, changed by the
guest's keys: "ro" makes any disk read-only, "sectorsize" gives the disk's
sectors, "nodelete" takes a device's deletion away.  The facts matter because
bhyve's restore trusts the saved state.  The capacity of a virtio-blk disk comes
from the state, so the guest would write beyond the end of a smaller disk.
bhyve compares whether the disk offers DISCARD, so a zvol is not restored on a
file that cannot delete.  A disk that may not be written is opened read-only,
and bhyve says nothing about it.

Source: usr.sbin/bhyve/block_if.c, blockif_open(); virtio.c, vi_pci_snapshot_consts();
pci_virtio_block.c, pci_vtblk_snapshot(); pci_ahci.c; FreeBSD 15.1, read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from bhystream.backend.bhyve.config import GuestConfig
from bhystream.backend.bhyve.host import Disk, Host
from bhystream.backend.files import Lent, identity_of
from bhystream.errors import Reason

_PATHS = ("bootrom", "bootvars")
# Values of a serial port's path.  Source: usr.sbin/bhyve/uart_backend.c, uart_tty_open().
_NO_PATHS = ("stdio",)
_TCP = "tcp="

Reasons = tuple[list[str], list[str]]

# The types of cards whose backend is no network interface of the host.
_WITHOUT_INTERFACE = ("netgraph", "slirp")
_NETGRAPH_NEEDS = ("path", "peerhook")  # Source: net_backend_netgraph.c, ng_init()


def described(host: Host, config: GuestConfig) -> dict[str, Any]:
    """Return the CONFIG section with the facts of what stands behind disks and cards here.

    A resource whose facts cannot be found out is left out: an image that was
    ejected, a backend that is no interface.  Raises what host.disk() and
    host.mtu() raise.
    """
    section = config.section
    disks: dict[str, Any] = {}
    nets: dict[str, Any] = {}
    for word, key in section["resources"].items():
        value = config.full.get(key)
        if value is None:
            continue
        if word.startswith("disk"):
            found = host.disk(value)
            if found is not None:
                disks[word] = _facts(section["keys"], key.removesuffix(".path"), found)
        elif word.startswith("net") and _is_interface(config.full, key, value):
            mtu = host.mtu(value)
            if mtu is not None:
                nets[word] = {"mtu": mtu}
    return {**section, "disks": disks, "nets": nets}


def disks(section: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, str]:
    """Return the paths of a guest's disks but CDs, by their words.

    section: a CONFIG section.  values: the path for each key that has one.
    """
    keys = section["keys"]
    return {
        word: values[key]
        for word, key in section["resources"].items()
        if word.startswith("disk") and key in values and not _is_cd(keys, key)
    }


def missing(host: Host, config: GuestConfig) -> list[Reason]:
    """Return one line for each resource that a running guest's bhyve cannot be using.

    bhyve has the guest's resources open, so a path that is relative, or that
    does not exist, is a fault of the configuration.  The image of a CD may be
    gone, because the CD may have been ejected.  Raises what host.has_tap() and
    host.disk() raise.
    """
    out = []
    for word, key in config.section["resources"].items():
        value = config.full.get(key)
        why = "" if value is None else _missing(host, config, word, key, value)
        if why:
            cure = f"give with -C the {key} that the guest was started with"
            out.append(Reason(f"{key}: {value!r}: {why}", cure))
    return out


def _missing(host: Host, config: GuestConfig, word: str, key: str, value: str) -> str:
    """Return why bhyve cannot be using a resource, "" if it can."""
    if word.startswith("net"):
        is_there = not _is_interface(config.full, key, value) or host.has_tap(value)
        return "" if is_there else "there is no such interface"
    if word not in _PATHS and not word.startswith(("disk", "com")):
        return ""
    if value in _NO_PATHS or value.startswith(_TCP):
        return ""
    is_cd = _is_cd(config.full, key)
    if not value.startswith("/"):
        return "it is no absolute path, and bhyve runs in /"
    if not (is_cd or os.path.exists(value) or _is_terminal(word, value)):
        return "there is no such file"
    if word.startswith("disk") and not is_cd and host.disk(value) is None:
        return "bhyve cannot open it as a disk"
    return ""


def _is_cd(keys: Mapping[str, str], key: str) -> bool:
    """Say whether a disk is a CD.  key: that of its path."""
    return keys.get(f"{key.removesuffix('.path')}.type") == "cd"


def _is_terminal(word: str, path: str) -> bool:
    """Say whether a path is a terminal's.  The host makes an nmdm(4) when bhyve opens it."""
    return word.startswith("com") and os.path.dirname(path) == "/dev"


def _facts(keys: Mapping[str, str], disk: str, found: Disk) -> dict[str, Any]:
    """Return a disk's facts as the guest sees them.  disk: the disk's key, without ".path"."""
    sectors = keys.get(f"{disk}.sectorsize")
    # bhyve obeys nodelete only on a device.
    keeps = found.is_device and keys.get(f"{disk}.nodelete") == "true"
    return {
        "mediasize": found.size_bytes,
        "sectorsize": int(sectors.partition("/")[0]) if sectors else found.sector_bytes,
        "candelete": found.can_delete and not keeps,
        "writable": found.is_writable and keys.get(f"{disk}.ro") != "true",
    }


def _is_interface(whole: Mapping[str, str], key: str, value: str) -> bool:
    """Say whether a card's backend is a network interface.  key: the backend's key."""
    kind = whole.get(f"{key.removesuffix('backend')}type", value)
    return not kind.startswith(_WITHOUT_INTERFACE)


def reasons(host: Host, section: Mapping[str, Any], values: Mapping[str, str]) -> Reasons:
    """Return why the resources lent here cannot stand in for the source's: (hard, soft).

    section: a validated CONFIG section, without what -x names.  values: those
    of resources.Resolved, which reports a resource that is not lent at all.
    Raises what host.has_tap(), host.disk() and host.mtu() raise.
    """
    hard: list[str] = []
    soft: list[str] = []
    lent = Lent()
    for word, key in section["resources"].items():
        value = values.get(key)
        if value is None:
            continue
        if word.startswith("disk"):
            more = _disk_reasons(host, section, word, value)
        elif word.startswith("net"):
            more = _net_reasons(host, section, values, word, value)
        elif word in _PATHS:
            more = _file_reasons(word, value)
        else:
            more = [], []  # bhyve makes com ports, and listens for vnc by itself
        if before := lent.again(
            word,
            _identities(values, key, value),
            is_written=_is_written(section["keys"], key),
        ):
            more[0].append(f"{word}: {value}: it is lent as {before} too")
        hard += more[0]
        soft += more[1]
    return hard, soft


def _identities(values: Mapping[str, str], key: str, value: str) -> list[str]:
    """Return a resource's identities, the same for every name; [] for what may be shared."""
    if key.endswith(".backend"):
        if _is_interface(values, key, value):
            return [f"interface {value}"]
        net = key.removesuffix(".backend")
        hook = [values[f"{net}.{need}"] for need in _NETGRAPH_NEEDS if f"{net}.{need}" in values]
        return [f"hook {' '.join(hook)}"] if hook else []
    return [identity_of(value)] if value.startswith("/") else []


def _is_written(keys: Mapping[str, str], key: str) -> bool:
    """Say whether the guest writes to what stands behind a resource."""
    is_read = _is_cd(keys, key) or keys.get(f"{key.removesuffix('.path')}.ro") == "true"
    return not is_read and key != "lpc.bootrom"


def _file_reasons(word: str, value: str) -> Reasons:
    if not os.path.exists(value):
        return [f"{word}: {value}: there is no such file"], []
    return ([] if os.path.isfile(value) else [f"{word}: {value}: it is no file"]), []


def _disk_reasons(host: Host, section: Mapping[str, Any], word: str, value: str) -> Reasons:
    keys, path_key = section["keys"], section["resources"][word]
    disk = path_key.removesuffix(".path")
    found = host.disk(value)
    if found is None:
        why = "bhyve cannot open it as a disk" if os.path.exists(value) else "there is no such file"
        return [f"{word}: {value}: {why}"], []
    here = _facts(keys, disk, found)
    hard: list[str] = []
    soft: list[str] = []
    if found.is_device and here["sectorsize"] % found.sector_bytes:
        hard.append(
            f"{word}: {value}: its sectors have {found.sector_bytes} bytes, the guest's"
            f" {here['sectorsize']}; bhyve refuses the disk: lend one with smaller sectors"
        )
    theirs = section.get("disks", {}).get(word)
    if theirs is not None:
        is_virtio = ".port." not in disk
        differences = _cd_differences if _is_cd(keys, path_key) else _differences
        for key, is_hard, cure in differences(theirs, here, is_virtio):
            a, b = json.dumps(theirs[key]), json.dumps(here[key])
            line = f"{word}: {key}: the source has {a}, {value} {b}; {cure}"
            (hard if is_hard else soft).append(line)
    return hard, soft


def _differences(
    theirs: Mapping[str, Any], here: Mapping[str, Any], is_virtio: bool
) -> Iterator[tuple[str, bool, str]]:
    """Yield (key, whether the reason is hard, what helps) for each fact that differs."""
    if here["mediasize"] < theirs["mediasize"]:
        yield "mediasize", True, "the guest would write beyond the end: lend a disk of that size"
    elif here["mediasize"] > theirs["mediasize"]:
        yield "mediasize", False, "it may be another disk; -f overrules"
    if here["sectorsize"] != theirs["sectorsize"]:
        yield "sectorsize", True, "the guest counts sectors of the source's size: lend such a disk"
    if here["candelete"] != theirs["candelete"]:
        if is_virtio:
            yield (
                "candelete",
                True,
                "bhyve's restore refuses that: lend a file for a file, a zvol for a zvol",
            )
        else:
            yield "candelete", False, "the guest has found the source's value; -f overrules"
    if here["writable"] != theirs["writable"]:
        if theirs["writable"]:
            yield "writable", True, "the guest's writes would fail: lend a writable disk"
        else:
            yield "writable", False, "the guest could write where it could not; -f overrules"


def _cd_differences(
    theirs: Mapping[str, Any], here: Mapping[str, Any], is_virtio: bool
) -> Iterator[tuple[str, bool, str]]:
    """Do as _differences() for a CD: the guest never writes to a CD, and asks for its size anew."""
    if here["mediasize"] != theirs["mediasize"]:
        yield "mediasize", False, "it is another image; -f overrules"


def _net_reasons(
    host: Host, section: Mapping[str, Any], values: Mapping[str, str], word: str, value: str
) -> Reasons:
    key = section["resources"][word]
    net = key.removesuffix(".backend")
    if not _is_interface(values, key, value):
        kind = values.get(f"{net}.type", value)
        needs = _NETGRAPH_NEEDS if kind.startswith("netgraph") else ()
        return [
            f"{word}: netgraph needs a {need}: no -o {net}.{need}= is given"
            for need in needs
            if f"{net}.{need}" not in values
        ], []
    if not host.has_tap(value):
        return [f"{word}: {value}: there is no such interface"], []
    theirs = section.get("nets", {}).get(word)
    if theirs is None or f"{net}.mtu" not in section["keys"]:
        return [], []  # bhyve told the guest no MTU, so the guest relies on none
    mtu = host.mtu(value)
    if mtu is None or mtu == theirs["mtu"]:
        return [], []
    cure = f"longer packets are lost: ifconfig {value} mtu {theirs['mtu']}, or -f"
    return [], [f"{word}: mtu: the source has {theirs['mtu']}, {value} {mtu}; {cure}"]

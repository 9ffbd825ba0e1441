"""The check that the devices of a running QEMU are still those of its argv.

argv no longer describes a guest whose devices were plugged or unplugged since
the start, and QEMU would load the guest's state into other hardware without complaint.

Source: qemu/qemu softmmu/qdev-monitor.c: a -device with an id is below
/machine/peripheral, one without an id below /machine/peripheral-anon.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from bhystream.backend.qemu.devices import driver_of
from bhystream.backend.qemu.qmp import CommandError, Qmp
from bhystream.backend.refusals import Refusals
from bhystream.errors import Reason

_CURE = "restart QEMU with a command line that names the devices as they are now"
# Properties that tell a device from another one of its kind, if argv names them.
# devices.py compares the drive.
_TOLD_BY = ("netdev", "chardev", "mac", "serial", "addr", "bus")


def check_plugged(qmp: Qmp, config: Mapping[str, Any]) -> None:
    """Raise IncompatibleError if devices were plugged in, unplugged or exchanged after the start.

    config: made of QEMU's argv.  The error names the devices.
    """
    against = Refusals(qmp.who)
    named = {d["props"]["id"]: d for d in config["devices"] if "id" in d["props"]}
    here = dict(_children(qmp, "/machine/peripheral"))
    for word, idents in (
        ("plugged in", here.keys() - named.keys()),
        ("unplugged", named.keys() - here.keys()),
    ):
        against.extend(
            _reason(f"device {each} was {word} after the start") for each in sorted(idents)
        )
    for ident, device in sorted(named.items()):
        if ident not in here:
            continue
        if here[ident] == device["driver"]:
            against.extend(_changed(qmp, ident, device["props"]))
        else:
            now, then = here[ident], device["driver"]
            against.extend([_reason(f"device {ident} is a {now} now, not the {then} of the start")])
    anonymous = Counter(d["driver"] for d in config["devices"] if "id" not in d["props"])
    anonymous[driver_of("virtio-blk")] += sum(d["if"] == "virtio" for d in config["disks"])
    found = Counter(kind for _, kind in _children(qmp, "/machine/peripheral-anon"))
    for word, kinds in (("plugged in", found - anonymous), ("unplugged", anonymous - found)):
        against.extend(
            _reason(f"a {each} without an id was {word} after the start") for each in sorted(kinds)
        )
    if qmp.ask("query-cpus-fast", len, doing="examine the vCPUs") != config["smp"]["cpus"]:
        against.extend([_reason("vCPUs were plugged in or unplugged after the start")])
    if refused := against.merged():
        raise refused


def _reason(why: str) -> Reason:
    return Reason(why, _CURE)


def _children(qmp: Qmp, path: str) -> list[tuple[str, str]]:
    """Return (name, type) of each object right below a path of QOM."""

    def made(items: Any) -> list[tuple[str, str]]:
        return [
            (str(item["name"]), str(item["type"])[len("child<") : -1])
            for item in items
            if str(item["type"]).startswith("child<")
        ]

    return qmp.ask("qom-list", made, {"path": path}, doing="examine the devices")


def _changed(qmp: Qmp, ident: str, props: Mapping[str, str]) -> Iterator[Reason]:
    """Yield a reason for each property that tells a device from the one of the start."""
    for key in _TOLD_BY:
        if key not in props:
            continue
        now = _prop(qmp, ident, key)
        if now is not None and _plain(key, now) != _plain(key, props[key]):
            yield _reason(
                f"device {ident} is another one than at the start:"
                f" {key} was {props[key]}, is {now or 'nothing'}"
            )


def _prop(qmp: Qmp, ident: str, key: str) -> str | None:
    """Return a property as text, None if QEMU does not tell it."""
    name = {"bus": "parent_bus", "addr": "legacy-addr"}.get(key, key)
    try:
        value = qmp.execute(
            "qom-get",
            {"path": f"/machine/peripheral/{ident}", "property": name},
            doing="examine a device",
        )
    except CommandError:
        return None
    return str(value).rsplit("/", 1)[-1] if key == "bus" else str(value)


def _plain(key: str, value: str) -> str:
    """Return a property's value in one spelling: two spellings of one value become equal."""
    if key == "mac":
        return value.lower().replace("-", ":")
    if key == "addr":
        slot, _, function = value.partition(".")
        try:
            return f"{int(slot, 16)}.{int(function or '0', 16)}"
        except ValueError:
            return value
    return value

"""What only QMP knows of a running QEMU, and what must hold before a move.

argv says what was asked for; this is what came of it: the machine version
behind an alias, the accelerator of a list, the format of a probed image, a
device that was plugged in later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bhystream.backend.qemu.qmp import CommandError, Qmp
from bhystream.errors import GuestError, IncompatibleError


@dataclass(frozen=True)
class Disk:
    """One block device: its image format and its size as the guest sees it."""

    format: str
    size_bytes: int


@dataclass(frozen=True)
class Facts:
    """Of one QEMU.  An empty field is unknown, and argv alone decides.

    machine: the pinned type, "pc-q35-7.2".  aliases: {"q35": "pc-q35-7.2"}.
    disks: by drive id or node name.
    """

    arch: str = "x86_64"
    machine: str = ""
    accel: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    disks: Mapping[str, Disk] = field(default_factory=dict)


def _disk(inserted: Mapping[str, Any]) -> Disk:
    image = inserted.get("image", {})
    return Disk(str(inserted.get("drv", "")), int(image.get("virtual-size", 0)))


def gather(qmp: Qmp) -> Facts:
    """Ask a QEMU for its facts.  Raises GuestError."""
    doing = "examine"
    disks: dict[str, Disk] = {}
    for node in qmp.execute("query-named-block-nodes", {"flat": True}, doing=doing):
        disks[str(node.get("node-name", ""))] = _disk(node)
    for device in qmp.execute("query-block", doing=doing):
        if device.get("inserted") and device.get("device"):
            disks[str(device["device"])] = _disk(device["inserted"])
    machine = qmp.execute("qom-get", {"path": "/machine", "property": "type"}, doing=doing)
    kvm = qmp.execute("query-kvm", doing=doing)
    return Facts(
        arch=str(qmp.execute("query-target", doing=doing)["arch"]),
        machine=str(machine).removesuffix("-machine"),
        accel="kvm" if kvm["enabled"] else "tcg",
        disks=disks,
    )


@dataclass(frozen=True)
class Backend:
    """The one memory backend of a guest: its id and its size in bytes."""

    ident: str
    size_bytes: int


CURE = (
    "start QEMU with -object memory-backend-file,id=ram0,share=on,size=...,mem-path=..."
    " -machine ...,memory-backend=ram0"
)


def memory_backend(qmp: Qmp) -> Backend:
    """Return the guest's memory backend.

    Raises IncompatibleError unless it is exactly one, shared, used as the
    machine's memory, all of the guest's memory and from the file's start.
    """
    doing = "examine memory"
    backends = qmp.execute("query-memdev", doing=doing)
    if len(backends) != 1:
        names = ", ".join(str(b.get("id")) for b in backends) or "none"
        raise IncompatibleError(
            f"{qmp.who}: memory backends: {names}; exactly one is needed", hint=CURE
        )
    ident, size_bytes = str(backends[0].get("id", "")), int(backends[0]["size"])
    if not backends[0].get("share"):
        raise IncompatibleError(f"{qmp.who}: memory backend {ident} is not share=on", hint=CURE)
    used = qmp.execute("qom-get", {"path": "/machine", "property": "memory-backend"}, doing=doing)
    if str(used).rsplit("/", 1)[-1] != ident:
        raise IncompatibleError(
            f"{qmp.who}: memory backend {ident} is not the machine's memory", hint=CURE
        )
    total = qmp.execute("query-memory-size-summary", doing=doing)
    if total["base-memory"] != size_bytes or total.get("plugged-memory", 0):
        raise IncompatibleError(
            f"{qmp.who}: memory backend {ident} is not all of the guest's memory", hint=CURE
        )
    try:
        offset = qmp.execute(
            "qom-get", {"path": f"/objects/{ident}", "property": "offset"}, doing=doing
        )
    except CommandError:
        offset = 0  # the property came with QEMU 8.1
    if offset:
        raise IncompatibleError(f"{qmp.who}: memory backend {ident} has offset={offset}", hint=CURE)
    return Backend(ident, size_bytes)


def check_plugged(qmp: Qmp, config: Mapping[str, Any]) -> None:
    """Refuse devices that were plugged or unplugged after the start.

    argv no longer describes such a guest, and QEMU would load its state into
    other hardware without complaint.  Source: qemu/qemu softmmu/qdev-monitor.c:
    -device with an id lives below /machine/peripheral, without below
    /machine/peripheral-anon.
    """
    doing = "examine devices"
    named = {d["props"]["id"] for d in config["devices"] if "id" in d["props"]}
    here = {
        str(item["name"])
        for item in qmp.execute("qom-list", {"path": "/machine/peripheral"}, doing=doing)
        if str(item["type"]).startswith("child<")
    }
    for word, idents in (("plugged in", here - named), ("unplugged", named - here)):
        if idents:
            raise IncompatibleError(f"{qmp.who}: device {min(idents)} was {word} after the start")
    anonymous = sum("id" not in d["props"] for d in config["devices"])
    anonymous += sum(d["if"] == "virtio" for d in config["disks"])
    found = [
        item
        for item in qmp.execute("qom-list", {"path": "/machine/peripheral-anon"}, doing=doing)
        if str(item["type"]).startswith("child<")
    ]
    if len(found) != anonymous:
        raise IncompatibleError(
            f"{qmp.who}: devices without an id were plugged or unplugged after the start"
        )
    if len(qmp.execute("query-cpus-fast", doing=doing)) != config["smp"]["cpus"]:
        raise IncompatibleError(f"{qmp.who}: vCPUs were plugged in after the start")


def status(qmp: Qmp) -> str:
    """Return the run state: "running", "paused", "inmigrate", ..."""
    reply = qmp.execute("query-status", doing="query its state")
    if not isinstance(reply, dict) or not isinstance(reply.get("status"), str):
        raise GuestError(f"{qmp.who}: cannot query its state: odd answer")
    return str(reply["status"])

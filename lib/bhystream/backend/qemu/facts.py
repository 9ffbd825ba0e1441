"""What only QMP knows of a running QEMU, and what must hold before a move.

argv says what the operator asked for, QMP what QEMU made of it: the machine
version behind an alias, the accelerator chosen from a list, and the image in
each drive now (graph.py).  plugged.py checks that the devices are still argv's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bhystream.backend.qemu import graph
from bhystream.backend.qemu.graph import Drive
from bhystream.backend.qemu.process import working_directory
from bhystream.backend.qemu.qmp import CommandError, Qmp
from bhystream.errors import GuestError, IncompatibleError


@dataclass(frozen=True)
class Facts:
    """The facts of one QEMU.  If a field is empty, the fact is unknown, and argv alone decides.

    machine: the pinned type, "pc-q35-7.2".  aliases: {"q35": "pc-q35-7.2"}.
    drives: with their present images; None if QEMU was not asked.  directory:
    the working directory, from which QEMU's relative paths start.
    """

    arch: str = "x86_64"
    machine: str = ""
    accel: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    drives: tuple[Drive, ...] | None = None
    directory: str = ""


def gather(qmp: Qmp) -> Facts:
    """Ask a QEMU for its facts.  Raises GuestError, or AccessError for a QEMU not ours to see."""
    doing = "examine"
    directory = working_directory(qmp.pid)
    machine = qmp.execute("qom-get", {"path": "/machine", "property": "type"}, doing=doing)
    has_kvm = qmp.ask("query-kvm", lambda reply: bool(reply["enabled"]), doing=doing)
    return Facts(
        arch=qmp.ask("query-target", lambda reply: str(reply["arch"]), doing=doing),
        machine=str(machine).removesuffix("-machine"),
        accel="kvm" if has_kvm else "tcg",
        drives=graph.drives(qmp, directory),
        directory=directory,
    )


@dataclass(frozen=True)
class Backend:
    """A memory backend of a guest: its id and its size in bytes."""

    ident: str
    size_bytes: int
    is_shared: bool = True


CURE = (
    "start QEMU with -object memory-backend-file,id=ram0,share=on,size=...,mem-path=..."
    " -machine ...,memory-backend=ram0"
)


def memory_backend(qmp: Qmp) -> Backend:
    """Return the guest's memory backend.

    Raises IncompatibleError unless there is exactly one memory backend, which is
    shared, is the machine's memory, holds all of the guest's memory and begins
    at the start of its file.  Raises GuestError if QEMU fails.
    """
    doing = "examine memory"
    backends = qmp.ask("query-memdev", _backends, doing=doing)
    if len(backends) != 1:
        names = ", ".join(each.ident for each in backends) or "none"
        raise IncompatibleError(
            f"{qmp.who}: memory backends: {names}, and exactly one is needed", hint=CURE
        )
    ident, size_bytes = backends[0].ident, backends[0].size_bytes
    if not backends[0].is_shared:
        raise IncompatibleError(f"{qmp.who}: memory backend {ident} is not share=on", hint=CURE)
    used = qmp.execute("qom-get", {"path": "/machine", "property": "memory-backend"}, doing=doing)
    if str(used).rsplit("/", 1)[-1] != ident:
        raise IncompatibleError(
            f"{qmp.who}: memory backend {ident} is not the machine's memory", hint=CURE
        )
    base_bytes, plugged_bytes = qmp.ask(
        "query-memory-size-summary",
        lambda reply: (reply["base-memory"], reply.get("plugged-memory", 0)),
        doing=doing,
    )
    if base_bytes != size_bytes or plugged_bytes:
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
    return backends[0]


def _backends(reply: Any) -> list[Backend]:
    return [
        Backend(str(each.get("id", "")), int(each["size"]), bool(each.get("share")))
        for each in reply
    ]


def status(qmp: Qmp) -> str:
    """Return QEMU's run state: "running", "paused", "inmigrate", ...  Raises GuestError."""
    reply = qmp.execute("query-status", doing="query its state")
    if not isinstance(reply, dict) or not isinstance(reply.get("status"), str):
        raise GuestError(f"{qmp.who}: cannot query its state: QEMU's answer holds no status")
    return str(reply["status"])

"""A running QEMU guest that was opened: its identity, its configuration and its memory.

open_guest() either returns all three, or refuses the guest and leaves nothing
open.  It changes nothing in the guest.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bhystream.backend.process import Identity, identify
from bhystream.backend.qemu import facts, graph, migration, ram, supervisors
from bhystream.backend.qemu.config import label, reduce_argv
from bhystream.backend.qemu.plugged import check_plugged
from bhystream.backend.qemu.process import read_argv
from bhystream.backend.qemu.qmp import Qmp
from bhystream.errors import GuestError, IncompatibleError
from bhystream.guest import PAGE_BYTES, Layout, Segment
from bhystream.memory.mapping import unmap


@dataclass(frozen=True)
class Described:
    """A guest's configuration, and the images in its drives, at one moment.

    images: the paths, as QEMU sees them, of the raw images of disks, by the disks' keys.
    """

    config: dict[str, Any]
    drives: tuple[graph.Drive, ...] | None
    images: dict[str, str]


@dataclass(frozen=True)
class Program:
    """A QEMU that can be asked for its guest's configuration.

    argv: QEMU's arguments, without the program.  fallback: the guest's name if
    argv gives no usable name.  force: accept a guest that writes to other images
    than argv names.
    """

    qmp: Qmp
    argv: list[str]
    fallback: str
    force: bool

    def describe(self, changes: list[str]) -> Described:
        """Return the guest's configuration and drives as they are now.

        changes: as for reduce_argv(); filled with force only.  Raises GuestError,
        IncompatibleError or AccessError.
        """
        graph.refuse_jobs(self.qmp)
        found = facts.gather(self.qmp)
        images: dict[str, str] = {}
        allowed = changes if self.force else None
        config = reduce_argv(self.argv, found, self.fallback, allowed, images)
        check_plugged(self.qmp, config)
        return Described(config, found.drives, images)


@dataclass(frozen=True)
class Ram:
    """The file behind a guest's memory, open to read; views: its one mapping, until close()."""

    ident: str
    size_bytes: int
    fd: int
    views: list[memoryview]
    _opened: contextlib.ExitStack = field(repr=False)

    @property
    def layout(self) -> Layout:
        """Return the segments of the LAYOUT section."""
        return Layout((Segment(self.ident, None, self.size_bytes // PAGE_BYTES),))

    def close(self) -> None:
        """Release mapping and descriptor.  May be called twice.

        A view that the engine still holds keeps the mapping alive until the
        engine drops the view; that is no error.
        """
        self.views.clear()
        self._opened.close()


@dataclass(frozen=True)
class Opened:
    """One open guest.  The connection and the memory are ours until close().

    settings: the migration's, as they were found, to be put back.  changes: one
    line for each disk with another image than argv names.
    """

    qmp: Qmp
    identity: Identity
    settings: Mapping[str, Any]
    program: Program
    described: Described
    changes: list[str]
    ram: Ram

    @property
    def name(self) -> str:
        """Return the guest's name: from -name, else from the socket's path."""
        return str(self.described.config["name"])

    def close(self) -> None:
        """Release connection, descriptor and mapping; the guest stays as it is."""
        self.qmp.close()
        self.ram.close()


def open_guest(qmp_path: str, *, force: bool, on_wait: Callable[[], None]) -> Opened:
    """Open a guest.  Raises GuestError, IncompatibleError or AccessError.

    force, on_wait: what they mean for QemuSource().
    """
    fallback = _name_of_path(qmp_path)
    with contextlib.ExitStack() as undo:
        qmp = Qmp(os.path.abspath(qmp_path), f"guest {fallback}", on_wait)
        undo.callback(qmp.close)
        identity = identify(qmp.pid, "QEMU")
        _require_running(qmp)
        settings = _settings(qmp)
        backend = facts.memory_backend(qmp)
        program = Program(qmp, read_argv(qmp.pid)[1:], fallback, force)
        changes: list[str] = []
        described = program.describe(changes)
        qmp.who = f"guest {described.config['name']}"
        memory = _open_ram(qmp, backend.ident, backend.size_bytes)
        undo.callback(memory.close)
        if not force and (found := supervisors.reasons(identity.pid)):
            raise IncompatibleError(f"{qmp.who}: {found[0]}")
        undo.pop_all()
    return Opened(qmp, identity, settings, program, described, changes, memory)


def _require_running(qmp: Qmp) -> None:
    state = facts.status(qmp)
    if state != "running":
        raise GuestError(
            f"{qmp.who}: cannot send it: it is '{state}', not running", hint=_cure(state)
        )


def _settings(qmp: Qmp) -> dict[str, Any]:
    """Return the migration settings that we change; refuse a guest that another tool set up."""
    found = migration.capabilities(qmp)
    migration.refuse_unusual(qmp, found)
    return {
        "capabilities": {"x-ignore-shared": found["x-ignore-shared"]},
        "parameters": {"max-bandwidth": migration.parameter(qmp, "max-bandwidth")},
    }


def _open_ram(qmp: Qmp, ident: str, size_bytes: int) -> Ram:
    """Open the file behind the guest's memory, and map it.  Raises GuestError, AccessError."""
    with contextlib.ExitStack() as opened:
        fd = ram.open_ram(qmp.pid, size_bytes, os.O_RDONLY)
        opened.callback(os.close, fd)
        mapping = ram.map_ram(fd, size_bytes, qmp.who, mmap.PROT_READ)
        opened.callback(unmap, [view := memoryview(mapping)], [mapping])
        return Ram(ident, size_bytes, fd, [view], opened.pop_all())


def _name_of_path(path: str) -> str:
    """Return a guest name made of the socket's: "web1" of "/run/web1.qmp"."""
    return label(os.path.basename(path).split(".")[0]) or "guest"


def _cure(state: str) -> str:
    if state == "paused":
        return "let it run first (QMP: cont)"
    if state == "inmigrate":
        return "it waits for a stream: give its socket to bhyrecv"
    if state == "postmigrate":
        return "it was moved already: bhysend -l, then --resume or --discard"
    return ""

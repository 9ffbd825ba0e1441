"""A running QEMU guest that was opened: its identity, its configuration and its memory.

open_guest() either returns all three, or refuses the guest and leaves nothing
open.  It changes nothing in the guest.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bhystream.backend.process import Identity, identify
from bhystream.backend.qemu import facts, graph, migration, ram, supervisors
from bhystream.backend.qemu.config import label, reduce_argv
from bhystream.backend.qemu.plugged import check_plugged
from bhystream.backend.qemu.process import read_argv
from bhystream.backend.qemu.qmp import Qmp
from bhystream.backend.refusals import Refusals
from bhystream.errors import BhyError, GuestError, InternalError, Interrupted
from bhystream.guest import PAGE_BYTES, Layout, Segment
from bhystream.memory.mapping import unmap


@dataclass(frozen=True)
class Described:
    """A guest's configuration, and the images in its drives, at one moment.

    images: the paths, as QEMU sees them, of the images in the disks, by the disks' keys.
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
        return self.read(changes)

    def read(self, changes: list[str], *, has_jobs: bool = False) -> Described:
        """Do as describe(), whatever jobs work on the disks.

        has_jobs: leave the images in the drives out; a job may have put others there.
        """
        found = facts.gather(self.qmp)
        if has_jobs:
            found = replace(found, drives=None)
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
        program = Program(qmp, read_argv(qmp.pid)[1:], fallback, force)
        changes: list[str] = []
        settings, described, memory = _examine(program, identity, changes, undo)
        undo.pop_all()
    return Opened(qmp, identity, settings, program, described, changes, memory)


def _examine(
    program: Program, identity: Identity, changes: list[str], undo: contextlib.ExitStack
) -> tuple[dict[str, Any], Described, Ram]:
    """Return the migration settings, the guest, and its memory, which undo closes.

    changes: as for describe().  Raises one error that states everything that speaks against
    the guest's move, as far as QEMU answers.
    """
    against = Refusals(program.qmp.who)
    settings, described, memory = None, None, None
    try:
        settings, described, memory = _asked(program, against, changes, undo)
        against.who = program.qmp.who
        if not program.force:
            against.extend(supervisors.reasons(identity.pid))
    except BhyError as error:
        if not against.reasons or isinstance(error, Interrupted):
            raise
        against.add(error)
    if refused := against.merged():
        raise refused
    if settings is None or described is None or memory is None:
        raise InternalError("a guest was refused without a reason")
    return settings, described, memory


def _asked(
    program: Program, against: Refusals, changes: list[str], undo: contextlib.ExitStack
) -> tuple[dict[str, Any] | None, Described | None, Ram | None]:
    """Return what _examine() returns, None for what is refused.

    against: gets the reasons.  Raises the error after which nothing can be found out.
    """
    qmp, settings, described, memory, backend = program.qmp, None, None, None, None
    state = facts.status(qmp)
    if state != "running":
        what = f"{qmp.who}: cannot send it: it is '{state}', not running"
        against.add(GuestError(what, _cure(state)))
    with against.collecting(GuestError):
        settings = _settings(qmp)
    with against.collecting():
        backend = facts.memory_backend(qmp)
    busy = list(graph.users(qmp))
    for error in busy:
        against.add(error)
    with against.collecting(GuestError):
        described = program.read(changes, has_jobs=bool(busy))
        qmp.who = f"guest {described.config['name']}"
    if backend is None:
        against.keep_first(facts.CURE)  # QEMU and its command line say the same of the memory
    if backend is not None:
        memory = _open_ram(qmp, backend.ident, backend.size_bytes)
        undo.callback(memory.close)
    return settings, described, memory


def _settings(qmp: Qmp) -> dict[str, Any]:
    """Return the migration settings that we change; refuse a guest that another tool set up.

    Raises what refuse_unusual() raises.
    """
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

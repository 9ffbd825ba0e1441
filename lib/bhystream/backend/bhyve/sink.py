"""BhyveSink: a bhyve guest being rebuilt, as base.Sink.

            early (with a plan)                   late (without one)           left loaded (-u)
    check   judges the guest; changes nothing
    open    makes FILE a hole, FILE.meta the      makes FILE a hole            makes FILE a hole,
            plan; starts bhyve -r, which waits                                 on disk
    pages   go into the VM's memory               go into FILE                 go into FILE
    load    writes FILE.kern; loads the FPU       writes the other files;      writes the other
                                                  starts bhyve -r, which       files
                                                  waits; then as early
    start   writes the last page: bhyve restores the guest and runs it

So in both ways READY means that the guest's memory is in its VM, its devices
exist, and only the release is left.  restore.py says how bhyve is made to wait.
Until bhyve's socket appears the vCPUs never ran, and a failure undoes everything.

The early way exists because the pause then has no part that grows with the
memory.  The late way is taken if the disks may have to come first (bhysend -p),
or if nobody waits for the guest (-k).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bhystream import durable
from bhystream.backend.base import Target
from bhystream.backend.bhyve import (
    backing,
    clocks,
    identity,
    ownconf,
    powerbutton,
    snapshot,
    vmconf,
)
from bhystream.backend.bhyve.datastore import find
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.layout import memory_spans
from bhystream.backend.bhyve.loaded import (
    keep_files,
    note_configuration,
    note_running,
    start_waiting,
)
from bhystream.backend.bhyve.locks import HELD
from bhystream.backend.bhyve.network import announce
from bhystream.backend.bhyve.resources import Wishes
from bhystream.backend.bhyve.restore import supervision
from bhystream.backend.bhyve.restoredguest import RestoredGuest
from bhystream.backend.bhyve.validate import validate
from bhystream.backend.bhyve.waitingrestore import WaitingRestore
from bhystream.backend.bhyve.wanted import Wanted
from bhystream.errors import (
    BhyError,
    IncompatibleError,
    InternalError,
    Interrupted,
    from_oserror,
)
from bhystream.guest import Head, Json, State
from bhystream.memory.target import FileTarget, MappedTarget


@dataclass(frozen=True)
class Checked:
    """A guest that this host can take."""

    guest: RestoredGuest

    def record(self) -> Json:
        """Return the record from which open_loaded() finds the guest."""
        return self.guest.to_json()

    def waiting(self) -> WaitingRestore:
        """Return the guest's bhyve.  Raises InternalError if it was not started yet."""
        raise InternalError("BhyveSink: there is no bhyve to be let go")


@dataclass(frozen=True)
class Waiting(Checked):
    """A guest whose bhyve waits for the last page."""

    restore: WaitingRestore

    def record(self) -> Json:
        """Return the record from which open_loaded() finds the guest."""
        return self.guest.to_json(self.restore.started)

    def waiting(self) -> WaitingRestore:
        """Return the guest's bhyve."""
        return self.restore


class BhyveSink:
    """A guest being built.

    may_have_run, notices, on_wait: as in base.Sink.
    """

    def __init__(
        self,
        host: Host,
        name: str,
        resources: Mapping[str, str],
        dropped: Sequence[str],
        base: Path,
        id_: str,
        *,
        force: bool,
        is_kept: bool = False,
        unstarted: bool = False,
        below: Sequence[str] = (),
    ) -> None:
        """Prepare; change nothing on the host.

        name: the guest's name on this host.  resources: the -o words.  dropped:
        the -x keys.  base: the state directory.  id_: the stream id.  is_kept:
        the stream was kept (-k), so it has no plan.  unstarted: leave_paused()
        will be called, not start().  below: the directories in which the disks have to
        lie, () for any.  Raises UsageError if a word or key is wrong.
        """
        self.may_have_run = False
        self.notices: list[str] = []
        self.on_wait: Callable[[], None] = lambda: None
        self._wanted = Wanted(
            host,
            name,
            Wishes.parse(resources, dropped),
            base,
            id_,
            is_kept=is_kept,
            is_unstarted=unstarted,
            below=below,
            manager=find(host.datastores(), name, socket.gethostname()),
        )
        self._force = force
        self._stage: Checked | None = None
        self._source: Json = {}
        self._section: Json = {}
        self._disks: Mapping[str, str] = {}
        self._is_supervised = False
        self._clocks: clocks.Saved | None = None
        # load() closes what is open; abort() closes that, and undoes what was made.
        self._opened = contextlib.ExitStack()
        self._made = contextlib.ExitStack()

    # ---- the verdict

    def check(self, head: Head) -> list[str]:
        """Return the reasons against the guest; remember the head if there are none."""
        kind, host = head.host.get("hypervisor"), self._wanted.host
        if kind != host.kind:
            return [f"hypervisor: the guest runs under {ascii(kind)[:40]}, not {host.kind}"]
        try:
            section = validate(head.config)
            hard, soft, guest = self._wanted.judge(head, section)
        except Interrupted:  # of on_wait
            raise
        except (BhyError, OSError) as error:
            return [str(error)]
        reasons = hard if self._force else hard + soft
        if not reasons:
            self._stage = Checked(guest)
            self._source, self._section = head.host, section
            self._disks = backing.disks(section, guest.keys)
        return reasons

    @property
    def _checked(self) -> Checked:
        """Return the guest that check() has accepted.  Raises InternalError if there is none."""
        if self._stage is None:
            raise InternalError("BhyveSink: check() was not called, or refused the guest")
        return self._stage

    def disks(self) -> Mapping[str, str]:
        """Return the paths of the disks here, by their words."""
        return self._disks

    def description(self, head: Head) -> Sequence[str]:
        """Return the source's NAME.conf, if vm-bhyve is here and does not know the guest."""
        sent = head.host.get(identity.CONF)
        if self._wanted.manager or not isinstance(sent, dict):
            return ()
        stores = self._wanted.host.datastores()
        if not stores:
            return ()
        conf = vmconf.shareable(sent)
        name = self._wanted.name
        told = (
            f"vm-bhyve does not know it here; this is its {name}.conf at the source, for"
            f" {stores[0] / name / name}.conf with the disks and switches of this host:"
        )
        return [told, *(f'{key}="{value}"' for key, value in conf.items())] if conf else ()

    # ---- open

    def late_reasons(self) -> list[str]:
        """Return why there is no room for the memory in a file.

        For a kept stream check() has found that out already.
        """
        is_asked = not self._wanted.is_kept and not self._force
        return self._wanted.room(self._checked.guest, is_late=True) if is_asked else []

    def open(self, plan: bytes) -> Sequence[Target]:
        """Make the files; with a plan, also start the guest's bhyve, which then waits.

        Raises IncompatibleError if there is no room, BhyError if something cannot be made.
        """
        guest = self._checked.guest
        planned = snapshot.parse(plan) if plan and not self._wanted.is_unstarted else None
        if planned is None and (why := self.late_reasons()):
            raise IncompatibleError(f"guest {guest.name}: {why[0]}")
        directory = Path(guest.kept).parent
        try:
            durable.make_directory(directory)
        except OSError as error:
            raise from_oserror(error, f"make {directory}") from None
        self._wanted.remove_leftovers(guest)
        self._wanted.note_directory(guest)
        guest.make_staging()
        self._made.callback(guest.forget_started)
        self._made.callback(guest.remove)
        fd = self._make_memory_file(guest)
        if planned is None:
            spans = memory_spans(guest.memory_bytes)
            return [FileTarget(fd, offset) for _, offset, _ in spans]
        self._opened.close()
        _write(guest.files.meta, plan)
        restore = self._hold(guest, planned.kern_bytes)
        return [MappedTarget(view) for view in restore.memory]

    def _wait(self) -> None:
        # on_wait is set, and set again, after this object is made.
        self.on_wait()

    def _make_memory_file(self, guest: RestoredGuest) -> int:
        """Make FILE as one hole of the guest's size; return its descriptor, which load() closes."""
        path = guest.files.memory
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._opened.callback(os.close, fd)
            os.ftruncate(fd, guest.memory_bytes)
        except OSError as error:
            raise from_oserror(error, f"make {path}") from None
        return fd

    def _hold(self, guest: RestoredGuest, kern_bytes: int) -> WaitingRestore:
        """Start the guest's bhyve; return it when it waits for the last page."""
        vm_bhyve = supervision(self._wanted.host, guest, self._adapt)
        self._is_supervised = vm_bhyve is not None
        restore = start_waiting(
            self._wanted.host, guest, guest.files, kern_bytes, self._wait, vm_bhyve
        )
        self._made.callback(restore.undo)
        self._stage = Waiting(restore.guest, restore)
        return restore

    def _adapt(self, words: Sequence[str]) -> RestoredGuest:
        """Return the guest with the resources for which vm-bhyve calls bhyve."""
        guest = self._wanted.adapted(self._checked.guest, self._section, words, force=self._force)
        self._disks = backing.disks(self._section, guest.keys)
        return guest

    # ---- load and start

    def require_alive(self) -> None:
        """Raise GuestError if the guest's bhyve was started and has ended."""
        if isinstance(self._stage, Waiting):
            self._stage.restore.require_held()

    def load(self, states: Sequence[State]) -> None:
        """Complete the guest: its bhyve then waits, and lacks only the last page.

        With -u, write the files instead.  Raises BhyError if that fails.
        """
        stage = self._checked
        self._opened.close()
        if self._wanted.is_unstarted:
            keep_files(stage.guest, states)
            return
        meta, text, kern = snapshot.join(states)
        if isinstance(stage, Waiting):
            restore = stage.restore
        else:
            _write(stage.guest.files.meta, text)
            restore = self._hold(stage.guest, meta.kern_bytes)
        restore.load(kern, snapshot.fpu_states(states))
        self._clocks = clocks.Saved.of(meta, kern, states)

    def advance_clocks(self, ns: int) -> int:
        """Move the guest's TSC and HPET on.  Raises BhyError if FILE.kern cannot be written."""
        try:
            if self._clocks is None or not ns:
                raise IncompatibleError("for how long they stand still is not known")
            moved_ns = self._clocks.behind_ns(ns)
            pieces = clocks.moved_on(self._wanted.host, self._source, self._clocks, moved_ns)
        except IncompatibleError as error:
            self.notices.append(f"its clocks are as they were saved: {error}")
            return 0
        self._checked.waiting().change_kern(pieces)
        return moved_ns

    def start(self) -> None:
        """Let bhyve restore the guest and run it, independent of bhyrecv.  Raises BhyError."""
        guest, restore = self._checked.guest, self._checked.waiting()
        # From here on nothing may end the wait for bhyve.
        self.on_wait = lambda: None
        try:
            restore.release()
        except BaseException:
            self.may_have_run = restore.may_have_run
            raise
        self.may_have_run = True
        self._made.pop_all()
        try:
            restore.set_clock()
        except BhyError as error:
            self.notices.append(f"its clock chip is not set: {error}")
        restore.close()
        guest.remove()
        guest.forget_started()  # the record names it
        with contextlib.suppress(BhyError):
            # The guest runs, so an error in the note for vm-bhyve is ignored.  vm-bhyve does not
            # start the guest as long as its VM exists.
            note_running(guest, restore.started.process)

    def settle(self) -> None:
        """Tell the network where the guest is, and the operator what nobody does for it.

        Never raises a BhyError.
        """
        guest, restore = self._checked.guest, self._checked.waiting()
        running = restore.started
        if not restore.is_connected:
            self.notices.append(powerbutton.LOST)
        try:
            announce(self._wanted.host, guest.keys, running)
        except BhyError as error:
            self.notices.append(f"the network was not told where it is: {error}")
        if running.process and not self._is_supervised:
            note_configuration(guest, running.process)
            self.notices += ownconf.notices(guest.conf, guest.name, guest.keys, running.process)

    def leave_paused(self) -> None:
        """Leave the guest in its files on disk; open_loaded() finds it by its record.

        Raises BhyError if vm-bhyve's lock cannot be written.
        """
        self._made.pop_all()
        if self._wanted.manager:
            self._wanted.manager.locks.held(HELD)

    def record(self) -> Json:
        """Return the record from which open_loaded() finds the guest."""
        return self._checked.record()

    def abort(self) -> None:
        """Undo open(): end bhyve, destroy its VM, remove the files.  Never raises."""
        self._opened.close()
        if not self.may_have_run:
            self._made.close()


def _write(path: Path, data: bytes) -> None:
    try:
        with open(durable.create(path), "wb") as file:
            file.write(data)
    except OSError as error:
        raise from_oserror(error, f"write {path}") from None

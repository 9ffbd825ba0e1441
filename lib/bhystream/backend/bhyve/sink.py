"""BhyveSink: a bhyve guest being rebuilt, as base.Sink.

            early (a plan)                        late (none)                  left loaded (-u)
    check   the verdict; touches nothing
    open    FILE a hole, FILE.meta the plan;      FILE a hole                  FILE a hole, on disk
            bhyve -r held, its memory ours
    pages   into the VM's memory                  into FILE                    into FILE
    load    FILE.kern; the FPU                    the other files; bhyve -r    the other files
                                                  held; FILE.kern; the FPU
    start   the last page: bhyve restores and runs

So READY says of both: the guest's memory is in its VM, its devices are there,
and only the release is left.  How a bhyve is held: restore.py.  Until its
socket appears the vCPUs never ran, and a failure undoes everything.

Early, because the pause then has no part that grows with the memory.  Late
where the disks may have to come first (bhysend -p), or nobody waits (-k).
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
from bhystream.backend.bhyve import snapshot, vmbhyve
from bhystream.backend.bhyve.command import config_file
from bhystream.backend.bhyve.heldrestore import HeldRestore
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.loaded import HELD, held, keep_files
from bhystream.backend.bhyve.place import Place
from bhystream.backend.bhyve.resources import Wishes
from bhystream.backend.bhyve.validate import validate
from bhystream.backend.bhyve.wanted import Wanted
from bhystream.errors import BhyError, IncompatibleError, InternalError, from_oserror
from bhystream.guest import Head, Json, State
from bhystream.memory.target import FileTarget, MappedTarget


@dataclass(frozen=True)
class Checked:
    """A guest that this host can take."""

    place: Place

    def record(self) -> Json:
        """Return what open_loaded() needs."""
        return self.place.to_json()

    def held(self) -> HeldRestore:
        """Return its bhyve.  Raises InternalError where there is none yet."""
        raise InternalError("BhyveSink: there is no bhyve to be let go")


@dataclass(frozen=True)
class Held(Checked):
    """One whose bhyve is held."""

    restore: HeldRestore

    def record(self) -> Json:
        """Return what open_loaded() needs."""
        return self.place.to_json(self.restore.started)

    def held(self) -> HeldRestore:
        """Return its bhyve."""
        return self.restore


class BhyveSink:
    """A guest being built.

    may_have_run, notices, on_wait: as base.Sink's.
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
    ) -> None:
        """Prepare; touches nothing.

        name: of the guest here.  resources: the -o words.  dropped: the -x
        keys.  base: the state directory.  id_: of the stream.  is_kept: the
        stream is, so it has no plan.  unstarted: leave_paused() is to come, not
        start().  Raises UsageError.
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
            manager=vmbhyve.find(host.datastores(), name, socket.gethostname()),
        )
        self._force = force
        self._stage: Checked | None = None
        # What is open, and what was made: abort() gives up both, load() the first.
        self._opened = contextlib.ExitStack()
        self._made = contextlib.ExitStack()

    # ---- the verdict

    def check(self, head: Head) -> list[str]:
        """Return the reasons against the guest; remember the head if there are none."""
        kind, host = head.host.get("hypervisor"), self._wanted.host
        if kind != host.kind:
            return [f"hypervisor: the guest runs under {ascii(kind)[:40]}, not {host.kind}"]
        try:
            hard, soft, place = self._wanted.judge(head, validate(head.config))
        except (BhyError, OSError) as error:
            return [str(error)]
        reasons = hard if self._force else hard + soft
        if not reasons:
            self._stage = Checked(place)
        return reasons

    @property
    def _checked(self) -> Checked:
        """Return how far it has come.  Raises InternalError where check() did not let it."""
        if self._stage is None:
            raise InternalError("BhyveSink: check() was not called, or refused the guest")
        return self._stage

    # ---- open

    def late_reasons(self) -> list[str]:
        """Return why there is no room for its memory in a file; check() asked it of a kept one."""
        is_asked = not self._wanted.is_kept and not self._force
        return self._wanted.room(self._checked.place, is_late=True) if is_asked else []

    def open(self, plan: bytes) -> Sequence[Target]:
        """Make the files, and with a plan the guest's bhyve, held."""
        place = self._checked.place
        planned = snapshot.parse(plan) if plan and not self._wanted.is_unstarted else None
        if planned is None and (why := self.late_reasons()):
            raise IncompatibleError(f"guest {place.name}: {why[0]}")
        directory = Path(place.kept).parent
        try:
            durable.make_directory(directory)
        except OSError as error:
            raise from_oserror(error, f"make {directory}") from None
        self._wanted.remove_leftovers(place)
        self._wanted.note_directory(place)
        place.make_staging()
        self._made.callback(place.forget_started)
        self._made.callback(place.remove)
        fd = self._make_memory_file(place)
        if planned is None:
            spans = snapshot.memory_spans(place.memory_bytes)
            return [FileTarget(fd, offset) for _, offset, _ in spans]
        self._opened.close()
        _write(place.files.meta, plan)
        restore = self._hold(place, planned.kern_bytes)
        return [MappedTarget(view) for view in restore.memory]

    def _make_memory_file(self, place: Place) -> int:
        """Return FILE's descriptor, ours: one hole, of the guest's size."""
        path = place.files.memory
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._opened.callback(os.close, fd)
            os.ftruncate(fd, place.memory_bytes)
        except OSError as error:
            raise from_oserror(error, f"make {path}") from None
        return fd

    def _hold(self, place: Place, kern_bytes: int) -> HeldRestore:
        """Start the guest's bhyve; return it held."""
        restore = held(self._wanted.host, place, place.files, kern_bytes, self.on_wait)
        self._made.callback(restore.undo)
        self._stage = Held(place, restore)
        return restore

    # ---- load and start

    def require_alive(self) -> None:
        """Raise GuestError where its bhyve has ended."""
        if isinstance(self._stage, Held):
            self._stage.restore.require_held()

    def load(self, states: Sequence[State]) -> None:
        """Complete the guest: its bhyve is held then, with all but the last page."""
        stage = self._checked
        self._opened.close()
        if self._wanted.is_unstarted:
            keep_files(stage.place, states)
            return
        meta, text, kern = snapshot.join(states)
        if isinstance(stage, Held):
            restore = stage.restore
        else:
            _write(stage.place.files.meta, text)
            restore = self._hold(stage.place, meta.kern_bytes)
        restore.load(kern, snapshot.fpu_states(states))

    def start(self) -> None:
        """Let bhyve restore the guest and run it; it is nobody's then."""
        place, restore = self._checked.place, self._checked.held()
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
        place.remove()
        place.forget_started()  # the record names it
        if self._wanted.manager:
            # It runs, whatever becomes of a note for vm-bhyve, which does not
            # start it as long as its VM is there.
            with contextlib.suppress(BhyError):
                locks = self._wanted.manager.locks
                locks.runs_here(config_file(place.keys), restore.started.process)

    def leave_paused(self) -> None:
        """Let go of the guest, which lies in files on disk; its record finds it again."""
        self._made.pop_all()
        if self._wanted.manager:
            self._wanted.manager.locks.held(HELD)

    def record(self) -> Json:
        """Return what open_loaded() needs."""
        return self._checked.record()

    def abort(self) -> None:
        """Undo open(): bhyve ends, its VM and the files go."""
        self._opened.close()
        if not self.may_have_run:
            self._made.close()


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise from_oserror(error, f"write {path}") from None

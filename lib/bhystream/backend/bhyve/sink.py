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
from dataclasses import replace
from pathlib import Path
from typing import Any

from bhystream import durable
from bhystream.backend.base import Target
from bhystream.backend.bhyve import backing, identity, snapshot, verdict, vmbhyve
from bhystream.backend.bhyve.command import config_file
from bhystream.backend.bhyve.compare import differences
from bhystream.backend.bhyve.host import VMM_DIR, Host
from bhystream.backend.bhyve.loaded import HELD, held, keep_files
from bhystream.backend.bhyve.place import (
    Leftover,
    Place,
    find_leftover,
    kept_of,
    last_directory,
    note_directory,
    staging_of,
    staging_root,
    stream_of,
)
from bhystream.backend.bhyve.resources import Wishes
from bhystream.backend.bhyve.restore import Restore
from bhystream.backend.bhyve.snapshot import Meta
from bhystream.backend.bhyve.validate import validate
from bhystream.errors import BhyError, IncompatibleError, InternalError, from_oserror
from bhystream.guest import Head, Json, State
from bhystream.memory.target import FileTarget, MappedTarget


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
        self._host = host
        self._name = name
        self._wishes = Wishes.parse(resources, dropped)
        self._manager = vmbhyve.find(host.datastores(), name, socket.gethostname())
        self._base = base
        self._id = id_
        self._force = force
        self._is_kept = is_kept
        self._unstarted = unstarted
        self._place: Place | None = None
        self._plan: Meta | None = None
        self._restore: Restore | None = None
        self._fd = -1
        self._is_open = False
        self._released = False

    # ---- the verdict

    def check(self, head: Head) -> list[str]:
        """Return the reasons against the guest; remember the head if there are none."""
        kind = head.host.get("hypervisor")
        if kind != self._host.kind:
            return [f"hypervisor: the guest runs under {ascii(kind)[:40]}, not {self._host.kind}"]
        try:
            config = validate(head.config)
            hard, soft, place = self._judge(head, config)
        except (BhyError, OSError) as error:
            return [str(error)]
        reasons = hard if self._force else hard + soft
        if not reasons:
            self._section, self._place = config, place
        return reasons

    def _judge(self, head: Head, config: dict[str, Any]) -> tuple[list[str], list[str], Place]:
        """Return (reasons that stand, reasons that force overrules, where it would be)."""
        host = self._host
        hard, soft = verdict.ability_reasons(host)
        theirs_hard, theirs_soft = verdict.host_reasons(head.host, identity.describe(host))
        hard += theirs_hard
        soft += theirs_soft
        size = int(config["keys"]["memory.size"])
        hard += verdict.guest_reasons(host, config)
        keys, reasons, differences = self._lend(config)
        hard += reasons
        soft += differences
        if host.exists(self._name) and not any(one.has_vm(host) for one in self._leftovers()):
            id_ = stream_of(self._base, host.node_id(self._name))
            whose = f" (it is of stream {id_}: bhyrecv -q {id_})" if id_ else ""
            hard.append(
                f"name: a VM {self._name} is here already; name another, or destroy it{whose}"
            )
        place = self._placed(keys, size)
        hard += place.staging_reasons()
        return hard, soft + self._room(place, is_late=self._is_kept), place

    def _placed(self, keys: dict[str, str], size: int) -> Place:
        host, kept = self._host, kept_of(self._base, self._id, self._name)
        root = staging_root(host, self._base, os.environ)
        staging = kept if self._unstarted else staging_of(root, self._id, self._name)
        return Place(
            kind=host.kind,
            vmm_dir=host.environment().get(VMM_DIR, ""),
            name=self._name,
            staging=str(staging),
            kept=str(kept),
            keys=keys,
            memory_bytes=size,
            manager=str(self._manager.directory) if self._manager else "",
        )

    def _room(self, place: Place, *, is_late: bool) -> list[str]:
        """Return why there is no room for the guest, one line each.

        is_late: its memory goes through a file.
        """
        out, in_memory = [], False
        if is_late or self._unstarted:
            root = self._base if self._unstarted else Path(place.staging).parent
            found = os.statvfs(root)
            free = found.f_bavail * found.f_frsize
            what = "state" if self._unstarted else "staging"
            out = verdict.room_reasons(place.memory_bytes, free, what, str(root))
            in_memory = self._host.is_memory(root)
        needed = verdict.needed_memory_bytes(place.memory_bytes, is_staged_in_memory=in_memory)
        return out + verdict.memory_reasons(self._host.free_memory_bytes(), needed)

    def _lend(self, section: dict[str, Any]) -> tuple[dict[str, str], list[str], list[str]]:
        """Return the whole configuration here, the reasons against it, and the differences.

        What -o does not give comes from vm-bhyve's guest of that name, if
        there is one; the rest of its configuration is compared.
        """
        wishes, differ = self._wishes, []
        if self._manager and not self._names_all(section):
            own = self._manager.last_started()
            differ = differences(section, own.section, own.computed)
            named = {section["resources"].get(word, word) for word in wishes.values}
            lent = {key: value for key, value in own.resources().items() if key not in named}
            wishes = replace(wishes, values={**lent, **wishes.values})
        resolved = wishes.resolve(section)
        reasons = [*resolved.reasons]
        if self._manager:
            reasons += self._manager.locks.reasons()
        hard, soft = backing.reasons(self._host, resolved.section, resolved.values)
        reasons += hard
        differ = [*differ, *soft]
        return {**resolved.section["keys"], **resolved.values}, reasons, differ

    def _names_all(self, section: dict[str, Any]) -> bool:
        """Say whether the operator has named every resource."""
        given = self._wishes.values
        return all(word in given or key in given for word, key in section["resources"].items())

    def _known(self) -> Place:
        if self._place is None:
            raise InternalError("BhyveSink: check() was not called, or refused the guest")
        return self._place

    # ---- what others left

    @property
    def _lock(self) -> Path:
        """Return the file of the guest's lock, which names the directory made last under it."""
        return self._base / "lock" / f"to-{self._name}"

    def _leftovers(self) -> list[Leftover]:
        """Return what bhyrecvs left of this guest that were killed before anybody knew of it."""
        root = staging_root(self._host, self._base, os.environ)
        directories = {
            kept_of(self._base, self._id, self._name),
            staging_of(root, self._id, self._name),
        }
        if last := last_directory(self._lock):
            directories.add(last)
        found = [find_leftover(self._base, one, self._name) for one in directories]
        return [one for one in found if one]

    def _remove_leftovers(self, place: Place) -> None:
        for one in self._leftovers():
            one.remove(self._host)
        started = place.started()
        if started is not None and (started.is_alive() or not started.is_known):
            cure = "" if started.is_known else f"if it surely does not run: rm {place.started_path}"
            raise IncompatibleError(
                f"guest {place.name}: a bhyve starts, or runs, from this stream", cure
            )
        place.remove()
        place.forget_started()

    # ---- open

    def late_reasons(self) -> list[str]:
        """Return why there is no room for its memory in a file; check() asked it of a kept one."""
        is_asked = not self._is_kept and not self._force
        return self._room(self._known(), is_late=True) if is_asked else []

    def open(self, plan: bytes) -> Sequence[Target]:
        """Make the files, and with a plan the guest's bhyve, held."""
        place = self._known()
        if plan and not self._unstarted:
            self._plan = snapshot.parse(plan)
        elif why := self.late_reasons():
            raise IncompatibleError(f"guest {place.name}: {why[0]}")
        directory = Path(place.kept).parent
        try:
            durable.make_directory(directory)
        except OSError as error:
            raise from_oserror(error, f"make {directory}") from None
        self._remove_leftovers(place)
        note_directory(self._lock, place.staging)
        place.make_staging()
        self._is_open = True
        self._make_memory_file(place)
        if self._plan is None:
            spans = snapshot.memory_spans(place.memory_bytes)
            return [FileTarget(self._fd, offset) for _, offset, _ in spans]
        self._close()
        self._write(place.files.meta, plan)
        self._restore = held(self._host, place, place.files, self._plan.kern_bytes, self.on_wait)
        return [MappedTarget(view) for view in self._restore.memory]

    def _make_memory_file(self, place: Place) -> None:
        path = place.files.memory
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._fd, place.memory_bytes)
        except OSError as error:
            raise from_oserror(error, f"make {path}") from None

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.write_bytes(data)
        except OSError as error:
            raise from_oserror(error, f"write {path}") from None

    # ---- load and start

    def require_alive(self) -> None:
        """Raise GuestError where its bhyve has ended."""
        if self._restore is not None:
            self._restore.require_held()

    def load(self, states: Sequence[State]) -> None:
        """Complete the guest: its bhyve is held then, with all but the last page."""
        place = self._known()
        self._close()
        if self._unstarted:
            keep_files(place, states)
            return
        meta, text, kern = snapshot.join(states)
        if self._plan is None:
            self._write(place.files.meta, text)
            self._restore = held(self._host, place, place.files, meta.kern_bytes, self.on_wait)
        self._started().load(kern, snapshot.fpu_states(states))

    def _started(self) -> Restore:
        if self._restore is None:
            raise InternalError("BhyveSink: there is no bhyve to be let go")
        return self._restore

    def start(self) -> None:
        """Let bhyve restore the guest and run it; it is nobody's then."""
        place, restore = self._known(), self._started()
        try:
            restore.release()
        except BaseException:
            self.may_have_run = restore.may_have_run
            raise
        self.may_have_run = True
        self._released = True
        try:
            restore.set_clock()
        except BhyError as error:
            self.notices.append(f"its clock chip is not set: {error}")
        restore.close()
        place.remove()
        place.forget_started()  # the record names it
        if self._manager:
            # It runs, whatever becomes of a note for vm-bhyve, which does not
            # start it as long as its VM is there.
            with contextlib.suppress(BhyError):
                who = restore.started.process if restore.started else None
                self._manager.locks.runs_here(config_file(place.keys), who)

    def leave_paused(self) -> None:
        """Let go of the guest, which lies in files on disk; its record finds it again."""
        self._released = True
        if self._manager:
            self._manager.locks.held(HELD)

    def record(self) -> Json:
        """Return what open_loaded() needs."""
        return self._known().to_json(self._restore.started if self._restore else None)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def abort(self) -> None:
        """Undo open(): bhyve ends, its VM and the files go."""
        self._close()
        if self._released or self.may_have_run:
            return
        if self._restore is not None:
            self._restore.undo()
        if self._is_open and self._place is not None:
            self._place.remove()
            self._place.forget_started()

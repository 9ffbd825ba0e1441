"""BhyveSink: a bhyve guest being rebuilt, as base.Sink.

    check   the verdict; touches nothing, creates nothing
    open    the staging directory, FILE in it with its final size, all holes
    load    FILE.kern and FILE.meta: the snapshot is complete, and checked
    start   `bhyve -r FILE`, until its socket answers; then the files go

The load of a bhyve is its start, so READY says that the files are complete;
reading them takes its time after GO.  Until bhyve's socket appears the vCPUs
never ran, and a failure undoes everything.

Unverified on FreeBSD, all of it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bhystream.backend.base import Destination, Head, Json, State
from bhystream.backend.bhyve import backing, identity, snapshot, verdict, vmbhyve
from bhystream.backend.bhyve.command import config_file
from bhystream.backend.bhyve.compare import differences
from bhystream.backend.bhyve.host import VMM_DIR, Host
from bhystream.backend.bhyve.paused import BhyvePaused
from bhystream.backend.bhyve.place import Place, staging_root
from bhystream.backend.bhyve.resources import Wishes
from bhystream.backend.bhyve.restore import Restore
from bhystream.backend.bhyve.validate import validate
from bhystream.errors import (
    BhyError,
    FormatError,
    IncompatibleError,
    InternalError,
    from_oserror,
)


class BhyveSink:
    """A guest being built.

    may_have_run: False as long as its vCPUs provably never ran.
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
    ) -> None:
        """Prepare; touches nothing.

        name: of the guest here.  resources: the -o words.  dropped: the -x
        keys.  base: the state directory.  id_: of the stream.  Raises UsageError.
        """
        self._host = host
        self._name = name
        self._wishes = Wishes.parse(resources, dropped)
        self._manager = vmbhyve.find(host.datastores(), name, socket.gethostname())
        self._base = base
        self._id = id_
        self._force = force
        self._place: Place | None = None
        self._fd = -1
        self._released = False
        self.may_have_run = False

    # ---- the verdict

    def check(self, head: Head) -> list[str]:
        """Return the reasons against the guest; remember the head if there are none."""
        kind = head.host.get("hypervisor")
        if kind != self._host.kind:
            return [f"hypervisor: the guest runs under {ascii(kind)[:40]}, not {self._host.kind}"]
        try:
            hard, soft = self._judge(head)
        except (BhyError, OSError) as error:
            return [str(error)]
        return hard if self._force else hard + soft

    def _judge(self, head: Head) -> tuple[list[str], list[str]]:
        """Return (reasons that stand, reasons that force overrules)."""
        host = self._host
        hard, soft = verdict.ability_reasons(host)
        theirs_hard, theirs_soft = verdict.host_reasons(head.host, identity.describe(host))
        hard += theirs_hard
        soft += theirs_soft
        config = validate(head.config)
        size = int(config["keys"]["memory.size"])
        if head.layout != snapshot.layout_of(size):
            hard.append(f"layout: it is not that of memory.size={size}")
        hard += verdict.guest_reasons(host, config, head.devices)
        keys, reasons, differences = self._lend(config)
        hard += reasons
        soft += differences
        if host.exists(self._name):
            hard.append(f"name: a VM {self._name} is here already; name another, or destroy it")
        root = staging_root(host, "destination", self._base, os.environ)
        found = os.statvfs(root)
        soft += verdict.room_reasons(size, found.f_bavail * found.f_frsize, "staging", str(root))
        in_memory = host.is_memory(root)
        needed = verdict.needed_memory_bytes(size, is_staged_in_memory=in_memory)
        soft += verdict.memory_reasons(host.free_memory_bytes(), needed)
        self._place = Place(
            kind=host.kind,
            vmm_dir=host.environment().get(VMM_DIR, ""),
            name=self._name,
            process=None,
            staging=str(root / f"bhyrecv-{self._id[:16]}"),
            # Not "held": source and destination may be one host.
            kept=str(self._base / "loaded" / self._id),
            keys=keys,
            memory_bytes=size,
            bridges={},
            manager=str(self._manager.directory) if self._manager else "",
        )
        return hard, soft

    def _lend(self, section: dict[str, Any]) -> tuple[dict[str, str], list[str], list[str]]:
        """Return the whole configuration here, the reasons against it, and the differences.

        What -o does not give comes from vm-bhyve's guest of that name, if
        there is one; the rest of its configuration is compared.
        """
        wishes, differ = self._wishes, []
        if self._manager and not self._names_all(section):
            own = self._manager.config()
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

    # ---- open

    def open(self) -> Sequence[Destination]:
        """Make the memory file, one hole of the guest's size."""
        place = self._known()
        directory = os.path.dirname(place.kept)
        try:
            os.makedirs(directory, 0o700, exist_ok=True)
        except OSError as error:
            raise from_oserror(error, f"make {directory}") from None
        self._remove_leftover(place)
        place.forget_started()
        lock = self._base / "lock" / f"to-{self._name}"
        place.sweep(self._host, lock, self._base / "destination")
        place.make_staging()
        path = place.staged.memory
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._fd, place.memory_bytes)
        except OSError as error:
            raise from_oserror(error, f"make {path}") from None
        return [
            Destination(self._fd, offset)
            for _, offset, _ in snapshot.memory_spans(place.memory_bytes)
        ]

    def _remove_leftover(self, place: Place) -> None:
        """Remove what a bhyrecv of this stream left that was killed: there is one at a time."""
        if not os.path.isdir(place.staging):
            return
        if place.is_started():
            # Nothing of it is ours to remove, in abort() either.
            self._released = True
            raise IncompatibleError(
                f"guest {place.name}: a bhyve starts, or runs, from this stream"
            )
        place.remove(self._host)

    # ---- load and start

    def load(self, states: Sequence[State]) -> None:
        """Write the state; the snapshot is complete then."""
        place = self._known()
        meta, text, kern = snapshot.join(states)
        if meta.memory_bytes != place.memory_bytes:
            raise FormatError(f"state meta: memsize is {meta.memory_bytes}, not memory.size")
        if meta.ncpus != int(place.keys["cpus"]):
            raise FormatError(f"state meta: ncpus is {meta.ncpus}, not cpus")
        try:
            for path, data in ((place.staged.kern, kern), (place.staged.meta, text)):
                path.write_bytes(data)
        except OSError as error:
            raise from_oserror(error, f"write {place.staging}") from None
        self._close()

    def start(self) -> None:
        """Let bhyve restore the guest and run it; it is nobody's then."""
        place = self._known()
        if self._host.exists(place.name):
            raise IncompatibleError(f"guest {place.name}: a VM of that name came here meanwhile")
        restore = Restore(self._host, place, place.staged)
        try:
            restore.run()
        except BaseException:
            self.may_have_run = restore.may_have_run
            raise
        self.may_have_run = True
        self._released = True
        place.remove(self._host)
        if self._manager:
            # It runs, whatever becomes of a note for vm-bhyve, which does not
            # start it as long as its VM is there.
            with contextlib.suppress(BhyError):
                self._manager.locks.runs_here(config_file(place.keys, {}))

    def leave_paused(self) -> None:
        """Keep the guest as files on disk; revive() finds them again."""
        paused = BhyvePaused(self._known())
        paused.keep()
        self._released = True

    def revive(self) -> Json:
        """Return what open_paused() needs."""
        return self._known().to_json()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def abort(self) -> None:
        """Undo open(): the files go."""
        self._close()
        if self._place is not None and not self._released:
            self._place.remove(self._host)

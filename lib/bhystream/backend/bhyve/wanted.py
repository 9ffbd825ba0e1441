"""What is wanted of a stream's guest at this host, and whether it can be had.

The operator's words, vm-bhyve's guest of that name, and what others have left
here; nothing is made.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bhystream.backend.bhyve import backing, identity, verdict
from bhystream.backend.bhyve.compare import differences
from bhystream.backend.bhyve.host import VMM_DIR, Host
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
from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest
from bhystream.errors import IncompatibleError
from bhystream.guest import Head


@dataclass(frozen=True)
class Wanted:
    """One guest, as it is wanted here.

    name: of the guest here.  wishes: the -o words and -x keys.  base: the state
    directory.  id: of the stream.  is_kept: the stream is, so it has no plan.
    is_unstarted: it is to be left loaded.  manager: vm-bhyve's guest of that
    name, None where it has none.
    """

    host: Host
    name: str
    wishes: Wishes
    base: Path
    id: str
    is_kept: bool
    is_unstarted: bool
    manager: VmBhyveGuest | None

    def judge(self, head: Head, config: dict[str, Any]) -> tuple[list[str], list[str], Place]:
        """Return (reasons that stand, reasons that force overrules, where it would be)."""
        host = self.host
        hard, soft = verdict.ability_reasons(host)
        theirs_hard, theirs_soft = verdict.host_reasons(head.host, identity.describe(host))
        hard += theirs_hard
        soft += theirs_soft
        size = int(config["keys"]["memory.size"])
        hard += verdict.guest_reasons(host, config)
        keys, reasons, differences = self._lend(config)
        hard += reasons
        soft += differences
        if host.exists(self.name) and not any(one.has_vm(host) for one in self._leftovers()):
            id_ = stream_of(self.base, host.node_id(self.name))
            whose = f" (it is of stream {id_}: bhyrecv -q {id_})" if id_ else ""
            hard.append(
                f"name: a VM {self.name} is here already; name another, or destroy it{whose}"
            )
        place = self.place(keys, size)
        hard += place.staging_reasons()
        return hard, soft + self.room(place, is_late=self.is_kept), place

    def place(self, keys: dict[str, str], size: int) -> Place:
        """Return where the guest would be.  keys: its whole configuration.  size: of its memory."""
        host, kept = self.host, kept_of(self.base, self.id, self.name)
        root = staging_root(host, self.base, os.environ)
        staging = kept if self.is_unstarted else staging_of(root, self.id, self.name)
        return Place(
            kind=host.kind,
            vmm_dir=host.environment().get(VMM_DIR, ""),
            name=self.name,
            staging=str(staging),
            kept=str(kept),
            keys=keys,
            memory_bytes=size,
            manager=str(self.manager.directory) if self.manager else "",
        )

    def room(self, place: Place, *, is_late: bool) -> list[str]:
        """Return why there is no room for the guest, one line each.

        is_late: its memory goes through a file.
        """
        out, in_memory = [], False
        if is_late or self.is_unstarted:
            root = self.base if self.is_unstarted else Path(place.staging).parent
            found = os.statvfs(root)
            free = found.f_bavail * found.f_frsize
            what = "state" if self.is_unstarted else "staging"
            out = verdict.room_reasons(place.memory_bytes, free, what, str(root))
            in_memory = self.host.is_memory(root)
        needed = verdict.needed_memory_bytes(place.memory_bytes, is_staged_in_memory=in_memory)
        return out + verdict.memory_reasons(self.host.free_memory_bytes(), needed)

    def _lend(self, section: dict[str, Any]) -> tuple[dict[str, str], list[str], list[str]]:
        """Return the whole configuration here, the reasons against it, and the differences.

        What -o does not give comes from vm-bhyve's guest of that name, if
        there is one; the rest of its configuration is compared.
        """
        wishes, differ = self.wishes, []
        if self.manager and not self._names_all(section):
            own = self.manager.last_started()
            differ = differences(section, own.section, own.computed)
            named = {section["resources"].get(word, word) for word in wishes.values}
            lent = {key: value for key, value in own.resources().items() if key not in named}
            wishes = replace(wishes, values={**lent, **wishes.values})
        resolved = wishes.resolve(section)
        reasons = [*resolved.reasons]
        if self.manager:
            reasons += self.manager.locks.reasons()
        hard, soft = backing.reasons(self.host, resolved.section, resolved.values)
        reasons += hard
        differ = [*differ, *soft]
        return {**resolved.section["keys"], **resolved.values}, reasons, differ

    def _names_all(self, section: dict[str, Any]) -> bool:
        """Say whether the operator has named every resource."""
        given = self.wishes.values
        return all(word in given or key in given for word, key in section["resources"].items())

    # What others left.

    @property
    def _lock(self) -> Path:
        """Return the file of the guest's lock, which names the directory made last under it."""
        return self.base / "lock" / f"to-{self.name}"

    def _leftovers(self) -> list[Leftover]:
        """Return what bhyrecvs left of this guest that were killed before anybody knew of it."""
        root = staging_root(self.host, self.base, os.environ)
        directories = {
            kept_of(self.base, self.id, self.name),
            staging_of(root, self.id, self.name),
        }
        if last := last_directory(self._lock):
            directories.add(last)
        found = [find_leftover(self.base, one, self.name) for one in directories]
        return [one for one in found if one]

    def remove_leftovers(self, place: Place) -> None:
        """Remove it; refuse where a bhyve of this stream lives, or may.  Raises BhyError."""
        for one in self._leftovers():
            one.remove(self.host)
        started = place.started()
        if started is not None and (started.is_alive() or not started.is_known):
            cure = "" if started.is_known else f"if it surely does not run: rm {place.started_path}"
            raise IncompatibleError(
                f"guest {place.name}: a bhyve starts, or runs, from this stream", cure
            )
        place.remove()
        place.forget_started()

    def note_directory(self, place: Place) -> None:
        """Let the next one know of the directory that is about to be made.  Never raises."""
        note_directory(self._lock, place.staging)

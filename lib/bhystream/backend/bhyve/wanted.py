"""The guest that a stream and the operator want at this host, and whether the host can take it.

The judgment uses the operator's words, vm-bhyve's guest of the same name, and
what killed bhyrecvs have left here.  Nothing is made.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bhystream.backend.bhyve import backing, identity, verdict
from bhystream.backend.bhyve.argv import parse_argv
from bhystream.backend.bhyve.compare import another_machine, differences
from bhystream.backend.bhyve.config import GuestConfig, split
from bhystream.backend.bhyve.host import VMM_DIR, Host
from bhystream.backend.bhyve.resources import Resolved, Wishes
from bhystream.backend.bhyve.restoredguest import (
    Leftover,
    RestoredGuest,
    find_leftover,
    last_directory,
    loaded_directory,
    note_directory,
    staging_of,
    staging_root,
    stream_of,
)
from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest
from bhystream.beneath import fault_below
from bhystream.errors import IncompatibleError
from bhystream.guest import Head, Json


@dataclass(frozen=True)
class Wanted:
    """One guest, as it is wanted here.

    name: the guest's name on this host.  wishes: the -o words and -x keys.
    base: the state directory.  id: the stream id.  is_kept: the stream was kept
    (-k), so it has no plan.  is_unstarted: the guest is to be left loaded (-u).
    below: the directories in which the disks have to lie, () for any.
    manager: vm-bhyve's guest of that name, None if there is none.
    """

    host: Host
    name: str
    wishes: Wishes
    base: Path
    id: str
    is_kept: bool
    is_unstarted: bool
    below: Sequence[str]
    manager: VmBhyveGuest | None

    def judge(
        self, head: Head, config: dict[str, Any]
    ) -> tuple[list[str], list[str], RestoredGuest]:
        """Judge a guest; return (hard reasons, soft reasons, the guest's record).

        config: the validated CONFIG section.  -f overrules soft reasons.  Raises
        BhyError or OSError if something that is asked cannot be found out.
        """
        host = self.host
        able_hard, able_soft = verdict.ability_reasons(host)
        theirs_hard, theirs_soft = verdict.host_reasons(head.host, identity.describe(host))
        hard, soft = [*able_hard, *theirs_hard], [*able_soft, *theirs_soft]
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
        guest = self.restored(
            keys, size, has_power_button=head.host.get(identity.POWER_BUTTON) is True
        )
        hard += guest.staging_reasons()
        return hard, soft + self.room(guest, is_late=self.is_kept), guest

    def restored(self, keys: dict[str, str], size: int, *, has_power_button: bool) -> RestoredGuest:
        """Return the guest's record.

        keys: the guest's whole configuration.  size: the size of the guest's memory, in bytes.
        has_power_button: as in the record.
        """
        host, kept = self.host, loaded_directory(self.base, self.id, self.name)
        root = staging_root(host, self.base, os.environ)
        staging = kept if self.is_unstarted else staging_of(root, self.id, self.name)
        return RestoredGuest(
            kind=host.kind,
            vmm_dir=host.environment().get(VMM_DIR, ""),
            name=self.name,
            staging=str(staging),
            kept=str(kept),
            keys=keys,
            memory_bytes=size,
            manager=str(self.manager.directory) if self.manager else "",
            has_power_button=has_power_button,
        )

    def room(self, guest: RestoredGuest, *, is_late: bool) -> list[str]:
        """Return why there is no room for the guest, one line each.

        is_late: whether the guest's memory goes through a file.  Raises OSError.
        """
        out: list[str] = []
        in_memory = False
        if is_late or self.is_unstarted:
            root = self.base if self.is_unstarted else Path(guest.staging).parent
            found = os.statvfs(root)
            free = found.f_bavail * found.f_frsize
            what = "state" if self.is_unstarted else "staging"
            out += verdict.room_reasons(guest.memory_bytes, free, what, str(root))
            in_memory = self.host.is_memory(root)
        needed = verdict.needed_memory_bytes(guest.memory_bytes, is_staged_in_memory=in_memory)
        return out + verdict.memory_reasons(self.host.free_memory_bytes(), needed)

    @property
    def is_supervised(self) -> bool:
        """Say whether vm-bhyve will start the guest, and say then with which resources."""
        return self.manager is not None and bool(self.host.starter())

    def _differs_from_conf(self, section: dict[str, Any]) -> list[str]:
        """Return whether vm-bhyve's guest is another one, before vm-bhyve says it all."""
        assert self.manager is not None
        theirs, ours = section["keys"].get("uuid"), self.manager.conf().get("uuid")
        if theirs and ours and theirs.lower() != ours.lower():
            return [f"uuid: the stream says {theirs}, here {ours}"]
        return []

    def adapted(
        self, guest: RestoredGuest, section: Json, words: Sequence[str], *, force: bool
    ) -> RestoredGuest:
        """Return a guest with the resources for which vm-bhyve calls bhyve.

        words: bhyve's arguments.  Raises IncompatibleError, with every reason, if they
        describe another machine than the stream does, unless force overrules it.
        """
        own = split(parse_argv(words), self.name)
        keys, hard, soft = self._lend(dict(section), own)
        if reasons := hard if force else hard + soft:
            raise another_machine(self.name, reasons)
        return replace(guest, keys=keys)

    def _lend(
        self, section: dict[str, Any], own: GuestConfig | None = None
    ) -> tuple[dict[str, str], list[str], list[str]]:
        """Return the whole configuration here, the hard reasons against it, and the soft ones.

        Resources that -o does not give come from vm-bhyve's guest of that name,
        if there is one; the rest of that guest's configuration is compared.
        own: that guest as vm-bhyve starts it now; None if it is not started yet.
        """
        wishes, differ = self.wishes, []
        is_started = own is not None
        is_early = not is_started and self.is_supervised
        if is_early:
            differ = self._differs_from_conf(section)
        elif self.manager and (is_started or not self._names_all(section)):
            own = own or self.manager.last_started()
            differ = differences(section, own.section, own.computed)
            named = {section["resources"].get(word, word) for word in wishes.values}
            lent = {key: value for key, value in own.resources().items() if key not in named}
            wishes = replace(wishes, values={**lent, **wishes.values})
        resolved = wishes.resolve(section, is_partial=is_early)
        reasons = [*resolved.reasons, *self._place_reasons(resolved)]
        if self.manager and not is_started:
            reasons += self.manager.locks.reasons()
        hard, soft = backing.reasons(self.host, resolved.section, resolved.values)
        reasons += hard
        differ = [*differ, *soft]
        return {**resolved.section["keys"], **resolved.values}, reasons, differ

    def _place_reasons(self, resolved: Resolved) -> list[str]:
        """Return a reason for each disk that does not lie below a directory of --below."""
        if not self.below:
            return []
        lent = [
            (word, resolved.values[key])
            for word, key in resolved.section["resources"].items()
            if key in resolved.values and word.startswith(("disk", "bootvars"))
        ]
        found = [(word, path, fault_below(path, self.below)) for word, path in lent]
        return [f"{word}: {path}: {why}" for word, path, why in found if why]

    def _names_all(self, section: dict[str, Any]) -> bool:
        """Say whether the operator has named every resource."""
        given = self.wishes.values
        return all(word in given or key in given for word, key in section["resources"].items())

    # What killed bhyrecvs left.

    @property
    def _lock(self) -> Path:
        """Return the path of the guest's lock file, which names the last directory made with it."""
        return self.base / "lock" / f"to-{self.name}"

    def _leftovers(self) -> list[Leftover]:
        """Return what bhyrecvs left of this guest that were killed before they wrote a record."""
        root = staging_root(self.host, self.base, os.environ)
        directories = {
            loaded_directory(self.base, self.id, self.name),
            staging_of(root, self.id, self.name),
        }
        if last := last_directory(self._lock):
            directories.add(last)
        found = [find_leftover(self.base, one, self.name) for one in directories]
        return [one for one in found if one]

    def remove_leftovers(self, guest: RestoredGuest) -> None:
        """Remove what killed bhyrecvs left of this guest.

        Raises IncompatibleError if a bhyve of this stream is alive, or may be,
        and GuestError if a bhyve that was left does not end.
        """
        for one in self._leftovers():
            one.remove(self.host)
        started = guest.started()
        if started is not None and (started.is_alive() or not started.is_known):
            cure = "" if started.is_known else f"if it surely does not run: rm {guest.started_path}"
            raise IncompatibleError(
                f"guest {guest.name}: a bhyve starts, or runs, from this stream", cure
            )
        guest.remove()
        guest.forget_started()

    def note_directory(self, guest: RestoredGuest) -> None:
        """Note the directory that is about to be made, for the next bhyrecv.  Never raises."""
        note_directory(self._lock, guest.staging)

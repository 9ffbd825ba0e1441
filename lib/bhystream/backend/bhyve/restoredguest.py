"""The record of a bhyve guest at the destination, and the places of its files.

Two directories belong to a guest:

    staging   in memory (tmpfs), for a guest that is started in this move
    kept      loaded/ID.NAME in the state directory, on disk, for one that is not (bhyrecv -u)

Beside kept is the file ID.NAME.started, which names the bhyve that was started
from the stream.  The VM is written there when it is made, and the process before
it becomes bhyve.  So a bhyrecv that finds what a killed bhyrecv left knows both,
and ends exactly these.  The file outlives the other files if nothing else tells
the guest from another guest of its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bhystream import durable
from bhystream.backend.bhyve import ownconf, vmdirectory
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.listening import listens
from bhystream.backend.bhyve.locks import Locks
from bhystream.backend.bhyve.snapshot import FILE
from bhystream.backend.bhyve.snapshotfiles import Files
from bhystream.backend.process import Identity, boot_id, is_alive, kill_process
from bhystream.backend.tree import remove_tree
from bhystream.beneath import exchangeable
from bhystream.errors import BhyError, GuestError, from_oserror
from bhystream.guest import DEAD, Json

ROLE = "destination"
STAGING = "BHYRECV_STAGING"
_PREFIX = "bhyrecv-"
_KEPT = "loaded"
_MEMORY_DIRS = ("/dev/shm", "/tmp", "/var/run")
# `bhyve -r FILE` takes a FILE of NAME_MAX bytes, ".kern" included.
# Source: usr.sbin/bhyve/snapshot.c, strcat_extension(), FreeBSD 15.1.
_MAX_FILE_BYTES = 255 - len(".kern")
_ID_CHARS = 16  # of a stream id, in a directory's name
_STEM = re.compile("[0-9a-f]{16,32}")
_KILL_S = 30.0


@dataclass(frozen=True)
class Started:
    """A bhyve that bhyrecv has started.

    process: None if only the VM was made, as far as is known.  node:
    Host.node_id() of that VM.  is_known: False if the record of the start cannot
    be read, so that nothing is known of the process or the VM.
    """

    process: Identity | None
    node: str
    is_known: bool = True

    def is_alive(self) -> bool:
        """Say whether this very process is alive."""
        return self.process is not None and is_alive(self.process)

    def may_have_run(self, run_dir: Path, name: str) -> bool:
        """Say whether a bhyve that has ended may have let its vCPUs run.

        bhyve makes its checkpoint socket before it lets the vCPUs run, and any
        older socket was removed before the start.  The answer is yes if the
        socket exists, if the host was rebooted since (which removes sockets), or
        if the start is not known.  It is no if no process is recorded, because
        the process is recorded before it becomes bhyve.
        """
        if not self.is_known:
            return True
        if self.process is None:
            return False
        if self.process.boot_id != boot_id():
            return True
        try:
            os.lstat(run_dir / name)
        except FileNotFoundError:
            return False
        except OSError:
            pass  # it cannot be seen, so it may be there
        return True

    def end(self, host: Host, name: str) -> None:
        """Kill the process and destroy its VM, but no other VM of that name.

        If the process has ended before, another bhyve may have taken over its VM
        (VM_REINIT): a VM stays if a bhyve listens at the guest's socket.
        Raises GuestError if the process does not end.
        """
        if self.process is not None and not kill_process(self.process, _KILL_S):
            raise GuestError(f"guest {name}: its bhyve, process {self.process.pid}, does not end")
        if self.node and host.node_id(name) == self.node and not listens(host, name):
            host.destroy(name)


@dataclass(frozen=True)
class RestoredGuest:
    """One guest's record.  Paths are absolute.

    kind: the host's kind.  vmm_dir: the stand-in's directory, "" on FreeBSD.
    name: the guest's name on this host.  kept: the directory for the guest's files
    if bhyrecv -u leaves the guest loaded.  staging: the directory in which the files
    are; the same as kept if the guest is left loaded.  keys: the whole
    bhyve_config(5), host resources included.  memory_bytes: size of the guest's
    memory.  manager: the guest's directory in vm-bhyve's datastore, "" if
    vm-bhyve does not manage the guest.  process, node: the guest's bhyve and its
    VM; None and "" if no bhyve was started yet.  has_power_button: SIGTERM pressed the
    guest's power button at the source, and is to do so here.
    """

    kind: str
    vmm_dir: str
    name: str
    staging: str
    kept: str
    keys: dict[str, str]
    memory_bytes: int
    manager: str
    process: Identity | None = None
    node: str = ""
    has_power_button: bool = False

    @property
    def files(self) -> Files:
        """Return the snapshot files that the guest is started from."""
        return Files(Path(self.staging), FILE)

    @property
    def log_path(self) -> str:
        """Return the path of the log of the guest's bhyve, in the state directory."""
        return str(Path(self.kept).parents[1] / "log" / f"{self.name}.log")

    @property
    def conf(self) -> Path:
        """Return the path of the guest's configuration here; see ownconf.py."""
        if self.locks:
            return self.locks.conf
        return ownconf.path_of(Path(self.kept).parents[1], self.name)

    # vm-bhyve's guest, and its start.

    @property
    def locks(self) -> Locks | None:
        """Return the locks of vm-bhyve's guest, None if vm-bhyve does not manage the guest."""
        if not self.manager:
            return None
        return Locks(self.name, Path(self.manager), socket.gethostname())

    @property
    def vm_start(self) -> Path:
        """Return the directory by which vm-bhyve starts the guest; it may not exist."""
        return _vm_start(Path(self.kept))

    def end_supervisor(self) -> None:
        """Wait until vm-bhyve has cleaned up after a bhyve that has ended.  Never raises."""
        vmdirectory.end(self.vm_start)

    # The bhyve that was started.

    @property
    def started_path(self) -> Path:
        """Return the path of the file that names the started bhyve."""
        return Path(f"{self.kept}.started")

    def started(self) -> Started | None:
        """Return the started bhyve, from the record or from the file; None if there is none."""
        if self.process is not None:
            return Started(self.process, self.node)
        return read_started(self.started_path)

    def write_started(self, started: Started) -> None:
        """Record durably the VM that was made, and the process that is about to become bhyve.

        Raises InputOutputError or AccessError if the file cannot be written.
        """
        fields = {"process": started.process and started.process._asdict(), "node": started.node}
        try:
            durable.write(self.started_path, json.dumps(fields))
        except OSError as error:
            raise from_oserror(error, f"write {self.started_path}") from None

    def forget_started(self) -> None:
        """Remove the file of a start that never ran, or that the record names.  Never raises."""
        with contextlib.suppress(OSError):
            durable.remove(self.started_path)

    def to_json(self, started: Started | None = None) -> Json:
        """Return the record as JSON, with the process and VM of `started` if it is given."""
        whole = replace(self, process=started.process, node=started.node) if started else self
        fields = {**asdict(whole), "process": whole.process and whole.process._asdict()}
        return {"hypervisor": fields.pop("kind"), "role": ROLE, **fields}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> RestoredGuest:
        """Return the guest that to_json() wrote.  Raises GuestError if the record is another."""
        try:
            fields = dict(record)
            if fields.pop("role") != ROLE:
                raise KeyError("role")
            fields["kind"] = fields.pop("hypervisor")
            if fields["process"] is not None:
                fields["process"] = durable.typed(Identity(**fields["process"]))
            return durable.typed(RestoredGuest(**fields))
        except (KeyError, TypeError, ValueError) as error:
            raise GuestError(f"cannot read the record of a bhyve guest: {error}") from None

    # The directories.

    def staging_reasons(self) -> list[str]:
        """Return why the directory of the files could not be made, one line each."""
        if len(os.fsencode(self.files.memory)) > _MAX_FILE_BYTES:
            return [
                f"staging: {self.files.memory}: bhyve -r takes no path longer than"
                f" {_MAX_FILE_BYTES} bytes; name another staging or state directory"
            ]
        if why := exchangeable(self.staging):
            return [f"staging: another user could exchange {self.staging}: {why}"]
        parent = os.path.dirname(self.staging)
        # For a guest that is left loaded, the parent is made together with the directory.
        if self.staging != self.kept and not os.access(parent, os.W_OK | os.X_OK):
            return [f"staging: {parent} is not a directory that can be written to"]
        return []

    def make_staging(self) -> None:
        """Make the directory of the files.  Raises InputOutputError or AccessError if it cannot."""
        try:
            os.mkdir(self.staging, 0o700)
        except OSError as error:
            raise from_oserror(error, f"make the staging directory {self.staging}") from None

    def remove(self) -> None:
        """Remove both directories.  Never raises."""
        for directory in (self.staging, self.kept):
            remove_tree(directory)


def _vm_start(path: Path) -> Path:
    """Return the directory of a start.  path: RestoredGuest.kept, or started_path."""
    return vmdirectory.directory_of(path.parents[1], path.name[:_ID_CHARS])


def read_started(path: Path) -> Started | None:
    """Read what write_started() wrote; return None if there is no file.

    If the file cannot be read, return a Started that is not known.
    """
    try:
        return durable.read(path, _started)
    except BhyError:
        return Started(None, "", is_known=False)


def _started(fields: Any) -> Started:
    process = fields["process"]
    return Started(None if process is None else Identity(**process), str(fields["node"]))


@dataclass(frozen=True)
class Leftover:
    """The files, bhyve and VM that a killed bhyrecv left of one stream and guest.

    There is no record of the stream, or its phase is DEAD.  So the bhyve was
    never released, since STARTED is recorded before a guest may run.  A caller
    of remove() has to have the lock of the guest's name.
    """

    name: str
    directory: Path
    started: Mapping[Path, Started]

    def has_vm(self, host: Host) -> bool:
        """Say whether the VM of that name belongs to this leftover."""
        node = host.node_id(self.name)
        return node != "" and any(one.node == node for one in self.started.values())

    def remove(self, host: Host) -> None:
        """End its bhyve and remove its files.  Raises GuestError if bhyve does not end."""
        for path, one in self.started.items():
            one.end(host, self.name)
            vmdirectory.end(_vm_start(path))
            path.unlink(missing_ok=True)
        remove_tree(self.directory)


def find_leftover(base: Path, directory: Path, name: str) -> Leftover | None:
    """Return what is left of the stream whose files were in a directory, or None if nothing is.

    base: the state directory.  directory: a path like RestoredGuest.staging,
    which is checked.  name: the guest's.  Also returns None if the stream's
    record has a phase other than DEAD, because then --resume and --discard of
    that record end the guest; and if a record or a start cannot be read.
    """
    stem, _, rest = directory.name.removeprefix(_PREFIX).partition(".")
    is_ours = directory.name.startswith(_PREFIX) or directory.parent == base / _KEPT
    if not is_ours or rest != name or not _STEM.fullmatch(stem):
        return None
    if any(_read(path)[0] != DEAD for path in (base / ROLE).glob(f"{stem}*.json")):
        return None
    started = {}
    for path in (base / _KEPT).glob(f"{stem}*.started"):
        one = read_started(path)
        if one is not None and path.name.partition(".")[2] == f"{name}.started":
            if not one.is_known:
                return None
            started[path] = one
    return Leftover(name, directory, started) if started or directory.is_dir() else None


def stream_of(base: Path, node: str) -> str:
    """Return the id of the stream whose record names a VM, or "".  node: Host.node_id()."""
    records = (base / ROLE).glob("*.json")
    return next((path.stem for path in records if _read(path)[1] == node != ""), "")


def _read(path: Path) -> tuple[str, str]:
    """Return a record's phase and its VM, or ("", "") if the record cannot be read."""
    with contextlib.suppress(BhyError):
        return durable.read(path, _phase_and_node) or ("", "")
    return "", ""


def _phase_and_node(fields: Any) -> tuple[str, str]:
    return str(fields["phase"]), str(fields["revive"].get("node", ""))


def last_directory(lock: Path) -> Path | None:
    """Return the directory that was made last under a guest's lock, or None.

    lock: the lock's file, which names the directory.
    """
    with contextlib.suppress(OSError, ValueError):
        text = durable.read_file(lock).decode("utf-8", "surrogateescape")
        return Path(text) if text.startswith("/") else None
    return None


def note_directory(lock: Path, directory: str) -> None:
    """Write the directory that is about to be made into the lock's file.  Never raises."""
    with contextlib.suppress(OSError):
        lock.write_text(directory, "utf-8", "surrogateescape")


def staging_of(root: Path, id_: str, name: str) -> Path:
    """Return the staging directory of a stream and a guest, below a root."""
    return root / f"{_PREFIX}{id_[:_ID_CHARS]}.{name}"


def loaded_directory(base: Path, id_: str, name: str) -> Path:
    """Return the directory of a guest that is left loaded.

    It is not below "held", which is the source's: source and destination may be one host.
    """
    return base / _KEPT / f"{id_}.{name}"


def staging_root(host: Host, base: Path, environment: Mapping[str, str]) -> Path:
    """Return where staging directories are made: in memory (tmpfs), if such a place is found.

    base: the state directory, used if there is no such place.  environment: its
    BHYRECV_STAGING, if set, is used as it is.  Raises InputOutputError or
    AccessError if the directory cannot be made.
    """
    named = environment.get(STAGING)
    if named:
        return Path(named).absolute()
    for directory in _MEMORY_DIRS:
        path = Path(directory)
        if path.is_dir() and os.access(path, os.W_OK) and host.is_memory(path):
            return path
    path = base / "staging"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise from_oserror(error, f"make {path}") from None
    return path

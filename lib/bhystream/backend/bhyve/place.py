"""What is recorded of a bhyve guest at the destination, and where its files are.

Two directories belong to it:

    staging   in memory (tmpfs), for a guest that is started in this move
    kept      loaded/ID.NAME in the state directory, on disk, for one that is not (bhyrecv -u)

and, beside kept, ID.NAME.started: the bhyve that was started from the stream.
Its VM is written there when it is made, its process before that runs bhyve, so
whoever finds what a killed bhyrecv left knows both, and ends exactly these.  It stays when the
files go, where nothing else tells the guest from another one of its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bhystream import durable
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.listening import listens
from bhystream.backend.bhyve.snapshot import FILE
from bhystream.backend.bhyve.snapshotfiles import Files
from bhystream.backend.process import Identity, boot_id, is_alive, kill_process
from bhystream.errors import BhyError, GuestError, from_oserror
from bhystream.guest import DEAD, Json

ROLE = "destination"
STAGING = "BHYRECV_STAGING"
_PREFIX = "bhyrecv-"
_KEPT = "loaded"
_MEMORY_DIRS = ("/dev/shm", "/tmp", "/var/run")
# `bhyve -r FILE` takes NAME_MAX, with ".kern".  Source: usr.sbin/bhyve/snapshot.c,
# strcat_extension(), FreeBSD 15.1.
_MAX_FILE_BYTES = 255 - len(".kern")
_ID_CHARS = 16  # of a stream id, in a directory's name
_STEM = re.compile("[0-9a-f]{16,32}")
_KILL_S = 30.0


@dataclass(frozen=True)
class Started:
    """A bhyve that we have started.

    process: None where its VM was made for it, and nothing more is known.
    node: Host.node_id() of that VM.  is_known: False for one whose record
    cannot be read: anything may have become of it.
    """

    process: Identity | None
    node: str
    is_known: bool = True

    def is_alive(self) -> bool:
        """Say whether this very process lives."""
        return self.process is not None and is_alive(self.process)

    def may_have_run(self, run_dir: Path, name: str) -> bool:
        """Say whether it may have let its vCPUs run, now that it has ended.

        It has made its checkpoint socket by then, of which none was left at
        its start.  After a reboot, which removes sockets, nobody can say, and of
        one that is not known neither.  None runs before its process is written down.
        """
        if not self.is_known:
            return True
        if self.process is None:
            return False
        return self.process.boot_id != boot_id() or os.path.lexists(run_dir / name)

    def end(self, host: Host, name: str) -> None:
        """Kill it, and destroy its VM, and no other of that name.  Raises GuestError.

        Where it has ended, another bhyve may have taken over its VM (VM_REINIT).
        """
        if self.process is not None and not kill_process(self.process, _KILL_S):
            raise GuestError(f"guest {name}: its bhyve, process {self.process.pid}, does not end")
        if self.node and host.node_id(name) == self.node and not listens(host, name):
            host.destroy(name)


@dataclass(frozen=True)
class Place:
    """One guest's record.  Paths are absolute.

    kind: of the host.  vmm_dir: the stand-in's directory, "" on FreeBSD.
    name: of the guest here.  staging: the directory of its files; for a guest
    that is left loaded the same as kept.  keys: the whole bhyve_config(5), host
    resources too.  manager: the guest's directory in vm-bhyve's datastore, ""
    where it is not vm-bhyve's.  process, node: the bhyve that holds the guest,
    and its VM; None and "" where none was started yet.
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

    @property
    def files(self) -> Files:
        """Return the snapshot that the guest is started from."""
        return Files(Path(self.staging), FILE)

    @property
    def log_path(self) -> str:
        """Return the log of a bhyve that we start, in the state directory."""
        return str(Path(self.kept).parents[1] / "log" / f"{self.name}.log")

    # The bhyve that was started.

    @property
    def started_path(self) -> Path:
        """Return the file that names it."""
        return Path(f"{self.kept}.started")

    def started(self) -> Started | None:
        """Return the bhyve that was started, by the record or by what is beside the files."""
        if self.process is not None:
            return Started(self.process, self.node)
        return read_started(self.started_path)

    def write_started(self, started: Started) -> None:
        """Write durably what was made, or is about to be run.  Raises PipeError, AccessError."""
        fields = {"process": started.process and asdict(started.process), "node": started.node}
        try:
            durable.write(self.started_path, json.dumps(fields))
        except OSError as error:
            raise from_oserror(error, f"write {self.started_path}") from None

    def forget_started(self) -> None:
        """Forget a start that never ran, or that the record speaks of.  Never raises."""
        with contextlib.suppress(OSError):
            durable.remove(self.started_path)

    def to_json(self, started: Started | None = None) -> Json:
        """Return the record, JSON."""
        whole = replace(self, process=started.process, node=started.node) if started else self
        fields = asdict(whole)
        return {"hypervisor": fields.pop("kind"), "role": ROLE, **fields}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Place:
        """Return the place that to_json() wrote.  Raises GuestError."""
        try:
            fields = dict(record)
            if fields.pop("role") != ROLE:
                raise KeyError("role")
            fields["kind"] = fields.pop("hypervisor")
            if fields["process"] is not None:
                fields["process"] = Identity(**fields["process"])
            return Place(**fields)
        except (KeyError, TypeError) as error:
            raise GuestError(f"cannot read the record of a bhyve guest: {error}") from None

    # The directories.

    def staging_reasons(self) -> list[str]:
        """Return why the directory of the files could not be made, one line each."""
        if len(os.fsencode(self.files.memory)) > _MAX_FILE_BYTES:
            return [
                f"staging: {self.files.memory}: bhyve -r takes no path longer than"
                f" {_MAX_FILE_BYTES} bytes; name another staging or state directory"
            ]
        parent = os.path.dirname(self.staging)
        # The parent of one that is left loaded is made with it.
        if self.staging != self.kept and not os.access(parent, os.W_OK | os.X_OK):
            return [f"staging: {parent} is not a directory that can be written to"]
        return []

    def make_staging(self) -> None:
        """Make the directory of the files.  Raises PipeError, AccessError."""
        try:
            os.mkdir(self.staging, 0o700)
        except OSError as error:
            raise from_oserror(error, f"make the staging directory {self.staging}") from None

    def remove(self) -> None:
        """Remove both directories.  Never raises."""
        for directory in (self.staging, self.kept):
            shutil.rmtree(directory, ignore_errors=True)


def read_started(path: Path) -> Started | None:
    """Read what write_started() wrote; None where there is none.

    One that cannot be read is one that is not known.
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
    """What a killed bhyrecv left of one stream and guest, of which no record speaks, or DEAD does.

    So nothing of it was released: STARTED is recorded before a guest may run.
    Whoever removes it holds the lock of the guest's name.
    """

    name: str
    directory: Path
    started: Mapping[Path, Started]

    def has_vm(self, host: Host) -> bool:
        """Say whether the VM of that name is this one's."""
        node = host.node_id(self.name)
        return node != "" and any(one.node == node for one in self.started.values())

    def remove(self, host: Host) -> None:
        """End its bhyve and remove its files.  Raises GuestError where that does not end."""
        for path, one in self.started.items():
            one.end(host, self.name)
            path.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)


def find_leftover(base: Path, directory: Path, name: str) -> Leftover | None:
    """Return what is left of a stream whose files were in a directory; None where nothing is.

    base: the state directory.  directory: as Place.staging, from whatever
    source.  name: the guest's.  None also where a record other than DEAD speaks of
    the stream: then that one's verbs end it; and where one cannot be read.
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
    """Return the id of the stream whose record names a VM, "" for none.  node: Host.node_id()."""
    records = (base / ROLE).glob("*.json")
    return next((path.stem for path in records if _read(path)[1] == node != ""), "")


def _read(path: Path) -> tuple[str, str]:
    """Return a record's phase and its VM; ("", "") where it cannot be read."""
    with contextlib.suppress(BhyError):
        return durable.read(path, _phase_and_node) or ("", "")
    return "", ""


def _phase_and_node(fields: Any) -> tuple[str, str]:
    return str(fields["phase"]), str(fields["revive"].get("node", ""))


def last_directory(lock: Path) -> Path | None:
    """Return the directory that was made last under a guest's lock, None for none.

    lock: the lock's file.
    """
    with contextlib.suppress(OSError, ValueError):
        text = lock.read_text("utf-8", "surrogateescape")
        return Path(text) if text.startswith("/") else None
    return None


def note_directory(lock: Path, directory: str) -> None:
    """Let the lock's file name the directory that is about to be made.  Never raises."""
    with contextlib.suppress(OSError):
        lock.write_text(directory, "utf-8", "surrogateescape")


def staging_of(root: Path, id_: str, name: str) -> Path:
    """Return the staging directory of a stream and a guest, below a root."""
    return root / f"{_PREFIX}{id_[:_ID_CHARS]}.{name}"


def kept_of(base: Path, id_: str, name: str) -> Path:
    """Return the directory of a guest that is left loaded.

    Not "held": source and destination may be one host.
    """
    return base / _KEPT / f"{id_}.{name}"


def staging_root(host: Host, base: Path, environment: Mapping[str, str]) -> Path:
    """Return where staging directories are made: in memory, if any such place is known.

    base: the state directory, where nothing better is found.  Raises PipeError,
    AccessError.
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

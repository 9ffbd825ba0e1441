"""A running bhyve guest that was opened: which one it is, what it is made of, its memory.

All of it is known when open_guest() returns, or the guest was refused and
nothing is left open.  Nothing of the guest is changed, and nothing is made.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bhystream.backend.bhyve import backing, verdict, vmbhyve
from bhystream.backend.bhyve.checkpoint import Checkpoint
from bhystream.backend.bhyve.config import GuestConfig, parse, split
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.memory import Memory
from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest
from bhystream.backend.process import Identity, is_alive, is_same
from bhystream.errors import AccessError, BhyError, GoneError, GuestError, IncompatibleError

_SYNC_S = 10.0


@dataclass(frozen=True)
class Opened:
    """One guest.

    manager: what vm-bhyve has of it, None where it is not vm-bhyve's.  process:
    who serves its checkpoint socket.  config: what it runs with.  memory: ours to close.
    """

    host: Host
    name: str
    manager: VmBhyveGuest | None
    process: Identity
    config: GuestConfig
    memory: Memory

    @property
    def who(self) -> str:
        """Return what messages call it."""
        return f"guest {self.name}"

    @property
    def ncpus(self) -> int:
        """Return how many vCPUs it has."""
        return int(self.config.section["keys"]["cpus"])

    def connect(self) -> Checkpoint:
        """Connect to the same process: another guest's memory is not what we have mapped.

        Raises GoneError, and what Checkpoint() raises.
        """
        try:
            made = _connect(self.host, self.name)
        except BhyError:
            self._require_alive()
            raise
        if is_same(made.identity, self.process):
            return made
        made.close()
        raise GoneError(f"{self.who}: another guest has its name now")

    def require_started(self) -> None:
        """Refuse a guest with vCPUs that were never started.

        bhyve ends every checkpoint with letting all vCPUs run, and one that
        the guest has not started runs from wherever its registers say.  Run on
        FreeBSD 15.1, emulated AMD: from address 0.
        """
        try:
            waiting = sorted(self.memory.waiting_vcpus())
        except GuestError:
            self._require_alive()
            raise
        if waiting:
            which, cpus = ", ".join(map(str, waiting)), self.config.section["keys"]["cpus"]
            raise IncompatibleError(
                f"{self.who}: vcpus: {which} of {cpus} were never"
                " started, or are stopped: a checkpoint would let them run",
                "wait until its operating system runs, or give it no more vCPUs than that uses",
            )

    def _require_alive(self) -> None:
        if not is_alive(self.process):
            raise GoneError(f"{self.who}: its bhyve has ended meanwhile")


def open_guest(host: Host, name: str, config_path: str | None, *, force: bool) -> Opened:
    """Open a guest.

    config_path: of -C, or None for what vm-bhyve knows.  force: overrule soft
    reasons.  Raises GuestError, IncompatibleError, AccessError.
    """
    manager = vmbhyve.find(host.datastores(), name, socket.gethostname())
    if not host.exists(name):
        raise GuestError(f"guest {name}: no VM of that name is here")
    if manager:
        manager.locks.require_free()
    config_of = _teller(config_path, manager, name)
    process = _listener(host, name)
    config = config_of(process)
    if reasons := backing.missing(host, config):
        raise IncompatibleError(f"guest {name}: {reasons[0]}", "\n".join(reasons[1:]))
    opened = Opened(host, name, manager, process, config, Memory(host, name))
    try:
        _compare(opened)
        opened.require_started()
        hard, soft = verdict.source_reasons(host, process.pid, manager=manager)
        if reasons := hard + ([] if force else soft):
            raise IncompatibleError(f"guest {name}: {reasons[0]}", "\n".join(reasons[1:]))
    except BaseException:
        opened.memory.close()
        raise
    return opened


def _teller(
    path: str | None, manager: VmBhyveGuest | None, name: str
) -> Callable[[Identity], GuestConfig]:
    """Return what tells the configuration of a process: -C, read now, or vm-bhyve, or bhyrecv."""
    if path is not None:
        given = read_config(path, name)
        return lambda process: given
    if manager is None:
        raise IncompatibleError(
            f"guest {name}: its configuration is not known, and bhyve does not tell it",
            "give it as a bhyve_config(5) file: -C file",
        )
    return manager.running


def _listener(host: Host, name: str) -> Identity:
    """Return the process that serves the guest's checkpoint socket, and has said so."""
    connection = _connect(host, name)
    try:
        if connection.is_settled(_SYNC_S):
            return connection.identity
    finally:
        connection.close()
    raise GoneError(f"guest {name}: its bhyve has just ended")


def _connect(host: Host, name: str) -> Checkpoint:
    return Checkpoint(host.run_dir, name, f"guest {name}")


def _compare(opened: Opened) -> None:
    """Compare the configuration with what the kernel knows of the guest."""
    keys, memory = opened.config.section["keys"], opened.memory
    names = ("memory.size", "sockets", "cores", "threads")
    for key, b in zip(names, (memory.size_bytes, *memory.topology), strict=True):
        if (a := int(keys[key])) != b:
            raise IncompatibleError(
                f"{opened.who}: {key}: the configuration says {a}, the running guest has {b}",
                "it was started with another configuration: give it with -C",
            )


def read_config(path: str, name: str) -> GuestConfig:
    """Read a bhyve_config(5) file (-C).  name: the guest's; wins over the file's.

    Raises GuestError, AccessError; IncompatibleError for what cannot travel.
    """
    try:
        text = Path(path).read_text("utf-8", "surrogateescape")
    except PermissionError as error:
        raise AccessError(f"cannot read {path}: {error.strerror}") from None
    except OSError as error:
        raise GuestError(f"cannot read {path}: {error.strerror}") from None
    return split(parse(text), name)

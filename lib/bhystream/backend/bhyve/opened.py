"""A running bhyve guest that was opened: its process, its configuration, its memory.

open_guest() either returns all of these, or refuses the guest and leaves
nothing open.  It changes nothing in the guest and makes nothing on the host.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bhystream.backend.bhyve import backing, verdict
from bhystream.backend.bhyve.checkpoint import Checkpoint
from bhystream.backend.bhyve.config import GuestConfig, parse, split
from bhystream.backend.bhyve.datastore import find
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.memory import Memory
from bhystream.backend.process import Identity, is_alive, is_same
from bhystream.errors import AccessError, BhyError, GuestEndedError, GuestError, IncompatibleError

if TYPE_CHECKING:
    from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest

_SYNC_S = 10.0


class Opened(NamedTuple):
    """One opened guest.

    manager: vm-bhyve's guest, None if vm-bhyve does not manage it.  process: the
    process that serves the guest's checkpoint socket.  config: the configuration that
    the guest runs with.  memory: the guest's memory, which the owner of
    this object closes.
    """

    host: Host
    name: str
    manager: VmBhyveGuest | None
    process: Identity
    config: GuestConfig
    memory: Memory

    @property
    def who(self) -> str:
        """Return what messages call the guest."""
        return f"guest {self.name}"

    @property
    def ncpus(self) -> int:
        """Return how many vCPUs the guest has."""
        return int(self.config.section["keys"]["cpus"])

    def connect(self) -> Checkpoint:
        """Connect to the process that was opened, whose memory is mapped, and to no other.

        Raises GuestEndedError if that process has ended, or if another one
        listens, and what Checkpoint() raises.
        """
        try:
            made = _connect(self.host, self.name)
        except BhyError:
            self._require_alive()
            raise
        if is_same(made.identity, self.process):
            return made
        made.close()
        raise GuestEndedError(f"{self.who}: another guest has its name now")

    def require_started(self) -> None:
        """Refuse a guest with vCPUs that were never started.

        At the end of every checkpoint bhyve lets all vCPUs run, and a vCPU that
        the guest has not started would run from wherever its registers say: on
        FreeBSD 15.1, emulated AMD, it ran from address 0.
        Raises IncompatibleError if a vCPU waits, GuestEndedError if bhyve has ended.
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
            raise GuestEndedError(f"{self.who}: its bhyve has ended meanwhile")


def open_guest(host: Host, name: str, config_path: str | None, *, force: bool) -> Opened:
    """Open a guest.

    config_path: the file of -C, or None to use what vm-bhyve knows.  force:
    overrule soft reasons.  Raises GuestError if the guest is not here or does
    not answer, IncompatibleError if it cannot be sent, or AccessError.
    """
    manager = find(host.datastores(), name, socket.gethostname())
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
    """Return a function that returns a process's configuration.

    The configuration is the file of -C, read now, or comes from vm-bhyve or bhyrecv.
    """
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
    """Return the process that serves the guest's checkpoint socket, once it has answered there."""
    connection = _connect(host, name)
    try:
        if connection.is_settled(_SYNC_S):
            return connection.identity
    finally:
        connection.close()
    raise GuestEndedError(f"guest {name}: its bhyve has just ended")


def _connect(host: Host, name: str) -> Checkpoint:
    return Checkpoint(host.run_dir, name, f"guest {name}")


def _compare(opened: Opened) -> None:
    """Compare the configuration with the memory size and topology that the kernel reports.

    Raises IncompatibleError if they differ.
    """
    keys, memory = opened.config.section["keys"], opened.memory
    names = ("memory.size", "sockets", "cores", "threads")
    for key, b in zip(names, (memory.size_bytes, *memory.topology), strict=True):
        if (a := int(keys[key])) != b:
            raise IncompatibleError(
                f"{opened.who}: {key}: the configuration says {a}, the running guest has {b}",
                "the guest was started with another configuration: give that one with -C",
            )


def read_config(path: str, name: str) -> GuestConfig:
    """Read a bhyve_config(5) file (-C).  name: the guest's; it overrides the name in the file.

    Raises GuestError or AccessError if the file cannot be read, and
    IncompatibleError if the configuration cannot travel.
    """
    try:
        text = Path(path).read_text("utf-8", "surrogateescape")
    except PermissionError as error:
        raise AccessError(f"cannot read {path}: {error.strerror}") from None
    except OSError as error:
        raise GuestError(f"cannot read {path}: {error.strerror}") from None
    return split(parse(text), name)

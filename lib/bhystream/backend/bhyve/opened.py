"""A running bhyve guest that was opened: its process, its configuration, its memory.

open_guest() either returns all of these, or refuses the guest and leaves
nothing open.  It changes nothing in the guest and makes nothing on the host.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bhystream.backend.bhyve import backing, verdict
from bhystream.backend.bhyve.checkpoint import Checkpoint
from bhystream.backend.bhyve.config import GuestConfig, parse, split
from bhystream.backend.bhyve.datastore import find
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.memory import Memory
from bhystream.backend.process import Identity, is_alive, is_same
from bhystream.backend.refusals import Refusals, refusal
from bhystream.errors import (
    AccessError,
    BhyError,
    GuestEndedError,
    GuestError,
    IncompatibleError,
    InternalError,
    Interrupted,
    Reason,
)

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

        Raises what require_started() raises.
        """
        require_started(self.who, self.process, self.memory)

    def _require_alive(self) -> None:
        _require_alive(self.who, self.process)


def _require_alive(who: str, process: Identity) -> None:
    if not is_alive(process):
        raise GuestEndedError(f"{who}: its bhyve has ended meanwhile")


def require_started(who: str, process: Identity, memory: Memory) -> None:
    """Refuse a guest with vCPUs that were never started.

    At the end of every checkpoint bhyve lets all vCPUs run, and a vCPU that
    the guest has not started would run from wherever its registers say: on
    FreeBSD 15.1, emulated AMD, it ran from address 0.
    Raises IncompatibleError if a vCPU waits, GuestEndedError if bhyve has ended.
    """
    try:
        waiting = sorted(memory.waiting_vcpus())
    except GuestError:
        _require_alive(who, process)
        raise
    if not waiting:
        return
    cpus = math.prod(memory.topology)
    cure = "wait until its operating system runs"
    about = [f"cpus={used}"] if (used := cpus - len(waiting)) else []
    cure += "".join(f", or start it with {key}" for key in about)
    what = (
        f"vcpus: {', '.join(map(str, waiting))} of {cpus} were never started, or are stopped: a"
        " checkpoint would let them run"
    )
    error = refusal(Reason(what, cure, *about))
    error.args = (f"{who}: {what}",)
    raise error


def open_guest(
    host: Host, name: str, base: Path, config_path: str | None, *, force: bool
) -> Opened:
    """Open a guest.

    base: the state directory.  config_path: the file of -C, or None to use what vm-bhyve
    knows, or what bhyrecv started the guest with.  force: overrule soft reasons.  Raises
    GuestError if the guest is not here or does not answer, IncompatibleError if it cannot
    be sent, or AccessError.  The error states every reason that was found, and its class is
    that of the first.
    """
    manager = find(host.datastores(), name, socket.gethostname())
    if not host.exists(name):
        raise GuestError(f"guest {name}: no VM of that name is here", "ls /dev/vmm shows the names")
    against = Refusals(f"guest {name}")
    if manager:
        against.extend(manager.locks.reasons())
    config, opened = None, None
    try:
        config, process = _describe(host, name, base, config_path, manager, against)
        memory = Memory(host, name)
        try:
            if config is not None:
                opened = Opened(host, name, manager, process, config, memory)
                _compare(config, memory, against)
            with against.collecting():
                require_started(against.who, process, memory)
            hard, soft = verdict.source_reasons(host, process.pid, manager=manager)
            against.extend(hard + ([] if force else soft))
        except BaseException:
            memory.close()
            raise
        if opened is not None and not against.reasons:
            return opened
        memory.close()
    except BhyError as error:
        if not against.reasons or isinstance(error, Interrupted):
            raise
        against.add(error)
    if manager:
        against.reasons = in_its_words(against.reasons, manager, config.full if config else {})
    raise against.merged() or InternalError("a guest was refused without a reason")


def _describe(
    host: Host,
    name: str,
    base: Path,
    path: str | None,
    manager: VmBhyveGuest | None,
    against: Refusals,
) -> tuple[GuestConfig | None, Identity]:
    """Return the guest's configuration, None if it is not known, and its process.

    The configuration is the file of -C, or comes from vm-bhyve, or from a bhyrecv that has
    started the guest without vm-bhyve.  Raises what read_config() and _listener() raise, but
    for IncompatibleError.
    """
    config = None
    with against.collecting():
        if path is not None:
            config = read_config(path, name, against)
    process = _listener(host, name)
    with against.collecting():
        if path is None:
            config = (
                manager.running(process, against)
                if manager
                else _restored(host, name, base, process, against)
            )
        if config is not None:
            against.extend(backing.missing(host, config))
    return config, process


def _restored(
    host: Host, name: str, base: Path, process: Identity, against: Refusals
) -> GuestConfig:
    """Return what bhyrecv, or its line, has started this process with.

    Raises IncompatibleError.
    """
    from bhystream.backend.bhyve import ownconf  # with -C, nobody asks

    path = ownconf.path_of(base, name)
    found = ownconf.read(path)
    is_its = found is not None and (
        found.is_of(process) or ownconf.restarted_by(host.parent_command(process.pid)) == str(path)
    )
    if found and is_its:
        return split(parse(found.config), name, against)
    cure = (
        "give it as a bhyve_config(5) file: -C file; its bhyve command line, with -o"
        " config.dump=1 added, prints the file and starts nothing"
    )
    if found:
        cure += f"; if the guest was started again from {path}, that is the file"
    what = f"{against.who}: its configuration is not known, and bhyve does not tell it"
    raise IncompatibleError(what, cure)


def in_its_words(
    reasons: Sequence[Reason], manager: VmBhyveGuest, keys: Mapping[str, str]
) -> list[Reason]:
    """Return reasons about a guest of vm-bhyve with their cures in terms of its NAME.conf.

    keys: the guest's configuration, as far as it is known.
    """
    if not any(one.about for one in reasons):
        return list(reasons)
    from bhystream.backend.bhyve.cures import translated

    try:
        conf = manager.conf()
    except BhyError:  # whoever needs NAME.conf says so
        return list(reasons)
    return [translated(one, manager.name, conf, keys) for one in reasons]


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


def _compare(config: GuestConfig, memory: Memory, against: Refusals) -> None:
    """Compare the configuration with the memory size and topology that the kernel reports."""
    keys = config.section["keys"]
    names = ("memory.size", "sockets", "cores", "threads")
    for key, b in zip(names, (memory.size_bytes, *memory.topology), strict=True):
        # What the configuration leaves out has been refused already.
        if key in keys and (a := int(keys[key])) != b:
            what = f"{key}: the configuration says {a}, the running guest has {b}"
            cure = f"give with -C the configuration that it was started with, with {key}={b}"
            against.extend([Reason(what, cure)])


def read_config(path: str, name: str, against: Refusals | None = None) -> GuestConfig:
    """Read a bhyve_config(5) file (-C).  name: the guest's; it overrides the name in the file.

    against: as for split().  Raises GuestError or AccessError if the file cannot be read,
    and IncompatibleError if it is malformed, or without `against` if it cannot travel.
    """
    try:
        text = Path(path).read_text("utf-8", "surrogateescape")
    except PermissionError as error:
        raise AccessError(f"cannot read {path}: {error.strerror}") from None
    except OSError as error:
        raise GuestError(f"cannot read {path}: {error.strerror}") from None
    return split(parse(text), name, against)

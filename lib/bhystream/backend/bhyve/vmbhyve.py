"""A guest that vm-bhyve manages: its directory, and bhyve's arguments at its last start.

NAME.conf is vm-bhyve's own description; at each start vm-bhyve computes bhyve's
argv from NAME.conf, with taps and a VNC port that exist only then.  So the argv
of the last start is taken from vm-bhyve.log, where vm-bhyve writes it.

    source         the start must be that of the bhyve that runs: either run.lock is
                   vm-bhyve's and the log records no end after the start, or bhyrecv
                   started this very process (locks.py)
    destination    the start must be the last one, ended or not, and the .conf must not
                   have named other disks since (vmconf.py)

Both compare uuid and MAC addresses with the .conf, since the log may be another machine's.

Source, read, never run: freebsd/vm-bhyve@0c93a8fb, lib/vm-run, vm::run(), and
freebsd/vm-bhyve@06e1623d, lib/vm-util, util::log(): "DATE:  [bhyve options: ...]",
one entry per line, in the order options, devices, console, ISO device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bhystream.backend.bhyve import keys as known
from bhystream.backend.bhyve import vmconf
from bhystream.backend.bhyve.argv import parse_argv
from bhystream.backend.bhyve.config import GuestConfig, parse, read, split
from bhystream.backend.bhyve.keys import refuse, shown
from bhystream.backend.bhyve.locks import Locks
from bhystream.backend.process import Identity
from bhystream.backend.refusals import Refusals
from bhystream.errors import from_oserror

CURE = "name a bhyve_config(5) file of this guest with -C"
CURE_THERE = "give each resource with -o, or start the guest here once with vm-bhyve"
# vm-bhyve rotates its log at a start, if the log has 1 MiB or more.
_MAX_LOG_BYTES = 8 << 20
_NETWORK = re.compile(r"network[0-9]{1,3}_type")
# An entry follows the date, which is ISO 8601 since 1.7, and was "Feb 03 04:05:06" before.
_ENTRY = re.compile(r"[^\[]{1,40}: +\[bhyve (options|devices|console|iso device): (.*)\]")
# Entries which say that the last start has ended or not yet run bhyve, or that bhyve runs again.
_SAID = re.compile(
    r".{1,40}?: (bhyve exited with status .*|stopped|suspended|fatal;.*|initialising|restarting"
    r"|starting bhyve \(run [0-9]+\))"
)
# vm-bhyve writes -r as the last option; only its argument may contain spaces.
_RESUMED = re.compile(r"(?:^| )-r /.*\.save$")


@dataclass(frozen=True)
class VmBhyveGuest:
    """A guest's directory in a datastore.  hostname: what hostname(1) prints on this host."""

    name: str
    directory: Path
    hostname: str

    @property
    def locks(self) -> Locks:
        """Return the guest's locks."""
        return Locks(self.name, self.directory, self.hostname)

    def conf(self) -> dict[str, str]:
        """Return NAME.conf's keys, without running anything in it.

        Raises IncompatibleError if the file is too long, AccessError or
        InputOutputError if it cannot be read.
        """
        path = self.directory / f"{self.name}.conf"
        if path.stat().st_size > vmconf.MAX_CONF_BYTES:
            raise refuse(f"{path} is longer than {vmconf.MAX_CONF_BYTES} bytes")
        return vmconf.parse(_read(path, vmconf.MAX_CONF_BYTES))

    @property
    def _log(self) -> Path:
        return self.directory / "vm-bhyve.log"

    def _last_start(self, cure: str) -> Start:
        """Return the last start of the log.  Raises IncompatibleError if the log records none."""
        start = last_start(_read(self._log, _MAX_LOG_BYTES))
        if start is None:
            raise refuse(f"{self._log} records no start of {self.name}", cure)
        return start

    def running(self, process: Identity, against: Refusals | None = None) -> GuestConfig:
        """Return the configuration with which vm-bhyve or bhyrecv started the running guest.

        process: the guest's bhyve.  against: as for split(); gets also the error if the
        configuration and the .conf disagree on the uuid or a MAC address.  Raises
        IncompatibleError if no start is known to be that of this process, and without
        `against` for everything.
        """
        found = against or Refusals()
        config = self._running(process, found)
        with found.collecting():
            self._compare(self.conf(), config, CURE)
        if against is None:
            found.require_none()
        return config

    def _running(self, process: Identity, against: Refusals) -> GuestConfig:
        if ours := self.locks.started_with():
            if not ours.is_of(process):
                raise refuse(
                    f"{self.directory}/bhysend.conf is of another start than process"
                    f" {process.pid}, which runs {self.name}",
                    CURE,
                )
            return split(parse(ours.config), self.name, against)
        if not self.locks.is_supervised():
            raise refuse(
                f"{self._log} does not describe the bhyve that runs: vm-bhyve has not started"
                f" it, as {self.directory}/run.lock does not name this host",
                CURE,
            )
        start = self._last_start(CURE)
        if start.ended:
            raise refuse(
                f"{self._log} does not describe the bhyve that runs: after the last start it"
                f" says {shown(start.ended)}",
                CURE,
            )
        return split(parse_argv([*start.argv(), self.name], against), self.name, against)

    def last_started(self) -> GuestConfig:
        """Return the configuration with which vm-bhyve or bhyrecv last started the guest here.

        Raises IncompatibleError if no start is known, if the .conf has another
        uuid or MAC address than the start, or has since named other disks, another
        number of cards, or another kind of loader.
        """
        if ours := self.locks.started_with():
            found = read(ours.config, self.name)
            generated = found.full
        else:
            start = self._last_start(CURE_THERE)
            found = split(parse_argv([*start.argv(), self.name]), self.name)
            # The devices alone, without an ISO to install from and without bhyve_options.
            generated = parse_argv([*start.parts["devices"].split(), self.name])
        conf = self.conf()
        self._compare(conf, found, CURE_THERE)
        devices = known.pci_devices(generated)
        paths = [generated.get(f"{disk}.path", "") for disk in known.disks(generated, devices)]
        roms = found.full.get("lpc.bootrom"), found.full.get("lpc.bootvars")
        count = len(known.nets(devices))
        if changed := vmconf.changes(conf, self.directory, paths, count, roms):
            raise refuse(
                f"{self.name}.conf was changed since the guest last ran here: {'; '.join(changed)}",
                CURE_THERE,
            )
        return found

    def _compare(self, conf: dict[str, str], found: GuestConfig, cure: str) -> None:
        """Raise IncompatibleError if the .conf has a uuid or a MAC address that the start had not.

        found: may lack what was refused.  cure: the error's hint.
        """
        guest = found.section["keys"]
        # bhyve_options may add further cards, so each address only has to be among them.
        macs = {guest.get(f"{net}.mac") for net in known.nets(known.pci_devices(guest))}
        macs.discard(None)
        wanted = [("uuid", {guest["uuid"]})] if "uuid" in guest else []
        wanted += [
            (f"{key.removesuffix('type')}mac", macs) for key in conf if _NETWORK.fullmatch(key)
        ]
        for key, there in wanted:
            ours = conf.get(key)
            if ours and (known.mac(ours) or ours.lower()) not in there:
                had = ", ".join(sorted(there)) or "none"
                raise refuse(
                    f"{self.name}.conf has {key} {shown(ours)}, the last start had {had}", cure
                )


@dataclass(frozen=True)
class Start:
    """The last start that a vm-bhyve.log records.

    parts: the log's entries, by the word behind "bhyve".  ended: the later entry
    which says that this start's bhyve does not run, "" if there is none.
    """

    parts: Mapping[str, str]
    ended: str

    def argv(self) -> list[str]:
        """Return bhyve's words, in vm-bhyve's order: devices, options, ISO, console.

        The guest's name is not among them.  vm-bhyve itself splits the words at
        spaces, so no quoting is lost.
        """
        order = ("devices", "options", "iso device", "console")
        return [word for part in order for word in self.parts.get(part, "").split()]


def last_start(log: str) -> Start | None:
    """Return the last start that a vm-bhyve.log records, or None if it records none.

    NULs are dropped: no argument of a program holds one, and a power cut may leave some.
    """
    parts: dict[str, str] = {}
    ended = ""
    for line in log.replace("\0", "").split("\n"):
        entry, said = _ENTRY.fullmatch(line), _SAID.fullmatch(line)
        if entry and entry[1] == "options":
            parts, ended = {"options": _RESUMED.sub("", entry[2])}, ""
        elif entry and parts:
            parts[entry[1]] = entry[2]
        elif said and said[1].startswith("starting"):
            # bhyve runs again with the same options, which older versions of vm-bhyve write once.
            ended = ""
        elif said and not (ended and said[1] == "restarting"):
            ended = said[1]
    return Start(parts, ended) if "devices" in parts else None


def _read(path: Path, limit: int) -> str:
    """Return a file's text, its last `limit` bytes if it is longer."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - limit))
            data = file.read(limit)
    except OSError as error:
        raise from_oserror(error, f"read {path}") from error
    return data.decode("utf-8", "surrogateescape")

"""A guest that vm-bhyve manages: where it is, and what bhyve was last started with.

NAME.conf is vm-bhyve's own description; bhyve's argv is computed from it at
each start, with taps and a VNC port that exist only then.  So the argv of the
last start is taken from vm-bhyve.log, where vm-bhyve writes it, and compared
with the .conf: a log of another machine, or one that was edited since, must
not describe a running guest.

Confirmed in source, never run: freebsd/vm-bhyve@0c93a8fb lib/vm-run, vm::run(),
and lib/vm-util@06e1623d, util::log(), "DATE:  [bhyve options: ...]", one entry
a line, in the order options, devices, console, ISO device.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bhystream.backend.bhyve import keys as known
from bhystream.backend.bhyve.argv import parse_argv
from bhystream.backend.bhyve.config import GuestConfig, read, split
from bhystream.backend.bhyve.keys import refuse, shown
from bhystream.backend.bhyve.locks import Locks
from bhystream.errors import from_oserror

CURE = "name a bhyve_config(5) file of this guest with -C"
_MAX_CONF_BYTES = 256 << 10
# vm-bhyve rotates its log at a start, from 1 MiB on.
_MAX_LOG_BYTES = 8 << 20
_NETWORK = re.compile(r"network\d{1,3}_type")
_CONF_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
# Behind the date: ISO 8601 since 1.7, "Feb 03 04:05:06" before.
_ENTRY = re.compile(r"[^\[]{1,40}: +\[bhyve (options|devices|console|iso device): (.*)\]")
# Written last of all options, and the only one whose argument may hold spaces.
_RESUMED = re.compile(r"(?:^| )-r /.*\.save$")


@dataclass(frozen=True)
class VmBhyveGuest:
    """A guest's directory in a datastore.  hostname: of this host, as hostname(1) prints it."""

    name: str
    directory: Path
    hostname: str

    @property
    def locks(self) -> Locks:
        """Return the guest's locks."""
        return Locks(self.name, self.directory, self.hostname)

    def conf(self) -> dict[str, str]:
        """Return NAME.conf's keys; nothing of it is run.  Raises IncompatibleError."""
        path = self.directory / f"{self.name}.conf"
        return parse_conf(_read(path, _MAX_CONF_BYTES), path.name)

    def argv(self) -> list[str]:
        """Return bhyve's argv at the last start, without the program.

        Raises IncompatibleError where the log holds none.
        """
        path = self.directory / "vm-bhyve.log"
        words = last_argv(_read(path, _MAX_LOG_BYTES))
        if words is None:
            raise refuse(f"{path} records no start of {self.name}", CURE)
        return [*words, self.name]

    def config(self) -> GuestConfig:
        """Return the configuration of the last start, by vm-bhyve or by ours.

        Raises IncompatibleError where it and the .conf disagree on the uuid
        or a MAC address, or where something of it cannot travel.
        """
        ours = self.locks.started_with()
        found = read(ours, self.name) if ours else split(parse_argv(self.argv()), self.name)
        self._compare(self.conf(), found)
        return found

    def _compare(self, conf: dict[str, str], found: GuestConfig) -> None:
        """Refuse a .conf whose uuid or MAC addresses the last start did not have."""
        guest = found.section["keys"]
        # bhyve_options may add cards of its own, so each address only has to be there.
        macs = {guest[f"{net}.mac"] for net in known.nets(known.pci_devices(guest))}
        wanted = [("uuid", {guest["uuid"]})]
        wanted += [
            (f"{key.removesuffix('type')}mac", macs) for key in conf if _NETWORK.fullmatch(key)
        ]
        for key, there in wanted:
            ours = conf.get(key)
            if ours and (known.mac(ours) or ours.lower()) not in there:
                had = ", ".join(sorted(there)) or "none"
                raise refuse(
                    f"{self.name}.conf has {key} {shown(ours)}, the last start had {had}", CURE
                )


def find(datastores: Sequence[Path], name: str, hostname: str) -> VmBhyveGuest | None:
    """Return vm-bhyve's guest of that name, the first in the datastores' order, or None.

    datastores: of Host.datastores(), the default one first.
    """
    if not known.NAME.fullmatch(name):
        return None
    for datastore in datastores:
        directory = datastore / name
        if (directory / f"{name}.conf").is_file():
            return VmBhyveGuest(name, directory, hostname)
    return None


def parse_conf(text: str, what: str) -> dict[str, str]:
    """Return the keys of a sysrc-style file, the last of each one.

    Quotes and backslashes as sh(1) reads them; "$" and "`" stay what they are.
    A line that sets nothing is passed over.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            raise refuse(f"{what}: line {number}: a quote is open") from None
        key, equals, value = words[0].partition("=") if words else ("", "", "")
        if equals and _CONF_KEY.fullmatch(key):
            found[key] = value
    return found


def last_argv(log: str) -> list[str] | None:
    """Return the words of the last start that a vm-bhyve.log records, None without one.

    In vm-bhyve's order: devices, options, ISO, console.  The name is not in
    it.  vm-bhyve itself parts the words at spaces, so no quoting is lost.
    """
    parts: dict[str, str] = {}
    for line in log.splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry and entry[1] == "options":
            parts = {"options": _RESUMED.sub("", entry[2])}
        elif entry and parts:
            parts[entry[1]] = entry[2]
    if "devices" not in parts:
        return None
    order = ("devices", "options", "iso device", "console")
    return [word for part in order for word in parts.get(part, "").split()]


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

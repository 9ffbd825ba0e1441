"""The configuration that bhyrecv has last started a guest with, for its next move or start.

bhyve does not tell its configuration, and no description of a guest travels with the
guest but this one.  So bhyrecv writes it into a bhyve_config(5) file, whose first line
names the process that it is true of:

    # process PID START_TICKS BOOT_ID

bhysend reads the file if exactly this process runs the guest, or if the script of
notices() has started the guest from it.  For a guest of vm-bhyve
the file is bhysend.conf beside run.lock, and for any other guest conf/NAME.conf in the
state directory.  There it also serves to start the guest again, which nobody else does.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bhystream import durable
from bhystream.backend.bhyve.keys import refuse
from bhystream.backend.process import Identity, is_same
from bhystream.errors import BhyError, from_oserror

MAX_CONF_BYTES = 256 << 10
_RESTARTS = re.compile(r"sh -c .* pwait -v ([0-9]+) .* bhyve -k (\S+) ([\w.-]+); .*", re.ASCII)
_PROCESS = re.compile(r"# process ([0-9]{1,10}) (-?[0-9]{1,20}) ([0-9A-Za-z-]{1,64})")


@dataclass(frozen=True)
class OwnConf:
    """A guest's start by bhyrecv.

    config: bhyve_config(5) text.  process: the guest's bhyve, None if not known.
    """

    config: str
    process: Identity | None

    def is_of(self, who: Identity) -> bool:
        """Say whether the file is true of a process."""
        return self.process is not None and is_same(self.process, who)


def path_of(base: Path, name: str) -> Path:
    """Return the path of the file of a guest that vm-bhyve does not know.

    base: the state directory.
    """
    return base / "conf" / f"{name}.conf"


def write(path: Path, config: str, who: Identity | None) -> None:
    """Write the file, durably.

    config: bhyve_config(5) text.  who: the guest's bhyve; if it is None, the next move of
    the guest needs -C.  Raises AccessError or InputOutputError if the file cannot be written.
    """
    head = f"# process {who.pid} {who.start_ticks} {who.boot_id}\n" if who else ""
    try:
        # The file may have a VNC password.
        durable.write(path, f"{head}{config.removesuffix(chr(10))}\n", 0o600)
    except OSError as error:
        raise from_oserror(error, f"write {path}") from error


def remove(path: Path) -> None:
    """Remove the file of an earlier start.  Raises AccessError or InputOutputError."""
    try:
        durable.remove(path)
    except OSError as error:
        raise from_oserror(error, f"remove {path}") from error


def read(path: Path) -> OwnConf | None:
    """Return what the file says, None if there is no such file.

    Raises AccessError or InputOutputError if it cannot be read, IncompatibleError if it is
    too long to be ours.
    """
    try:
        data = durable.read_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_oserror(error, f"read {path}") from error
    if len(data) > MAX_CONF_BYTES:
        raise refuse(f"{path} is longer than {MAX_CONF_BYTES} bytes")
    text = data.decode("utf-8", "surrogateescape")
    if not text:
        return None
    found = _PROCESS.fullmatch(text.partition("\n")[0])
    return OwnConf(text, Identity(int(found[1]), int(found[2]), found[3]) if found else None)


# Who starts the guest again.


def _loop(path: str, name: str, pid: str) -> str:
    """Return the script that waits for the guest's bhyve, and starts it again after each reboot.

    A reboot is a status of 0, and leaves the VM: if there is none to be destroyed, the guest
    was saved into files, or something else has happened.
    """
    return (
        f'[ "$(pgrep -fx "bhyve: {name}")" = {pid} ] &&'
        f' pwait -v {pid} | grep -q "status 0" &&'
        f" while bhyvectl --destroy --vm={name} && bhyve -k {path} {name}; do :; done"
    )


def restarted_by(command: str) -> str | None:
    """Return the file with which our script starts a guest; None if this is not our script.

    command: the command line of the parent of the guest's bhyve.
    """
    found = _RESTARTS.fullmatch(command)
    if not found:
        return None
    pid, path, name = found.groups()
    return path if command == f"sh -c {_loop(path, name, pid)}" else None


def notices(path: Path, name: str, keys: Mapping[str, str], who: Identity) -> list[str]:
    """Say that nothing starts the guest again, and which line does.

    who: the guest's bhyve.  Only bhyve's own firmware boots a guest; any other has to be loaded
    by its loader each time.  The line may be given twice: only one of them goes on.
    """
    told = "nothing starts it again when it reboots"
    try:
        found = read(path)
        if found is None or not found.is_of(who):
            return [f"{told}; its configuration was not kept here"]
    except BhyError as error:
        return [f"{told}; its configuration was not kept here: {error}"]
    told += f"; its configuration here is {path}"
    if "bootrom" not in keys and "lpc.bootrom" not in keys:
        return [f"{told}; its loader has to load it again first"]
    loop = shlex.quote(_loop(shlex.quote(str(path)), name, str(who.pid)))
    lock = shlex.quote(f"{path}.lock")
    return [f"{told}; this line starts it again:", f"  daemon -f lockf -st 0 {lock} sh -c {loop}"]

"""The configuration that bhyrecv started a guest with, kept as long as the guest may need it.

bhyve does not tell its configuration, and no description of a guest travels with the
guest but this one.  So bhyrecv writes it into a bhyve_config(5) file, whose first line
names the process that it is true of:

    # process PID START_TICKS BOOT_ID

bhysend reads the file if exactly this process runs the guest.  For a guest of vm-bhyve
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
from bhystream.backend.process import Identity
from bhystream.errors import from_oserror

MAX_CONF_BYTES = 256 << 10
_PROCESS = re.compile(r"# process ([0-9]{1,10}) (-?[0-9]{1,20}) ([0-9A-Za-z-]{1,64})")


@dataclass(frozen=True)
class OwnConf:
    """A guest's start by bhyrecv.

    config: bhyve_config(5) text.  process: the guest's bhyve, None if not known.
    """

    config: str
    process: Identity | None


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


def read(path: Path) -> OwnConf | None:
    """Return what the file says, None if there is no such file.

    Raises AccessError or InputOutputError if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONF_BYTES).decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_oserror(error, f"read {path}") from error
    if not text:
        return None
    found = _PROCESS.fullmatch(text.partition("\n")[0])
    return OwnConf(text, Identity(int(found[1]), int(found[2]), found[3]) if found else None)


def notices(path: Path, name: str, keys: Mapping[str, str], who: Identity) -> list[str]:
    """Say that nothing starts the guest again, and which line does, as vmrun.sh would.

    who: the guest's bhyve, whose status is 0 if the guest reboots.  Only bhyve's own
    firmware boots a guest; any other has to be loaded by its loader each time.
    """
    told = f"nothing starts it again when it reboots; its configuration here is {path}"
    if "bootrom" not in keys and "lpc.bootrom" not in keys:
        return [f"{told}; its loader has to load it again first"]
    start = f"bhyve -k {shlex.quote(str(path))} {name}"
    loop = (
        f'pwait -v {who.pid} | grep -q "status 0" || exit;'
        f" while bhyvectl --destroy --vm={name}; {start}; do :; done"
    )
    return [f"{told}; this line starts it again:", f"  daemon -f sh -c {shlex.quote(loop)}"]

"""Where a process hangs on Linux: what is above it, and which unit of systemd it is in.

Source: proc_pid_stat(5), proc_pid_cmdline(5), cgroups(7); sd_booted(3), systemctl(1).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from bhystream.backend import programs
from bhystream.errors import GuestError

_USER_MANAGER = re.compile(r"user@([0-9]{1,10})\.service")
# Fields of proc_pid_stat(5), counted from the third: field 2 may hold spaces and parentheses.
_PARENT = 4 - 3
_ARG_START = 48 - 3


@dataclass(frozen=True)
class Above:
    """One process above another.

    command: its command line, "" where that may not be seen.  is_fed: it was
    forked and never called exec, or its standard input is no terminal: a shell
    without a script in its command line may be running one all the same.
    """

    pid: int
    command: str
    is_fed: bool = False


def above(pid: int) -> list[Above]:
    """Return the processes above one, its parent first, as far as this PID namespace shows them."""
    found: list[Above] = []
    parent = _parent(_stat(pid))
    while parent > 0:
        stat = _stat(parent)
        found.append(Above(parent, command_of(parent), _is_copy(parent, stat) or _is_fed(parent)))
        parent = _parent(stat)
    return found


def command_of(pid: int) -> str:
    """Return the command line of a process, "" where it may not be seen."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _stat(pid: int) -> list[bytes]:
    """Return the fields of proc_pid_stat(5) from the third on, none where the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return []
    return text[text.rindex(b")") + 2 :].split()


def _parent(stat: list[bytes]) -> int:
    return int(stat[_PARENT]) if stat else 0


def _is_copy(pid: int, stat: list[bytes]) -> bool:
    """Say whether a process runs its parent's program because it never called exec.

    Its arguments then lie where the parent's do, which exec would have moved.
    The kernel tells where only to those who may trace the process, others 0.
    """
    if not stat or stat[_ARG_START] == b"0":
        return False
    other = _stat(_parent(stat))
    try:
        return (
            bool(other)
            and other[_ARG_START] == stat[_ARG_START]
            and os.readlink(f"/proc/{pid}/exe") == os.readlink(f"/proc/{_parent(stat)}/exe")
        )
    except OSError:
        return False


def _is_fed(pid: int) -> bool:
    """Say whether the standard input of a process is known to be no terminal."""
    try:
        return not os.readlink(f"/proc/{pid}/fd/0").startswith(
            ("/dev/pts/", "/dev/tty", "/dev/con")
        )
    except OSError:
        return False


# ---- systemd


@dataclass(frozen=True)
class Unit:
    """A service or a scope: name: "web1.service".  user: whose manager has it, None: the host's."""

    name: str
    user: int | None = None


def has_systemd() -> bool:
    """Say whether systemd is this host's init.  Source: sd_booted(3)."""
    return os.path.isdir("/run/systemd/system")


def unit_of(pid: int) -> Unit | None:
    """Return the unit that a process is in; None where there is none, or no systemd."""
    if not has_systemd():
        return None
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
            return parse_cgroup(file.read())
    except OSError:
        return None


def parse_cgroup(text: str) -> Unit | None:
    """Return the innermost unit in what proc_pid_cgroup(5) says, None where there is none.

    systemd's own hierarchy is cgroup v2's, or the one of its name; where both
    are there, systemd uses both, or the other lies idle.
    """
    paths = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        paths[controllers] = path
    return _unit_in(paths.get("", "")) or _unit_in(paths.get("name=systemd", ""))


def _unit_in(path: str) -> Unit | None:
    parts = path.split("/")
    for at in range(len(parts) - 1, -1, -1):
        if parts[at].endswith((".service", ".scope")):
            managers = [found for part in parts[:at] if (found := _USER_MANAGER.fullmatch(part))]
            return Unit(parts[at], int(managers[-1][1]) if managers else None)
    return None


def show(unit: Unit, *names: str) -> Mapping[str, str] | None:
    """Ask systemd for properties of a unit; None where it does not tell all of them."""
    program = shutil.which("systemctl")
    if program is None:
        return None
    words = [program]
    if unit.user is not None:
        if unit.user == os.geteuid():
            words = ["/usr/bin/env", f"XDG_RUNTIME_DIR=/run/user/{unit.user}", program, "--user"]
        else:
            words += ["--user", f"--machine={unit.user}@.host"]
    try:
        text = programs.ask(*words, "show", f"--property={','.join(names)}", "--", unit.name)
    except GuestError:
        return None
    found = dict(line.partition("=")[::2] for line in text.splitlines() if "=" in line)
    return found if all(name in found for name in names) else None

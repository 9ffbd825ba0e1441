"""The ancestors of a process on Linux, and the unit of systemd that the process is in.

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
    """One ancestor of a process.

    command: its command line, "" if we may not see it.  is_fed: the ancestor was
    forked and never called exec, or its standard input is no terminal: a shell
    without a script in its command line may nevertheless be running a script.
    """

    pid: int
    command: str
    is_fed: bool = False


def above(pid: int) -> list[Above]:
    """Return a process's ancestors, its parent first, as far as this PID namespace shows them."""
    found: list[Above] = []
    parent = _parent(_stat(pid))
    while parent > 0:
        stat = _stat(parent)
        found.append(Above(parent, command_of(parent), _is_copy(parent, stat) or _is_fed(parent)))
        parent = _parent(stat)
    return found


def command_of(pid: int) -> str:
    """Return the command line of a process, "" if it cannot be read."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _stat(pid: int) -> list[bytes]:
    """Return the fields of proc_pid_stat(5) from the third on, [] if the process has ended."""
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

    The process's arguments then lie at the same address as the parent's; exec
    would have moved them.  The kernel tells this address only to a caller that
    may trace the process, and 0 to all others.
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
    """A service or a scope.

    name: the unit's name, such as "web1.service".  user: the uid whose user manager
    runs the unit, or None for a unit of the system's manager.
    """

    name: str
    user: int | None = None


def has_systemd() -> bool:
    """Say whether systemd is this host's init.  Source: sd_booted(3)."""
    return os.path.isdir("/run/systemd/system")


def unit_of(pid: int) -> Unit | None:
    """Return the unit that a process is in; None if it is in no unit, or without systemd."""
    if not has_systemd():
        return None
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
            return parse_cgroup(file.read())
    except OSError:
        return None


def parse_cgroup(text: str) -> Unit | None:
    """Return the innermost unit that /proc/PID/cgroup names, None if it names no unit.

    systemd's own hierarchy is cgroup v2's, or the hierarchy "name=systemd"; if
    the host has both, systemd either uses both, or leaves one of them idle.
    Source: proc_pid_cgroup(5).
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
    """Return properties of a unit from systemctl show; None if any of them is missing."""
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

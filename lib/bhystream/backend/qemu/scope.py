"""Where a QEMU of ours is started, so that it outlives bhyrecv and what bhyrecv was run from.

A session of its own (launch.Child) keeps the terminal's signals away.  Two
things take a process along all the same:

    a PID namespace   ends with its process 1, whatever else is in it: with
                      bhyrecv, where that is process 1
    a unit            systemd ends all of a service with its main process,
                      and of a session's scope with the login where logind has
                      KillUserProcesses=yes; a user's own manager, with all
                      that it has, ends with the last login

A unit can be left: systemd-run(1) --scope moves itself into a scope that nobody
but the operator ends, and then becomes QEMU, so that the process is still our
child.  For the system's manager that takes root; a user's own is a way out
only where it outlives the login (loginctl enable-linger).

Source: pid_namespaces(7); systemd.scope(5), systemd.kill(5), logind.conf(5),
systemd 252.
"""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Sequence

from bhystream.backend import programs
from bhystream.backend.lineage import Above, Unit, above, show, unit_of
from bhystream.backend.supervisors import is_shell, may_start_again, program_of, words
from bhystream.errors import GuestError

# Process 1 of a container, which ends with the program that it was given.
_ENDS_WITH_CHILD = words("bwrap catatonit docker-init dumb-init timeout tini unshare")
_LINGER = "/var/lib/systemd/linger"


def leaving(name: str) -> list[str]:
    """Return what to put before the command of a guest's QEMU; [] where nothing need be left.

    name: of the guest.
    """
    unit = unit_of(os.getpid())
    program = shutil.which("systemd-run")
    if unit is None or program is None or not _can_leave():
        return []
    start = [program, "--scope", "--quiet", "--collect", f"--unit=bhyrecv-{name}-{os.getpid()}"]
    if os.geteuid() == 0:
        return [*start, "--slice=machine.slice", "--"]
    runtime = f"XDG_RUNTIME_DIR=/run/user/{os.geteuid()}"
    return ["/usr/bin/env", runtime, *start, "--user", "--"]


def reasons() -> tuple[list[str], list[str]]:
    """Say why a guest that is started here could not outlive bhyrecv: (hard, soft)."""
    hard = _namespace_reasons()
    if hard:
        return hard, []
    unit = unit_of(os.getpid())
    found = waiting(above(os.getpid())) or (_unit_reason(unit) if unit else "")
    return [], [found] if found else []


def _namespace_reasons() -> list[str]:
    """Refuse a PID namespace that ends with us, and one whose /proc is another's."""
    if os.getpid() == 1:
        return [
            "pid: bhyrecv is process 1 of its container, which ends with it, and the guest too;"
            " run it in one whose process 1 stays, as docker exec does"
        ]
    try:
        seen = os.readlink("/proc/self")
    except OSError:
        seen = "none"
    if seen != str(os.getpid()):
        return [
            f"pid: /proc is not of bhyrecv's PID namespace: it is process {os.getpid()}, there"
            f" {seen}; mount it, as unshare --mount-proc does"
        ]
    return []


def waiting(chain: Sequence[Above]) -> str:
    """Say whether process 1 only waits for bhyrecv, as of `docker run IMAGE sh -c bhyrecv`.

    chain: what is above bhyrecv.  A terminal's shell waits for its user, and a
    program that is not known may do more.  Returns the reason, or "".
    """
    for each in chain:
        name = program_of(each.command)
        is_script = is_shell(each.command) and (each.is_fed or may_start_again(each.command))
        if not is_script and name not in _ENDS_WITH_CHILD:
            return ""
        if each.pid == 1:
            return (
                f"pid: process 1 of the container, {ascii(each.command)[:60]}, seems to wait for"
                " bhyrecv, and the guest would end with it; run bhyrecv in a container whose"
                " process 1 stays, or -f if it does"
            )
    return ""


def _can_leave() -> bool:
    """Say whether there is a manager that outlives the login, and takes a scope of ours."""
    return os.geteuid() == 0 or os.path.exists(f"{_LINGER}/{_user()}")


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _unit_reason(unit: Unit) -> str:
    """Say why the guest would end with the unit that bhyrecv is in, "" where it would not."""
    if _can_leave():
        if shutil.which("systemd-run"):
            return ""
        cure = "install systemd-run"
    else:
        cure = f"loginctl enable-linger {_user()}"
    if unit.user is not None:
        why = "ends when its user has logged out"
    elif unit.name.endswith(".scope"):
        if not unit.name.startswith("session-") or _stays_after_logout():
            return ""
        why = "is ended at the logout (KillUserProcesses of logind.conf)"
    else:
        found = show(unit, "KillMode")
        if found and found["KillMode"] in ("process", "none"):
            return ""
        why = "ends with all that it has started"
        if os.geteuid() != 0:
            cure = f"run bhyrecv from a login of {_user()}'s, with {cure}"
    return (
        f"unit: bhyrecv runs in {unit.name} of systemd's, which {why}, and the guest could not"
        f" outlive it; {cure}, or -f if the guest may end then"
    )


def _stays_after_logout() -> bool:
    """Say whether logind leaves a user's processes alone; False where it does not tell."""
    program = shutil.which("loginctl")
    if program is None:
        return False
    try:
        answer = programs.ask(program, "show-session", "--property=KillUserProcesses")
    except GuestError:
        return False
    return answer.strip() == "KillUserProcesses=no"

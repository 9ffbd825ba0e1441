"""How QEMU is started so that it outlives bhyrecv, and the program that bhyrecv was run from.

A session of its own (launch.Child) keeps the terminal's signals away from QEMU.
QEMU would nevertheless end with:

    a PID namespace   the kernel ends all processes of the namespace with its
                      process 1, which may be bhyrecv
    a unit            systemd ends all processes of a service with its main
                      process, and those of a session's scope at the logout if
                      logind has KillUserProcesses=yes; a user's own manager ends,
                      with all its units, after the user's last logout

A unit can be left: systemd-run(1) --scope moves itself into a scope that only the
operator ends, and then executes QEMU, so that QEMU is still our child.  To use
the system's manager takes root; a user's own manager helps only if it outlives
the login (loginctl enable-linger).

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

# Programs that, as process 1 of a container, end with the program that they run.
_ENDS_WITH_CHILD = words("bwrap catatonit docker-init dumb-init timeout tini unshare")
_LINGER = "/var/lib/systemd/linger"


def leaving(name: str) -> list[str]:
    """Return the words to put before QEMU's command, so that QEMU leaves our unit.

    name: the guest's name.  Returns [] if no unit is to be left, or none can be left.
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
    """Return the reasons why a guest started here could not outlive bhyrecv: (hard, soft)."""
    hard = _namespace_reasons()
    if hard:
        return hard, []
    unit = unit_of(os.getpid())
    found = waiting(above(os.getpid())) or (unit_reason(unit) if unit else "")
    return [], [found] if found else []


def _namespace_reasons() -> list[str]:
    """Return a reason if our PID namespace ends with bhyrecv, or /proc shows another one."""
    if os.getpid() == 1:
        return [
            "pid: bhyrecv is process 1 of its container, which ends with bhyrecv, and so would the"
            " guest; run bhyrecv in a container whose process 1 stays, as docker exec does"
        ]
    try:
        seen = os.readlink("/proc/self")
    except OSError:
        seen = "none"
    if seen != str(os.getpid()):
        return [
            f"pid: /proc is not of bhyrecv's PID namespace: bhyrecv is process {os.getpid()}, but"
            f" in /proc it is {seen}; mount the namespace's own, as unshare --mount-proc does"
        ]
    return []


def waiting(chain: Sequence[Above]) -> str:
    """Return a reason if process 1 only waits for bhyrecv, as in `docker run IMAGE sh -c bhyrecv`.

    chain: bhyrecv's ancestors, its parent first.  Returns "" for a terminal's shell,
    which waits for its user, and for an unknown program, which may do more than wait.
    """
    for each in chain:
        name = program_of(each.command)
        is_script = is_shell(each.command) and (each.is_fed or may_start_again(each.command))
        if not is_script and name not in _ENDS_WITH_CHILD:
            return ""
        if each.pid == 1:
            return (
                f"pid: process 1 of the container, {ascii(each.command)[:60]}, seems to wait for"
                " bhyrecv and to end then, and so would the guest; run bhyrecv in a container"
                " whose process 1 stays, or use -f if this one stays"
            )
    return ""


def _can_leave() -> bool:
    """Say whether a manager that outlives the login would take a scope of ours."""
    return os.geteuid() == 0 or os.path.exists(f"{_LINGER}/{_user()}")


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def unit_reason(unit: Unit) -> str:
    """Return the reason if the guest would end with the unit that bhyrecv is in, else ""."""
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
        f"unit: bhyrecv runs in {unit.name} of systemd's, which {why}, and the guest would end"
        f" too; {cure}, or use -f if the guest may end then"
    )


def _stays_after_logout() -> bool:
    """Say whether logind leaves a user's processes alone at the logout; False if it is silent."""
    program = shutil.which("loginctl")
    if program is None:
        return False
    try:
        answer = programs.ask(program, "show-session", "--property=KillUserProcesses")
    except GuestError:
        return False
    return answer.strip() == "KillUserProcesses=no"

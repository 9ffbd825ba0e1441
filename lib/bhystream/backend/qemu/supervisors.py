"""Whether a guest would be started again after its QEMU has ended, judged by QEMU's ancestors.

    above QEMU                    after its end
    systemd                       its unit tells: Restart=, UpheldBy=, TriggeredBy=
    runit, s6, supervisord ...    start it again: that is what they are for
    a shell with a script, or     may be in a loop
    a copy of one (a subshell)
    a terminal's shell            is at its prompt
    sudo, su, timeout ...         end with QEMU: the process above them counts
    an ancestor of bhysend too    knows of the move
    any other                     not known

The walk up ends at a login, and at a process that was started from outside the
PID namespace.  qmp.py refuses libvirt's guests before this file is asked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence

from bhystream.backend.lineage import Above, Unit, above, show, unit_of
from bhystream.backend.supervisors import is_shell, may_start_again, program_of, reason, words
from bhystream.errors import Reason

# Programs that run another program, wait for it, and end with it.
_THROUGH = words(
    "bwrap doas flock nsenter pkexec runuser script setsid strace su sudo",
    "systemd-inhibit timeout unshare",
)
# Programs that restart QEMU even if they are ancestors of bhysend too.
_SUPERVISORS = words(
    "circusd daemon dinit finit immortal monit perpd runsv s6-supervise supervise",
    "supervise-daemon supervisord",
)
# Processes above these belong to the host, not to the command that was typed.
_LOGINS = words(
    "SCREEN agetty atd cron crond dropbear inetd init login screen sshd sshd-session",
    "systemd tmux xinetd",
)
# With these, systemd does not restart a unit that ends; on-watchdog is for units that hang.
_LEFT_ENDED = frozenset({"no", "on-watchdog"})


def reasons(pid: int) -> list[Reason]:
    """Return the soft reason, or [], if a program may start the QEMU `pid` again once it ends."""

    def of_unit(waiting: Collection[int]) -> Reason | None:
        unit = unit_of(pid)
        return unit_reason(unit, waiting) if unit else None

    found = judge(pid, above(pid), ours(above(os.getpid())), of_unit)
    return [found] if found else []


def ours(chain: Sequence[Above]) -> set[int]:
    """Return the pids of this process and of the ancestors that wait for it, up to a login.

    chain: our ancestors, the parent first.
    """
    found = {os.getpid()}
    for each in chain:
        if program_of(each.command) in _LOGINS:
            break
        found.add(each.pid)
    return found


def judge(
    pid: int,
    chain: Sequence[Above],
    ours: Collection[int],
    of_unit: Callable[[Collection[int]], Reason | None],
) -> Reason | None:
    """Return the reason, or None.

    pid: QEMU's.  chain: QEMU's ancestors, the parent first.  ours: as returned by
    ours().  of_unit: called if systemd is above QEMU, with the pids of QEMU and of
    the ancestors that end with QEMU; returns the unit's reason, or None.
    """
    waiting = {pid}
    for each in chain:
        name = program_of(each.command)
        if name == "systemd" or (each.pid == 1 and name == "init"):
            return of_unit(waiting)
        if each.pid in ours and not _is_supervisor(each.command):
            return None
        if each.pid == 1:
            return reason("QEMU", each.command) if _is_main(each.command) else None
        if name not in _THROUGH:
            may = not name or may_start_again(each.command)
            may = may or (each.is_fed and is_shell(each.command))
            return reason("QEMU", each.command or f"process {each.pid}") if may else None
        waiting.add(each.pid)
    if pid == 1:
        return Reason(
            "supervisor: the guest's QEMU is process 1 of its container, and the program that runs"
            " the container may start QEMU again when QEMU is killed: a second copy of the guest",
            "make sure that it does not, and use -f",
        )
    return None


def _is_main(command: str) -> bool:
    """Say whether process 1 of a container may be there to run QEMU, not only to adopt orphans.

    "tini -- qemu-system-x86_64 ..." ends with QEMU, and the container may then be
    started again; a script may be in a loop.
    """
    if is_shell(command):
        return may_start_again(command)
    return _is_supervisor(command) or "qemu-" in command


def _is_supervisor(command: str) -> bool:
    """Say whether a command line, or the script that it runs, is a supervisor's by its name."""
    return any(program_of(word) in _SUPERVISORS for word in command.split()[:2])


def unit_reason(unit: Unit, waiting: Collection[int]) -> Reason | None:
    """Return the reason if systemd starts the unit again when its main process ends, else None.

    waiting: the pids of QEMU and of its ancestors that end with QEMU; if the unit's
    main process is another one, there is no reason.
    """
    if not unit.name.endswith(".service"):
        return None
    found = show(unit, "Restart", "MainPID", "UpheldBy", "TriggeredBy")
    what = f"supervisor: the guest's QEMU is in {unit.name} of systemd's"
    if found is None:
        return Reason(
            f"{what}, and systemctl does not say whether systemd starts the unit again when QEMU"
            " ends: a second copy of the guest",
            "make sure that the unit has Restart=no, and use -f",
        )
    # MainPID=0: systemd knows no main process; the unit ends with its last process.
    if int(found["MainPID"]) not in {0, *waiting}:
        return None
    if found["Restart"] not in _LEFT_ENDED:
        return Reason(
            f"{what}, which with Restart={found['Restart']} starts QEMU again when QEMU ends: a"
            " second copy of the guest",
            "put Restart=no into a drop-in of the unit (systemctl edit --runtime"
            f" {unit.name}), or use -f",
        )
    others = f"{found['UpheldBy']} {found['TriggeredBy']}".split()
    if others:
        return Reason(
            f"{what}, which {others[0]} may start again when it ends: a second copy of the guest",
            f"systemctl stop {others[0]} first, or use -f",
        )
    return None

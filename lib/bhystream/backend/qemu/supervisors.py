"""What starts a guest again whose QEMU was ended, judged by the processes above that QEMU.

    above QEMU                    after its end
    systemd                       its unit tells: Restart=, UpheldBy=, TriggeredBy=
    runit, s6, supervisord ...    start it again: that is what they are for
    a shell with a script, or     may be in a loop
    a copy of one (a subshell)
    a terminal's shell            is at its prompt
    sudo, su, timeout ...         end with it: what is above them counts
    what runs bhysend too         knows of the move
    any other                     not known

The walk up ends at a login, and at what was started from outside the PID
namespace.  libvirt's guests do not get here: qmp.py refuses them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence

from bhystream.backend.lineage import Above, Unit, above, show, unit_of
from bhystream.backend.supervisors import is_shell, may_start_again, program_of, reason, words

# They run a program, wait for it, and end with it.
_THROUGH = words(
    "bwrap doas flock nsenter pkexec runuser script setsid strace su sudo",
    "systemd-inhibit timeout unshare",
)
# Above bhysend too they are no better.
_SUPERVISORS = words(
    "circusd daemon dinit finit immortal monit perpd runsv s6-supervise supervise",
    "supervise-daemon supervisord",
)
# What is above them has to do with the host, and not with what was typed.
_LOGINS = words(
    "SCREEN agetty atd cron crond dropbear inetd init login screen sshd sshd-session",
    "systemd tmux xinetd",
)
# Of these a unit's end is an end: on-watchdog is for units that hang.
_LEFT_ENDED = frozenset({"no", "on-watchdog"})


def reasons(pid: int) -> list[str]:
    """Say what may start the QEMU `pid` again once it is ended: one reason at most, a soft one."""

    def of_unit(waiting: Collection[int]) -> str:
        unit = unit_of(pid)
        return _unit_reason(unit, waiting) if unit else ""

    found = judge(pid, above(pid), ours(above(os.getpid())), of_unit)
    return [found] if found else []


def ours(chain: Sequence[Above]) -> set[int]:
    """Return this process and what waits for it, up to a login.  chain: what is above us."""
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
    of_unit: Callable[[Collection[int]], str],
) -> str:
    """Return the reason, or "".

    pid: of QEMU.  chain: what is above it.  ours: the processes that wait for
    us.  of_unit: asked where systemd is above QEMU; gets QEMU and those that
    end with it.
    """
    waiting = {pid}
    for each in chain:
        name = program_of(each.command)
        if name == "systemd" or (each.pid == 1 and name == "init"):
            return of_unit(waiting)
        if each.pid in ours and not _is_supervisor(each.command):
            return ""
        if each.pid == 1:
            return reason("QEMU", each.command) if _is_main(each.command) else ""
        if name not in _THROUGH:
            may = not name or may_start_again(each.command)
            may = may or (each.is_fed and is_shell(each.command))
            return reason("QEMU", each.command or f"process {each.pid}") if may else ""
        waiting.add(each.pid)
    if pid == 1:
        return (
            "supervisor: the guest's QEMU is process 1 of its container, and what runs that may"
            " start it again when it is killed: a second copy; see that it does not, then -f"
        )
    return ""


def _is_main(command: str) -> bool:
    """Say whether process 1 of a container may be there for QEMU, and not for what has no parent.

    "tini -- qemu-system-x86_64 ..." ends with it, and the container is started
    again; a script may be in a loop.
    """
    if is_shell(command):
        return may_start_again(command)
    return _is_supervisor(command) or "qemu-" in command


def _is_supervisor(command: str) -> bool:
    """Say whether a program is there to start others again, by its name or its interpreter's."""
    return any(program_of(word) in _SUPERVISORS for word in command.split()[:2])


def _unit_reason(unit: Unit, waiting: Collection[int]) -> str:
    """Say what makes systemd start a unit again when its main process, one of `waiting`, ends."""
    if not unit.name.endswith(".service"):
        return ""
    found = show(unit, "Restart", "MainPID", "UpheldBy", "TriggeredBy")
    what = f"supervisor: the guest's QEMU is in {unit.name} of systemd's"
    if found is None:
        return (
            f"{what}, and systemctl does not say whether that is started again when it ends:"
            " a second copy; see that it has Restart=no, then -f"
        )
    # 0: systemd knows of none, and takes the unit for ended when it is empty.
    if int(found["MainPID"]) not in {0, *waiting}:
        return ""
    if found["Restart"] not in _LEFT_ENDED:
        return (
            f"{what}, which with Restart={found['Restart']} starts it again when it ends: a second"
            " copy; put Restart=no into a drop-in of the unit (systemctl edit --runtime), or -f"
        )
    others = f"{found['UpheldBy']} {found['TriggeredBy']}".split()
    if others:
        return (
            f"{what}, which {others[0]} may start again when it ends: a second copy;"
            f" systemctl stop {others[0]} first, or -f"
        )
    return ""

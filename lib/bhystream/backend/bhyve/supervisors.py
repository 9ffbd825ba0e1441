"""The programs that start a guest again after its bhyve was killed, judged by bhyve's parent.

After a move the guest's bhyve at the source ends by SIGKILL, and never with an
exit status.  So a parent that restarts bhyve only after a reboot of the guest is
harmless; a parent that always restarts bhyve makes a second copy of the guest.

    parent          after a kill                                   read in
    bhyve -M (16)   ends with its child                            D53731
    vmrun.sh        ends: the shell's status is 137, not 0         share/examples/bhyve, 15.1
    libvirt         does not notice: no status, no core dump;      bhyve_monitor.c, 1dc6a872
                    the guest stays in its books, to be started
    vm-bhyve        ends by suspending.lock (1.7.0), else by       lib/vm-run, 0c93a8fb
                    on_fault, which is shutdown by default
    CBSD            ends, unless its on_crash is restart;          share/bhyverun.sh, 0ee08397
                    lockf(1) is the parent, and ends with 70
    our line        ends, as the status is not 0: ownconf.py
    any other       not known: a script, daemon(8) with -r, runit

Only bhyve's parent is checked: a supervisor above the parent is not noticed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bhystream.backend.supervisors import may_start_again, program_of, reason
from bhystream.errors import Reason

if TYPE_CHECKING:
    from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest

_HARMLESS = frozenset({"bhyve", "vmrun.sh"})
_LIBVIRT = frozenset({"libvirtd", "virtbhyved"})


def reasons(
    parent: str, manager: VmBhyveGuest | None, knows_suspending_lock: bool
) -> tuple[list[Reason], list[Reason]]:
    """Say what may start a killed guest again: (hard, soft), one reason at most.

    parent: command line of bhyve's parent, "" for init.  manager: vm-bhyve's
    guest, or None if vm-bhyve does not manage it.  knows_suspending_lock: whether
    this host's vm-bhyve does.  Raises IncompatibleError if the guest's .conf is
    too long, AccessError or InputOutputError if it cannot be read.
    """
    if manager is not None:
        if knows_suspending_lock or manager.conf().get("on_fault", "shutdown") != "restart":
            return [], []
        what = (
            "vm-bhyve: on_fault is restart, and this host's vm-bhyve is older than 1.7.0, or not"
            " where the port puts it: vm-bhyve would start the guest again once it has moved"
        )
        conf = f"{manager.name}.conf"
        cure = f'update vm-bhyve, or start the guest with on_fault="shutdown" in {conf}'
        return [Reason(what, cure)], []
    if _is_cbsd(parent):
        what = (
            "supervisor: CBSD starts a second copy of the guest once it has moved, if on_crash is"
            " restart"
        )
        cure = "set on_crash to destroy and restart the guest, or use -f if it is destroy"
        return [], [Reason(what, cure)]
    if program_of(parent) in _LIBVIRT:
        what = (
            "supervisor: libvirt does not notice that the guest has moved, and may start a second"
            " copy here"
        )
        cure = "use virsh autostart --disable now, virsh destroy and undefine afterwards, and -f"
        return [], [Reason(what, cure)]
    if may_start_again(parent, _HARMLESS):
        from bhystream.backend.bhyve.ownconf import restarted_by  # few guests have such a parent

        return [], [] if restarted_by(parent) else [reason("bhyve", parent)]
    return [], []


def _is_cbsd(parent: str) -> bool:
    """Say whether the parent is the lockf(1) under which CBSD's bhyverun.sh runs bhyve."""
    return program_of(parent) == "lockf" and "/bhyveload." in parent

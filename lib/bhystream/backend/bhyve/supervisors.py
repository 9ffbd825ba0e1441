"""What starts a guest again whose bhyve was killed, judged by bhyve's parent.

A guest that has moved ends at its source by SIGKILL, and never with a status
of bhyve's own.  So a parent that restarts its guest on a reboot only is
harmless; one that restarts it whatever happened makes a second copy.

    parent          after a kill                                   read in
    bhyve -M (16)   ends with its child                            D53731
    vmrun.sh        ends: the shell's status is 137, not 0         share/examples/bhyve, 15.1
    libvirt         does not notice: no status, no core dump;      bhyve_monitor.c, 1dc6a872
                    the guest stays in its books, to be started
    vm-bhyve        ends by suspending.lock (1.7.0), else by       lib/vm-run, 0c93a8fb
                    on_fault, which is shutdown by default
    CBSD            ends, unless its on_crash is restart;          share/bhyverun.sh, 0ee08397
                    lockf(1) is the parent, and ends with 70
    any other       not known: a script, daemon(8) with -r, runit

Only the parent is looked at: a supervisor further up is not noticed.
"""

from __future__ import annotations

from bhystream.backend.bhyve.vmbhyve import VmBhyveGuest
from bhystream.backend.supervisors import may_start_again, program_of, reason

_HARMLESS = frozenset({"bhyve", "vmrun.sh"})
_LIBVIRT = frozenset({"libvirtd", "virtbhyved"})


def reasons(
    parent: str, manager: VmBhyveGuest | None, knows_suspending_lock: bool
) -> tuple[list[str], list[str]]:
    """Say what may start a killed guest again: (hard, soft), one reason at most.

    parent: command line of bhyve's parent, "" for init.  manager: vm-bhyve's
    guest, where it is one; knows_suspending_lock: its vm-bhyve does.  Raises
    IncompatibleError, AccessError where the guest's .conf cannot be read.
    """
    if manager is not None:
        if knows_suspending_lock or manager.conf().get("on_fault", "shutdown") != "restart":
            return [], []
        return [
            "vm-bhyve: on_fault is restart, and this host's vm-bhyve is older than 1.7.0, or not"
            " where the port puts it: it would start the guest again once it has moved;"
            " update it, or start the guest with on_fault=shutdown"
        ], []
    if _is_cbsd(parent):
        return [], [
            "supervisor: CBSD starts the guest again once it has moved if its on_crash is"
            " restart: a second copy; set it to destroy and restart the guest, or -f if it is"
        ]
    if program_of(parent) in _LIBVIRT:
        return [], [
            "supervisor: libvirt does not notice that the guest has moved, and may start it here"
            " again: a second copy; virsh autostart --disable now, virsh destroy and undefine"
            " afterwards, and -f"
        ]
    if may_start_again(parent, _HARMLESS):
        return [], [reason("bhyve", parent)]
    return [], []


def _is_cbsd(parent: str) -> bool:
    """Say whether it is the lockf(1) that CBSD's bhyverun.sh runs bhyve under."""
    return program_of(parent) == "lockf" and "/bhyveload." in parent

"""Before all others on the CPUs, for the moments in which a paused guest waits for this program.

From END to the guest's start bhysend and bhyrecv compute next to nothing: each waits for the
other, for QEMU and for the disk.  On a busy host each of these waits ends with another one, for
a CPU.  Measured with a busy loop for each of two CPUs: the scheduler let a bhyrecv whose QEMU
had just started its guest wait for up to 60 ms, and bhysend with it.

A lower nice value does not help: Linux divides the CPUs among sessions and control groups
first, and only then among their processes.  So the program takes a real-time priority, the
lowest, if its user may have one (root).  No scan and no copy of memory belongs into such a
block: other guests would get no CPU meanwhile.

Without SCHED_RESET_ON_FORK a hypervisor that is started in such a block would keep the priority,
so on other systems than Linux nothing is done.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def urgently(*others: int | None) -> Iterator[None]:
    """Give the calling thread a real-time priority in this block, if that may be done.

    others: the native ids of threads that get it too; None of a thread that does not run.  A
    thread whose policy somebody has chosen keeps it.  Raises nothing itself.
    """
    urgent = [id_ for id_ in (0, *others) if id_ is not None and _is_made_urgent(id_)]
    try:
        yield
    finally:
        for id_ in urgent:
            with contextlib.suppress(OSError):
                os.sched_setscheduler(id_, os.SCHED_OTHER, os.sched_param(0))


def _is_made_urgent(id_: int) -> bool:
    if not hasattr(os, "SCHED_RESET_ON_FORK"):
        return False
    try:
        if os.sched_getscheduler(id_) != os.SCHED_OTHER:
            return False
        lowest = os.sched_param(os.sched_get_priority_min(os.SCHED_RR))
        os.sched_setscheduler(id_, os.SCHED_RR | os.SCHED_RESET_ON_FORK, lowest)
    except OSError:
        return False
    return True

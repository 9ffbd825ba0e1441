"""Before all others on the CPUs, for the moments in which a paused guest waits for this program.

From END to the guest's start bhysend and bhyrecv compute next to nothing: each waits for the
other, for QEMU and for the disk.  On a busy host each of these waits ends with another one, for
a CPU.  Measured with a busy loop for each of two CPUs: the scheduler let a bhyrecv whose QEMU
had just started its guest wait for up to 60 ms, and bhysend with it.

A lower nice value does not help: Linux divides the CPUs among sessions and control groups
first, and only then among their processes.  So the program takes a real-time priority, the
lowest, if it may have one (CAP_SYS_NICE, which root has).

Other guests get no CPU while a program with such a priority computes.  So no scan and no copy of
memory belongs into such a block, and the priority ends with the CPU time that the block may use:
a peer that floods this program takes a fifth of a second from the others, and no more.

Without SCHED_RESET_ON_FORK a hypervisor that is started in such a block would keep the priority,
so on other systems than Linux nothing is done.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

# Of all threads of the process.  A usual block takes 10 ms, and 5 ms more for each MiB that the
# filters of the pipeline hold back.
_CPU_S = 0.2


@contextlib.contextmanager
def urgently(*others: int | None) -> Iterator[None]:
    """Give the main thread, which calls this, a real-time priority in the block, if it may.

    others: the native ids of threads that get it too; None of a thread that does not run.  A
    thread keeps a policy or a nice value that somebody has chosen for it.  Uses SIGPROF, and
    raises nothing itself.
    """
    urgent = [id_ for id_ in (0, *others) if id_ is not None and _is_made_urgent(id_)]

    def end(*_: object) -> None:
        while urgent:
            _make_usual(urgent.pop())

    if not urgent:
        yield
        return
    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, _CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        end()


def _is_made_urgent(id_: int) -> bool:
    if not hasattr(os, "SCHED_RESET_ON_FORK"):
        return False
    try:
        if os.sched_getscheduler(id_) != os.SCHED_OTHER or os.getpriority(os.PRIO_PROCESS, id_):
            return False
        lowest = os.sched_param(os.sched_get_priority_min(os.SCHED_RR))
        os.sched_setscheduler(id_, os.SCHED_RR | os.SCHED_RESET_ON_FORK, lowest)
    except OSError:
        return False
    return True


def _make_usual(id_: int) -> None:
    # A user who may take the priority by a resource limit may not clear the flag.
    for flag in (0, os.SCHED_RESET_ON_FORK):
        with contextlib.suppress(OSError):
            # By now the id may be that of another thread.
            if os.sched_getscheduler(id_) == os.SCHED_RR | os.SCHED_RESET_ON_FORK:
                os.sched_setscheduler(id_, os.SCHED_OTHER | flag, os.sched_param(0))

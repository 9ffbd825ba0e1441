"""By which policy Linux gives a thread its turns on the CPUs."""

from __future__ import annotations

import os

OTHER = os.SCHED_OTHER
# The nice value of the tests themselves.
NICE = os.getpriority(os.PRIO_PROCESS, 0)
_RESET_ON_FORK = getattr(os, "SCHED_RESET_ON_FORK", 0)


def policy(id_: int) -> int:
    """Return the policy of a thread, by its native id; 0 is the caller."""
    return os.sched_getscheduler(id_) & ~_RESET_ON_FORK


def _urgent() -> int:
    """Return the policy of an urgent thread: the usual one where nobody may choose another."""
    if not _RESET_ON_FORK or NICE:
        return OTHER
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        return OTHER
    os.sched_setscheduler(0, OTHER, os.sched_param(0))
    return os.SCHED_RR


URGENT = _urgent()

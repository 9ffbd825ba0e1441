"""Whether other processes keep this host's CPUs busy.

On a busy host each part of a pause takes longer than on an idle one, by a half and more, so
what one move has taken says nothing about a move under the other load.  The measure is what
bhysend's own main thread, which does the live rounds, has met: Linux counts for how long a
thread has run, and for how long it was ready to run and waited for a CPU.

Measured with a guest that moves within a host of two CPUs: for each second on a CPU the thread
waits for 0.09 to 0.26 s while only the guest and the two programs run, and for 0.24 to 1.2 s
if there also is a busy loop for each CPU.

Other systems do not count that.  Their hosts are never taken for busy.
"""

from __future__ import annotations

from pathlib import Path

# The time on a CPU and the time of waiting, in ns.  Source: Linux,
# Documentation/scheduler/sched-stats.rst, "/proc/<pid>/schedstat".
SCHEDSTAT = Path("/proc/self/schedstat")
_WAITS = 0.3
# In less time the count says more of chance than of the load.
_WINDOW_NS = 300_000_000


class HostLoad:
    """The load of the host, as this process meets it."""

    def __init__(self) -> None:
        """Begin with the start of the process."""
        self._seen = [(0, 0)]

    def is_busy(self) -> bool:
        """Say whether the host has been busy of late.  Raises nothing.

        Of late: since the last call that lies 0.3 s of CPU time and waiting back.
        """
        try:
            ran_ns, waited_ns = (int(word) for word in SCHEDSTAT.read_bytes().split()[:2])
        except (OSError, ValueError):
            return False
        seen = self._seen
        # A long move ends under another load than it began.
        while len(seen) > 1 and ran_ns + waited_ns - sum(seen[1]) >= _WINDOW_NS:
            del seen[0]
        first_ran_ns, first_waited_ns = seen[0]
        seen.append((ran_ns, waited_ns))
        return waited_ns - first_waited_ns > _WAITS * (ran_ns - first_ran_ns)

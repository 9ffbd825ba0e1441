"""A hypervisor that its supervisor has started: what launch.Child is for a child of ours.

Only its parent sees how it ends, so its exit status is not known here.
"""

from __future__ import annotations

import contextlib
import select
import signal
import time

from bhystream.backend.launch import log_lines
from bhystream.backend.process import Identity, is_alive, is_all_stopped, open_ending
from bhystream.errors import BhyError, GuestError

_POLL_S = 0.005
_KILL_S = 10.0


class Adopted:
    """A process that another program has started.  log_path: where it says what goes wrong."""

    status: int | None = None

    def __init__(self, who: Identity, log_path: str) -> None:
        """Watch a living process.  Raises GuestError if it has ended."""
        self.log_path = log_path
        self._who = who
        self._ending = open_ending(who)
        if self._ending is None:
            raise GuestError(f"process {who.pid} has ended")

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._who.pid

    def has_ended(self) -> bool:
        """Say whether the process has ended."""
        return self.ends_within(0.0)

    def ends_within(self, limit_s: float) -> bool:
        """Wait for the process's end for at most limit_s seconds; say whether it has ended."""
        if self._ending is None:
            return not is_alive(self._who)
        poll = select.poll()
        poll.register(self._ending.fileno(), select.POLLIN)
        return bool(poll.poll(limit_s * 1000))

    def stop(self, limit_s: float) -> bool:
        """Stop the process (SIGSTOP); return True once none of its threads runs.

        Returns False if the process has ended, or does not stop in limit_s seconds.
        """
        end = time.monotonic() + limit_s
        self._signal(signal.SIGSTOP)
        while not self.has_ended() and time.monotonic() < end:
            if is_all_stopped(self.pid):
                return True
            time.sleep(_POLL_S)
        return False

    def go_on(self) -> None:
        """Undo stop(): let the process go on (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._ending is not None:
                self._ending.kill(number)

    def last_words(self) -> str:
        """Return the last lines of the process's log, as one line."""
        ended = ["it has ended"] if self.has_ended() else []
        return "; ".join([*log_lines(self.log_path), *ended])

    def kill(self) -> None:
        """Kill the process (SIGKILL) and wait for its end.  Never raises."""
        with contextlib.suppress(BhyError, OSError):
            self._signal(signal.SIGKILL)
            self.ends_within(_KILL_S)

    def let_go(self) -> None:
        """Watch the process no longer."""
        if self._ending is not None:
            self._ending.close()
            self._ending = None

"""The gate at which threads of the guest stop when the guest is paused."""

from __future__ import annotations

import threading
import time


class Gate:
    """A gate that parks a known number of threads and knows when all of them stand.

    A thread calls rest() wherever the gate may stop it: between two steps, never
    inside a step.  `is_closed` may be read without the lock, to leave a batch early.
    """

    def __init__(self) -> None:
        """Make a closed gate: no thread passes before open()."""
        self._changed = threading.Condition()
        self._members = 0
        self._parked = 0
        self.is_closed = True

    def join(self, run: threading.Thread) -> None:
        """Start one more thread, which must call rest() before its first step."""
        self._members += 1
        run.start()

    def rest(self, seconds: float = 0.0) -> None:
        """Sleep for `seconds`; if the gate is or gets closed, stand still until the gate opens."""
        if not seconds and not self.is_closed:
            return
        with self._changed:
            if seconds:
                self._changed.wait_for(lambda: self.is_closed, seconds)
            if self.is_closed:
                self._parked += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self.is_closed)
                self._parked -= 1

    def close(self) -> None:
        """Stop every thread; return when all of them stand."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._parked == self._members)

    def open(self) -> None:
        """Let every thread run on; return when no thread stands any more."""
        with self._changed:
            self.is_closed = False
            self._changed.notify_all()
        while True:
            with self._changed:
                if not self._parked:
                    return
            time.sleep(0.0005)

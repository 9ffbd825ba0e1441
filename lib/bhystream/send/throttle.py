"""The throttle: hold the vCPUs of a running guest back, for a part of the time (--throttle).

A guest that changes its memory faster than the link carries never fits into -d.  In each
tenth of a second the vCPUs then stand still for so many percent of it.  precopy.py says
how many: none as long as the rounds get smaller, and never more than the operator allows.

A thread does it, because the main thread may wait in write(2) for long.  The guest counts
as running all the time, but it may stand at any moment.  So it is on record as paused
before the throttle begins: if bhysend dies, its keeper lets the guest run.
"""

from __future__ import annotations

import signal
import threading
import time
from types import TracebackType

from bhystream.backend.base import Source

_PERIOD_S = 0.1


class Throttle:
    """The throttle of one move.  When the `with` block ends, however it ends, the guest runs.

    percent: how much of the time the vCPUs stand now, 0 before set().  most: the largest
    percent so far.  took_ns: how long the throttle was at work.
    """

    def __init__(self, source: Source) -> None:
        """source: stays the caller's; nobody else may pause it or ask it about its state."""
        self.percent = self.most = self.took_ns = 0
        self._source = source
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._start_ns = 0

    def __enter__(self) -> Throttle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        if self._thread:
            # If a signal raises here, the thread lets the guest run all the same.
            self._thread.join()
            self.took_ns = time.monotonic_ns() - self._start_ns

    def set(self, percent: int) -> None:
        """Let the vCPUs stand for so many percent of the time, 1 to 99, from now on."""
        self.percent, self.most = percent, max(self.most, percent)
        if self._thread is None:
            self._start_ns = time.monotonic_ns()
            self._thread = threading.Thread(target=self._work)
            self._thread.start()

    def check(self) -> None:
        """Raise what has stopped the throttle, usually a GuestError, if anything has."""
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        # A signal has to interrupt the main thread, which may be in a write(2).
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            while not self._is_over.wait(_PERIOD_S * (100 - self.percent) / 100):
                try:
                    self._source.suspend_vcpus()
                    self._is_over.wait(_PERIOD_S * self.percent / 100)
                finally:
                    self._source.resume_vcpus()
        except BaseException as raised:  # for the main thread
            self._failure = raised

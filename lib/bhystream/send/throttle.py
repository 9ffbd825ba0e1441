"""The throttle: hold the vCPUs of a running guest back, for a part of the time (--throttle).

A guest that changes its memory faster than the link carries never fits into -d.  In each
tenth of a second the vCPUs then stand still for so many percent of it.  precopy.py says
how many: none as long as the rounds get smaller, and never more than the operator allows.

A thread does it, because the main thread may wait in write(2) for long.  The guest counts
as running all the time, but it may stand at any moment.  So it is on record as paused
before the throttle begins: if bhysend dies, its keeper lets the guest run.

The block begins and ends, and set() is called, where no signal raises.  Else a signal could
leave the thread at work on a guest that somebody else resumes, or that nobody does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from bhystream import threads
from bhystream.backend.base import Source
from bhystream.errors import GuestError

_PERIOD_S = 0.1
_AGAIN_S = 1.0


class Throttle:
    """The throttle of one move.  When the `with` block ends, however it ends, the guest runs.

    percent: how much of the time the vCPUs stand now, 0 before set().  most: the largest
    percent so far.  took_ns: how long the throttle was at work.
    """

    def __init__(self, source: Source, wake: Callable[[], None]) -> None:
        """source: stays the caller's; nobody else may pause it or ask it about its state.

        wake: makes the main thread call check(), also out of a blocked write(2); called by
        the throttle's thread when it has failed, and again each second until the block ends.
        """
        self.percent = self.most = self.took_ns = 0
        self._source = source
        self._wake = wake
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
        """Let the guest run.  Raises what has stopped the throttle, if nothing else is raised."""
        self._is_over.set()
        if self._thread and self._thread.ident is not None:
            self._thread.join()
            self.took_ns = time.monotonic_ns() - self._start_ns
        if kind is None:
            # The guest may stand, so it is not paused as if it ran.
            self.check()

    def set(self, percent: int) -> None:
        """Let the vCPUs stand for so many percent of the time, 1 to 99, from now on.

        Raises GuestError if no thread can be started.
        """
        self.percent, self.most = percent, max(self.most, percent)
        if self._thread is None:
            self._thread, self._start_ns = threading.Thread(target=self._work), time.monotonic_ns()
            try:
                threads.start(self._thread)
            except RuntimeError as error:
                raise GuestError(
                    f"guest {self._source.name}: cannot throttle it: {error}"
                ) from None

    def check(self) -> None:
        """Raise what has stopped the throttle, usually a GuestError, if anything has."""
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            stood_s = 0.0
            while not self._is_over.wait(self._rest_s(stood_s)):
                start_s = time.monotonic()
                try:
                    self._source.suspend_vcpus()
                    self._is_over.wait(_PERIOD_S * self.percent / 100)
                finally:
                    self._source.resume_vcpus()
                stood_s = time.monotonic() - start_s
        except BaseException as raised:  # for the main thread
            self._failure = raised
            # The guest may stand, and a signal may come just before a write(2) that blocks.
            self._wake()
            while not self._is_over.wait(_AGAIN_S):
                self._wake()

    def _rest_s(self, stood_s: float) -> float:
        """Return how long the vCPUs run now, after they stood for stood_s seconds.

        A hypervisor may take long to stop a guest (QEMU flushes its disks), and the guest
        stands meanwhile.
        """
        runs = (100 - self.percent) / 100
        return max(_PERIOD_S * runs, stood_s * runs / (1 - runs))

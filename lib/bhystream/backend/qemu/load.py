"""The way of the device state into a QEMU that waits: prepared before the pause, no deadlock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time
from collections.abc import Callable

from bhystream.backend.process import identify, is_alive
from bhystream.backend.qemu import facts, migration
from bhystream.backend.qemu.migration import PIPE_BYTES
from bhystream.backend.qemu.qmp import ConnectionLostError, Qmp
from bhystream.backend.qemu.wire import LOOK_S
from bhystream.errors import GuestError

LOAD_LIMIT_S = 60.0
_NAME = "bhyrecv"


class StatePipe:
    """A pipe to a QEMU that is `inmigrate`, which reads nothing from it before feed()."""

    def __init__(self, qmp: Qmp, on_wait: Callable[[], None]) -> None:
        """Make the pipe, and give QEMU its reading end.  qmp stays the caller's.

        on_wait: as in Qmp.  Raises CommandError or ConnectionLostError.
        """
        self._qmp = qmp
        self._on_wait = on_wait
        read_end, self._fd = os.pipe()
        try:
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            qmp.send_fd(_NAME, read_end, doing="load state")
        except BaseException:
            self.close()
            raise
        finally:
            # Leave QEMU the only copy, so that we get EPIPE if QEMU dies.
            os.close(read_end)

    def feed(self, data: bytes) -> None:
        """Load `data` into QEMU; its guest is paused afterwards.  Called once.

        Raises GuestError if QEMU does not load the state; QEMU 7.2 then ends by itself.
        """
        end = time.monotonic() + LOAD_LIMIT_S
        try:
            self._qmp.execute("migrate-incoming", {"uri": f"fd:{_NAME}"}, doing="load state")
            _write_all(self._qmp, self._fd, data, end, self._on_wait)
        finally:
            self.close()
        _await_loaded(self._qmp, end, self._on_wait)

    def take_back(self) -> None:
        """Take the reading end from a QEMU that goes on waiting.  Never raises."""
        if self._fd >= 0:
            with contextlib.suppress(GuestError):
                self._qmp.execute("closefd", {"fdname": _NAME}, doing="take the pipe back")

    def close(self) -> None:
        """Close our end.  May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _write_all(qmp: Qmp, fd: int, data: bytes, end: float, on_wait: Callable[[], None]) -> None:
    """Write without blocking, so that a QEMU that stops reading cannot block us."""
    os.set_blocking(fd, False)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    view, who = memoryview(data), identify(qmp.pid, "QEMU")
    while view:
        on_wait()
        if not poll.poll(LOOK_S * 1000) and (time.monotonic() > end or not is_alive(who)):
            raise ConnectionLostError(f"{qmp.who}: cannot load state: QEMU does not take it")
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            continue
        except BrokenPipeError:
            # QEMU gave up in the middle; its log or query-migrate tells why.
            return


def _await_loaded(qmp: Qmp, end: float, on_wait: Callable[[], None]) -> None:
    while True:
        now, error = migration.progress(qmp)
        if now == "completed":
            break
        if now == "failed" or time.monotonic() > end:
            raise GuestError(
                f"{qmp.who}: cannot load state: migration {now}" + (f": {error}" if error else "")
            )
        on_wait()
        time.sleep(migration.POLL_S)
    state = facts.status(qmp)
    if state not in ("paused", "prelaunch"):
        raise GuestError(f"{qmp.who}: cannot load state: QEMU is '{state}' afterwards")

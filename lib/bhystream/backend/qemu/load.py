"""Load the device state into a QEMU that waits, without a deadlock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time

from bhystream.backend.process import identify, is_alive
from bhystream.backend.qemu import facts, migration
from bhystream.backend.qemu.migration import PIPE_BYTES
from bhystream.backend.qemu.qmp import ConnectionLostError, Qmp
from bhystream.errors import GuestError

LOAD_LIMIT_S = 60.0


def feed_state(qmp: Qmp, data: bytes) -> None:
    """Load `data` into a QEMU that is `inmigrate`; its guest is paused afterwards.

    Raises GuestError if QEMU does not load the state; QEMU 7.2 then ends by itself.
    """
    end = time.monotonic() + LOAD_LIMIT_S
    read_end, write_end = os.pipe()
    try:
        try:
            with contextlib.suppress(OSError):
                fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            qmp.send_fd("bhyrecv", read_end, doing="load state")
        finally:
            # Leave QEMU the only copy, so that we get EPIPE if QEMU dies.
            os.close(read_end)
        qmp.execute("migrate-incoming", {"uri": "fd:bhyrecv"}, doing="load state")
        _write_all(qmp, write_end, data, end)
    finally:
        os.close(write_end)
    _await_loaded(qmp, end)


def _write_all(qmp: Qmp, fd: int, data: bytes, end: float) -> None:
    """Write without blocking, so that a QEMU that stops reading cannot block us."""
    os.set_blocking(fd, False)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    view, who = memoryview(data), identify(qmp.pid, "QEMU")
    while view:
        if not poll.poll(1000) and (time.monotonic() > end or not is_alive(who)):
            raise ConnectionLostError(f"{qmp.who}: cannot load state: QEMU does not take it")
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            continue
        except BrokenPipeError:
            # QEMU gave up in the middle; its log or query-migrate tells why.
            return


def _await_loaded(qmp: Qmp, end: float) -> None:
    while True:
        now, error = migration.progress(qmp)
        if now == "completed":
            break
        if now == "failed" or time.monotonic() > end:
            raise GuestError(
                f"{qmp.who}: cannot load state: migration {now}" + (f": {error}" if error else "")
            )
        time.sleep(migration.POLL_S)
    state = facts.status(qmp)
    if state not in ("paused", "prelaunch"):
        raise GuestError(f"{qmp.who}: cannot load state: QEMU is '{state}' afterwards")

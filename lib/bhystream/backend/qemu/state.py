"""The device state out of a stopped QEMU: its own migration stream, read whole into memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time

from bhystream.backend.process import Identity, is_alive
from bhystream.backend.qemu import migration
from bhystream.backend.qemu.migration import PIPE_BYTES
from bhystream.backend.qemu.qmp import ConnectionLostError, Qmp
from bhystream.errors import GuestError

# A few hundred KiB is usual.  More means that RAM is in it: QEMU 9.1 and later
# leave only named files out, not memfd.  Source: qemu/qemu migration/ram.c,
# migrate_ram_is_ignored(), qemu_ram_is_named_file().
MAX_STATE_BYTES = 64 << 20
STATE_LIMIT_S = 60.0


def take_state(qmp: Qmp, who: Identity) -> bytes:
    """Return the device state of a stopped guest.

    The guest is `postmigrate` afterwards and its disks are inactive; `cont`
    undoes both.  On failure nothing is running in QEMU that migration.let_run()
    could not cancel.  who: its process.  Raises GuestError.
    """
    read_end, write_end = os.pipe()
    try:
        with contextlib.suppress(OSError):
            # All of a usual state fits, so QEMU never waits for us.
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            qmp.send_fd("bhysend", write_end, doing="save state")
        finally:
            # QEMU's copy is the only one, so that its close is our EOF.
            os.close(write_end)
        try:
            qmp.execute("migrate", {"uri": "fd:bhysend"}, doing="save state")
        except GuestError:
            with contextlib.suppress(GuestError):
                qmp.execute("closefd", {"fdname": "bhysend"}, doing="save state")
            raise
        data = _drain(qmp, who, read_end)
    finally:
        # Before any cancel: a migration blocked in write(2) gets EPIPE.
        os.close(read_end)
    _await_completed(qmp)
    return data


def _drain(qmp: Qmp, who: Identity, fd: int) -> bytes:
    """Read the pipe to its EOF, within the limits of size and time."""
    chunks: list[bytes] = []
    total = 0
    end = time.monotonic() + STATE_LIMIT_S
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        left_ms = (end - time.monotonic()) * 1000
        if left_ms <= 0 or not poll.poll(min(left_ms, 1000)):
            _check_draining(qmp, who, left_ms)
            continue
        chunk = os.read(fd, PIPE_BYTES)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
        total += len(chunk)
        if total > MAX_STATE_BYTES:
            raise GuestError(
                f"{qmp.who}: cannot save state: more than"
                f" {MAX_STATE_BYTES >> 20} MiB; this QEMU put RAM into the state",
                hint="give it RAM from memory-backend-file, not memfd",
            )


def _check_draining(qmp: Qmp, who: Identity, left_ms: float) -> None:
    """Called when a second passed without a byte.  Raises to give up."""
    if not is_alive(who):
        raise ConnectionLostError(f"{qmp.who}: cannot save state: QEMU has ended")
    if left_ms <= 0:
        raise GuestError(f"{qmp.who}: cannot save state: not done in {STATE_LIMIT_S:g} s")


def _await_completed(qmp: Qmp) -> None:
    """After EOF: the migration has ended; only "completed" is good.

    QEMU closes the file some way before or after it sets the status.
    """
    end = time.monotonic() + 10.0
    while True:
        now, error = migration.progress(qmp)
        if now == "completed":
            return
        if not migration.is_busy(now) or time.monotonic() > end:
            raise GuestError(
                f"{qmp.who}: cannot save state: migration {now}" + (f": {error}" if error else "")
            )
        time.sleep(migration.POLL_S)

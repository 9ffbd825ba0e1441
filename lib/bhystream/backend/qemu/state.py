"""Take the device state of a stopped QEMU: its own migration stream, read whole into memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time
from collections.abc import Iterator

from bhystream.backend.process import Identity, is_alive
from bhystream.backend.qemu import migration
from bhystream.backend.qemu.migration import PIPE_BYTES
from bhystream.backend.qemu.qmp import ConnectionLostError, Qmp
from bhystream.errors import GuestError

# A state usually has a few hundred KiB.  A state above this limit contains the RAM:
# QEMU 9.1 and later leave the RAM out only if it lies in a named file, and not if it
# lies in a memfd.  Source: qemu/qemu migration/ram.c, migrate_ram_is_ignored(),
# qemu_ram_is_named_file().
MAX_STATE_BYTES = 64 << 20
STATE_LIMIT_S = 60.0


_NAME = "bhysend"


@contextlib.contextmanager
def state_pipe(qmp: Qmp) -> Iterator[int]:
    """Give QEMU, which still runs, a pipe for its state; yield our end of the pipe to read.

    If the block raises, QEMU has no end of the pipe any more.  Raises CommandError or
    ConnectionLostError.
    """
    read_end, write_end = os.pipe()
    try:
        with contextlib.suppress(OSError):
            # A state of usual size fits into the pipe, so that QEMU does not wait for us.
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            qmp.send_fd(_NAME, write_end, doing="save state")
        finally:
            # Leave QEMU the only copy, so that we get EOF when QEMU closes it.
            os.close(write_end)
        try:
            yield read_end
        except GuestError:
            # QEMU refuses this if a migration has taken its end.
            with contextlib.suppress(GuestError):
                qmp.execute("closefd", {"fdname": _NAME}, doing="save state")
            raise
    finally:
        # Close before any cancel, so that a migration blocked in write(2) gets EPIPE.
        os.close(read_end)


def take_state(qmp: Qmp, who: Identity, fd: int) -> bytes:
    """Return the device state of a stopped guest.

    Afterwards QEMU is `postmigrate` and the guest's disks are inactive; `cont`
    undoes both.  who: QEMU's process.  fd: of state_pipe().  Raises GuestError;
    migration.let_run() can then cancel whatever still runs in QEMU.
    """
    qmp.execute("migrate", {"uri": f"fd:{_NAME}"}, doing="save state")
    data = _drain(qmp, who, fd)
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
    """Raise GuestError if QEMU has ended or the time is up; called after a second without data."""
    if not is_alive(who):
        raise ConnectionLostError(f"{qmp.who}: cannot save state: QEMU has ended")
    if left_ms <= 0:
        raise GuestError(f"{qmp.who}: cannot save state: not done in {STATE_LIMIT_S:g} s")


def _await_completed(qmp: Qmp) -> None:
    """Wait, after EOF, until the status is "completed".  Raises GuestError for any other end.

    QEMU may close the pipe before or after it sets the status.
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

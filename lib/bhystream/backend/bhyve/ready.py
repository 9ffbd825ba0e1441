"""All that a bhyve guest's pause needs, made ready beforehand; and the pause.

make_ready   makes the directory, with the null device as memory file; rehearses,
             that is, runs a checkpoint that bhyve ends by itself; makes the FIFO
pause        asks for the same checkpoint, in whose last write bhyve blocks
             (fifo.py), so that the guest stands paused (paused.py).  The state is
             FILE.kern, the rehearsal's FILE.meta, the saved FPU registers, and how
             long the guest's clocks went on
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass

from bhystream.backend.bhyve import clocks, fifo, fpustate, snapshot, verdict
from bhystream.backend.bhyve.checkpoint import Checkpoint, Outcome
from bhystream.backend.bhyve.host import VMM_DIR
from bhystream.backend.bhyve.layout import clamped
from bhystream.backend.bhyve.opened import Opened
from bhystream.backend.bhyve.paused import BhyvePaused, PausedRecord
from bhystream.backend.bhyve.rehearsal import UNSAVED, MemoryFileError, Rehearsal, changes, rehearse
from bhystream.backend.bhyve.snapshot import FILE
from bhystream.backend.bhyve.snapshotdir import SnapshotDir
from bhystream.errors import (
    BhyError,
    FormatError,
    GuestEndedError,
    GuestError,
    Reason,
    from_oserror,
)
from bhystream.guest import State

_HOLD_S = 30.0
_STATE_BYTES = 64 << 20  # room for FILE.kern and FILE.meta, before their sizes are known


@dataclass(frozen=True)
class Ready:
    """One guest that can be paused.

    directory: removed by the caller until pause() is called, and by the paused
    guest from then on.  record: what a process needs to find the paused guest.
    warning: why bhyve writes a memory file, empty if it writes to the null device.
    """

    opened: Opened
    directory: SnapshotDir
    rehearsal: Rehearsal
    record: PausedRecord
    warning: Reason

    def pause(self) -> BhyvePaused:
        """Pause the guest in a checkpoint, and take its state.

        If that fails, the guest is resumed, and a request that bhyve has not
        served is withdrawn.  Raises GuestError if the guest cannot be paused or
        saved, and what Opened.require_started() and Opened.connect() raise.
        """
        start_ns = time.monotonic_ns()
        self.opened.require_started()
        kern_bytes = self.rehearsal.meta.kern_bytes
        _require_room(self.opened, self.directory, kern_bytes, self.warning)
        checkpoint = self.opened.connect()
        held = BhyvePaused(self.opened.host, self.record)
        try:
            self._hold(checkpoint, held)
            return self._with_state(clocks.state_of(time.monotonic_ns() - start_ns))
        except BaseException:
            with contextlib.suppress(BhyError):
                held.resume()
            raise
        finally:
            checkpoint.close()

    def _hold(self, checkpoint: Checkpoint, held: BhyvePaused) -> None:
        """Ask for the checkpoint; return when the guest stands paused, with all its state saved."""
        files, full_bytes = self.directory.files, self.record.full_bytes
        try:
            fd = fifo.arm(files.meta, full_bytes)
        except OSError as error:
            raise from_oserror(error, f"fill {files.meta}") from None
        try:
            directory = self.directory.open()
            try:
                checkpoint.request(directory, FILE, fd)
            finally:
                os.close(directory)
            outcome = checkpoint.await_outcome(
                _limit_s(self.opened, self.directory), lambda: fifo.pending_in(fd) == full_bytes
            )
        finally:
            os.close(fd)  # only bhyve may have the FIFO open: see fifo.has_reader()
        if outcome == Outcome.EXITED:
            raise self._gone()
        if outcome != Outcome.HELD:
            raise self._unsaved("")
        kern_bytes = files.kern.stat().st_size
        if not held.stands() or kern_bytes != self.rehearsal.meta.kern_bytes:
            raise self._failed(checkpoint, held)

    def _failed(self, checkpoint: Checkpoint, held: BhyvePaused) -> GuestError:
        """Release a checkpoint that does not match the rehearsal; return how it differs.

        Raises RefusedError, with bhyve's own words, if bhyve replies with an error (G5).
        """
        text = held.release()
        if checkpoint.await_outcome(_HOLD_S) == Outcome.EXITED:
            return self._gone()
        return self._unsaved(changes(self.rehearsal.meta, text))

    def _gone(self) -> GuestEndedError:
        return GuestEndedError(f"{self.opened.who}: its bhyve has ended in the pause")

    def _unsaved(self, why: str) -> GuestError:
        if why:
            return GuestError(
                f"{self.opened.who}: its state is not what it was at the rehearsal: {why}",
                "send it again when its devices stay as they are",
            )
        return GuestError(
            f"{self.opened.who}: its bhyve saved it at the rehearsal, but not now; bhyve logs"
            " the reason itself",
            f"{UNSAVED}, or a full disk",
        )

    def _with_state(self, clock: State) -> BhyvePaused:
        """Return the paused guest with its state, which is read here, and its saved FPU."""
        path, guest = self.directory.files.kern, self.opened
        try:
            states = snapshot.cut(self.rehearsal.text, path.read_bytes())
        except OSError as error:
            raise from_oserror(error, f"read {path}") from None
        except FormatError as error:
            raise GuestError(f"{guest.who}: {path}: {error}") from None
        saved, reasons = fpustate.save(guest.host, guest.name, guest.ncpus, self.directory)
        return BhyvePaused(guest.host, self.record, [*states, *saved, clock], reasons)


def make_ready(opened: Opened, directory: SnapshotDir) -> Ready:
    """Make the directory, rehearse, make the FIFO.

    Raises what rehearse() raises, and GuestError, InputOutputError or AccessError
    if something cannot be made; then SnapshotDir.remove() undoes what was made.
    """
    host, size = opened.host, opened.memory.size_bytes
    directory.make()
    warning = clamped(host, size) or Reason(directory.make_sink(host))
    rehearsal, warning = _rehearse(opened, directory, warning)
    try:
        full_bytes = fifo.make(directory.files.meta)
    except OSError as error:
        raise from_oserror(error, f"make {directory.files.meta}") from None
    record = PausedRecord(
        kind=host.kind,
        vmm_dir=host.environment().get(VMM_DIR, ""),
        name=opened.name,
        process=opened.process,
        directory=str(directory.path),
        node=host.node_id(opened.name),
        full_bytes=full_bytes,
        manager=str(opened.manager.directory) if opened.manager else "",
    )
    return Ready(opened, directory, rehearsal, record, warning)


def _rehearse(opened: Opened, directory: SnapshotDir, warning: Reason) -> tuple[Rehearsal, Reason]:
    """Rehearse; if bhyve cannot write to the null device, rehearse again with a memory file.

    warning: as Ready's, so far as it is known.  Returns the rehearsal and the final warning.
    """
    _require_room(opened, directory, _STATE_BYTES, warning)
    try:
        return _rehearse_once(opened, directory), warning
    except MemoryFileError as error:
        if not directory.has_sink():
            raise
        warning = Reason(f"bhyve cannot write it to the null device ({error})")
        directory.drop_sink(opened.host)
        _require_room(opened, directory, _STATE_BYTES, warning)
        return _rehearse_once(opened, directory), warning


def _rehearse_once(opened: Opened, directory: SnapshotDir) -> Rehearsal:
    checkpoint, size = opened.connect(), opened.memory.size_bytes
    try:
        return rehearse(checkpoint, directory, opened.who, size, _limit_s(opened, directory))
    finally:
        checkpoint.close()


def _require_room(opened: Opened, directory: SnapshotDir, state_bytes: int, warning: str) -> None:
    """Raise GuestError if the checkpoint would fill the disk, while the guest still runs."""
    path, needed = directory.path, state_bytes + _written_bytes(opened, directory)
    try:
        found = os.statvfs(path)
    except OSError as error:
        raise from_oserror(error, f"look at {path}") from None
    free = found.f_bavail * found.f_frsize
    if reasons := verdict.room_reasons(needed, free, "state directory", str(path)):
        raise GuestError(f"{opened.who}: {reasons[0]}", warning)


def _limit_s(opened: Opened, directory: SnapshotDir) -> float:
    """Return how long a checkpoint may take, in seconds."""
    return _HOLD_S + _written_bytes(opened, directory) / snapshot.SLOW_BYTES_PER_SECOND


def _written_bytes(opened: Opened, directory: SnapshotDir) -> int:
    """Return how many bytes of memory a checkpoint writes to a file."""
    return 0 if directory.has_sink() else opened.memory.size_bytes

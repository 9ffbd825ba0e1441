"""A bhyve guest of which all is ready that its pause needs; and the pause.

make_ready   the directory, with the null device as memory file; the rehearsal:
             a checkpoint, which bhyve ends by itself; then the FIFO
pause        the same checkpoint, which stands in its last write (fifo.py), so
             that the guest stands held (held.py); FILE.kern is its state, with
             the rehearsal's FILE.meta, and the FPU beside it
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from bhystream.backend.bhyve import fifo, fpustate, snapshot, verdict
from bhystream.backend.bhyve.checkpoint import Checkpoint, Outcome
from bhystream.backend.bhyve.held import BhyveHeld, HeldRecord
from bhystream.backend.bhyve.host import VMM_DIR
from bhystream.backend.bhyve.opened import Opened
from bhystream.backend.bhyve.rehearsal import UNSAVED, MemoryFileError, Rehearsal, changes, rehearse
from bhystream.backend.bhyve.snapshot import FILE
from bhystream.backend.bhyve.snapshotdir import SnapshotDir, clamped
from bhystream.errors import BhyError, FormatError, GoneError, GuestError, from_oserror

_HOLD_S = 30.0
_STATE_BYTES = 64 << 20  # room for FILE.kern and FILE.meta, before their sizes are known


@dataclass(frozen=True)
class Ready:
    """One guest that can be paused.

    directory: the guest's from pause() on; until then the caller's to remove.
    record: by which the guest is found when it stands held.  warning: why the
    memory file could not be left out, "" where it is.
    """

    opened: Opened
    directory: SnapshotDir
    rehearsal: Rehearsal
    record: HeldRecord
    warning: str

    def pause(self) -> BhyveHeld:
        """Hold the guest in a checkpoint, and take its state.

        Where that fails, the guest is let go; a request that was not served
        is taken back.
        """
        self.opened.require_started()
        kern_bytes = self.rehearsal.meta.kern_bytes
        _require_room(self.opened, self.directory, kern_bytes, self.warning)
        checkpoint = self.opened.connect()
        held = BhyveHeld(self.opened.host, self.record)
        try:
            self._hold(checkpoint, held)
            return self._with_state()
        except BaseException:
            with contextlib.suppress(BhyError):
                held.resume()
            raise
        finally:
            checkpoint.close()

    def _hold(self, checkpoint: Checkpoint, held: BhyveHeld) -> None:
        """Ask for the checkpoint; return when the guest stands in it, all of it saved."""
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
            os.close(fd)  # bhyve has it now, or nobody: see fifo.has_reader()
        if outcome == Outcome.EXITED:
            raise self._gone()
        if outcome != Outcome.HELD:
            raise self._unsaved("")
        kern_bytes = files.kern.stat().st_size
        if not held.stands() or kern_bytes != self.rehearsal.meta.kern_bytes:
            raise self._failed(checkpoint, held)

    def _failed(self, checkpoint: Checkpoint, held: BhyveHeld) -> GuestError:
        """Let go of a checkpoint that is not what was rehearsed; return how it differs.

        Raises RefusedError with G5's own words.
        """
        text = held.release()
        if checkpoint.await_outcome(_HOLD_S) == Outcome.EXITED:
            return self._gone()
        return self._unsaved(changes(self.rehearsal.meta, text))

    def _gone(self) -> GoneError:
        return GoneError(f"{self.opened.who}: its bhyve has ended in the pause")

    def _unsaved(self, why: str) -> GuestError:
        if why:
            return GuestError(
                f"{self.opened.who}: its state is not what it was at the rehearsal: {why}",
                "send it again when its devices stay as they are",
            )
        return GuestError(
            f"{self.opened.who}: its bhyve saved it at the rehearsal, and now did not; it logs"
            " the reason itself",
            f"{UNSAVED}, or a full disk",
        )

    def _with_state(self) -> BhyveHeld:
        """Return the guest that stands held, with its state read and its FPU stored."""
        path, guest = self.directory.files.kern, self.opened
        try:
            states = snapshot.cut(self.rehearsal.text, path.read_bytes())
        except OSError as error:
            raise from_oserror(error, f"read {path}") from None
        except FormatError as error:
            raise GuestError(f"{guest.who}: {path}: {error}") from None
        saved, reasons = fpustate.save(guest.host, guest.name, guest.ncpus, self.directory)
        return BhyveHeld(guest.host, self.record, [*states, *saved], reasons)


def make_ready(opened: Opened, directory: SnapshotDir) -> Ready:
    """Make the directory, rehearse, make the FIFO.

    Where this raises, SnapshotDir.remove() undoes what was made.
    """
    host, size = opened.host, opened.memory.size_bytes
    directory.make()
    warning = clamped(host, size) or directory.make_sink(host)
    rehearsal, warning = _rehearse(opened, directory, warning)
    try:
        full_bytes = fifo.make(directory.files.meta)
    except OSError as error:
        raise from_oserror(error, f"make {directory.files.meta}") from None
    record = HeldRecord(
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


def _rehearse(opened: Opened, directory: SnapshotDir, warning: str) -> tuple[Rehearsal, str]:
    """Rehearse; once more with a memory file where bhyve may not write to the device.

    warning: why the memory file cannot be left out, so far.  Returns it as it is then.
    """
    _require_room(opened, directory, _STATE_BYTES, warning)
    try:
        return _rehearse_once(opened, directory), warning
    except MemoryFileError as error:
        if not directory.has_sink():
            raise
        warning = f"it cannot write it to the null device ({error})"
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
    """Refuse while the guest runs what would end in a full disk."""
    path, needed = directory.path, state_bytes + _written_bytes(opened, directory)
    try:
        found = os.statvfs(path)
    except OSError as error:
        raise from_oserror(error, f"look at {path}") from None
    free = found.f_bavail * found.f_frsize
    if reasons := verdict.room_reasons(needed, free, "state directory", str(path)):
        raise GuestError(f"{opened.who}: {reasons[0]}", warning)


def _limit_s(opened: Opened, directory: SnapshotDir) -> float:
    """Return how long a checkpoint may take."""
    return _HOLD_S + _written_bytes(opened, directory) / snapshot.SLOW_BYTES_PER_SECOND


def _written_bytes(opened: Opened, directory: SnapshotDir) -> int:
    """Return how much memory a checkpoint writes to a file."""
    return 0 if directory.has_sink() else opened.memory.size_bytes

"""A guest of the destination, found again by its record: it runs, is held, or lies in files.

    runs       its bhyve, the very process that was started, listens at its socket
    held       its bhyve lives and stands before its last page (restore.py): its vCPUs
               never ran.  Of a bhyrecv that was killed between READY and the start
    in files   left by `bhyrecv -u`; --resume starts it

A guest is known by its process and its VM, not by its name: what else has that
name is not touched, and counts for nothing.

One in files whose start failed when the vCPUs may have run is not started
again: its disks may have gone on, and its state not.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bhystream import durable
from bhystream.backend.bhyve import snapshot, snapshotfiles
from bhystream.backend.bhyve.command import config_file
from bhystream.backend.bhyve.heldrestore import HeldRestore
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.listening import listener
from bhystream.backend.bhyve.locks import Locks
from bhystream.backend.bhyve.place import Place, Started
from bhystream.backend.bhyve.restore import Restore
from bhystream.backend.bhyve.restoring import TooLateError
from bhystream.backend.bhyve.snapshotfiles import Files
from bhystream.backend.process import is_same, is_stopped
from bhystream.errors import BhyError, GoneError, GuestError, TakenError, from_oserror
from bhystream.guest import SLOW_BYTES_PER_SECOND, Json, State

# Words in run.lock that are no host's, so that vm-bhyve starts nothing.
HELD = "held-by-bhysend"
ATTEMPTS = 3
_SETTLE_S = 60.0
_POLL_S = 0.01


def open_loaded(record: Json, host_of: Callable[[str], Host]) -> BhyveLoaded:
    """Return the guest of a record made by Place.to_json().  Raises GuestError.

    host_of: returns the host of a record by its vmm_dir.
    """
    place = Place.from_json(record)
    return BhyveLoaded(host_of(place.vmm_dir), place)


def held(
    host: Host,
    place: Place,
    files: Files,
    kern_bytes: int,
    on_wait: Callable[[], None] = lambda: None,
) -> HeldRestore:
    """Start a bhyve for a guest's files, and return it held.

    on_wait: as Restore's.  One that was faster than we is ended, and started
    again.  Raises BhyError.
    """
    restore = Restore(host, place, files, on_wait)
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(TooLateError):
            return restore.hold(kern_bytes)
    return restore.hold(kern_bytes)


def keep_files(place: Place, states: Sequence[State]) -> None:
    """Complete the files of a guest that is left loaded, all of them on the disk.

    FILE is there.  Raises FormatError, PipeError, AccessError.
    """
    _, text, kern = snapshot.join(states)
    files = place.files
    texts = {files.kern: kern, files.meta: [text]}
    texts[files.fpu] = [snapshotfiles.pack_fpu(snapshot.fpu_states(states))]
    try:
        for path, pieces in texts.items():
            with path.open("wb") as file:
                file.writelines(pieces)
        kept = Path(place.kept)
        for path in (*kept.iterdir(), kept, kept.parent):
            durable.sync(path)
        durable.write(_synced(place), "")
    except OSError as error:
        raise from_oserror(error, f"write {place.kept}") from None


def _synced(place: Place) -> Path:
    """Return the file that says that all others are complete, and on the disk."""
    return Path(place.kept, "synced")


class BhyveLoaded:
    """base.Paused for the destination's guests of bhyve and its stand-in."""

    reasons: Sequence[str] = ()

    def __init__(self, host: Host, place: Place) -> None:
        """place: as it was recorded, of this host."""
        self.place = place
        self._who = f"guest {place.name}"
        self._host = host
        self._locks: Locks | None = None
        if place.manager:
            self._locks = Locks(place.name, Path(place.manager), socket.gethostname())

    # Where it is.

    def runs(self) -> bool:
        """Say whether it runs; wait while its bhyve restores it.  Raises GuestError."""
        started = self.place.started()
        if started is None:
            return False
        end = time.monotonic() + _SETTLE_S + self.place.memory_bytes / SLOW_BYTES_PER_SECOND
        while not self._listens(started):
            if not started.is_alive() or self._is_held(started):
                return False
            if time.monotonic() > end:
                raise GuestError(
                    f"{self._who}: its bhyve -r does not end", f"its log: {self.place.log_path}"
                )
            time.sleep(_POLL_S)
        return True

    def _listens(self, started: Started) -> bool:
        """Say whether this very bhyve has made its socket: then it runs, or is about to."""
        if not started.is_alive():
            return False
        found = listener(self._host, self.place.name)
        return found is not None and started.process is not None and is_same(found, started.process)

    def _is_held(self, started: Started) -> bool:
        """Say whether it stands, or goes round, before its last page."""
        if started.process is not None and is_stopped(started.process):
            return True
        return self._lacks_last_page()

    def _lacks_last_page(self) -> bool:
        """Say whether FILE is there, and cut short."""
        with contextlib.suppress(OSError):
            return self.place.files.memory.stat().st_size < self.place.memory_bytes
        return False

    def was_never_released(self) -> bool:
        """Say whether nobody can let its bhyve run any more: FILE has no last page.

        Asked where the bhyrecv that would have given it is gone.  Without that
        page no signal lets bhyve go on, so there is no race with anybody.  One
        that has its page and stands stopped never ran either, but a SIGCONT from
        anywhere would let it run just when it is ended: that one is left in doubt.
        """
        started = self.place.started()
        return started is not None and started.is_alive() and self._lacks_last_page()

    def lies_in_files(self) -> bool:
        """Say whether it lies in files from which it can be started."""
        return _synced(self.place).exists()

    def is_alive(self) -> bool:
        """Say whether it runs, is held, or lies in files."""
        started = self.place.started()
        return (started is not None and started.is_alive()) or self.lies_in_files()

    def require_paused(self) -> None:
        """Raise TakenError where it runs, GoneError where nothing is left of it."""
        if self.runs():
            raise TakenError(f"{self._who}: it runs here")
        if not self.is_alive():
            raise GoneError(f"{self._who}: nothing is left of it here")

    def states(self) -> Sequence[State]:
        """Return the state of a guest in files.  Raises GuestError, AccessError."""
        _, found = snapshotfiles.read_states(self.place.files, self.place.memory_bytes)
        return [*found, *snapshotfiles.read_fpu(self.place.files)]

    # What is done to it.

    def resume(self) -> None:
        """Let it run: it does already, or it is started from its files.  Raises GoneError."""
        if not self.runs():
            self._require_startable()
            self._start()
        self.place.remove()
        if self._locks:
            # It runs, whatever becomes of a note for vm-bhyve.
            with contextlib.suppress(BhyError):
                started = self.place.started()
                who = started.process if started else None
                self._locks.runs_here(config_file(self.place.keys), who)

    def _require_startable(self) -> None:
        """End what an earlier start left; refuse a guest that may have run by it."""
        started = self.place.started()
        if started is not None:
            may_have_run = started.may_have_run(self._host.run_dir, self.place.name)
            if may_have_run and not started.is_alive():
                why = "its bhyve -r has ended"
                if not started.is_known:
                    why = f"{self.place.started_path} cannot be read"
                raise self._has_run(f"{self._who}: {why}")
            self._end(started)
        if not self.lies_in_files():
            raise GoneError(f"{self._who}: its bhyve has ended, and left nothing to go on from")

    def _has_run(self, why: str) -> TakenError:
        return TakenError(
            f"{why}; it may have run by then, so its state is not resumed again",
            "start it from its disks, as after a power cut, and --discard this;\n"
            f"if it surely did not run: rm {self.place.started_path}",
        )

    def _start(self) -> None:
        """Start it from its files, which stay as they are until it runs."""
        states = self.states()
        meta, _, kern = snapshot.join(states)
        files = self._linked()
        restore = held(self._host, self.place, files, meta.kern_bytes)
        try:
            restore.load(kern, snapshot.fpu_states(states))
        except BaseException:
            restore.undo()
            raise
        try:
            restore.release()
        except BhyError as error:
            if restore.may_have_run:
                raise self._has_run(str(error)) from None
            raise
        with contextlib.suppress(BhyError):
            restore.set_clock()
        restore.close()

    def _linked(self) -> Files:
        """Return the same memory and text under other names: FILE.kern is written anew there."""
        files = Files(Path(self.place.kept), "start")
        try:
            for old, new in (
                (self.place.files.memory, files.memory),
                (self.place.files.meta, files.meta),
            ):
                new.unlink(missing_ok=True)
                os.link(old, new)
        except OSError as error:
            raise from_oserror(error, f"make {files.memory}") from None
        return files

    def discard(self, there: str) -> None:
        """End it for good: its bhyve, its VM, its files.  One that runs is refused."""
        if self.runs():
            raise GuestError(f"{self._who}: it runs, so it is not ended here")
        self._spoil()
        if started := self.place.started():
            self._end(started)
        self.place.remove()
        is_left_loaded = self.place.staging == self.place.kept
        if self._locks and is_left_loaded and self._locks.holder() == HELD:
            self._locks.release()

    def _spoil(self) -> None:
        """See that its files are not started any more, before that of a start is forgotten.

        Never raises.
        """
        with contextlib.suppress(OSError):
            if self.lies_in_files():
                durable.remove(_synced(self.place))

    def _end(self, started: Started) -> None:
        started.end(self._host, self.place.name)
        self.place.forget_started()

    def clear(self) -> None:
        """Remove the files of a start; also its bhyve, where that never ran."""
        with contextlib.suppress(BhyError):
            started = self.place.started()
            if started is not None and not self.runs():
                self._spoil()
                self._end(started)
            self.place.remove()

    def close(self) -> None:
        """Do nothing: nothing is open."""

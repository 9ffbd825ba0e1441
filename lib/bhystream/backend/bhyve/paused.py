"""A bhyve guest that stands suspended, or is about to: brought back, kept, ended.

bhyve's suspend ends its process.  What is left of the guest is three pieces:
the state, in FILE.kern and FILE.meta of the staging directory; the memory, in
whoever's mapping is left; and how it was started, in the record.  This is
what puts them together again:

    bhyve lives             it runs, once no request to suspend it is under way
    else bhyve -r           from FILE with the memory, started by us
    keep()                  the same three files on disk, synced

Both the source, with its mapping, and the keeper, with its own, act through
this; --resume and --discard too, with the files on disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from pathlib import Path

from bhystream.backend.base import Json
from bhystream.backend.bhyve import checkpoint, snapshot
from bhystream.backend.bhyve.command import config_file
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.locks import Locks
from bhystream.backend.bhyve.memory import Memory, copy_sparse
from bhystream.backend.bhyve.place import Place
from bhystream.backend.bhyve.restore import Restore, listens
from bhystream.backend.process import is_alive
from bhystream.errors import BhyError, GuestError, from_oserror

_SETTLE_S = 60.0
# Words in run.lock that are no host's, so that vm-bhyve starts nothing.
_HELD, _MOVED = "held-by-bhysend", "moved-by-bhysend"
_SUPERVISOR_S = 60.0


def open_paused(record: Json) -> BhyvePaused:
    """Return the guest of a record made by Place.to_json().  Raises GuestError."""
    return BhyvePaused(Place.from_json(record))


class BhyvePaused:
    """base.Paused for bhyve and its stand-in."""

    def __init__(self, place: Place, memory: Memory | None = None) -> None:
        """memory: the caller's, if it has the guest's memory mapped."""
        self.place = place
        self._who = f"guest {place.name}"
        self._host: Host = place.host()
        self._memory = memory
        self._is_ours = False
        self._locks: Locks | None = None
        if place.manager:
            self._locks = Locks(place.name, Path(place.manager), socket.gethostname())

    def hold(self) -> None:
        """Map the guest's memory: it is lost with the last mapping."""
        self._memory = Memory(self._host, self.place.name)
        self._is_ours = True

    def clear(self) -> None:
        """Remove the directories of a guest that was not paused, or runs again."""
        self.place.remove(self._host)

    # Where it is.

    def runs(self) -> bool:
        """Say whether it runs, and go on doing so: no request to suspend it is left.

        Raises GuestError where a request is under way and does not end.
        """
        process = self.place.process
        if process is None or not is_alive(process):
            return listens(self._host, self.place.name)
        if self.place.withdraw(self._host):
            return is_alive(process)
        run_dir, name = self._host.run_dir, self.place.name
        return checkpoint.settle(run_dir, name, self._who, _SETTLE_S, process)

    def is_alive(self) -> bool:
        """Say whether it runs, or can be brought back."""
        process = self.place.process
        if process is not None and is_alive(process):
            return True
        if self._is_complete() or self._can_gather():
            return True
        return listens(self._host, self.place.name)

    def _is_complete(self) -> bool:
        """Say whether the files on disk are all there: the memory is the last."""
        return self.place.kept_files.memory.exists()

    def _can_gather(self) -> bool:
        """Say whether the state is complete, and the memory is somewhere."""
        try:
            snapshot.read_states(self.place.staged, self.place.memory_bytes)
        except BhyError:
            return False
        return (
            self._memory is not None
            or self._has_memory_file()
            or self._host.exists(self.place.name)
        )

    def _has_memory_file(self) -> bool:
        """Say whether bhyve wrote the memory into the staging directory itself."""
        path = self.place.staged.memory
        with contextlib.suppress(OSError):
            return path.is_file() and path.stat().st_size == self.place.memory_bytes
        return False

    # What is done to it.

    def resume(self) -> None:
        """Let it run: it does already, or `bhyve -r` makes it."""
        if not self.runs():
            self._roll_back()
        self.place.remove(self._host)
        if self._locks:
            self._locks.take_back()

    def _roll_back(self) -> None:
        """Start the guest from its snapshot, with the network that its manager took down."""
        self._await_supervisor()
        files = self.place.staged
        if self._is_complete() or not self._has_memory_file():
            self._gather()
            files = self.place.kept_files
        if self._host.exists(self.place.name):
            # Left behind by a bhyve in capability mode; the memory is safe.
            self._host.destroy(self.place.name)
        for tap, bridge in self.place.bridges.items():
            if not self._host.has_tap(tap):
                self._host.make_tap(tap, bridge)
        Restore(self._host, self.place, files).run()
        if self._locks:
            self._locks.runs_here(config_file(self.place.keys, {}))

    def _await_supervisor(self) -> None:
        """Wait for the end of vm-bhyve's: until then it may take our VM and taps for its own."""
        if self._locks and not self._locks.supervisor_gone(_SUPERVISOR_S):
            raise GuestError(f"{self._who}: its vm-bhyve supervisor does not end")

    def keep(self) -> None:
        """Write all of it to disk, synced.  Twice is no error.  Raises BhyError."""
        if self._is_complete() and not os.path.isdir(self.place.staging):
            return
        self._gather()
        try:
            for path in (*Path(self.place.kept).iterdir(), Path(self.place.kept)):
                _sync(path)
            _sync(Path(self.place.kept).parent)
        except OSError as error:
            raise from_oserror(error, f"write {self.place.kept}") from None
        if self._host.exists(self.place.name):
            self._host.destroy(self.place.name)
        if os.path.isdir(self.place.staging):
            self.place.drop_sink(self._host)
            shutil.rmtree(self.place.staging, ignore_errors=True)
        self._await_supervisor()
        if self._locks:
            self._locks.held(_HELD)

    def _gather(self) -> None:
        """Bring the three files together on disk, the memory last.  Twice is no error."""
        if self._is_complete():
            return
        staged, kept = self.place.staged, self.place.kept_files
        snapshot.read_states(staged, self.place.memory_bytes)
        partial = f"{kept.memory}.partial"
        try:
            os.makedirs(self.place.kept, 0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            for source, target in ((staged.kern, kept.kern), (staged.meta, kept.meta)):
                shutil.copyfile(source, target)
            self._write_memory(partial)
            os.rename(partial, kept.memory)
        except OSError as error:
            raise from_oserror(error, f"write {kept.memory}") from None

    def _write_memory(self, path: str) -> None:
        """Write the memory file from where the memory still is."""
        if self._memory is None and self._has_memory_file():
            copy_sparse(self.place.staged.memory, Path(path))
        elif self._memory is not None:
            self._memory.write(path)
        else:
            memory = Memory(self._host, self.place.name)
            try:
                memory.write(path)
            finally:
                memory.close()

    def discard(self, there: str) -> None:
        """End it for good: its files, what is left of its VM; a guest that runs is refused."""
        if self.runs():
            raise GuestError(f"{self._who}: it runs, so it is not ended here")
        self._await_supervisor()
        if self._host.exists(self.place.name):
            self._host.destroy(self.place.name)
        self.place.remove(self._host)
        if self._locks and there and there != self._locks.hostname:
            self._locks.gone_to(there)
        elif self._locks:
            self._locks.held(_MOVED)

    def close(self) -> None:
        """Give up our mapping; the guest stays as it is."""
        if self._memory is not None and self._is_ours:
            self._memory.close()
        self._memory = None


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

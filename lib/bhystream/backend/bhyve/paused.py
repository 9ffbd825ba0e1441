"""A bhyve guest that stands suspended, or is about to: brought back, kept, ended.

bhyve's suspend ends its process.  What is left of the guest is three pieces:
the state, in FILE.kern and FILE.meta of the staging directory; the memory, in
whoever's mapping is left; and how it was started, in the record.  This is
what puts them together again:

    bhyve lives             it runs, once no request to suspend it is under way
    else bhyve -r           from FILE with the memory, started by us
    keep()                  the same three files on disk, synced

A guest is known by its process, not by its name: a bhyve of the same name
that is neither the source's nor one of our own starts, each of which holds a
lock as long as it lives, is another guest.  It is not touched, and nothing is
removed because it runs.

A bhyve -r that failed when the vCPUs may have run is not tried again: the disks
may have gone on, and the state not.

A guest that is only copied (-k) runs on whatever happens to its copy, and is
never started from it: its disks have gone on.

Both the source, with its mapping, and the keeper, with its own, act through
this; --resume and --discard too, with the files on disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from pathlib import Path

from bhystream import durable
from bhystream.backend.base import Json
from bhystream.backend.bhyve import checkpoint
from bhystream.backend.bhyve.command import config_file
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.locks import Locks
from bhystream.backend.bhyve.memory import Memory, copy_sparse
from bhystream.backend.bhyve.place import Place
from bhystream.backend.bhyve.restore import SLOW_BYTES_PER_SECOND, Restore, listener, listens
from bhystream.backend.process import boot_id, is_alive
from bhystream.errors import BhyError, GoneError, GuestError, TakenError, from_oserror

_SETTLE_S = 60.0
# Words in run.lock that are no host's, so that vm-bhyve starts nothing.
_HELD, _MOVED = "held-by-bhysend", "moved-by-bhysend"
_SUPERVISOR_S = 60.0
_POLL_S = 0.01


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
        """Say whether it runs, and goes on doing so: no request to suspend it is left.

        Raises GuestError where a request is under way and does not end, and
        where another guest has its name now.
        """
        process = self.place.process
        if process is None or not is_alive(process):
            return not self.place.is_copied and self._was_started()
        if self.place.is_copied or self.place.withdraw(self._host):
            return is_alive(process)
        run_dir, name = self._host.run_dir, self.place.name
        return checkpoint.settle(run_dir, name, self._who, _SETTLE_S, process)

    def _was_started(self) -> bool:
        """Say whether a bhyve runs that we have started from the snapshot; wait while it loads."""
        end = time.monotonic() + _SETTLE_S + self.place.memory_bytes / SLOW_BYTES_PER_SECOND
        while (found := listener(self._host, self.place.name)) is None:
            if not self.place.is_started():
                self._require_no_run()
                return False
            if time.monotonic() > end:
                raise GuestError(
                    f"{self._who}: its bhyve -r does not end", f"its log: {self.place.log_path}"
                )
            time.sleep(_POLL_S)
        if self.place.is_started():
            return True
        if self._is_complete() or self._can_gather():
            raise TakenError(
                f"{self._who}: another guest of that name runs here, process {found.pid}",
                "end that one first; this one stays as it is",
            )
        # There is nothing to start it from: a source's was, and its lock file is removed.
        return self._is_this_boot()

    def _require_no_run(self) -> None:
        """Refuse a state from which the guest may have run already: its disks have gone on."""
        may_have_run = self.place.may_have_run(self._host.run_dir)
        if may_have_run and (self._is_complete() or self._can_gather()):
            raise self._has_run(f"{self._who}: its bhyve -r has ended")

    def _has_run(self, why: str) -> TakenError:
        return TakenError(
            f"{why}; it may have run by then, so its state is not resumed again",
            "start it from its disks, as after a power cut, and --discard this;\n"
            f"if it surely did not run: rm {self.place.started_path}",
        )

    def is_alive(self) -> bool:
        """Say whether it runs, or can be brought back."""
        process = self.place.process
        if process is not None and is_alive(process):
            return True
        if self.place.is_copied:
            return False
        if self._is_complete() or self._can_gather():
            return True
        if process is None:
            return self.place.is_started()
        # One who was killed may have brought it back, and nothing of it is left
        # but its record.  After a reboot that one is gone too.
        return self._is_this_boot() and listens(self._host, self.place.name)

    def _is_this_boot(self) -> bool:
        """Say whether the source's bhyve ran in this boot of the host."""
        process = self.place.process
        return process is not None and process.boot_id == boot_id()

    def outlives_us(self) -> bool:
        """Say whether it can do without our mapping: it runs, or its memory is in a file, or lost.

        A process that was asked to suspend may do so yet, and leave no memory
        but ours.
        """
        process = self.place.process
        if process is not None and is_alive(process):
            return self.place.is_copied or self.place.withdraw(self._host)
        return self._is_complete() or self._has_memory_file() or not self.is_alive()

    def _is_complete(self) -> bool:
        """Say whether the files on disk are all there: the memory is the last.

        Of files that were not synced a crash of the host leaves the names and
        not the bytes, so they count in the boot only in which they were written.
        """
        if not self.place.kept_files.memory.exists():
            return False
        return self._is_this_boot() or self._synced.exists()

    @property
    def _synced(self) -> Path:
        """Return the file that says that the snapshot on disk was synced."""
        return Path(self.place.kept, "synced")

    def _can_gather(self) -> bool:
        """Say whether bhyve has written the state, and the memory is somewhere.

        Whether the state is whole is for `bhyve -r` to say, not for our own
        reading of it: what it does not understand would be removed as nothing.
        """
        staged = self.place.staged
        try:
            if not all(os.stat(path).st_size for path in (staged.kern, staged.meta)):
                return False
        except FileNotFoundError:
            return False
        except OSError as error:
            raise from_oserror(error, f"look at {staged.kern}") from None
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
        """Let it run: it does already, or `bhyve -r` makes it.  Raises GoneError."""
        is_gone = False
        if not self.place.is_copied and not self.runs():
            is_gone = not self.is_alive()
            if not is_gone:
                self._roll_back()
        self.place.remove(self._host)
        if self._locks:
            self._locks.take_back()
        if is_gone:
            raise GoneError(f"{self._who}: its bhyve has ended, and left nothing to go on from")

    def _roll_back(self) -> None:
        """Start the guest from its snapshot, with the network that its manager took down."""
        files = self.place.staged
        if self._is_complete() or not self._has_memory_file():
            # First of all: the memory may be in the VM only, which the supervisor destroys.
            self._gather()
            files = self.place.kept_files
        self._await_supervisor()
        self._drop_node()
        for tap, bridge in self.place.bridges.items():
            if not self._host.has_tap(tap):
                self._host.make_tap(tap, bridge)
        restore = Restore(self._host, self.place, files)
        try:
            restore.run()
        except BhyError as error:
            if restore.may_have_run:
                raise self._has_run(str(error)) from None
            raise
        if self._locks:
            # It runs, whatever becomes of a note for vm-bhyve.
            with contextlib.suppress(BhyError):
                self._locks.runs_here(config_file(self.place.keys, {}))

    def _drop_node(self) -> None:
        """Destroy the VM that a bhyve in capability mode left behind; the memory is safe by now.

        A VM of that name that was made since is another's, whose bhyve may not
        listen yet; at a destination there never was one of ours.
        """
        place = self.place
        is_ours = place.node != "" and self._host.node_id(place.name) == place.node
        if is_ours and not listens(self._host, place.name):
            self._host.destroy(place.name)

    def _await_supervisor(self) -> None:
        """Wait for the end of vm-bhyve's: until then it may take our VM and taps for its own."""
        if self._locks and not self._locks.supervisor_gone(_SUPERVISOR_S):
            raise GuestError(
                f"{self._who}: its vm-bhyve supervisor does not end",
                f"if no vm process of it is left: rm {self._locks.directory}/run.lock",
            )

    def keep(self) -> None:
        """Write all of it to disk, synced.  Twice is no error.  Raises BhyError."""
        if os.path.isdir(self.place.staging) or not self._is_complete():
            self._gather()
            self._sync()
            self._drop_node()
            self.place.drop_sink(self._host)
            shutil.rmtree(self.place.staging, ignore_errors=True)
        self._await_supervisor()
        if self._locks:
            self._locks.held(_HELD)

    def _sync(self) -> None:
        """See that what _gather() wrote is on the disk, with the names that lead to it."""
        kept = Path(self.place.kept)
        try:
            for path in (*kept.iterdir(), kept, kept.parent, kept.parent.parent):
                durable.sync(path)
            self._synced.touch(0o600)
            durable.sync(kept)
        except OSError as error:
            raise from_oserror(error, f"write {kept}") from None

    def _gather(self) -> None:
        """Bring the three files together on disk, the memory last.  Twice is no error."""
        if self._is_complete():
            return
        if not self._can_gather():
            raise GuestError(f"{self._who}: it is not suspended in {self.place.staging}")
        staged, kept = self.place.staged, self.place.kept_files
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
        """End it for good: its files, what is left of its VM; a guest that runs is refused.

        Where another one has its name, that one's VM and locks are left alone.
        """
        try:
            if self.runs():
                raise GuestError(f"{self._who}: it runs, so it is not ended here")
        except TakenError:
            if there:
                raise  # it runs there too: the operator has to end one
            self.place.remove(self._host)
            return
        if not self.place.is_copied:
            self._await_supervisor()
            self._drop_node()
        self.place.remove(self._host)
        if self._locks and not self.place.is_copied:
            self._leave_lock(self._locks, there)

    def _leave_lock(self, locks: Locks, there: str) -> None:
        """Keep vm-bhyve from starting what is gone; a destination's is as it was before."""
        if self.place.process is None:
            if locks.holder() == _HELD:
                locks.release()
        elif there and there != locks.hostname:
            locks.gone_to(there)
        else:
            locks.held(_MOVED)

    def close(self) -> None:
        """Give up our mapping; the guest stays as it is."""
        if self._memory is not None and self._is_ours:
            self._memory.close()
        self._memory = None

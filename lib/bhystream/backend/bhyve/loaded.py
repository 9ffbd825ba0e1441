"""A guest at the destination, found again by its record: it runs, waits, or lies in files.

    runs       the guest's bhyve, the very process that was started, listens at
               the guest's checkpoint socket
    waits      the guest's bhyve lives and waits for FILE's last page (restore.py);
               the vCPUs never ran.  A bhyrecv that is killed between READY and
               the start leaves such a guest
    in files   `bhyrecv -u` left the guest; --resume starts it

A guest is known by its process and its VM, not by its name.  Another process
or VM of the same name is left alone and decides nothing.

If the start of a guest in files fails after its vCPUs may have run, the guest
is not started again: its disks may have changed since, but its state has not.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bhystream import durable
from bhystream.backend.bhyve import ownconf, powerbutton, snapshot, snapshotfiles, vmdirectory
from bhystream.backend.bhyve.argv import parse_argv
from bhystream.backend.bhyve.command import config_file
from bhystream.backend.bhyve.compare import another_machine, differences
from bhystream.backend.bhyve.config import split
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.listening import listener
from bhystream.backend.bhyve.locks import HELD
from bhystream.backend.bhyve.network import announce
from bhystream.backend.bhyve.restore import Restore, Supervision, supervision
from bhystream.backend.bhyve.restoredguest import RestoredGuest, Started
from bhystream.backend.bhyve.restoring import TooLateError
from bhystream.backend.bhyve.snapshotfiles import Files
from bhystream.backend.bhyve.waitingrestore import WaitingRestore
from bhystream.backend.process import Identity, is_same, is_stopped
from bhystream.errors import (
    BhyError,
    GuestEndedError,
    GuestError,
    StaleError,
    from_oserror,
)
from bhystream.guest import SLOW_BYTES_PER_SECOND, Json, State

ATTEMPTS = 3
_SETTLE_S = 60.0
_POLL_S = 0.01


def open_loaded(record: Json, host_of: Callable[[str], Host]) -> BhyveLoaded:
    """Return the guest of a record that RestoredGuest.to_json() made.

    host_of: returns the host of a record by its vmm_dir.  Raises GuestError if
    the record cannot be read.
    """
    guest = RestoredGuest.from_json(record)
    return BhyveLoaded(host_of(guest.vmm_dir), guest)


def start_waiting(
    host: Host,
    guest: RestoredGuest,
    files: Files,
    kern_bytes: int,
    on_wait: Callable[[], None] = lambda: None,
    supervision: Supervision | None = None,
) -> WaitingRestore:
    """Start a bhyve for a guest's files; return it when it waits for the last page.

    on_wait, supervision: as in Restore.  If bhyve reads all of FILE before FILE is cut,
    bhyve is ended and started again, up to ATTEMPTS times in all.  Raises
    BhyError, TooLateError of it if bhyve was too fast each time.
    """
    restore = Restore(host, guest, files, on_wait, supervision)
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(TooLateError):
            return restore.hold(kern_bytes)
    return restore.hold(kern_bytes)


def keep_files(guest: RestoredGuest, states: Sequence[State]) -> None:
    """Complete the files of a guest that is left loaded (-u), and sync them to the disk.

    FILE exists already.  Raises FormatError if the states are not a whole
    snapshot, InputOutputError or AccessError if a file cannot be written.
    """
    _, text, kern = snapshot.join(states)
    files = guest.files
    texts = {files.kern: kern, files.meta: [text]}
    texts[files.fpu] = [snapshotfiles.pack_fpu(snapshot.fpu_states(states))]
    try:
        for path, pieces in texts.items():
            with open(durable.create(path), "wb") as file:
                file.writelines(pieces)
        kept = Path(guest.kept)
        for path in (*kept.iterdir(), kept, kept.parent):
            durable.sync(path)
        durable.write(_synced(guest), "")
    except OSError as error:
        raise from_oserror(error, f"write {guest.kept}") from None


def note_running(guest: RestoredGuest, who: Identity | None) -> None:
    """Tell vm-bhyve that a guest runs here, with or without its supervisor.

    who: the guest's bhyve, None if it is not known.  Raises InputOutputError or AccessError.
    """
    if guest.vm_start.exists():
        vmdirectory.let_run(guest.vm_start)
    elif guest.locks:
        guest.locks.runs_here(config_file(guest.keys), who)


def note_configuration(guest: RestoredGuest, who: Identity | None) -> None:
    """Keep the configuration of a guest that vm-bhyve does not know.

    who: as for note_running().  Never raises a BhyError: ownconf.notices() finds out.
    """
    if not guest.locks:
        with contextlib.suppress(BhyError):
            ownconf.remove(guest.conf)
            ownconf.write(guest.conf, config_file(guest.keys), who)


def _synced(guest: RestoredGuest) -> Path:
    """Return the path of the file whose existence says that all others are on the disk."""
    return Path(guest.kept, "synced")


class BhyveLoaded:
    """base.Paused for the destination's guests of bhyve and of bhyve's stand-in."""

    reasons: Sequence[str] = ()

    def __init__(self, host: Host, guest: RestoredGuest) -> None:
        """Take a guest of this host, as it was recorded."""
        self.guest = guest
        self._who = f"guest {guest.name}"
        self._host = host
        self._locks = guest.locks

    # Questions.

    def runs(self) -> bool:
        """Say whether the guest runs; wait while its bhyve restores it.

        Raises GuestError if bhyve restores for longer than it should.
        """
        started = self.guest.started()
        if started is None:
            return False
        end = time.monotonic() + _SETTLE_S + self.guest.memory_bytes / SLOW_BYTES_PER_SECOND
        while not self._listens(started):
            if not started.is_alive() or self._is_held(started):
                return False
            if time.monotonic() > end:
                raise GuestError(
                    f"{self._who}: its bhyve -r does not end", f"its log: {self.guest.log_path}"
                )
            time.sleep(_POLL_S)
        return True

    def _listens(self, started: Started) -> bool:
        """Say whether this very bhyve has made its socket: the guest runs, or is about to."""
        if not started.is_alive():
            return False
        found = listener(self._host, self.guest.name)
        return found is not None and started.process is not None and is_same(found, started.process)

    def _is_held(self, started: Started) -> bool:
        """Say whether bhyve is stopped, or loops in its read because FILE has no last page."""
        if started.process is not None and is_stopped(started.process):
            return True
        return self._lacks_last_page()

    def _lacks_last_page(self) -> bool:
        """Say whether FILE exists and lacks its last page."""
        with contextlib.suppress(OSError):
            return self.guest.files.memory.stat().st_size < self.guest.memory_bytes
        return False

    def was_never_released(self) -> bool:
        """Say whether the guest's bhyve waits and nobody can release it: FILE has no last page.

        The caller knows that the bhyrecv that would have written the page is
        gone.  Without that page no signal lets bhyve go on, so there is no race
        with any other process.  A stopped bhyve that has its page never ran
        either, but a SIGCONT from any process could let it run at the moment in
        which it is ended: such a guest is left in doubt.
        """
        started = self.guest.started()
        return started is not None and started.is_alive() and self._lacks_last_page()

    def lies_in_files(self) -> bool:
        """Say whether the guest lies in files from which it can be started."""
        return _synced(self.guest).exists()

    def is_alive(self) -> bool:
        """Say whether the guest runs, waits, or lies in files."""
        started = self.guest.started()
        return (started is not None and started.is_alive()) or self.lies_in_files()

    def require_paused(self) -> None:
        """Raise StaleError if the guest runs, GuestEndedError if neither bhyve nor files exist."""
        if self.runs():
            raise StaleError(f"{self._who}: it runs here")
        if not self.is_alive():
            raise GuestEndedError(f"{self._who}: nothing is left of it here")

    def states(self) -> Sequence[State]:
        """Return the state of a guest in files.

        Raises GuestError if a file is missing or incomplete, AccessError if it cannot be read.
        """
        _, found = snapshotfiles.read_states(self.guest.files, self.guest.memory_bytes)
        return [*found, *snapshotfiles.read_fpu(self.guest.files)]

    # Actions.

    def resume(self) -> None:
        """Start the guest from its files, unless it runs already.

        Raises GuestEndedError if there are no files, StaleError if the guest may
        have run, and BhyError if it cannot be started.
        """
        if not self.runs():
            self._require_startable()
            self._start()
        # The guest runs, so an error here or in the note for vm-bhyve is ignored.
        with contextlib.suppress(BhyError):
            announce(self._host, self.guest.keys, self.guest.started())
        self.guest.remove()
        with contextlib.suppress(BhyError):
            started = self.guest.started()
            who = started.process if started else None
            note_running(self.guest, who)
            note_configuration(self.guest, who)

    def _require_startable(self) -> None:
        """End the bhyve that an earlier start left; refuse a guest that may have run since."""
        started = self.guest.started()
        if started is not None:
            may_have_run = started.may_have_run(self._host.run_dir, self.guest.name)
            if may_have_run and not started.is_alive():
                why = "its bhyve -r has ended"
                if not started.is_known:
                    why = f"{self.guest.started_path} cannot be read"
                raise self._has_run(f"{self._who}: {why}")
            self._end(started)
        if not self.lies_in_files():
            raise GuestEndedError(
                f"{self._who}: its bhyve has ended, and there are no files to start it from"
            )

    def _has_run(self, why: str) -> StaleError:
        return StaleError(
            f"{why}; it may have run by then, so its state is not resumed again",
            "start it from its disks, as after a power cut, and --discard this;\n"
            f"if it surely did not run: rm {self.guest.started_path}",
        )

    def _start(self) -> None:
        """Start the guest from its files, which stay as they are until the guest runs."""
        states = self.states()
        meta, _, kern = snapshot.join(states)
        files = self._linked()
        if self._locks and self._locks.holder() == HELD:
            self._locks.release()
        restore = start_waiting(
            self._host,
            self.guest,
            files,
            meta.kern_bytes,
            supervision=supervision(self._host, self.guest, self._adapted),
        )
        self.guest = replace(restore.guest, process=None, node="")
        if not restore.is_connected:
            self.reasons = [powerbutton.LOST]
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

    def _adapted(self, words: Sequence[str]) -> RestoredGuest:
        """Return the guest with the resources for which vm-bhyve calls bhyve.

        words: bhyve's arguments.  Raises IncompatibleError if they describe another machine.
        """
        own = split(parse_argv(words), self.guest.name)
        keys = split(self.guest.keys, self.guest.name).section["keys"]
        # The record may lack resources, which vm-bhyve gives only now.
        ours = {"keys": keys, "resources": own.section["resources"]}
        if lines := differences(ours, own.section, own.computed):
            raise another_machine(self.guest.name, lines)
        return replace(self.guest, keys={**self.guest.keys, **own.resources()})

    def _linked(self) -> Files:
        """Link FILE and FILE.meta to other names, beside which FILE.kern is written anew."""
        files = Files(Path(self.guest.kept), "start")
        try:
            for old, new in (
                (self.guest.files.memory, files.memory),
                (self.guest.files.meta, files.meta),
            ):
                new.unlink(missing_ok=True)
                os.link(old, new)
        except OSError as error:
            raise from_oserror(error, f"make {files.memory}") from None
        return files

    def discard(self, there: str) -> None:
        """End the guest for good: its bhyve, its VM, its files.

        there: not used.  Raises GuestError if the guest runs, or if its bhyve does not end.
        """
        if self.runs():
            raise GuestError(f"{self._who}: it runs, so it is not ended here")
        self._spoil()
        if started := self.guest.started():
            self._end(started)
        self.guest.end_supervisor()
        self.guest.remove()
        is_left_loaded = self.guest.staging == self.guest.kept
        if self._locks and is_left_loaded and self._locks.holder() == HELD:
            self._locks.release()

    def _spoil(self) -> None:
        """Make sure that nobody starts the files any more, before the earlier start is forgotten.

        Never raises.
        """
        with contextlib.suppress(OSError):
            if self.lies_in_files():
                durable.remove(_synced(self.guest))

    def _end(self, started: Started) -> None:
        started.end(self._host, self.guest.name)
        self.guest.forget_started()

    def clear(self) -> None:
        """Remove the files of a start, and end its bhyve if the guest does not run.

        Never raises a BhyError.
        """
        with contextlib.suppress(BhyError):
            started = self.guest.started()
            if started is not None and not self.runs():
                self._spoil()
                self._end(started)
                self.guest.end_supervisor()
            else:
                vmdirectory.let_run(self.guest.vm_start)
            self.guest.remove()

    def close(self) -> None:
        """Do nothing: nothing is open."""

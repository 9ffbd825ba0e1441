"""The directory of a guest that is to be paused: STATE_DIR/held/ID, mode 0700.

    ckp        bhyve's memory file: a link to dev/null, or a file if the link cannot be used
    ckp.kern   the state of kernel and devices that bhyve saves
    ckp.meta   a regular file in the rehearsal; the FIFO afterwards
    dev/       the null device, mounted
    journal    while a vCPU has the stub's registers: the guest's own registers
    throttled  while bhysend may have suspended vCPUs of the running guest: an empty file

bhyve gets the directory as a descriptor, and opens ckp.kern there first.  So
bhysend withdraws a request by a directory of that name: bhyve's open(2) fails,
and bhyve refuses the request.  mkdir(2) shows which of the two came first.

The directory contains nothing of the guest itself.  If it is removed, the
measurements and the saved state are lost, and so is the FIFO that releases a
paused guest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from bhystream.backend.bhyve import fifo
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.journal import Journal
from bhystream.backend.bhyve.snapshot import FILE
from bhystream.backend.bhyve.snapshotfiles import Files
from bhystream.errors import AccessError, GuestError, InputOutputError, from_oserror

_NULL_DIR = "dev"
_SINK = f"{_NULL_DIR}/null"
_REMOVE_S = 1.0
_REMOVE_POLL_S = 0.01


@dataclass(frozen=True)
class SnapshotDir:
    """One guest's directory."""

    path: Path

    @property
    def files(self) -> Files:
        """Return the three files of the snapshot."""
        return Files(self.path, FILE)

    def make(self) -> None:
        """Make the directory.  Raises InputOutputError or AccessError if it cannot be made."""
        try:
            self.path.parent.mkdir(0o700, exist_ok=True)
            self.path.mkdir(0o700)
        except OSError as error:
            raise from_oserror(error, f"make {self.path}") from None

    def open(self) -> int:
        """Return the directory as a descriptor for a request; the descriptor is the caller's.

        Raises InputOutputError or AccessError if it cannot be opened.
        """
        try:
            return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise from_oserror(error, f"open {self.path}") from None

    def sweep(self, host: Host, lock: Path, records: Path) -> None:
        """Remove the directory that a bhysend left which was killed before it wrote a record.

        lock: the guest's lock file, which the caller has locked.  The file names
        the last directory that was made under the lock; sweep() writes the name
        of this directory into it.  records: the directory of the source's records.
        The earlier directory stays if a record names it, or if its FIFO contains
        bytes, because then a guest may stand paused in it.  Never raises.
        """
        with contextlib.suppress(OSError, ValueError):
            left = Path(lock.read_text("utf-8", "surrogateescape"))
            is_ours = left.parent == self.path.parent and left.name.isalnum() and left.is_dir()
            is_known = any(records.glob(f"{left.name}*.json"))
            if is_ours and not is_known and not fifo.pending(SnapshotDir(left).files.meta):
                SnapshotDir(left).remove(host)
        with contextlib.suppress(OSError):
            lock.write_text(str(self.path), "utf-8", "surrogateescape")

    # The memory file.

    def make_sink(self, host: Host) -> str:
        """Make the memory file the null device; return "", or why that is not possible.

        The result is checked with stat(2): if the memory file were no device,
        bhyve would write the whole memory into a file.

        bhyve opens the memory file with openat(2) relative to the directory's
        descriptor, which follows a relative link and crosses a mount also in
        capability mode.  Run on FreeBSD 15.1, emulated AMD.
        """
        directory = self.path / _NULL_DIR
        try:
            directory.mkdir(0o700)
            host.mount_null(directory)
            os.symlink(_SINK, self.files.memory)
            if not self.has_sink():
                raise GuestError("the memory file is no null device")
        except OSError as error:
            self.drop_sink(host)
            return error.strerror or str(error)
        except (GuestError, AccessError, InputOutputError) as error:  # an interrupt is not caught
            self.drop_sink(host)
            return str(error)
        return ""

    def has_sink(self) -> bool:
        """Say whether the memory file is the null device."""
        try:
            found, null = os.stat(self.files.memory), os.stat("/dev/null")
        except OSError:
            return False
        return stat.S_ISCHR(found.st_mode) and found.st_rdev == null.st_rdev

    def drop_sink(self, host: Host) -> None:
        """Undo make_sink().  Never raises; may be called twice."""
        directory = self.path / _NULL_DIR
        if self.files.memory.is_symlink():
            with contextlib.suppress(OSError):
                self.files.memory.unlink()
        if directory.exists():
            host.unmount_null(directory)
            with contextlib.suppress(OSError):
                # The directory is empty, or the stand-in's.  If it is still mounted, this fails.
                shutil.rmtree(directory)

    # The request.

    def drop_files(self) -> None:
        """Remove the files that a finished checkpoint has written.  Never raises."""
        files = self.files
        for path in (files.kern, files.meta, *(() if self.has_sink() else (files.memory,))):
            with contextlib.suppress(OSError):
                path.unlink()

    def withdraw(self) -> bool:
        """Make sure that bhyve begins no request in the directory any more.

        Returns False if bhyve may have begun one before.  Source: snapshot.c,
        vm_checkpoint(), read: bhyve's open(2) of a directory for writing fails
        with EISDIR, before bhyve pauses anything.
        """
        try:
            self.files.kern.mkdir(0o700)
        except FileNotFoundError:
            return True
        except FileExistsError:
            return self.files.kern.is_dir()
        except OSError:  # for instance, no room for another name
            return False
        return True

    # The registers.

    @property
    def journal(self) -> Journal:
        """Return the journal of what must be put back into the guest before it runs."""
        return Journal(self.path / "journal")

    # The throttle.

    @property
    def throttled(self) -> Path:
        """Return the mark of a guest whose vCPUs bhysend may have suspended.

        Without the mark a suspended vCPU is another program's, and is left alone.
        """
        return self.path / "throttled"

    def remove(self, host: Host) -> None:
        """Remove the directory with its mount.  Never raises; may be called twice."""
        if not self.path.is_dir():
            return
        self.withdraw()
        # bhyve may still serve a request that was given up: it has the null device open,
        # so the device cannot be unmounted, and it makes up to three files while the
        # directory is emptied.  In a removed directory it can make none.
        end = time.monotonic() + _REMOVE_S
        while True:
            self.drop_sink(host)
            shutil.rmtree(self.path, ignore_errors=True)
            if not os.path.lexists(self.path) or time.monotonic() > end:
                return
            time.sleep(_REMOVE_POLL_S)

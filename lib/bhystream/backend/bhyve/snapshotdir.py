"""The directory of a guest that is to be held: STATE_DIR/held/ID, mode 0700.

    ckp        bhyve's memory file: a link to dev/null, or a file where that cannot be had
    ckp.kern   what bhyve saves of kernel and devices
    ckp.meta   a regular file in the rehearsal; the FIFO afterwards
    dev/       the null device, mounted
    journal    while the guest's registers are not its own: what they were

It is handed to bhyve as a descriptor, so it also takes a request back: a
directory in the place of ckp.kern, which bhyve opens first, refuses it.
mkdir(2) decides which of the two came first.

Nothing in it is the guest: whoever removes it loses what was measured and
saved, and the way to let a guest run that stands held.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from bhystream.backend.bhyve import fifo
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.journal import Journal
from bhystream.backend.bhyve.snapshot import FILE, memory_spans
from bhystream.backend.bhyve.snapshotfiles import Files
from bhystream.errors import AccessError, GuestError, PipeError, from_oserror

_NULL_DIR = "dev"
_SINK = f"{_NULL_DIR}/null"
# Source: sys/kern/sys_generic.c, devfs_iosize_max().
_CLAMP = "debug.devfs_iosize_max_clamp"
_CLAMP_BYTES = (1 << 31) - 1


def clamped(host: Host, memory_bytes: int) -> str:
    """Return why bhyve cannot write a guest's memory to a device, or "".

    bhyve writes lowmem, and then highmem, with one write(2) each, unless a
    terminal is its standard input; devfs answers EINVAL beyond INT_MAX bytes,
    and the checkpoint fails.  Run on FreeBSD 15.1.  Source: snapshot.c,
    vm_snapshot_mem_part(); sys/fs/devfs/devfs_vnops.c, devfs_write_f().
    """
    longest = max(length for _, _, length in memory_spans(memory_bytes))
    value = (host.sysctl(_CLAMP) or "0").strip()
    if longest <= _CLAMP_BYTES or value == "0":
        return ""
    return (
        f"{_CLAMP}: it is {value} here, so no device takes the {longest} bytes that bhyve"
        f" writes at once; sysctl {_CLAMP}=0 lets the null device take them"
    )


@dataclass(frozen=True)
class SnapshotDir:
    """One guest's directory."""

    path: Path

    @property
    def files(self) -> Files:
        """Return the three files of the snapshot."""
        return Files(self.path, FILE)

    def make(self) -> None:
        """Make it.  Raises PipeError, AccessError."""
        try:
            self.path.parent.mkdir(0o700, exist_ok=True)
            self.path.mkdir(0o700)
        except OSError as error:
            raise from_oserror(error, f"make {self.path}") from None

    def open(self) -> int:
        """Return it as a descriptor for a request, the caller's.  Raises PipeError, AccessError."""
        try:
            return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise from_oserror(error, f"open {self.path}") from None

    def sweep(self, host: Host, lock: Path, records: Path) -> None:
        """Remove the directory of one who was killed before anybody knew of it.

        lock: the guest's lock file, which the caller holds; it names the last
        directory that was made under it, from now on ours.  records: the
        source's; a directory that one of them speaks of stays, and so does
        one in whose FIFO something is: whoever stands in it needs it.  Never
        raises.
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
        """Let the memory file be the null device; return "", or why that cannot be had.

        It is believed only when it is seen: a memory file that is no device
        would be one without the guest's memory.

        bhyve opens it with openat(2) below the directory's descriptor, which
        follows a relative link and crosses a mount also in capability mode.
        Run on FreeBSD 15.1, emulated AMD.
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
        except (GuestError, AccessError, PipeError) as error:  # and not an interrupt
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
        """Undo make_sink().  Never raises; twice is no error."""
        directory = self.path / _NULL_DIR
        if self.files.memory.is_symlink():
            with contextlib.suppress(OSError):
                self.files.memory.unlink()
        if directory.exists():
            host.unmount_null(directory)
            with contextlib.suppress(OSError):
                # A stand-in's, or an empty one; a mount that stays keeps it.
                shutil.rmtree(directory)

    # The request.

    def drop_files(self) -> None:
        """Remove what a checkpoint that was served has written.  Never raises."""
        files = self.files
        for path in (files.kern, files.meta, *(() if self.has_sink() else (files.memory,))):
            with contextlib.suppress(OSError):
                path.unlink()

    def withdraw(self) -> bool:
        """Make sure that no request begins to use the directory any more; False if one may have.

        Read: open(2) of a directory to write fails with EISDIR, before
        anything is paused (snapshot.c, vm_checkpoint()).
        """
        try:
            self.files.kern.mkdir(0o700)
        except FileNotFoundError:
            return True
        except FileExistsError:
            return self.files.kern.is_dir()
        except OSError:  # no room for a name
            return False
        return True

    # The registers.

    @property
    def journal(self) -> Journal:
        """Return what is to be put back into the guest before it is let go."""
        return Journal(self.path / "journal")

    def remove(self, host: Host) -> None:
        """Remove it with its mount.  Never raises; twice is no error."""
        if not self.path.is_dir():
            return
        self.withdraw()
        self.drop_sink(host)
        # A second time for a file that a late request has made meanwhile.
        for _ in range(2):
            shutil.rmtree(self.path, ignore_errors=True)

"""What is recorded of a bhyve guest: all that is needed to bring it back without bhysend.

The record is written before the pause, and read by the keeper and the verbs.
Two directories belong to it, each with the three files of a snapshot, named
ckp, ckp.kern and ckp.meta:

    staging   in memory; bhyve's suspend writes here, and the memory file is
              the null device where that can be had
    kept      in the state directory, on disk; made when the guest is brought
              back or kept, and no manager of guests looks there.  held/ID at
              a source, loaded/ID at a destination: both may be one host

The staging directory of a source also takes a request back: it is handed to
bhyve as a descriptor, and in a directory that was removed no file can be
made, so a request that comes late pauses nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bhystream.backend.base import Json
from bhystream.backend.bhyve.host import VMM_DIR, Host
from bhystream.backend.bhyve.hosts import open_host
from bhystream.backend.bhyve.snapshot import Files, memory_spans
from bhystream.backend.process import Identity, boot_id
from bhystream.errors import (
    AccessError,
    BhyError,
    GuestError,
    PipeError,
    UsageError,
    from_oserror,
)

FILE = "ckp"
_NULL_DIR = "dev"
_SINK = f"{_NULL_DIR}/null"
STAGING = {"source": "BHYSEND_STAGING", "destination": "BHYRECV_STAGING"}
_MEMORY_DIRS = ("/dev/shm", "/tmp", "/var/run")
# `bhyve -r FILE` takes NAME_MAX, with ".kern".  Source: snapshot.c, strcat_extension().
_MAX_FILE_BYTES = 255 - len(".kern")
# Source: freebsd/freebsd-src@005a071d sys/kern/sys_generic.c, devfs_iosize_max().
_CLAMP = "debug.devfs_iosize_max_clamp"
_CLAMP_BYTES = (1 << 31) - 1


@dataclass(frozen=True)
class Place:
    """One guest's record.  Paths are absolute.

    kind: of the host.  vmm_dir: the stand-in's directory, "" on FreeBSD.
    process: of the source's guest; None at the destination, where it is not
    started yet.  keys: the whole bhyve_config(5), host resources too.
    bridges: tap -> its bridge, or None.  manager: the guest's directory in
    vm-bhyve's datastore, "" where it is not vm-bhyve's.  is_copied: a -k's:
    the guest is never suspended, and what is written is not what becomes of it.
    node: Host.node_id() of the source's VM, the only one that is ever destroyed.
    """

    kind: str
    vmm_dir: str
    name: str
    process: Identity | None
    staging: str
    kept: str
    keys: dict[str, str]
    memory_bytes: int
    bridges: dict[str, str | None]
    manager: str
    is_copied: bool = False
    node: str = ""

    @property
    def staged(self) -> Files:
        """Return the snapshot in memory."""
        return Files(Path(self.staging), FILE)

    @property
    def kept_files(self) -> Files:
        """Return the snapshot on disk."""
        return Files(Path(self.kept), FILE)

    @property
    def log_path(self) -> str:
        """Return the log of a bhyve that we start, in the state directory."""
        return str(Path(self.kept).parents[1] / "log" / f"{self.name}.log")

    @property
    def started_path(self) -> Path:
        """Return the file of the bhyve that was started from the snapshot, see lock_started().

        Of one stream there may be guests of several names (bhysend -k).
        """
        return Path(f"{self.kept}.{self.name}.started")

    def lock_started(self) -> int:
        """Lock a file for the bhyve that is about to be started from the snapshot.

        Returns the descriptor, which that bhyve inherits, and which is the
        caller's to close: the lock is flock(2)'s, of the open file, so it
        lives and ends with that bhyve, whatever becomes of us.  bhyve closes
        nothing that it inherits, and capabilities take no lock away:
        unverified on FreeBSD.  Source: flock(2); bhyverun.c, main().

        Raises GuestError where one lives already, PipeError, AccessError.
        """
        try:
            fd = os.open(self.started_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise from_oserror(error, f"make {self.started_path}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if isinstance(error, BlockingIOError):
                raise GuestError(f"guest {self.name}: bhyve -r was started already") from None
            raise from_oserror(error, f"lock {self.started_path}") from None
        with contextlib.suppress(OSError):  # the lock is what counts
            os.ftruncate(fd, 0)
            os.write(fd, boot_id().encode())
        return fd

    def is_started(self) -> bool:
        """Say whether a bhyve lives that we have started from the snapshot.

        Raises PipeError, AccessError.
        """
        try:
            fd = os.open(self.started_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise from_oserror(error, f"look at {self.started_path}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            raise from_oserror(error, f"look at {self.started_path}") from None
        finally:
            os.close(fd)
        return False

    def may_have_run(self, run_dir: Path) -> bool:
        """Say whether a bhyve may have run that we started from the snapshot, and that has ended.

        It has made its checkpoint socket, of which none was left at its start.
        After a reboot, which removes sockets, nobody can say.
        """
        try:
            boot = self.started_path.read_text()
        except OSError:
            return False
        return boot not in ("", boot_id()) or os.path.lexists(run_dir / self.name)

    def forget_started(self) -> None:
        """Forget a start that never ran, or was of an earlier time.  Never raises."""
        with contextlib.suppress(OSError, BhyError):
            if not self.is_started():
                self.started_path.unlink(missing_ok=True)

    def host(self) -> Host:
        """Return the host that the record is of."""
        return open_host({VMM_DIR: self.vmm_dir} if self.vmm_dir else {})

    def to_json(self) -> Json:
        """Return the record, JSON."""
        return {"hypervisor": self.kind, **asdict(self)}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Place:
        """Return the place that to_json() wrote.  Raises GuestError."""
        try:
            fields = {key: value for key, value in record.items() if key != "hypervisor"}
            if fields["process"] is not None:
                fields["process"] = Identity(**fields["process"])
            return Place(**fields)
        except (KeyError, TypeError) as error:
            raise GuestError(f"cannot read the record of a bhyve guest: {error}") from None

    # The staging directory.

    def make_staging(self) -> None:
        """Make the staging directory.  Raises UsageError, PipeError, AccessError."""
        for files in (self.staged, self.kept_files):
            if len(os.fsencode(files.memory)) > _MAX_FILE_BYTES:
                raise UsageError(
                    f"{files.memory}: bhyve -r takes no path longer than {_MAX_FILE_BYTES} bytes",
                    "name another staging or state directory",
                )
        try:
            os.mkdir(self.staging, 0o700)
        except OSError as error:
            raise from_oserror(error, f"make the staging directory {self.staging}") from None

    def sweep(self, host: Host, lock: Path, records: Path) -> None:
        """Remove the staging directory of one who was killed before anybody knew of it.

        lock: the guest's lock file, which the caller holds; it names the last
        staging directory that was made under it, from now on ours.  records:
        the role's; a directory that one of them speaks of stays.  Never raises.
        """
        with contextlib.suppress(OSError, ValueError):
            left = Path(lock.read_text())
            role, _, id_ = left.name.partition("-")
            is_ours = role in ("bhysend", "bhyrecv") and id_.isalnum() and left.is_dir()
            if is_ours and not any(records.glob(f"{id_}*.json")):
                replace(self, staging=str(left)).drop_sink(host)
                shutil.rmtree(left, ignore_errors=True)
        with contextlib.suppress(OSError):
            lock.write_text(self.staging)

    def make_sink(self, host: Host) -> str:
        """Let the memory file be the null device; return "", or why that cannot be had.

        It is believed only when it is seen: a memory file that is no device
        would be one without the guest's memory.

        bhyve opens it with openat(2) below the directory's descriptor, which
        follows a relative link and crosses a mount also in capability mode;
        O_CREAT and O_TRUNC do nothing to a device, lseek(2) is allowed, and
        its size is not asked for.  Confirmed in source, never run:
        bnovkov/freebsd-src@e7ae4550 usr.sbin/bhyve/snapshot.c, vm_checkpoint()
        and vm_snapshot_mem_part(); sys/fs/devfs/devfs_vnops.c, devfs_setattr()
        and devfs_ops_f (index id 1020455833); sys/kern/vfs_lookup.c (24501488).
        """
        directory = Path(self.staging, _NULL_DIR)
        if why := self._clamped(host):
            return why
        try:
            directory.mkdir(0o700)
            host.mount_null(directory)
            os.symlink(_SINK, self.staged.memory)
            if not self.has_sink():
                raise GuestError("the memory file is no null device")
        except OSError as error:
            self.drop_sink(host)
            return error.strerror or str(error)
        except (GuestError, AccessError, PipeError) as error:  # and not an interrupt
            self.drop_sink(host)
            return str(error)
        return ""

    def _clamped(self, host: Host) -> str:
        """Return why bhyve could not write this guest's memory to a device, or "".

        bhyve writes lowmem, and then highmem, with one write(2) each, unless a
        terminal is its standard input; devfs answers EINVAL beyond INT_MAX
        bytes, and bhyve gives the suspend up.  Source: snapshot.c,
        vm_snapshot_mem_part(); devfs_vnops.c, devfs_write_f().
        """
        longest = max(length for _, _, length in memory_spans(self.memory_bytes))
        value = (host.sysctl(_CLAMP) or "0").strip()
        if longest <= _CLAMP_BYTES or value == "0":
            return ""
        return (
            f"{_CLAMP}: it is {value} here, so no device takes the {longest} bytes that bhyve"
            f" writes at once; sysctl {_CLAMP}=0 lets the null device take them"
        )

    def has_sink(self) -> bool:
        """Say whether the memory file is the null device."""
        try:
            found, null = os.stat(self.staged.memory), os.stat("/dev/null")
        except OSError:
            return False
        return stat.S_ISCHR(found.st_mode) and found.st_rdev == null.st_rdev

    def drop_sink(self, host: Host) -> None:
        """Undo make_sink().  Never raises; twice is no error."""
        directory = Path(self.staging, _NULL_DIR)
        if self.staged.memory.is_symlink():
            with contextlib.suppress(OSError):
                os.unlink(self.staged.memory)
        if directory.exists():
            host.unmount_null(directory)
            with contextlib.suppress(OSError):
                # A stand-in's, or an empty one; a mount that stays keeps it.
                shutil.rmtree(directory)

    # The room that bhyve's files need there.

    @property
    def _ballast(self) -> Path:
        return Path(self.staging, "ballast")

    def hold_room(self, room_bytes: int) -> None:
        """Hold room in the staging directory, so that nobody else takes it.  Twice is no error.

        bhyve does not see that its last write to FILE.meta fails, and ends as
        one that has suspended its guest: without this state the guest is lost.
        Confirmed in source, never run: snapshot.c, vm_checkpoint().  A file
        system that cannot reserve (ZFS: EINVAL) holds none.

        Raises PipeError, AccessError where there is no such room.
        """
        try:
            fd = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, room_bytes)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise from_oserror(error, f"reserve {room_bytes} bytes: {self._ballast}") from None

    def held_bytes(self) -> int:
        """Return how much room hold_room() holds."""
        try:
            return self._ballast.stat().st_size
        except OSError:
            return 0

    def release_room(self) -> None:
        """Undo hold_room(): bhyve writes now, or never.  Never raises."""
        with contextlib.suppress(OSError):
            self._ballast.unlink()

    def drop_files(self) -> None:
        """Remove the files of a request that was served, and failed: the next has not begun."""
        for path in (self.staged.kern, self.staged.meta):
            with contextlib.suppress(OSError):
                path.unlink()

    def withdraw(self, host: Host) -> bool:
        """Make sure that no request can use the staging directory any more.

        Returns False if one has begun to: its first file is there, FILE.kern.
        A removed directory takes no new file.  Confirmed in source, never run:
        ENOENT from tmpfs_vnops.c, tmpfs_lookup1() (freebsd/freebsd-src@00bac917),
        ufs_lookup.c (index id 220308933), zfs_dir.c, zfs_dirent_lookup()
        (59510294160).
        """
        if not os.path.isdir(self.staging):
            return True
        if os.path.lexists(self.staged.kern):
            return False
        self.drop_sink(host)
        self.release_room()
        try:
            os.rmdir(self.staging)
        except OSError:
            return False
        return True

    def remove(self, host: Host) -> None:
        """Remove both directories.  Never raises.

        At a source the file of is_started() goes last.  At a destination it
        stays, like the record of what was started there: it tells the guest
        from another one of its name, whenever somebody asks (bhyrecv -q).
        """
        if os.path.isdir(self.staging):
            self.drop_sink(host)
            shutil.rmtree(self.staging, ignore_errors=True)
        shutil.rmtree(self.kept, ignore_errors=True)
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.started_path.unlink(missing_ok=True)


def staging_root(host: Host, role: str, base: Path, environment: Mapping[str, str]) -> Path:
    """Return where staging directories are made: in memory, if any such place is known.

    role: "source" or "destination", which have a variable each.  base: the
    state directory, where nothing better is found.  Raises PipeError, AccessError.
    """
    named = environment.get(STAGING[role])
    if named:
        return Path(named).absolute()
    for name in _MEMORY_DIRS:
        path = Path(name)
        if path.is_dir() and os.access(path, os.W_OK) and host.is_memory(path):
            return path
    path = base / "staging"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise from_oserror(error, f"make {path}") from None
    return path

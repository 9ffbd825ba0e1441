"""vm_checkpoint(): pause the guest, save it into three files, and let it run again.

bhysend's hold relies on the order of bhyve's steps.  bhyve opens FILE.kern, FILE
and FILE.meta; pauses vCPUs and devices; writes memory, kernel structures and
devices; then writes FILE.meta in one flush, in which a full FIFO keeps bhyve
standing; and lets devices and all vCPUs go on.  A checkpoint that fails ends
with the same last step, even if it paused nothing; after the guest runs again,
bhyve flushes what there is of FILE.meta's text (xo.py).

Source: usr.sbin/bhyve/snapshot.c, vm_checkpoint(), FreeBSD 15.1; the flush into
a full FIFO was run there, the rest was read.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NoReturn

from .below import open_below
from .devices import Device
from .guest import Guest
from .node import data_extents
from .settings import Settings
from .xo import Xo

_FLAGS = os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_INT_MAX = (1 << 31) - 1
_MODE = 0o700
_NAME_MAX = 255
_GROWTH = bytes(64)
_ENOTSUP = 45  # FreeBSD's


class _FailedError(Exception):
    """The checkpoint has failed.  The text is G5's reply, "" if bhyve reports no error."""


class Saving:
    """One checkpoint.

    end: called when a suspend has saved everything; destroys the VM and ends
    the process.  memflags: for FILE.meta, bits of vmmapi.h.
    """

    def __init__(
        self,
        guest: Guest,
        name: str,
        settings: Settings,
        *,
        memflags: int,
        end: Callable[[], None],
    ) -> None:
        self._guest = guest
        self._name = name
        self._settings = settings
        self._memflags = memflags
        self._end = end
        self._fds: list[int] = []
        self._is_hold = False
        self._at = 0

    def run(self, fddir: int, filename: str, *, suspend: bool) -> str:
        """Save the guest into files of a directory; return "" or the text of the error.

        fddir: descriptor of the directory, which the caller closes.  filename:
        FILE, below fddir.  The guest runs on, unless a suspend succeeded.
        """
        if len(os.fsencode(f"{filename}.kern")) > _NAME_MAX:
            complain("Filename exceeds maximum length.")
            complain("Failed to construct kernel data filename.")
            return f"failed to open a snapshot file: {os.strerror(errno.ENAMETOOLONG)}"
        xo: Xo | None = None
        error = ""
        try:
            kern, memory, meta = self._open(fddir, filename)
            xo = Xo(meta, self._stand)
            self._save(xo, kern, memory)
            xo.finish()
            if suspend:
                self._end()
        except _FailedError as failed:
            error = str(failed)
        self._guest.resume_devices()
        self._guest.resume_vcpus()
        if xo is not None:
            xo.destroy()
        for fd in self._fds:
            os.close(fd)
        return error

    def _open(self, fddir: int, filename: str) -> tuple[int, int, int]:
        """Open the three files, in bhyve's order.  If FILE.meta is a FIFO, wait for its reader."""
        for suffix, flags, what in (
            (".kern", os.O_WRONLY, "Failed to open kernel data snapshot file."),
            ("", os.O_RDWR, "Failed to create checkpoint file"),
            (".meta", os.O_WRONLY, "Failed to open vm metadata snapshot file."),
        ):
            try:
                fd = open_below(fddir, f"{filename}{suffix}", flags | _FLAGS, _MODE)
            except OSError as error:
                complain(f"{what}: {error.strerror}")
                # bhyve reports no error of FILE.meta.
                told = "" if suffix == ".meta" else f"failed to open a snapshot file: {error}"
                raise _FailedError(told) from None
            self._fds.append(fd)
        kern, memory, meta = self._fds
        self._is_hold = stat.S_ISFIFO(os.fstat(meta).st_mode)
        return kern, memory, meta

    def _save(self, xo: Xo, kern: int, memory: int) -> None:
        guest = self._guest
        guest.pause_vcpus()
        guest.pause_devices()
        self._save_memory(memory)
        xo.open_container("basic metadata")
        xo.emit("ncpus", guest.ncpus)
        xo.emit("vmname", self._name)
        xo.emit("memsize", guest.memory.low_bytes + guest.memory.high_bytes)
        xo.emit("memflags", self._memflags)
        xo.close("}")
        xo.open_list("kern_structs")
        for name, blob in guest.save_kernel():
            self._write_blob(xo, kern, name, blob)
        xo.close("]")
        if self._plays("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            os.lseek(kern, 0, os.SEEK_CUR)
        except OSError as error:
            complain(f"Failed to get data file current offset.: {error.strerror}")
            raise self._failed("Failed to snapshot device state.", error) from None
        xo.open_list("devices")
        for name, blob in self._device_blobs():
            self._write_blob(xo, kern, name, blob)
        xo.close("]")
        if self._plays("hang", everywhere=False):
            threading.Event().wait()

    def _save_memory(self, fd: int) -> None:
        try:
            write_memory(self._guest, fd, clamp=self._settings.clamps_devices)
        except OSError as error:
            complain(f"Failed to write in file: {error.strerror}")
            complain("vm_snapshot_mem: Could not write lowmem")
            raise self._failed("Could not write guest memory to file", error) from None

    def _device_blobs(self) -> Iterator[tuple[str, bytes]]:
        *_, last = self._guest.devices
        for device in self._guest.devices:
            if not device.can_be_saved:
                raise self._no_device(device, _ENOTSUP)
            if device is last and self._plays("fail", everywhere=False):
                raise self._no_device(device, errno.ENOSPC)
            blob = self._guest.save_device(device)
            if device is last and self._plays("grow", everywhere=False):
                blob += _GROWTH
            yield device.name, blob

    def _no_device(self, device: Device, number: int) -> _FailedError:
        complain(f"Failed to snapshot {device.name}; ret={number}")
        text = "Operation not supported" if number == _ENOTSUP else os.strerror(number)
        why = OSError(number, text)
        return self._failed("Failed to snapshot device state.", why)

    def _write_blob(self, xo: Xo, fd: int, name: str, blob: bytes) -> None:
        """Write a blob with one write(2), as bhyve does.  A short write fails the checkpoint."""
        try:
            count = os.write(fd, blob)
            if count != len(blob):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            complain(f"Failed to write all snapshotted data.: {error.strerror}")
            raise self._failed("Failed to snapshot device state.", error) from None
        xo.open_instance()
        xo.emit("device", name)
        xo.emit("size", len(blob))
        xo.emit("file_offset", self._at)
        xo.close("}")
        self._at += len(blob)

    def _failed(self, what: str, error: OSError) -> _FailedError:
        complain(what)
        return _FailedError(f"failed to snapshot: {error.strerror}")

    def _stand(self) -> None:
        """Play held-die: the FIFO has its first byte, and keeps bhyve standing if it is full."""
        if "held-die" in self._settings.fail:
            os.kill(os.getpid(), signal.SIGKILL)

    def _plays(self, what: str, *, everywhere: bool = True) -> bool:
        """Say whether to play a failure: in every checkpoint if `everywhere`, or in a hold only."""
        fail = self._settings.fail
        return (everywhere and what in fail) or (self._is_hold and f"hold-{what}" in fail)


def write_memory(guest: Guest, fd: int, *, clamp: bool) -> None:
    """Write lowmem, and highmem directly behind it.  Raises OSError if a write fails.

    clamp: whether a device takes no more than INT_MAX bytes at once; then a
    larger segment fails, because bhyve writes each segment with one write(2).

    Like bhyve, write from the mapping.  But in a regular file a page that the
    guest never touched becomes a hole, so that a large guest makes a small file.
    """
    os.lseek(fd, 0, os.SEEK_SET)  # fails if FILE is a FIFO
    is_file = stat.S_ISREG(os.fstat(fd).st_mode)
    memory = guest.memory
    base = 0
    for gpa, mapping in memory.segments():
        length = len(mapping)
        if clamp and not is_file and length > _INT_MAX:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        extents = data_extents(memory.fd, gpa, gpa + length) if is_file else [(gpa, gpa + length)]
        with memoryview(mapping) as view:
            for start, end in extents:
                os.lseek(fd, base + start - gpa, os.SEEK_SET)
                _write(fd, view[start - gpa : end - gpa])
        base += length
    if is_file:
        os.truncate(fd, base)


def _write(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]


def complain(text: str) -> None:
    """Print a line on standard error.  Never raises."""
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def abort() -> NoReturn:
    """End the process by SIGABRT, as bhyve does after a fatal error, but without a core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.abort()

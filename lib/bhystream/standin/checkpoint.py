"""The checkpoint socket, and the snapshot files that it makes.

One connection at a time, synchronously; the connection is closed when the
handler has returned, which is all that G4 answers.  G5 replies with a list:
empty, or with "error".  Source: dossier, sections 1, 3 and 4 (FreeBSD
usr.sbin/bhyve/snapshot.c and ipc.c, generations G4 and G5).
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bhystream.backend.bhyve import nvlist
from bhystream.errors import BhyError

from .below import open_below
from .guest import Guest
from .node import data_extents
from .settings import Settings, read_settings

_FLAGS = os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_INT_MAX = (1 << 31) - 1
_MODE = 0o700
_NAME_MAX = 255
_BACKLOG = 10


@dataclass
class Files:
    """The three files of a snapshot, open to be written."""

    kern: int = -1
    memory: int = -1
    meta: int = -1

    def close(self) -> None:
        """Close what is open."""
        for fd in (self.kern, self.memory, self.meta):
            if fd >= 0:
                os.close(fd)


class CheckpointServer:
    """Serves the socket of one guest in a thread.

    end: called in a suspend when all is saved; destroys the VM and ends the
    process.  memflags: for the meta file.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        guest: Guest,
        *,
        memflags: int,
        end: Callable[[], None],
    ) -> None:
        self._directory = directory
        self._name = name
        self._guest = guest
        self._memflags = memflags
        self._end = end
        self._busy = threading.Lock()

    def start(self) -> None:
        """Bind the socket and serve it.  Raises OSError; bhyve then runs on without one."""
        path = self._directory / "run" / self._name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
        threading.Thread(
            target=self._serve, args=(listener,), name="checkpoint", daemon=True
        ).start()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep every request waiting."""
        with self._busy:
            yield

    def _serve(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            with connection, self._busy:
                try:
                    request = nvlist.receive(connection)
                    if request is not None:
                        self._answer(connection, request)
                except (BhyError, OSError) as error:
                    _complain(f"checkpoint socket: {error}")

    def _answer(self, connection: socket.socket, request: Mapping[str, nvlist.Value]) -> None:
        settings = read_settings(self._directory)
        if "hang" in settings.fail:
            threading.Event().wait()
        try:
            error = self._handle(request, settings)
            if error:
                _complain(error)
            if settings.generation == 5:
                # Without a command the list comes back, as it was, with the error in it.
                echo = {} if "cmd" in request else request
                nvlist.send(connection, {**echo, "error": error} if error else {})
        finally:
            for value in request.values():
                if isinstance(value, nvlist.Descriptor):
                    os.close(value.fd)

    def _handle(self, request: Mapping[str, nvlist.Value], settings: Settings) -> str:
        """Do what is asked; return "" or the error."""
        command = request.get("cmd")
        if not isinstance(command, str):
            return "missing command name"
        if command != "checkpoint":
            return f"command '{command}' not found"
        match request:
            case {
                "filename": str(filename),
                "suspend": bool(suspend),
                "fddir": nvlist.Descriptor(fd),
            }:
                return self._checkpoint(fd, filename, suspend=suspend, settings=settings)
        return os.strerror(errno.EINVAL)

    def _checkpoint(self, fddir: int, filename: str, *, suspend: bool, settings: Settings) -> str:
        files = Files()
        try:
            try:
                _open(files, fddir, filename)
            except OSError as error:
                return f"failed to open a snapshot file: {error}"
            return self._save(files, settings, suspend=suspend)
        finally:
            files.close()

    def _save(self, files: Files, settings: Settings, *, suspend: bool) -> str:
        """Pause the guest and save it; it runs on, unless the suspend succeeded."""
        guest = self._guest
        guest.pause_vcpus()
        guest.pause_devices()
        error = ""
        try:
            write_memory(guest, files.memory, clamp=settings.clamps_devices)
            structs = list(guest.save_kernel())
            devices = self._device_blobs()
            die = suspend and "die" in settings.fail
            meta = self._write_kern(files.kern, structs, devices, die=die)
            _write(files.meta, (json.dumps(meta, indent=2) + "\n").encode())
        except OSError as raised:
            error = f"failed to snapshot: {raised.strerror}"
        if suspend and not error:
            self._end()
        guest.resume_devices()
        guest.resume_vcpus()
        return error

    def _device_blobs(self) -> Iterator[tuple[str, bytes]]:
        for device in self._guest.devices:
            if not device.can_be_saved:
                _complain(f"{device.name}: snapshot not supported")
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            yield device.name, self._guest.save_device(device)

    def _write_kern(
        self,
        fd: int,
        structs: list[tuple[str, bytes]],
        devices: Iterable[tuple[str, bytes]],
        *,
        die: bool,
    ) -> dict[str, Any]:
        """Write .kern, back to back, and return what .meta says of it."""
        os.lseek(fd, 0, os.SEEK_CUR)  # it must be seekable
        lists: dict[str, list[dict[str, Any]]] = {"kern_structs": [], "devices": []}
        at = 0
        for key, blobs in (("kern_structs", structs), ("devices", devices)):
            for name, blob in blobs:
                _write(fd, blob)
                lists[key].append({"device": name, "size": len(blob), "file_offset": at})
                at += len(blob)
            if die:
                os.kill(os.getpid(), signal.SIGKILL)
        memory = self._guest.memory
        basic = {
            "ncpus": self._guest.ncpus,
            "vmname": self._name,
            "memsize": memory.low_bytes + memory.high_bytes,
            "memflags": self._memflags,
        }
        return {"basic metadata": basic, **lists}


def write_memory(guest: Guest, fd: int, *, clamp: bool) -> None:
    """Write lowmem, and highmem directly behind it.  Raises OSError.

    clamp: a device takes no more than INT_MAX bytes at once, and bhyve writes
    each segment with one write(2).

    From the mapping, as bhyve does; but a page that the guest never touched
    becomes a hole in a regular file, so that a large guest stays a small file.
    """
    os.lseek(fd, 0, os.SEEK_SET)  # a FIFO is refused here
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


def _write(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _open(files: Files, fddir: int, filename: str) -> None:
    """Open the three, in bhyve's order, all before the pause.  Raises OSError."""
    if len(f"{filename}.kern") > _NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), filename)
    files.kern = open_below(fddir, f"{filename}.kern", os.O_WRONLY | _FLAGS, _MODE)
    files.memory = open_below(fddir, filename, os.O_RDWR | _FLAGS, _MODE)
    files.meta = open_below(fddir, f"{filename}.meta", os.O_WRONLY | _FLAGS, _MODE)


def _complain(text: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

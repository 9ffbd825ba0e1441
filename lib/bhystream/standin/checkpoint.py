"""The checkpoint socket: one connection after the other, one request on each.

The backend relies on this: every descriptor that came with a request, even
under a key that bhyve does not know, stays open in bhyve's process until the
handler has returned and the connection is closed.  A G4 bhyve (see Settings)
answers only by closing the connection; a G5 bhyve first sends a reply list,
which is empty or contains "error".

Source: usr.sbin/bhyve/snapshot.c, checkpoint_thread() and handle_message(),
FreeBSD 15.1 (G4), run there; freebsd/freebsd-src@04811d46 usr.sbin/bhyve/ipc.c
(G5), read.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from bhystream.backend.bhyve import nvlist
from bhystream.errors import FormatError

from .guest import Guest
from .saving import Saving, complain
from .settings import Settings, read_settings

_BACKLOG = 10
_SUN_PATH_BYTES = 103  # FreeBSD's sys/un.h, without the NUL
# FreeBSD's text for the errno of nvlist_recv(3) if the connection ends before its first byte.
_NOT_CONNECTED = "Socket is not connected"


class CheckpointServer:
    """The thread that serves the checkpoint socket of one guest.

    end: called when a suspend has saved everything; destroys the VM and ends
    the process.  memflags: for FILE.meta, bits of vmmapi.h.
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
        """Bind the socket and start the thread.

        A path longer than _SUN_PATH_BYTES is cut.  Raises OSError if the socket
        cannot be bound, or if the cut would fall inside the directory's path.
        """
        whole = os.fsencode(self._directory / "run" / self._name)
        path = Path(os.fsdecode(whole[:_SUN_PATH_BYTES]))
        if path.parent != self._directory / "run":
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), os.fsdecode(whole))
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
        """Keep every request waiting until the with block ends."""
        with self._busy:
            yield

    def _serve(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            with self._busy:
                self._serve_one(connection)

    def _serve_one(self, connection: socket.socket) -> None:
        """Serve one connection, close it, and then close the descriptors that came over it."""
        request: dict[str, nvlist.Value] = {}
        try:
            with connection:
                request = _receive(connection)
                if request:
                    self._answer(connection, request)
        finally:
            _close(request)

    def _answer(self, connection: socket.socket, request: dict[str, nvlist.Value]) -> None:
        settings = read_settings(self._directory)
        if "no-anchor" in settings.fail:
            _close(request, but="fddir")
        if "hang" in settings.fail:
            threading.Event().wait()
        error = self._handle(request, settings)
        if settings.generation == 5:
            # bhyve sends a request without a command back, with the error added to the list.
            echo = {} if "cmd" in request else _without_descriptors(request)
            reply, _ = nvlist.pack({**echo, "error": error} if error else {})
            with suppress(OSError):  # the client may be gone already
                connection.sendall(reply, socket.MSG_NOSIGNAL)

    def _handle(self, request: Mapping[str, nvlist.Value], settings: Settings) -> str:
        """Serve a request; return "" or the text of the error."""
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
                saving = Saving(
                    self._guest, self._name, settings, memflags=self._memflags, end=self._end
                )
                return saving.run(fd, filename, suspend=suspend)
        return os.strerror(errno.EINVAL)


def _receive(connection: socket.socket) -> dict[str, nvlist.Value]:
    """Return a request; if none can be read, print bhyve's message and return {}."""
    try:
        request = nvlist.receive(connection)
    except FormatError:
        complain(f"nvlist_recv() failed: {os.strerror(errno.EINVAL)}")
        return {}
    except OSError as error:
        complain(f"nvlist_recv() failed: {error.strerror}")
        return {}
    if request is None:
        complain(f"nvlist_recv() failed: {_NOT_CONNECTED}")
    return request or {}


def _without_descriptors(request: Mapping[str, nvlist.Value]) -> dict[str, nvlist.Value]:
    return {k: v for k, v in request.items() if not isinstance(v, nvlist.Descriptor)}


def _close(request: dict[str, nvlist.Value], but: str = "") -> None:
    """Close and remove the descriptors of a request, except the one under the key `but`."""
    for key, value in [*request.items()]:
        if isinstance(value, nvlist.Descriptor) and key != but:
            os.close(value.fd)
            del request[key]

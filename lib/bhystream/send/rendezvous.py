"""Where the answers come in at the source: the third stage's socket, or the command's pipe.

    bhysend -a g | ssh dst bhyrecv | bhysend -A
        |                               |
        '---- DIR/run/ID (a socket) ----'

The third stage hands on the answers that it reads, and bhysend tells it the
status to end with, so the pipeline's exit status is that of the move.  In the
command form bhysend reads the command's standard output directly.  One thread
serves all of these and fills an Inbox.  The thread never blocks on a read, and
reads on while the main thread is blocked in write(2): so both directions may be
full, and neither waits for the other.

Only bhysend's user may enter the state directory (mode 0700), because any process
that can connect may speak for the destination.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bhystream import threads
from bhystream.errors import FormatError, UsageError, from_oserror
from bhystream.handover.answers import Answer, Inbox, Parser

# sizeof(sockaddr_un.sun_path) without its NUL, on FreeBSD, where it is smallest.
_MAX_PATH_BYTES = 103
READ_BYTES = 65536
_GREETING_SECONDS = 30.0
_JOIN_SECONDS = 5.0


def path_of(base: Path, id_: str) -> str:
    """Return the path of a stream's socket.  Raises UsageError if it is too long for a socket."""
    path = str(base / "run" / id_)
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise UsageError(f"BHYSEND_STATE_DIR {base}: too long for a socket in it")
    return path


def connect(base: Path, id_: str) -> tuple[socket.socket, list[str]] | None:
    """Connect to the bhysend of a stream; return None if there is none here.

    Returns the connection, which the caller must close, and the name and the operand
    of bhysend's guest.  Raises UsageError as path_of() does.
    """
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.settimeout(_GREETING_SECONDS)
        peer.connect(path_of(base, id_))
        with peer.makefile("rb", buffering=0) as file:
            names = json.loads(file.readline())
        peer.settimeout(None)
    except ConnectionRefusedError:
        # The socket's file is that of a bhysend that was killed.
        peer.close()
        with contextlib.suppress(OSError):
            os.unlink(path_of(base, id_))
        return None
    except (OSError, ValueError):
        peer.close()
        return None
    return peer, names


class Rendezvous:
    """The way in of one stream's answers: third stages, and a command's pipe.

    The caller must close() the Rendezvous, with the status for the third stages.
    """

    def __init__(
        self, inbox: Inbox, id_: str, names: tuple[str, str], on_noise: Callable[[bytes], None]
    ) -> None:
        """Listen and read nothing yet.

        names: the guest's name, and its operand, for a third stage that was given either.
        on_noise: called in the thread, with each line before HELLO.  inbox: the caller's.
        """
        self._greeting = json.dumps(names).encode() + b"\n"
        self._inbox = inbox
        self._id = id_
        self._on_noise = on_noise
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._parsers: dict[int, Parser] = {}
        self._hellos: dict[int, Answer] = {}
        self._peers: list[socket.socket] = []
        self._listening = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._serve, name="answers", daemon=True)

    def listen(self, base: Path) -> None:
        """Listen for third stages on the socket of the stream.

        Raises UsageError if its path is too long, and InputOutputError or AccessError if
        bhysend cannot listen there; close() then removes what was made.
        """
        path = path_of(base, self._id)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.callback(_stop_listening, listener, path)
        try:
            listener.bind(path)
            listener.listen(4)
        except OSError as error:
            raise from_oserror(error, f"listen on {path}") from error
        accept = partial(self._accept, listener)
        self._selector.register(listener, selectors.EVENT_READ, accept)

    def read(self, fd: int) -> None:
        """Take answers from a descriptor, which stays the caller's."""
        self._parsers[fd] = Parser(self._id, self._on_noise)
        self._selector.register(fd, selectors.EVENT_READ, partial(self._take, fd))

    @property
    def thread_id(self) -> int | None:
        """Return the native id of the thread, None before start()."""
        return self._thread.native_id

    def start(self) -> None:
        """Start the thread, the first one of the program beside the main thread."""
        threads.start(self._thread)

    def close(self, status: int) -> None:
        """End the thread, tell the third stages the status, and stop listening.

        May be called twice.
        """
        if self._waker.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")
        if self._thread.ident is not None:
            self._thread.join(_JOIN_SECONDS)
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.settimeout(5.0)
                peer.sendall(b"status %d\n" % status)
            peer.close()
        self._listening.close()
        self._selector.close()
        self._woken.close()
        self._waker.close()

    def _serve(self) -> None:
        try:
            self._read_on()
        finally:
            self._inbox.lose("the answers are not read any more")

    def _read_on(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    return
                key.data()

    def _accept(self, listener: socket.socket) -> None:
        try:
            peer, _ = listener.accept()
        except OSError:
            # If, say, no descriptor is free, the listener would be ready again at once,
            # for ever.  So accept nobody any more.
            self._selector.unregister(listener)
            return
        self._peers.append(peer)
        with contextlib.suppress(OSError):
            peer.sendall(self._greeting)
            self.read(peer.fileno())

    def _take(self, fd: int) -> None:
        """Read what has come from one descriptor."""
        parser = self._parsers[fd]
        why, closed = "the way back was closed", True
        try:
            data = os.read(fd, READ_BYTES)
            for answer in parser.feed(data):
                # The first answer of a connection is its HELLO.
                self._inbox.put(self._hellos.setdefault(fd, answer), answer)
        except OSError:
            data = b""
        except FormatError as error:
            data, why, closed = b"", f"the way back: {error}", False
        if not data:
            self._selector.unregister(fd)
            del self._parsers[fd]
            # While another connection is left, an answer may still come.
            if not self._parsers:
                self._inbox.lose(why, closed=closed)


def _stop_listening(listener: socket.socket, path: str) -> None:
    listener.close()
    with contextlib.suppress(OSError):
        os.unlink(path)

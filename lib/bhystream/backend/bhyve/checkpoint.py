"""The client of bhyve's checkpoint socket: one request, and what comes of it.

    generation   a request ends with                  success or failure
    G4           EOF, when the handler has returned   not told: the files say it
    G5           a reply, then EOF                    "error" in the reply
    both         nothing, while FILE.meta is a FIFO   held: the FIFO says it
                 that takes no more (fifo.py)

bhyve serves one connection after the other, and one request on each.  So any
answer on a later connection proves that all requests before it have been
served: settle() asks with a command that does not exist.  A connection that
is closed without a word leaves a line in the guest's log, so each one asks.

Two descriptors go along that no command of bhyve's knows.  bhyve keeps what
came with a request until it has been served, so what they are open at does not
end with us:

    bhysend        the FIFO: without a reader bhyve's write to it would be SIGPIPE
    bhysend-reply  our end of this connection: so would be G5's reply

bhyve does not ignore that signal; it would be the guest's end.

Whether the process lives is never concluded from the socket.  A refused
connection says that nobody listens, but on FreeBSD also that the queue of
those who wait is full; only the process's own identity decides.

- Run on FreeBSD 15.1, emulated AMD: a request with the FIFO, held and released;
  G4's EOF; the line in the log.
- Read: usr.sbin/bhyve/snapshot.c, checkpoint_thread() and vm_checkpoint() (15.1,
  and 14's); usr.sbin/bhyve/ipc.c, ipc_thread() (16-CURRENT), which destroys the
  request behind the reply; lib/libnv/msgio.c, buf_send(), which sends without
  MSG_NOSIGNAL, and buf_recv(), which waits for a request without a limit.
- Read: the loop ends with the first accept(2) that fails, which a client that is
  gone already does not cause.
- Read: the queue holds 10, and a full one refuses: sys/kern/uipc_usrreq.c,
  unp_connectat().

What the reply to a checkpoint holds in 16 was not found.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path

from bhystream.backend.bhyve import nvlist
from bhystream.backend.bhyve.listening import SYNC, ask
from bhystream.backend.bhyve.nvlist import Descriptor
from bhystream.backend.process import (
    EndedError,
    Identity,
    await_end,
    identify,
    is_alive,
    open_ending,
    peer_pid,
)
from bhystream.errors import AccessError, FormatError, GuestError

_CONNECT_S = 10.0
_POLL_S = 0.05
# A reply is a few bytes that bhyve sends at once; it may be cut off by its end.
_REPLY_S = 10.0
# From the end of the connection, which a process that ends closes first, to its own end.
_MOMENT_S = 0.2
_HOLD_POLL_S = 0.001  # of the guest's pause


class Outcome(Enum):
    """How a request ended."""

    REPLIED = "bhyve answered"
    CLOSED = "the connection ended"
    HELD = "bhyve stands in the request"
    EXITED = "the process ended"


class NobodyListensError(GuestError):
    """There is no socket, or nobody accepts on it: no proof that the process is gone."""


class RefusedError(GuestError):
    """bhyve replied with an error; the text is its own."""


class UnansweredError(GuestError):
    """The request was not served within its time: it may be yet."""


class Checkpoint:
    """One connection to a guest's bhyve, for one request.

    identity: the process that listens.  served_ns: when the request was seen
    to have ended, of the monotonic clock.
    """

    def __init__(self, run_dir: Path, name: str, who: str, limit_s: float = _CONNECT_S) -> None:
        """Connect.  who: for messages, "guest web1".  limit_s: for a queue that is full.

        Raises NobodyListensError, AccessError for a forbidden socket, and
        GuestError else, all of which name the socket.
        """
        self._who = who
        self._path = run_dir / name
        self._socket = _connect(self._path, who, limit_s)
        self.served_ns = 0
        self._has_asked = False
        try:
            self.identity: Identity = identify(peer_pid(self._socket, "bhyve"), "bhyve")
            # Now: to look for a process takes time, and later the guest stands.
            self._ending = open_ending(self.identity)
        except EndedError as error:
            self._socket.close()
            raise NobodyListensError(f"{who}: nobody listens at {self._path}: {error}") from None
        except BaseException:
            self._socket.close()
            raise

    def request(self, directory_fd: int, filename: str, fifo_fd: int | None = None) -> None:
        """Ask for a checkpoint into files of a directory.

        directory_fd: the caller's; bhyve gets a copy.  filename: the memory
        file's last path component.  fifo_fd: FILE.meta, where that is a FIFO;
        the caller's too.  Raises GuestError.
        """
        pairs: dict[str, nvlist.Value] = {
            "cmd": "checkpoint",
            "filename": filename,
            "suspend": False,
            "fddir": Descriptor(directory_fd),
        }
        if fifo_fd is not None:
            pairs["bhysend"] = Descriptor(fifo_fd)
        self._send(pairs)

    def sync(self) -> None:
        """Ask for a command that does not exist, to be answered when all before it is served."""
        self._send(SYNC)

    def _send(self, pairs: Mapping[str, nvlist.Value]) -> None:
        self._has_asked = True
        try:
            ask(self._socket, pairs)
        except OSError as error:
            raise GuestError(f"{self._who}: cannot ask its bhyve: {error.strerror}") from None

    def await_outcome(self, limit_s: float, is_held: Callable[[], bool] | None = None) -> Outcome:
        """Wait for the end of the request, for at most limit_s seconds.

        is_held: says whether bhyve stands in it and goes no further; asked often.

        The end of the connection may be that of the process, seen a moment
        earlier: CLOSED means that it lives on, as far as that moment shows it.
        Raises UnansweredError at the limit, and RefusedError for an error that
        a living bhyve replies.
        """
        if self._ending is None:
            return Outcome.EXITED
        end = time.monotonic() + limit_s
        fds = [self._socket.fileno(), self._ending.fileno()]
        while not _is_readable(fds, _HOLD_POLL_S if is_held else limit_s):
            if is_held and is_held():
                return Outcome.HELD
            if time.monotonic() >= end:
                raise UnansweredError(
                    f"{self._who}: its bhyve has not answered for {limit_s:.0f} s"
                )
        self.served_ns = time.monotonic_ns()
        reply = self._receive()
        if reply is None and await_end(self.identity, _MOMENT_S):
            return Outcome.EXITED
        if reply is not None and not is_alive(self.identity):
            return Outcome.EXITED
        if reply and "error" in reply:
            # ascii(): it goes to a terminal.
            raise RefusedError(f"{self._who}: its bhyve refused: {ascii(reply['error'])[1:-1]}")
        return Outcome.CLOSED if reply is None else Outcome.REPLIED

    def _receive(self) -> dict[str, nvlist.Value] | None:
        """Return the reply, None where the connection ended or what came makes no sense."""
        if not _is_readable([self._socket.fileno()], _MOMENT_S):
            return None  # the process has ended; somebody else holds a copy of the socket
        self._socket.settimeout(_REPLY_S)
        try:
            reply = nvlist.receive(self._socket)
        except (OSError, FormatError):
            # Cut off by the process's end, or reset by it: what is left decides.
            return None
        finally:
            self._socket.settimeout(None)
        for value in (reply or {}).values():
            if isinstance(value, Descriptor):
                os.close(value.fd)  # nobody asked for it
        return reply

    def is_settled(self, limit_s: float) -> bool:
        """Ask for nothing, see that it was served; say whether the process lives then.

        Raises UnansweredError at the limit, and GuestError.
        """
        end = time.monotonic() + limit_s
        try:
            self.sync()
        except GuestError:
            # It let go of us before we asked: it ends.  One that lives after all
            # has served nothing of ours.
            if await_end(self.identity, max(0.0, end - time.monotonic())):
                return False
            raise
        try:
            return self.await_outcome(max(0.0, end - time.monotonic())) != Outcome.EXITED
        except RefusedError:
            return is_alive(self.identity)

    def close(self) -> None:
        """End the connection, with a word if none was said.  Twice is no error."""
        if not self._has_asked:
            with contextlib.suppress(GuestError):
                self.sync()
        self._socket.close()
        if self._ending is not None:
            self._ending.close()
            self._ending = None


def settle(
    run_dir: Path, name: str, who: str, limit_s: float, process: Identity | None = None
) -> bool:
    """Wait until every request made so far has been served; say whether a process lives.

    A connection of our own that is still open counts as a request: close it
    first.  process: the guest's, where it is known.  It decides where nobody
    listens; without it that counts as its end.  Raises GuestError or
    AccessError where neither is certain after limit_s seconds: a request may
    still be under way.
    """
    end = time.monotonic() + limit_s
    while True:
        try:
            sync = Checkpoint(run_dir, name, who, max(0.0, end - time.monotonic()))
        except NobodyListensError:
            # It is about to end, or its queue is full.
            if process is None or await_end(process, _POLL_S):
                return False
            if time.monotonic() >= end:
                raise
            continue
        try:
            return sync.is_settled(max(0.0, end - time.monotonic()))
        finally:
            sync.close()


def _is_readable(fds: list[int], limit_s: float) -> bool:
    """Wait until one of the descriptors can be read, or has ended."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(limit_s * 1000))


def _connect(path: Path, who: str, limit_s: float) -> socket.socket:
    """Return a connected socket, blocking; the caller's to close."""
    end = time.monotonic() + limit_s
    while True:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.settimeout(max(_POLL_S, end - time.monotonic()))
        try:
            made.connect(str(path))
            made.settimeout(None)
            return made
        except OSError as error:
            made.close()
            # Linux says that a queue is full at once where a limit is set.
            if isinstance(error, BlockingIOError) and time.monotonic() < end:
                time.sleep(_POLL_S)
                continue
            raise _unconnected(path, who, error) from None


def _unconnected(path: Path, who: str, error: OSError) -> GuestError | AccessError:
    # AF_UNIX path too long carries no errno.
    text = f"{who}: cannot connect to {path}: {error.strerror or error}"
    if isinstance(error, PermissionError):
        return AccessError(text)
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
        return NobodyListensError(
            text, "its bhyve has no checkpoint socket: was it built with BHYVE_SNAPSHOT?"
        )
    if isinstance(error, (TimeoutError, BlockingIOError)):
        return GuestError(f"{who}: cannot connect to {path}: its bhyve is busy, or hangs")
    return GuestError(text)

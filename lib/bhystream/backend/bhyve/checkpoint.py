"""The client of bhyve's checkpoint socket: one request, and its outcome.

    generation   a request ends with                  success or failure
    G4           EOF, when the handler has returned   not told: the files show it
    G5           a reply, then EOF                    "error" in the reply
    both         nothing, while FILE.meta is a FIFO   held: the FIFO shows it
                 that takes no more (fifo.py)

bhyve serves one connection after the other, and one request on each.  So an
answer on a later connection proves that bhyve has served all earlier requests:
settle() asks with a command that does not exist.  bhyve writes a line into the
guest's log for a connection that is closed without a request, so each
connection makes a request.

Each request carries up to two descriptors that no command of bhyve's uses.
bhyve keeps a request's descriptors until the request has been served, so the
FIFO and the connection stay open even if bhysend is killed:

    bhysend        the FIFO: without a reader, bhyve's write to the FIFO raises SIGPIPE
    bhysend-reply  our end of this connection: without it, G5's reply raises SIGPIPE

bhyve does not ignore SIGPIPE, which would end bhyve, and the guest with it.

The socket never decides whether the process lives.  A refused connection means
that nobody listens or, on FreeBSD, that the queue of waiting connections is
full; only the process's own identity decides.

- Run on FreeBSD 15.1, emulated AMD: a request with the FIFO, held and released;
  G4's EOF; the line in the log.
- Read: usr.sbin/bhyve/snapshot.c, checkpoint_thread() and vm_checkpoint() (15.1
  and 14); usr.sbin/bhyve/ipc.c, ipc_thread() (16-CURRENT), which destroys the
  request after the reply; lib/libnv/msgio.c, buf_send(), which sends without
  MSG_NOSIGNAL, and buf_recv(), which waits for a request without a limit.
- Read: bhyve's loop ends with the first accept(2) that fails.  A client that
  has gone already does not make accept(2) fail.
- Read: the queue holds 10 connections, and a full queue refuses the next:
  sys/kern/uipc_usrreq.c, unp_connectat().

What the reply to a checkpoint holds in FreeBSD 16 was not found.
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
# A reply is a few bytes that bhyve sends at once; the end of bhyve may cut the reply off.
_REPLY_S = 10.0
# The time from the end of the connection to that of its process, which closes it first.
_MOMENT_S = 0.2
_HOLD_POLL_S = 0.001  # this time is part of the guest's pause


class Outcome(Enum):
    """How a request ended."""

    REPLIED = "bhyve answered"
    CLOSED = "the connection ended"
    HELD = "bhyve stands in the request"
    EXITED = "the process ended"


class NobodyListensError(GuestError):
    """There is no socket, or nobody accepts on it.  The process may live all the same."""


class RefusedError(GuestError):
    """bhyve replied with an error; the text is bhyve's."""


class UnansweredError(GuestError):
    """bhyve did not serve the request in time, and may still serve it."""


class Checkpoint:
    """One connection to a guest's bhyve, for one request.

    identity: the process that listens.  served_ns: when await_outcome() saw
    the end of the request, by the monotonic clock.
    """

    def __init__(self, run_dir: Path, name: str, who: str, limit_s: float = _CONNECT_S) -> None:
        """Connect to the socket `name` in run_dir.

        who: the guest, as messages name it: "guest web1".  limit_s: how long
        to wait while the queue is full.  Raises NobodyListensError, AccessError
        if the socket may not be used, and GuestError otherwise; each error
        names the socket.
        """
        self._who = who
        self._path = run_dir / name
        self._socket = _connect(self._path, who, limit_s)
        self.served_ns = 0
        self._has_asked = False
        try:
            self.identity: Identity = identify(peer_pid(self._socket, "bhyve"), "bhyve")
            # To look for a process takes time, and later that time would lengthen the pause.
            self._ending = open_ending(self.identity)
        except EndedError as error:
            self._socket.close()
            raise NobodyListensError(f"{who}: nobody listens at {self._path}: {error}") from None
        except BaseException:
            self._socket.close()
            raise

    def request(self, directory_fd: int, filename: str, fifo_fd: int | None = None) -> None:
        """Ask for a checkpoint into files of a directory.

        directory_fd: stays the caller's; bhyve gets a copy.  filename: the
        memory file's last path component.  fifo_fd: FILE.meta if that is a
        FIFO; stays the caller's too.  Raises GuestError if the request cannot
        be sent.
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
        """Ask for a command that does not exist: bhyve answers after all earlier requests.

        Raises GuestError if the request cannot be sent.
        """
        self._send(SYNC)

    def _send(self, pairs: Mapping[str, nvlist.Value]) -> None:
        self._has_asked = True
        try:
            ask(self._socket, pairs)
        except OSError as error:
            raise GuestError(f"{self._who}: cannot ask its bhyve: {error.strerror}") from None

    def await_outcome(self, limit_s: float, is_held: Callable[[], bool] | None = None) -> Outcome:
        """Wait for the end of the request, for at most limit_s seconds.

        is_held: says whether bhyve waits in the request and goes no further;
        called every millisecond.

        A process that ends closes the connection a moment before its own end.
        CLOSED means that the process still lived after that moment (0.2 s).
        Raises UnansweredError at the limit, and RefusedError if a bhyve that
        still lives replies with an error.
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
            # ascii() because the text may go to a terminal.
            raise RefusedError(f"{self._who}: its bhyve refused: {ascii(reply['error'])[1:-1]}")
        return Outcome.CLOSED if reply is None else Outcome.REPLIED

    def _receive(self) -> dict[str, nvlist.Value] | None:
        """Return the reply, or None if the connection ended or the bytes are no nvlist."""
        if not _is_readable([self._socket.fileno()], _MOMENT_S):
            return None  # bhyve has ended, and another process has a copy of its socket
        self._socket.settimeout(_REPLY_S)
        try:
            reply = nvlist.receive(self._socket)
        except (OSError, FormatError):
            # The end of the process may cut the reply off, or reset the connection.
            return None
        finally:
            self._socket.settimeout(None)
        for value in (reply or {}).values():
            if isinstance(value, Descriptor):
                os.close(value.fd)  # we asked for no descriptor
        return reply

    def is_settled(self, limit_s: float) -> bool:
        """Wait until bhyve has served an empty request; say whether the process lives then.

        Raises UnansweredError at the limit, and GuestError if the request
        cannot be sent while the process lives.
        """
        end = time.monotonic() + limit_s
        try:
            self.sync()
        except GuestError:
            # bhyve closed the connection before we asked, so bhyve is about to end.
            # A bhyve that lives after all has served nothing on this connection.
            if await_end(self.identity, max(0.0, end - time.monotonic())):
                return False
            raise
        try:
            return self.await_outcome(max(0.0, end - time.monotonic())) != Outcome.EXITED
        except RefusedError:
            return is_alive(self.identity)

    def close(self) -> None:
        """End the connection, with a request if none was made.  Twice is no error."""
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
    first.  process: the guest's process if it is known.  If nobody listens, the
    process decides; if the process is not known either, the guest has ended.
    Raises GuestError or AccessError if neither is certain after limit_s
    seconds: bhyve may still be serving a request.
    """
    end = time.monotonic() + limit_s
    while True:
        try:
            sync = Checkpoint(run_dir, name, who, max(0.0, end - time.monotonic()))
        except NobodyListensError:
            # The process is about to end, or its queue is full.
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
    """Return a connected, blocking socket, which the caller closes."""
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
            # With a time limit set, Linux reports a full queue at once.
            if isinstance(error, BlockingIOError) and time.monotonic() < end:
                time.sleep(_POLL_S)
                continue
            raise _unconnected(path, who, error) from None


def _unconnected(path: Path, who: str, error: OSError) -> GuestError | AccessError:
    # An OSError for an AF_UNIX path that is too long has no errno, and so no strerror.
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

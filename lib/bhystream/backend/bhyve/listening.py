"""The process that listens at a guest's checkpoint socket, and requests to that process.

bhyve prints a line into the guest's log for each connection that is closed
without a message (run on FreeBSD 15.1, emulated AMD).  So each connection made
here sends a command that bhyve does not know and passes over.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Mapping

from bhystream.backend.bhyve import nvlist
from bhystream.backend.bhyve.host import Host
from bhystream.backend.process import EndedError, Identity, identify, peer_pid
from bhystream.errors import GuestError

SYNC: Mapping[str, nvlist.Value] = {"cmd": "bhysend-sync"}
"""A command that bhyve does not know, and reaches only after all earlier requests."""

_PROBE_S = 5.0


def listens(host: Host, name: str) -> bool:
    """Say whether a bhyve answers at a guest's checkpoint socket.

    Raises GuestError if that cannot be found out.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(str(host.run_dir / name))
        except (TimeoutError, BlockingIOError):
            return True  # the socket's queue is full, so a process listens
        except OSError as error:
            _require_nobody(error, name)
            return False
        _say_a_word(probe)
    return True


def listener(host: Host, name: str) -> Identity | None:
    """Return the process that listens at a guest's checkpoint socket, or None if none does.

    Raises GuestError if the process cannot be identified: the socket's queue is full, for
    example.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(str(host.run_dir / name))
        except (TimeoutError, BlockingIOError):
            raise GuestError(f"guest {name}: the bhyve of that name is busy, or hangs") from None
        except OSError as error:
            _require_nobody(error, name)
            return None
        _say_a_word(probe)
        with contextlib.suppress(EndedError):
            return identify(peer_pid(probe, "bhyve"), "bhyve")
    return None


def _require_nobody(error: OSError, name: str) -> None:
    """Raise GuestError unless connect(2) has failed because nobody listens.

    The error for a path that is too long has no errno; nobody can listen there.
    """
    if error.errno not in (errno.ECONNREFUSED, errno.ENOENT, errno.ENOTDIR, None):
        text = f"guest {name}: cannot connect to its checkpoint socket: {error.strerror}"
        raise GuestError(text) from None


def ask(connection: socket.socket, pairs: Mapping[str, nvlist.Value]) -> None:
    """Send a request, and with it our end of the connection.  Raises OSError.

    bhyve then has our end open too until it has answered, so bhyve never
    writes to a connection whose other end is closed.
    """
    nvlist.send(connection, {**pairs, "bhysend-reply": nvlist.Descriptor(connection.fileno())})


def _say_a_word(connection: socket.socket) -> None:
    """Send an unknown command, so that bhyve logs nothing when the connection is closed."""
    with contextlib.suppress(OSError):
        ask(connection, SYNC)

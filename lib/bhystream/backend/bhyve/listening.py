"""Who listens at a guest's checkpoint socket.

bhyve prints a line into the guest's log for each connection that is closed
without a message.  Run on FreeBSD 15.1, emulated AMD.
"""

from __future__ import annotations

import contextlib
import socket

from bhystream.backend.bhyve.host import Host
from bhystream.backend.process import EndedError, Identity, identify, peer_pid
from bhystream.errors import GuestError

_PROBE_S = 5.0


def listens(host: Host, name: str) -> bool:
    """Say whether a bhyve answers at a guest's checkpoint socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(str(host.run_dir / name))
        except (TimeoutError, BlockingIOError):
            return True  # its queue is full: somebody is there
        except OSError:
            return False
    return True


def listener(host: Host, name: str) -> Identity | None:
    """Return the process that listens at a guest's checkpoint socket, None where none does.

    Raises GuestError where its queue is full, so that it cannot be seen.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(str(host.run_dir / name))
        except (TimeoutError, BlockingIOError):
            raise GuestError(f"guest {name}: the bhyve of that name is busy, or hangs") from None
        except OSError:
            return None
        with contextlib.suppress(EndedError):
            return identify(peer_pid(probe, "bhyve"), "bhyve")
    return None

"""The operator's command at the pause (bhysend -p).

It begins with the pause and must have ended with status 0 before END is
recorded: to flush or snapshot storage, to move an address.  It runs beside the
last round, so what it needs is not simply added to the downtime.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

from bhystream.errors import GuestError, ending
from bhystream.send.options import AS_IT_IS

_END_SECONDS = 5
_STDERR = 2


class Hook:
    """One run of the command."""

    def __init__(self, command: str, guest: str, stream_id: str, umask: int = AS_IT_IS) -> None:
        """Start it, in a process group of its own.  umask: the operator's.

        Its standard input is empty and its standard output is our standard
        error: standard output carries the stream.  Raises GuestError.
        """
        self._guest = guest
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,
                env={**os.environ, "BHYSEND_GUEST": guest, "BHYSEND_ID": stream_id},
                process_group=0,
                umask=umask,
            )
        except OSError as error:
            raise GuestError(
                f"guest {guest}: the -p command does not start: {error.strerror}"
            ) from error

    @property
    def group(self) -> int:
        """Return its process group."""
        return self._process.pid

    def wait(self) -> None:
        """Wait for its end.  Raises GuestError unless its status is 0."""
        status = self._process.wait()
        if status:
            raise GuestError(f"guest {self._guest}: the -p command {ending(status)}")

    def kill(self) -> None:
        """End it and what it started, as far as we may.  Never raises."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_END_SECONDS)

"""The operator's command at the pause (bhysend -p).

The command starts when the guest is paused, and must end with status 0 before
bhysend writes END, or lets a kept guest run on.  The command may flush or snapshot
storage, or move an address.  The command runs beside the last round, so its time
is not simply added to the downtime.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

from bhystream.errors import GuestError, ending
from bhystream.inherited import GATE
from bhystream.send.options import AS_IT_IS

_END_SECONDS = 5
_STDERR = 2


class Hook:
    """One run of the command, a child process.  The caller must wait() for it or kill() it."""

    def __init__(self, command: str, guest: str, stream_id: str, umask: int = AS_IT_IS) -> None:
        """Make the command's process, in a process group of its own; begin() lets it begin.

        So others can be told of the process group before anything runs in it.
        command: for sh -c.  guest, stream_id: for the command's environment.  umask: the
        operator's.  The command's standard input is empty, and its standard output is
        bhysend's standard error, because bhysend's standard output carries the stream.
        Raises GuestError if the shell cannot be started.
        """
        self._guest = guest
        gate, self._opener = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*GATE, "/bin/sh", "-c", command],
                stdin=gate,
                stdout=_STDERR,
                env={**os.environ, "BHYSEND_GUEST": guest, "BHYSEND_ID": stream_id},
                process_group=0,
                umask=umask,
            )
        except OSError as error:
            os.close(self._opener)
            raise GuestError(
                f"guest {guest}: the -p command does not start: {error.strerror}"
            ) from error
        finally:
            os.close(gate)

    @property
    def group(self) -> int:
        """Return the command's process group."""
        return self._process.pid

    def begin(self) -> None:
        """Let the command begin."""
        with contextlib.suppress(BrokenPipeError):  # it was killed, which wait() tells
            os.write(self._opener, b"\n")
        os.close(self._opener)

    def wait(self) -> None:
        """Wait until the command ends.  Raises GuestError unless its status is 0."""
        status = self._process.wait()
        if status:
            raise GuestError(f"guest {self._guest}: the -p command {ending(status)}")

    def kill(self) -> None:
        """Kill the command and its process group, as far as bhysend may.  Never raises."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_END_SECONDS)

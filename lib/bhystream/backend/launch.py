"""One hypervisor that we have started: its log, its last words, its end.

The hypervisor gets its own session and standard streams (else ssh would wait
for it, and a Ctrl-C would reach it), the root directory, and none of our
descriptors except those that the caller passes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from bhystream import durable, inherited
from bhystream.errors import ending, from_oserror

_LOG_LINES = 4
_POLL_S = 0.0005


class Child:
    """A child process and its log file; both ours until let_go()."""

    def __init__(
        self,
        argv: Sequence[str],
        log_path: str,
        environment: Mapping[str, str] | None = None,
        pass_fds: Collection[int] = (),
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        """Start the program.  argv: program first.  log_path: created, 0600,
        in the place of an older log.

        environment: set in addition to our own.  pass_fds: descriptors that the
        child inherits; ours stay open.  stdin: a descriptor, which stays the
        caller's, or DEVNULL.  Raises AccessError or InputOutputError if the log
        cannot be made or the program cannot be run.
        """
        self.log_path = log_path
        try:
            log = durable.create(Path(log_path))
        except OSError as error:
            raise from_oserror(error, f"open {log_path}") from None
        try:
            with inherited.heeding():
                self._child = subprocess.Popen(
                    argv,
                    stdin=stdin,
                    stdout=log,
                    stderr=log,
                    close_fds=True,
                    pass_fds=tuple(pass_fds),
                    env={**os.environ, **(environment or {})},
                    cwd="/",
                    start_new_session=True,
                    umask=0o077,
                )
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(log_path)
            raise from_oserror(error, f"run {argv[0]}") from None
        finally:
            os.close(log)

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._child.pid

    def has_ended(self) -> bool:
        """Reap the child if it has ended; say whether it has."""
        return self._child.poll() is not None

    @property
    def status(self) -> int | None:
        """Return the exit status, or minus the signal that ended the child; None until then."""
        return self._child.poll()

    def stop(self, limit_s: float) -> bool:
        """Stop the child (SIGSTOP); return True once none of its threads runs.

        Returns False if the child has ended, or does not stop in limit_s seconds.
        The kernel tells the parent when the last thread stands.  Source: waitid(2).
        """
        end = time.monotonic() + limit_s
        self._child.send_signal(signal.SIGSTOP)
        while self._child.poll() is None and time.monotonic() < end:
            # A child that ends right after poll() cannot stop any more: ECHILD.
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG) is not None:
                    return True
            time.sleep(_POLL_S)
        return False

    def go_on(self) -> None:
        """Undo stop(): let the child go on (SIGCONT)."""
        self._child.send_signal(signal.SIGCONT)

    def ends_within(self, limit_s: float) -> bool:
        """Wait for the child's end for at most limit_s seconds; say whether it has ended."""
        try:
            self._child.wait(limit_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def last_words(self) -> str:
        """Return the last lines of the child's log, and its exit status, as one line."""
        said = log_lines(self.log_path)
        if self.status is not None:
            said.append(f"it {ending(self.status)}")
        return "; ".join(said)

    def kill(self) -> None:
        """Kill the child (SIGKILL) and wait for its end.  Never raises."""
        with contextlib.suppress(OSError):
            self._child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(10.0)

    def remove_log(self) -> None:
        """Remove the log file."""
        with contextlib.suppress(OSError):
            os.unlink(self.log_path)

    def let_go(self) -> None:
        """Leave the child to itself: the child outlives us, and we do not wait for it."""
        if self._child.poll() is None:
            # Else Popen's destructor would warn of a child that still runs.
            self._child.returncode = 0


def log_lines(path: str) -> list[str]:
    """Return the last lines of a hypervisor's log that are not empty; [] if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line.strip() for line in file.read()[-4096:].splitlines()]
    except OSError:
        return []
    return [line for line in lines if line][-_LOG_LINES:]

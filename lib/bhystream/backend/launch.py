"""One hypervisor started by us: its log, its last words, its end.

It gets its own session and standard streams (else ssh would wait for it, and
a Ctrl-C would reach it), the root directory, and no descriptor of ours but
those that it is given.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence

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
        """Start it.  argv: program first.  log_path: created, 0600.

        environment: what is set beside our own.  pass_fds: what it inherits;
        ours stay open.  stdin: a descriptor, the caller's, or DEVNULL.  Raises a
        BhyError if the program cannot be run.
        """
        self.log_path = log_path
        try:
            log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise from_oserror(error, f"open {log_path}") from None
        try:
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
        """Say whether it is gone; reaps it."""
        return self._child.poll() is not None

    @property
    def status(self) -> int | None:
        """Return its exit status, or minus the signal that ended it; None while it lives."""
        return self._child.poll()

    def stop(self, limit_s: float) -> bool:
        """Stop it (SIGSTOP); return when none of its threads runs.  False if it ended, or hangs.

        Its parent is told when the last thread stands.  Source: waitid(2).
        """
        end = time.monotonic() + limit_s
        self._child.send_signal(signal.SIGSTOP)
        while self._child.poll() is None and time.monotonic() < end:
            # One that ends behind poll() can no more be stopped: ECHILD.
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG) is not None:
                    return True
            time.sleep(_POLL_S)
        return False

    def go_on(self) -> None:
        """Undo stop()."""
        self._child.send_signal(signal.SIGCONT)

    def ends_within(self, limit_s: float) -> bool:
        """Wait for its end for so long; say whether it is gone."""
        try:
            self._child.wait(limit_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def last_words(self) -> str:
        """Return the last lines of its log and its exit status, as one line."""
        try:
            with open(self.log_path, encoding="utf-8", errors="replace") as file:
                lines = [line.strip() for line in file.read()[-4096:].splitlines()]
        except OSError:
            lines = []
        said = [line for line in lines if line][-_LOG_LINES:]
        if self.status is not None:
            said.append(f"it {ending(self.status)}")
        return "; ".join(said)

    def kill(self) -> None:
        """End it at once and wait for it.  Never raises."""
        with contextlib.suppress(OSError):
            self._child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(10.0)

    def remove_log(self) -> None:
        """Remove the log file."""
        with contextlib.suppress(OSError):
            os.unlink(self.log_path)

    def let_go(self) -> None:
        """Leave the process to itself: it outlives us, and nobody waits for it."""
        if self._child.poll() is None:
            # Popen's destructor complains of a child that still runs.
            self._child.returncode = 0

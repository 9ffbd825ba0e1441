"""One QEMU started by us: its log, its first words, its end.

It gets its own session and standard streams (else ssh would wait for it, and
a Ctrl-C would reach it), the root directory, and no descriptor of ours.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time

from bhystream.backend.qemu.qmp import NobodyListensError, Qmp
from bhystream.errors import GuestError, from_oserror

START_LIMIT_S = 30.0
_LOG_LINES = 4


class Launched:
    """A child process and its log file; both ours until let_go()."""

    def __init__(self, argv: list[str], log_path: str, who: str) -> None:
        """Start it.  argv: program first.  log_path: created, 0600.

        Raises a BhyError if the program cannot be run.
        """
        self.log_path = log_path
        self._who = who
        try:
            log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise from_oserror(error, f"open {log_path}") from None
        try:
            self._child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                close_fds=True,
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

    def last_words(self) -> str:
        """Return the last lines of its log as one, or ""."""
        try:
            with open(self.log_path, encoding="utf-8", errors="replace") as file:
                lines = [line.strip() for line in file.read()[-4096:].splitlines()]
        except OSError:
            return ""
        return "; ".join([line for line in lines if line][-_LOG_LINES:])

    def blame(self, error: GuestError) -> GuestError:
        """Return the error with QEMU's own last words, if it has any."""
        if not self._gone_soon():
            return error
        words = self.last_words() or f"status {self._child.returncode}"
        return GuestError(f"{self._who}: QEMU has ended: {words}", hint=error.hint)

    def _gone_soon(self) -> bool:
        """Give a process that closed its connection a moment to end."""
        try:
            self._child.wait(0.5)
        except subprocess.TimeoutExpired:
            return False
        return True

    def connect(self, qmp_path: str) -> Qmp:
        """Wait for its QMP socket and connect.  Raises GuestError."""
        end = time.monotonic() + START_LIMIT_S
        while True:
            if self.has_ended():
                words = self.last_words() or f"status {self._child.returncode}"
                raise GuestError(f"{self._who}: cannot start QEMU: {words}")
            try:
                return Qmp(qmp_path, self._who)
            except NobodyListensError:
                if time.monotonic() > end:
                    raise
            except GuestError:
                # It listened, and ended before it had greeted us?
                if not self._gone_soon():
                    raise
            time.sleep(0.005)

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

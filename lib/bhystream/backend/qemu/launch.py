"""One QEMU started by us: its first words, and its last."""

from __future__ import annotations

import time
from collections.abc import Mapping

from bhystream.backend.launch import Child
from bhystream.backend.qemu.qmp import NobodyListensError, Qmp
from bhystream.errors import GuestError

START_LIMIT_S = 30.0


class Launched(Child):
    """A QEMU and its log file; both ours until let_go()."""

    def __init__(
        self, argv: list[str], log_path: str, who: str, secrets: Mapping[str, str]
    ) -> None:
        """Start it.  argv: program first.  log_path: created, 0600.

        secrets: what its last words must not show: QEMU repeats the option that
        it does not like.  Raises a BhyError if the program cannot be run.
        """
        super().__init__(argv, log_path)
        self._who = who
        self._secrets = secrets

    def last_words(self) -> str:
        """Return the last lines of its log as one, without the secrets."""
        words = super().last_words()
        for secret, shown in self._secrets.items():
            words = words.replace(secret, shown)
        return words

    def blame(self, error: GuestError) -> GuestError:
        """Return the error with QEMU's own last words, if it has any."""
        if not self._gone_soon():
            return error
        return GuestError(f"{self._who}: QEMU has ended: {self.last_words()}", hint=error.hint)

    def _gone_soon(self) -> bool:
        """Give a process that closed its connection a moment to end."""
        return self.ends_within(0.5)

    def connect(self, qmp_path: str) -> Qmp:
        """Wait for its QMP socket and connect.  Raises GuestError."""
        end = time.monotonic() + START_LIMIT_S
        while True:
            if self.has_ended():
                raise GuestError(f"{self._who}: cannot start QEMU: {self.last_words()}")
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

"""One QEMU that we have started: how we connect to it, and its last words."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from bhystream.backend.launch import Child
from bhystream.backend.qemu.qmp import NobodyListensError, Qmp
from bhystream.errors import GuestError

START_LIMIT_S = 30.0


class Launched(Child):
    """A QEMU and its log file; both ours until let_go()."""

    def __init__(
        self, argv: list[str], log_path: str, who: str, secrets: Mapping[str, str]
    ) -> None:
        """Start QEMU.  argv: program first.  log_path: created, 0600.

        secrets: texts that last_words() must not show, each with its substitute,
        because QEMU repeats an option that it refuses.  Raises a BhyError if the
        program cannot be run.
        """
        super().__init__(argv, log_path)
        self._who = who
        self._secrets = secrets

    def last_words(self) -> str:
        """Return the last lines of QEMU's log as one line, without the secrets."""
        words = super().last_words()
        for secret, shown in self._secrets.items():
            words = words.replace(secret, shown)
        return words

    def blame(self, error: GuestError) -> GuestError:
        """Return the error, with QEMU's own last words if QEMU has ended."""
        if not self._gone_soon():
            return error
        return GuestError(f"{self._who}: QEMU has ended: {self.last_words()}", hint=error.hint)

    def _gone_soon(self) -> bool:
        """Say whether QEMU ends within a moment, as it does after closing its connection."""
        return self.ends_within(0.5)

    def connect(self, qmp_path: str, on_wait: Callable[[], None]) -> Qmp:
        """Wait until QEMU listens at its QMP socket; connect.  Raises GuestError.

        on_wait: as in Qmp.
        """
        end = time.monotonic() + START_LIMIT_S
        while True:
            if self.has_ended():
                raise GuestError(f"{self._who}: cannot start QEMU: {self.last_words()}")
            try:
                return Qmp(qmp_path, self._who, on_wait)
            except NobodyListensError:
                if time.monotonic() > end:
                    raise
            except GuestError:
                # QEMU may have listened, and ended before it greeted us.
                if not self._gone_soon():
                    raise
            on_wait()
            time.sleep(0.005)

"""vm-bhyve's locks of one guest, and how a move goes around them.

    run.lock         one line: the host that runs the guest.  Another host's name, or any other
                     word, makes `vm start`, `vm startall` and `vm destroy` refuse
    suspending.lock  its existence ends the supervisor's loop after bhyve has exited
    NAME.save        its existence alone makes the next `vm start` resume it, and nothing
                     removes it then: after a reboot in the guest it would be resumed again

At the source: before_suspend(), the suspend, supervisor_gone(), then
gone_to(destination) or held(word), or, where the guest runs on here,
runs_here().  The supervisor unlinks run.lock, suspending.lock and console when
it ends, so nothing of ours is written before that.  vm-bhyve older than 1.7.0
knows no suspending.lock: it starts the guest again.

Source: dossier managers.md, 1.1 to 1.4; freebsd/vm-bhyve@0c93a8fb lib/vm-run,
vm::lock(), vm::unlock(), vm::confirm_stopped().  Unverified on FreeBSD.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from bhystream.backend.bhyve.keys import refuse, shown
from bhystream.errors import GuestError, InternalError, from_oserror

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_POLL_S = 0.05
_MAX_LOCK_BYTES = 1024


@dataclass(frozen=True)
class Locks:
    """The locks in one guest's directory.  hostname: this host's, as hostname(1) prints it.

    All methods raise GuestError, AccessError or PipeError for files that
    cannot be read or written.
    """

    name: str
    directory: Path
    hostname: str

    @property
    def _run(self) -> Path:
        return self.directory / "run.lock"

    @property
    def _suspending(self) -> Path:
        return self.directory / "suspending.lock"

    def holder(self) -> str | None:
        """Return run.lock's first line, None where there is no run.lock."""
        try:
            with self._run.open("rb") as file:
                data = file.read(_MAX_LOCK_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise from_oserror(error, f"read {self._run}") from error
        return data.decode(errors="replace").partition("\n")[0].strip()

    def reasons(self, allowed: Collection[str] = ()) -> list[str]:
        """Return why the guest must not be moved from or to here, one line each.

        allowed: other hosts that may hold run.lock: at a destination on
        shared storage, the source.
        """
        out = []
        holder = self.holder()
        if holder is not None and holder != self.hostname and holder not in allowed:
            out.append(f"{self._run}: the guest belongs to {shown(holder)}")
        save = self.directory / f"{self.name}.save"
        if os.path.lexists(save):
            out.append(f"{save} exists: vm-bhyve would resume that state again; run vm discard")
        return out

    def require_free(self, allowed: Collection[str] = ()) -> None:
        """Raise IncompatibleError with the first of reasons()."""
        for reason in self.reasons(allowed):
            raise refuse(reason)

    def is_supervised(self) -> bool:
        """Say whether a supervisor of this host holds the guest (vm _run)."""
        return self.holder() == self.hostname

    def before_suspend(self) -> None:
        """Tell the supervisor that the coming exit is a suspend: it will not start it again."""
        self._write(self._suspending, self.hostname)

    def take_back(self) -> None:
        """Undo before_suspend(): the guest runs on, and its next exit is its own."""
        self._remove(self._suspending)

    def supervisor_gone(self, limit_s: float) -> bool:
        """Wait until the supervisor has ended, which it shows by unlinking run.lock.

        limit_s: seconds at most.  Returns False where it still holds it then.
        """
        end = time.monotonic() + limit_s
        while self.is_supervised():
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL_S)
        return True

    def gone_to(self, host: str) -> None:
        """Lock the guest for another host, durably: `vm list` says Locked (host).

        host: a hostname.  Raises GuestError while the supervisor has not ended.
        """
        self._take(host)

    def held(self, word: str) -> None:
        """Lock the guest with a word that is no host's, durably, so that no `vm start` runs it."""
        self._take(word)

    def runs_here(self) -> None:
        """Lock the guest for this host, durably: it runs here without a supervisor."""
        self._write(self._run, self.hostname)

    def release(self) -> None:
        """Undo gone_to() and held().  A lock of a supervisor of this host stays."""
        if not self.is_supervised():
            self._remove(self._run)

    def _take(self, word: str) -> None:
        if not _WORD.fullmatch(word):
            raise GuestError(f"{self._run}: {shown(word)} cannot be written into it")
        if word == self.hostname:
            raise InternalError(f"{self._run}: {word} is this host, where vm start would run it")
        if self.is_supervised():
            raise GuestError(f"{self._run}: the guest's vm-bhyve supervisor has not ended")
        self._write(self._run, word)

    def _write(self, path: Path, line: str) -> None:
        """Replace a lock by one line, whole and durable."""
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with fresh.open("w", encoding="utf-8") as file:
                file.write(f"{line}\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
            self._sync()
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise from_oserror(error, f"write {path}") from error

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
            self._sync()
        except OSError as error:
            raise from_oserror(error, f"remove {path}") from error

    def _sync(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

"""vm-bhyve's locks of one guest, and what a move does with them.

    run.lock         one line: the host that runs the guest.  If it is another host's name, or
                     any other word, `vm start`, `vm startall` and `vm destroy` refuse
    suspending.lock  if it exists, the supervisor's loop ends after bhyve has exited
    NAME.save        if it exists, the next `vm start` resumes that state, and nothing
                     removes the file: after a reboot of the guest it would be resumed again

A guest that bhyrecv started has no supervisor, and no log of vm-bhyve records
the start.  The guest's run.lock has a second line, which vm-bhyve does not read
("head -n 1"), and beside run.lock is

    bhysend.conf     the bhyve_config(5) text that the guest was started with; the first
                     line, a comment, names the process that was started

At the source bhysend calls leaves() before the pause, and take_back() if the
guest stays; in between it writes nothing.  After a move bhysend calls
before_kill(), kills bhyve, and calls supervisor_gone(), then gone_to(destination).
The supervisor unlinks run.lock, suspending.lock and console when it ends.

The supervisor takes a killed bhyve for a failed one, and acts by on_fault,
which is "restart" only if the operator has set it.  suspending.lock overrules
on_fault.  vm-bhyve older than 1.7.0 does not know suspending.lock.

Source: freebsd/vm-bhyve@0c93a8fb, lib/vm-run, vm::run() and vm::handle_exit(),
read: after bhyve has exited, and if suspending.lock exists, they destroy the
taps, then the VM's node if it exists, then vm::unlock() removes the three files.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bhystream import durable
from bhystream.backend.bhyve import ownconf
from bhystream.backend.bhyve.keys import shown
from bhystream.backend.process import Identity
from bhystream.errors import GuestError, InternalError, Reason, from_oserror

_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_POLL_S = 0.05
_MAX_LOCK_BYTES = 1024
_OURS = "bhysend"
_GONE = "moved by bhysend"
# A word in run.lock that names no host, so that vm-bhyve does not start the guest.  While the
# guest may run at the destination, the second line names the host whose vm-bhyve has it.
HELD = "held-by-bhysend"
# A word in run.lock that names no host: the guest is being rebuilt here, and must not be booted.
_WAITS = "waits-for-bhyrecv"


@dataclass(frozen=True)
class Locks:
    """The locks in one guest's directory.  hostname: this host's, as hostname(1) prints it.

    All methods raise AccessError or InputOutputError if a file cannot be read or written.
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

    @property
    def conf(self) -> Path:
        """The file with what bhyrecv started the guest with; see ownconf.py."""
        return self.directory / "bhysend.conf"

    def holder(self) -> str | None:
        """Return run.lock's first line, or None if there is no run.lock."""
        lines = _read(self._run, _MAX_LOCK_BYTES)
        return None if lines is None else lines.partition("\n")[0].strip()

    def reasons(self) -> list[Reason]:
        """Return why the guest must not be moved from or to this host, one line each."""
        out = []
        if held := self._held_by_another():
            out.append(held)
        save = self.directory / f"{self.name}.save"
        if os.path.lexists(save):
            what = f"{save} exists: vm-bhyve would resume that state again"
            out.append(Reason(what, f"run vm discard {self.name}"))
        return out

    def _held_by_another(self) -> Reason | None:
        """Return which other host has the guest, and the cure if that is no longer true."""
        holder = self.holder()
        if holder in (None, self.hostname) or self._is_left() or self._is_leaving():
            return None
        if not holder:
            return Reason(
                f"{self._run} is empty, as after a power failure",
                f"if the guest surely runs on no other host: rm {self._run}",
            )
        if holder.lower() == self.hostname.lower():
            return Reason(
                f"{self._run}: it names {shown(holder)}, and this host is {shown(self.hostname)}",
                f"write this host's name into it: hostname > {self._run}",
            )
        return Reason(
            f"{self._run}: the guest belongs to {shown(holder)}",
            f"if it surely does not run there: rm {self._run}",
        )

    def is_supervised(self) -> bool:
        """Say whether a supervisor of this host holds the guest (vm _run)."""
        return self._is_leaving() or (self.holder() == self.hostname and not self._is_ours())

    def _is_ours(self) -> bool:
        """Say whether run.lock was written by runs_here()."""
        return self._lines() == [self.hostname, _OURS, ""]

    def started_with(self) -> ownconf.OwnConf | None:
        """Return what bhyrecv started the guest with, or None if bhyrecv did not start it.

        The guest may have ended since, because no supervisor looks after it.
        """
        return ownconf.read(self.conf) if self._is_ours() else None

    def _is_left(self) -> bool:
        """Say whether run.lock keeps no guest: it has moved away, or its rebuilding here ended.

        A guest that moved away from here may come back, from wherever it is.
        """
        lines = self._lines()
        return lines[0] == _WAITS or lines[1:] == [_GONE, ""]

    def _is_leaving(self) -> bool:
        return self._lines() == [HELD, self.hostname, ""]

    def _lines(self) -> list[str]:
        return (_read(self._run, _MAX_LOCK_BYTES) or "").split("\n")

    # A start by vm-bhyve, for bhyrecv: vmstart.py.

    def forget_move(self) -> str:
        """Remove a run.lock that keeps no guest, so that `vm start` starts it.

        Returns the host to which the guest had moved, for gone_to() if the guest does not come
        back after all; "" if it had not.
        """
        if not self._is_left():
            return ""
        host = self.holder() or ""
        self._remove(self._suspending)
        self._remove(self._run)
        return host if host != _WAITS else ""

    def wait_here(self) -> None:
        """Let run.lock, which vm-bhyve has made, name no host: nobody boots the guest meanwhile."""
        self._write(self._run, _WAITS)

    def runs_supervised(self) -> None:
        """Let run.lock be as vm-bhyve has made it: the guest runs here, with its supervisor."""
        self._write(self._run, self.hostname)

    def is_removed_within(self, limit_s: float) -> bool:
        """Wait until the supervisor has removed run.lock; say whether it has."""
        end = time.monotonic() + limit_s
        while os.path.lexists(self._run):
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL_S)
        return True

    def log_written_ns(self) -> int:
        """Return when vm-bhyve.log was last written, in ns since the Epoch, 0 if there is none."""
        try:
            return os.stat(self.directory / "vm-bhyve.log").st_mtime_ns
        except OSError:
            return 0

    def last_log_line(self) -> str:
        """Return the last line of vm-bhyve.log, "" if there is none."""
        try:
            with (self.directory / "vm-bhyve.log").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _MAX_LOCK_BYTES))
                lines = file.read().decode("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    # A move away.

    def leaves(self, *, is_secured: bool = True) -> None:
        """Let run.lock name no host, durably, before the guest is paused.

        The supervisor cannot remove it any more, if the file system has flags for that: when the
        host is shut down, vm-bhyve ends the held guest, and at its next start would boot a guest
        that may run at the destination by then.
        is_secured: whether kern.securelevel keeps root from undoing sunlnk.
        """
        if self.is_supervised():
            self._write(self._run, f"{HELD}\n{self.hostname}")
            _fix(self._run, is_secured=is_secured)

    def before_kill(self) -> None:
        """Tell the supervisor that bhyve's coming exit is no fault, so it starts no bhyve again."""
        self._write(self._suspending, self.hostname)
        self.let_go()

    def let_go(self) -> None:
        """Let the supervisor remove run.lock when it ends."""
        try:
            _loosen(self._run)
        except OSError as error:
            raise from_oserror(error, f"chflags {self._run}") from error

    def take_back(self) -> None:
        """Undo leaves() and before_kill(): the guest runs on, and its supervisor goes by that."""
        self._remove(self._suspending)
        if self._is_leaving():
            self._write(self._run, self.hostname)

    def ended(self) -> None:
        """Undo leaves(): bhyve has ended, and so has the supervisor, or it will soon."""
        if self._is_leaving():
            self._remove(self._run)

    def supervisor_gone(self, limit_s: float) -> bool:
        """Wait until the supervisor has ended, which shows in that it unlinks run.lock.

        limit_s: seconds at most.  Returns False if the supervisor still has run.lock then.
        """
        end = time.monotonic() + limit_s
        while self.is_supervised():
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL_S)
        return True

    def gone_to(self, host: str) -> None:
        """Lock the guest for another host, durably: `vm list` says Locked (host).

        host: a hostname.  Raises GuestError if the supervisor has not ended or
        the name cannot stand in run.lock, InternalError if host is this host.
        """
        self._take(host, _GONE)

    def held(self, word: str) -> None:
        """Lock the guest with a word that names no host, durably, so that `vm start` refuses.

        Raises what gone_to() raises.
        """
        self._take(word)

    def runs_here(self, config: str, who: Identity | None) -> None:
        """Lock the guest for this host, durably: bhyrecv started it, without a supervisor.

        config: the bhyve_config(5) text that the guest was started with.  who:
        the guest's bhyve; if it is None, the next move of this guest needs -C.
        """
        ownconf.write(self.conf, config, who)
        self._write(self._run, f"{self.hostname}\n{_OURS}")

    def release(self) -> None:
        """Undo gone_to() and held().  The lock of a supervisor of this host stays."""
        if not self.is_supervised():
            self._remove(self._run)

    def _take(self, word: str, second: str = "") -> None:
        if not _WORD.fullmatch(word):
            raise GuestError(f"{self._run}: {shown(word)} cannot be written into it")
        if word == self.hostname:
            raise InternalError(f"{self._run}: {word} is this host, where vm start would run it")
        if self.is_supervised():
            raise GuestError(f"{self._run}: the guest's vm-bhyve supervisor has not ended")
        self._write(self._run, f"{word}\n{second}".removesuffix("\n"))
        self._remove(self._suspending)  # vm-bhyve older than 1.7.0 does not

    def _write(self, path: Path, text: str, mode: int = 0o644) -> None:
        """Replace a file as a whole, durably, by the text and a newline."""
        try:
            _loosen(path)
            durable.write(path, f"{text}\n", mode)
        except OSError as error:
            raise from_oserror(error, f"write {path}") from error

    def _remove(self, path: Path) -> None:
        try:
            _loosen(path)
            durable.remove(path)
        except OSError as error:
            raise from_oserror(error, f"remove {path}") from error


def _fix(path: Path, *, is_secured: bool) -> None:
    """Let nobody remove or replace a file, as far as the file system can.  Never raises.

    UFS has uunlnk, and ZFS only sunlnk.  Source: sys/contrib/openzfs/module/os/freebsd/zfs/
    zfs_vnops_os.c, zfs_freebsd_setattr(), FreeBSD 15.1, read; chflags(2).
    """
    if sys.platform.startswith("freebsd"):
        for flag in (stat.UF_NOUNLINK, *(() if is_secured else (stat.SF_NOUNLINK,))):
            with contextlib.suppress(OSError):
                os.chflags(path, flag, follow_symlinks=False)
                return


def _loosen(path: Path) -> None:
    """Undo _fix().  Raises OSError if that fails."""
    if sys.platform.startswith("freebsd"):
        with contextlib.suppress(FileNotFoundError):
            flags = path.lstat().st_flags
            kept = flags & ~(stat.UF_NOUNLINK | stat.SF_NOUNLINK)
            if kept != flags:
                os.chflags(path, kept, follow_symlinks=False)


def _read(path: Path, limit: int) -> str | None:
    """Return a file's first `limit` bytes as text, or None if there is no such file."""
    try:
        with path.open("rb") as file:
            return file.read(limit).decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_oserror(error, f"read {path}") from error

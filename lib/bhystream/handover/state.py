"""What survives the programs: the state directory, its locks and records.

    DIR/host-id            the name of this host for the other side; random, made once
    DIR/lock/NAME          one flock(2) per guest, and per stream that is read; the file
                           of a guest stays
    DIR/run/ID             the socket of a stream's third stage
    DIR/source/ID.json     a guest of this host that is paused or held
    DIR/destination/ID.json   a stream that was started here, or stands paused
    DIR/told/NAME          the warnings that were printed for a guest
    DIR/destination/over      streams that were here long ago: a line each, "ID PHASE"
    DIR/log/, DIR/NAME.qmp    the destination's hypervisors

ID is the stream id.  An act is recorded *before* it is done, and durably
(durable.py): a record says what may have happened, never less, and a record that
cannot be read counts as the most that it could say.

The records of the two roles have separate names, because source and destination
may be one host (a move to another process, every test).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import re
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bhystream import durable
from bhystream.beneath import exchangeable
from bhystream.errors import (
    BhyError,
    GuestError,
    IncompatibleError,
    RecordError,
    UsageError,
    from_oserror,
)
from bhystream.guest import PHASES
from bhystream.report import host_name

_ATTEMPTS = 5
# Without O_NONBLOCK, the open(2) of a device could wait.
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_MAX_TIME_NS = (1 << 63) - 1  # in the year 2262
_HOST_ID = re.compile("[0-9a-f]{16}")
_OVER = "over"
_OVER_LINE = re.compile("([0-9a-f]{32}) ([a-z-]{1,20})")

Role = Literal["source", "destination"]


class Record(NamedTuple):
    """One guest that stands at the end of a stream, or a stream's tombstone.

    id: the stream id, 32 hex digits.  guest: the guest's name.  operand: the
    operand that names the guest on a command line.  lock: the name of the guest's
    lock.  phase: one of guest.PHASES.  revive: what hypervisors.open_paused()
    needs.  time_ns: the time of the last change, since the Epoch.  host,
    directory: at the source, from GO on, the destination's host id and state
    directory, as in HELLO.  keeper: the keeper's process id.  ask: in
    the command form, the words that run bhyrecv at the destination.  throttled: PAUSED, and
    the guest runs, but its vCPUs may stand at any moment.
    """

    id: str
    guest: str
    operand: str
    lock: str
    phase: str
    revive: dict[str, Any]
    time_ns: int = 0
    host: str = ""
    directory: str = ""
    keeper: int = 0
    ask: tuple[str, ...] = ()
    throttled: bool = False

    @property
    def there(self) -> str:
        """Return the host name that the destination gave in HELLO; "" if not recorded."""
        return self.host.partition("/")[0]

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Record:
        """Return the record with these fields.  Raises ValueError, TypeError if it is none."""
        found = dict(fields)
        if isinstance(found.get("ask"), list):
            found["ask"] = tuple(found["ask"])
        made = durable.typed(Record(**found))
        if made.phase not in PHASES or not 0 <= made.time_ns <= _MAX_TIME_NS or made.keeper < 0:
            raise ValueError("not a record of bhysend or bhyrecv")
        return made

    def with_phase(self, phase: str) -> Record:
        """Return the record with another phase, and with the time of now."""
        return self._replace(phase=phase, time_ns=time.time_ns())


def default_directory() -> Path:
    """Return root's state directory on a system like this one.

    Source: hier(7) of FreeBSD, which has no /var/lib and empties /var/run at
    boot; the Filesystem Hierarchy Standard.
    """
    return Path("/var/db" if os.uname().sysname == "FreeBSD" else "/var/lib", "bhysend")


def directory() -> Path:
    """Return the state directory, absolute, made with mode 0700 if it is not there.

    It is BHYSEND_STATE_DIR, else default_directory() for root, else under
    XDG_STATE_HOME.  Raises UsageError if no home directory is known; AccessError,
    InputOutputError if it cannot be made; IncompatibleError if it belongs to
    another user, others may enter it or could exchange it, or there is a link in it.
    """
    named = os.environ.get("BHYSEND_STATE_DIR")
    if named:
        path = Path(named)
    elif os.geteuid() == 0:
        path = default_directory()
    else:
        path = _home_directory() / "bhysend"
    try:
        # The keeper and the hypervisor get this path, and have other working directories.
        path = path.absolute()
        durable.make_directory(path)
        found = path.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise IncompatibleError(
                f"state directory {path}: not ours alone (mode 0700)",
                f"if nobody else could write in it: chmod 700 {path}; or set BHYSEND_STATE_DIR",
            )
        if why := exchangeable(path):
            raise IncompatibleError(
                f"state directory {path}: another user could exchange it: {why}",
                "name a directory in a place that only root and you may write to",
            )
        for name in ("lock", "run", "source", "destination", "log", "told", "conf"):
            durable.make_directory(path / name)
            if not stat.S_ISDIR((path / name).lstat().st_mode):
                raise IncompatibleError(f"state directory {path}: {name} is a link")
    except OSError as error:
        raise from_oserror(error, f"use the state directory {path}") from error
    return path


def _home_directory() -> Path:
    """Return the directory for a user's state.  Raises UsageError if none is known.

    A relative XDG_STATE_HOME is ignored.  Source: XDG Base Directory
    Specification 0.8.
    """
    named = os.environ.get("XDG_STATE_HOME", "")
    if named.startswith("/"):
        return Path(named)
    try:
        home = os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        home = ""
    if not home.startswith("/"):
        raise UsageError("no home directory is known: set BHYSEND_STATE_DIR or HOME")
    return Path(home, ".local/state")


def looked_in(base: Path) -> str:
    """Return the line that names the records in which something was not found.

    base: the state directory.
    """
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = str(os.geteuid())
    return (
        f"looked on {host_name()}, as user {user}, in the state directory {base}; "
        "each host, user and directory has its own records"
    )


def host_id(base: Path) -> str:
    """Return a unique name of this host and state directory.

    It consists of the host's name, for people, and of 64 random bits, which no
    other host of that name has.  Raises AccessError, InputOutputError.
    """
    path = base / "host-id"
    try:
        with Lock(base, "host-id", "the host id", wait=True):
            with contextlib.suppress(FileNotFoundError):
                found = durable.read_file(path).decode(errors="replace")
                if _HOST_ID.fullmatch(found):
                    return f"{host_name()}/{found}"
            made = os.urandom(8).hex()
            durable.write(path, made)
            return f"{host_name()}/{made}"
    except OSError as error:
        raise from_oserror(error, f"read {path}") from error


class Lock:
    """A lock, such as a guest's: held while any process has its descriptor open.

    The keeper inherits the descriptor, so the guest stays locked if bhysend is
    killed while the keeper is still at work.
    """

    def __init__(
        self, base: Path, name: str, what: str, *, wait: bool = False, once: bool = False
    ) -> None:
        """Take the lock, or raise GuestError at once.

        name: the lock's name.  what: names the locked thing in the message.  wait:
        wait instead, for a lock that is never held for long.  once: release() removes
        the lock's file; not for a lock that another process inherits.
        """
        self._path = base / "lock" / _file_name(name)
        self._once = once
        self.fd = self._open()
        for attempt in range(_ATTEMPTS):
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                while not self._is_ours():
                    # The last holder has removed the file: the name has another file now.
                    os.close(self.fd)
                    self.fd = self._open()
                    fcntl.flock(self.fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                return
            except BlockingIOError as error:
                if attempt == _ATTEMPTS - 1:
                    os.close(self.fd)
                    raise GuestError(f"{what}: another bhysend or bhyrecv works on it") from error
            except OSError as error:
                os.close(self.fd)
                raise from_oserror(error, f"lock {self._path}") from error
            # -l takes the lock for a moment, to see whether it is free.
            time.sleep(0.01)

    def _open(self) -> int:
        try:
            fd = os.open(self._path, _LOCK_FLAGS, 0o600)
            try:
                durable.require_regular(fd, self._path)
            except BaseException:
                os.close(fd)
                raise
            return fd
        except OSError as error:
            raise from_oserror(error, f"open {self._path}") from error

    def _is_ours(self) -> bool:
        """Say whether the file that we have locked is the one of that name."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Close our descriptor; may be called twice."""
        if self.fd >= 0:
            if self._once:
                with contextlib.suppress(OSError):
                    os.unlink(self._path)
            os.close(self.fd)
            self.fd = -1


class Told:
    """The warnings that were printed for a guest, and are not repeated before every move."""

    def __init__(self, base: Path, name: str) -> None:
        """base: the state directory.  name: the name of the guest's lock."""
        self._path = base / "told" / _file_name(name)

    def new(self, lines: Sequence[str], *, everything: bool = False) -> list[str]:
        """Return the new lines, or all lines if `everything`; note all lines as printed."""
        before: list[str] = []
        with contextlib.suppress(OSError, ValueError):
            text = durable.read_file(self._path).decode("utf-8", "surrogateescape")
            before = text.splitlines()
        found = [line for line in lines if everything or line not in before]
        if found:
            # If this fails, the lines are printed once more, which does no harm.
            with contextlib.suppress(OSError):
                durable.write(self._path, "".join(f"{line}\n" for line in lines))
        return found


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


class Records:
    """The records of one role."""

    def __init__(self, base: Path, role: Role) -> None:
        """base: the state directory, from directory()."""
        self._dir = base / role

    def write(self, record: Record) -> None:
        """Write a record durably.  Raises AccessError, InputOutputError."""
        path = self._dir / f"{record.id}.json"
        try:
            fields = record._asdict()
            if not record.throttled:
                # An older bhysend takes a record with a field that it does not know for broken.
                del fields["throttled"]
            durable.write(path, json.dumps(fields))
        except OSError as error:
            raise from_oserror(error, f"record the guest in {path}") from error

    def change(self, id_: str, before: str, after: str) -> bool:
        """Change a record's phase if it is `before`; return False if it is not.

        If several processes try, only one succeeds.  Raises AccessError,
        InputOutputError, RecordError.
        """
        with Lock(self._dir.parent, f"record-{self._dir.name}", "the records", wait=True):
            found = self.get(id_)
            if found is None or found.phase != before:
                return False
            self.write(found.with_phase(after))
            return True

    def remove(self, id_: str) -> None:
        """Remove a record durably, if it is there.  Raises AccessError, InputOutputError."""
        try:
            durable.remove(self._dir / f"{id_}.json")
        except OSError as error:
            raise from_oserror(error, f"remove the record {id_}") from error

    def archive(self, over: Sequence[Record]) -> list[Record]:
        """Note the phases of streams in one file; return the records that the caller may remove.

        A record that has changed since is left out.  Raises RecordError,
        AccessError, InputOutputError.
        """
        with Lock(self._dir.parent, f"record-{self._dir.name}", "the records", wait=True):
            taken = [record for record in over if self.get(record.id) == record]
            known = {**self._over(), **{record.id: record.phase for record in taken}}
            text = "".join(f"{id_} {phase}\n" for id_, phase in known.items())
            try:
                durable.write(self._dir / _OVER, text)
            except OSError as error:
                raise from_oserror(error, f"write {self._dir / _OVER}") from error
            return taken

    def phase(self, id_: str) -> str | None:
        """Return the last phase of a stream, by its record or archive(); None if unknown.

        Raises RecordError, AccessError, InputOutputError.
        """
        record = self.get(id_)
        return record.phase if record else self._over().get(id_)

    def _over(self) -> dict[str, str]:
        path = self._dir / _OVER
        try:
            lines = durable.read_file(path).decode(errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise from_oserror(error, f"read {path}") from error
        found = {}
        for line in lines:
            match = _OVER_LINE.fullmatch(line)
            if match is None or match[2] not in PHASES:
                raise RecordError(
                    f"{path} is broken: any stream may have run here before",
                    f"remove each line that is not a stream id and a word: {line[:80]!r}",
                )
            found[match[1]] = match[2]
        return found

    def get(self, id_: str) -> Record | None:
        """Return one record, None if there is none.

        Raises RecordError, AccessError, InputOutputError.
        """
        return self._read(self._dir / f"{id_}.json")

    def all(self) -> list[Record]:
        """Return the records that can be read, oldest first."""
        return sorted(self._survey()[0], key=lambda r: r.time_ns)

    def broken(self) -> list[BhyError]:
        """Return one error for each record that cannot be read."""
        return self._survey()[1]

    def find(self, operand: str) -> list[Record]:
        """Return the records whose id, guest or operand is `operand`.

        Raises RecordError, AccessError or InputOutputError if there are none, but
        a record that cannot be read may be one.
        """
        found = [r for r in self.all() if operand in (r.id, r.guest, r.operand)]
        if not found:
            for error in self.broken():
                raise error
        return found

    def _survey(self) -> tuple[list[Record], list[BhyError]]:
        found: list[Record] = []
        broken: list[BhyError] = []
        for path in self._dir.glob("*.json"):
            try:
                record = self._read(path)
            except BhyError as error:
                broken.append(error)
                continue
            if record:
                found.append(record)
        return found, broken

    @staticmethod
    def _read(path: Path) -> Record | None:
        def make(fields: Mapping[str, Any]) -> Record:
            made = Record.from_json(fields)
            if made.id != path.stem:  # the record would be written, and removed, under its id
                raise ValueError(f"its id is {made.id[:40]!r}")
            return made

        return durable.read(path, make)

"""A guest that stands paused in its QEMU, after QemuSource.pause() or found by its record.

The record is the JSON of record_of(): the QMP path, and the pid, start time
and boot id of the process that listened there.  Another process at the socket
is another guest, and is never touched.

QemuPaused does not connect before it needs the connection, so that a record
whose QEMU has ended can still be opened, asked and discarded, and so that the
keeper leaves the socket, which serves one client, to bhysend while bhysend lives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from bhystream import durable
from bhystream.backend.process import Identity, await_end, end_process, identify, is_alive
from bhystream.backend.qemu import migration
from bhystream.backend.qemu.facts import status
from bhystream.backend.qemu.graph import refuse_jobs
from bhystream.backend.qemu.qmp import ConnectionLostError, NobodyListensError, Qmp
from bhystream.errors import GuestEndedError, GuestError, StaleError
from bhystream.guest import Json, State

_END_S = 2.0


def open_paused(record: Json) -> QemuPaused:
    """Return the guest of a record that record_of() made, whether or not the guest is alive.

    Raises GuestError if the record has another form.
    """
    try:
        if record["hypervisor"] != "qemu":
            raise ValueError("hypervisor")
        return QemuPaused(
            _of(str, record["name"]),
            _of(str, record["qmp"]),
            durable.typed(Identity(record["pid"], record["start_ticks"], record["boot_id"])),
            _of(dict[str, dict[str, int | bool]], record["restore"]),
            announce=_of(bool, record["announce"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise GuestError(f"cannot read the record of a paused QEMU guest: {error}") from None


def _of(kind: Any, value: Any) -> Any:
    if not durable.is_of(value, kind):
        raise TypeError(f"{str(value)[:40]!r} is not of its type")
    return value


def gone(who: str, identity: Identity) -> GuestEndedError:
    """Return the error for a guest whose QEMU has ended.  who: the guest in messages."""
    return GuestEndedError(f"{who}: its QEMU (process {identity.pid}) has ended")


@contextlib.contextmanager
def ending(who: str, identity: Identity) -> Iterator[None]:
    """Raise GuestEndedError if a QMP command failed because its QEMU has ended.

    For use around any command.  If the connection was lost or refused, but QEMU
    lives, the command's own error goes on.
    """
    try:
        yield
    except (ConnectionLostError, NobodyListensError):
        # QEMU closes the connection a moment before its process ends.
        if await_end(identity, _END_S):
            raise gone(who, identity) from None
        raise


class QemuPaused:
    """base.Paused for QEMU."""

    def __init__(
        self,
        name: str,
        qmp_path: str,
        identity: Identity,
        found: Any,
        *,
        announce: bool,
        qmp: Qmp | None = None,
        states: Sequence[State] = (),
    ) -> None:
        """Take the guest; connect to nothing.

        found: the migration settings to put back.  announce: the guest is in a
        new place, so resume() announces it to the network.  qmp: a connection to
        the guest, which close() ends.  states: what the pause has saved.
        """
        self._who = f"guest {name}"
        self._qmp_path = qmp_path
        self._identity = identity
        self._found = found
        self._announce = announce
        self._qmp = qmp
        self._states = states
        # QEMU's state is complete.
        self.reasons: Sequence[str] = ()

    def _connect(self) -> Qmp:
        """Return a connection to this very guest.  Raises GuestError."""
        if self._qmp is None:
            if not self.is_alive():
                raise gone(self._who, self._identity)
            qmp = Qmp(self._qmp_path, self._who)
            try:
                if identify(qmp.pid, "QEMU") != self._identity:
                    raise GuestError(
                        f"{self._who}: another guest (process {qmp.pid}) now lives at"
                        f" {self._qmp_path}; ours is process {self._identity.pid}"
                    )
            except BaseException:
                qmp.close()
                raise
            self._qmp = qmp
        return self._qmp

    def states(self) -> Sequence[State]:
        """Return the state that the pause has saved; none for a guest found by its record."""
        return self._states

    def require_paused(self) -> None:
        """Raise StaleError unless the guest still stands as when its state was saved.

        Only a `cont` leads out of `postmigrate`, and any of QEMU's monitors may
        have sent it; a later `stop` leads to `paused`.  Raises GuestEndedError if
        QEMU has ended, GuestError if a job works on the guest's disks.
        """
        with ending(self._who, self._identity):
            qmp = self._connect()
            with qmp.ahead("query-status", "query-jobs", "query-block-exports"):
                now = status(qmp)
                if now != "postmigrate":
                    raise StaleError(
                        f"{self._who}: another program let the guest run while it stood paused;"
                        f" its QEMU is now '{now}'",
                        "what was sent is no longer this guest; keep other monitors away from"
                        " the guest",
                    )
                refuse_jobs(qmp)

    def resume(self) -> None:
        """Let the guest run; leave a running guest alone.

        Raises GuestEndedError if QEMU has ended, GuestError if the guest does not run.
        """
        try:
            with ending(self._who, self._identity):
                qmp = self._connect()
                migration.let_run(qmp)
            migration.restore(qmp, self._found)
            if self._announce:
                migration.announce(qmp)
        except BaseException:
            # The caller's next try may need a new connection.
            self.close()
            raise

    def clear(self) -> None:
        """Do nothing: nothing is made before the pause."""

    def discard(self, there: str) -> None:
        """End the guest for good: send SIGTERM, later SIGKILL, to this very process.

        A signal through a pidfd, unlike `quit`, needs no free socket and cannot
        reach another guest; QEMU treats SIGTERM as `quit`.  Raises GuestError if
        QEMU cannot be ended, or if the guest runs and its QMP socket is free to
        tell that.
        """
        state = ""
        with contextlib.suppress(GuestError):
            state = status(self._connect())
        self.close()
        if state == "running":
            raise GuestError(f"{self._who}: it runs, so it is not ended here")
        if not end_process(self._identity):
            raise GuestError(f"{self._who}: cannot end its QEMU (process {self._identity.pid})")

    def is_alive(self) -> bool:
        """Say whether the process of this very guest exists."""
        return is_alive(self._identity)

    def runs(self) -> bool:
        """Say whether its vCPUs run now."""
        with ending(self._who, self._identity):
            return status(self._connect()) == "running"

    def close(self) -> None:
        """End the connection; the guest stays as it is."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

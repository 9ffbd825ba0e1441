"""A guest that stands paused in its QEMU: by QemuSource.pause(), or found again from its record.

The record is the JSON of record_of(): the QMP path, and the pid, start time
and boot of the process that listened there.  Another process at the socket is
another guest, and is never touched.

Nothing is connected before it is needed, so that a record whose QEMU is gone
can still be opened, asked and discarded, and so that the keeper does not hold
the socket, which serves one client, while bhysend lives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

# Loaded now, also by a keeper: later the file system may be what fails.
import qemu.qmp  # noqa: F401

from bhystream.backend.process import Identity, await_end, end_process, identify, is_alive
from bhystream.backend.qemu import migration
from bhystream.backend.qemu.facts import status
from bhystream.backend.qemu.graph import refuse_jobs
from bhystream.backend.qemu.qmp import ConnectionLostError, NobodyListensError, Qmp
from bhystream.errors import GoneError, GuestError, TakenError
from bhystream.guest import Json, State

_END_S = 2.0


def open_paused(record: Json) -> QemuPaused:
    """Return the guest of a record made by revive().

    Raises GuestError if the record is not one of ours; whether the guest is
    alive is is_alive()'s to say.
    """
    try:
        if record["hypervisor"] != "qemu":
            raise ValueError("hypervisor")
        identity = Identity(int(record["pid"]), int(record["start_ticks"]), str(record["boot_id"]))
        return QemuPaused(
            str(record["name"]),
            str(record["qmp"]),
            identity,
            dict(record["restore"]),
            announce=bool(record["announce"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise GuestError(f"cannot read the record of a paused QEMU guest: {error}") from None


def gone(who: str, identity: Identity) -> GoneError:
    """Return what to say of a guest whose QEMU is no more.  who: as messages call the guest."""
    return GoneError(f"{who}: its QEMU (process {identity.pid}) has ended")


@contextlib.contextmanager
def ending(who: str, identity: Identity) -> Iterator[None]:
    """Tell a connection that was lost, or refused, with its QEMU from one that was only lost.

    Around any command.  Raises GoneError where the process has ended.
    """
    try:
        yield
    except (ConnectionLostError, NobodyListensError):
        # The process closes it a moment before it is gone.
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
        """found: settings to put back.  announce: it runs in a new place.

        qmp: a connection to it, which close() gives up.  states: what the
        pause has saved.
        """
        self._who = f"guest {name}"
        self._qmp_path = qmp_path
        self._identity = identity
        self._found = found
        self._announce = announce
        self._qmp = qmp
        self._states = states
        # QEMU leaves nothing of a guest out.
        self.reasons: Sequence[str] = ()

    def _connect(self) -> Qmp:
        """Return the connection to this very guest.  Raises GuestError."""
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
        """Return the state that the pause has saved."""
        return self._states

    def require_paused(self) -> None:
        """Ask whether it stands as it did when its state was saved.

        `postmigrate` is left by a `cont` only, whoever sends it: every QEMU
        may have several monitors, and a `stop` afterwards leads to `paused`.
        """
        with ending(self._who, self._identity):
            now = status(self._connect())
        if now != "postmigrate":
            raise TakenError(
                f"{self._who}: somebody let it run while it stood paused: it is '{now}'",
                "what was sent is no longer this guest; keep other monitors away from it",
            )
        with ending(self._who, self._identity):
            refuse_jobs(self._connect())

    def resume(self) -> None:
        """Let it run; a guest that runs already is left alone."""
        try:
            with ending(self._who, self._identity):
                qmp = self._connect()
                migration.let_run(qmp)
            migration.restore(qmp, self._found)
            if self._announce:
                migration.announce(qmp)
        except BaseException:
            # The next try may need a new connection.
            self.close()
            raise

    def clear(self) -> None:
        """Do nothing: nothing is made before the pause."""

    def discard(self, there: str) -> None:
        """End it for good: SIGTERM, in time SIGKILL, to this very process.

        By its pidfd rather than by `quit`: that needs no free socket and
        cannot reach another guest.  QEMU treats SIGTERM as `quit`.  A guest
        that somebody let run is refused, if its QMP socket is free to ask.
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
        """Give up the connection; the guest stays as it is."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

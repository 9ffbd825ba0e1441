"""The hand-over in terms of QMP: shared by the source, the sink and the keeper.

Capabilities and parameters that we change are put back as they were found, also
after a failure.  The record holds them, so that another process can put them
back if we are killed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from bhystream.backend.qemu.facts import status
from bhystream.backend.qemu.qmp import Qmp
from bhystream.errors import GuestError

# Capabilities that may be on before a move: none of them changes how the state
# is written or read.
_HARMLESS = {"x-ignore-shared", "late-block-activate", "events"}
_BUSY = {
    "setup", "active", "cancelling", "pre-switchover", "device", "wait-unplug", "colo",
    "postcopy-active", "postcopy-paused", "postcopy-recover", "postcopy-recover-setup",
}  # fmt: skip
# How long to sleep between two questions: no longer than QEMU takes for an answer, because
# the guest is paused.
POLL_S = 0.0002
PIPE_BYTES = 1 << 20  # the size of a pipe to QEMU, if the host allows it
# In bytes a second; too high to limit anything.  QEMU's default is 128 MiB/s.
UNLIMITED = 1_000_000_000_000


def capabilities(qmp: Qmp) -> dict[str, bool]:
    """Return all migration capabilities by name.  Raises GuestError."""

    def made(found: Any) -> dict[str, bool]:
        return {str(each["capability"]): bool(each["state"]) for each in found}

    return qmp.ask("query-migrate-capabilities", made, doing="examine migration")


def parameter(qmp: Qmp, name: str) -> int:
    """Return a migration parameter that is a number.  Raises GuestError."""
    return qmp.ask(
        "query-migrate-parameters", lambda found: int(found[name]), doing="examine migration"
    )


def set_capabilities(qmp: Qmp, wanted: Mapping[str, bool]) -> None:
    """Set the named migration capabilities.  Raises GuestError."""
    items = [{"capability": name, "state": state} for name, state in wanted.items()]
    if items:
        qmp.execute("migrate-set-capabilities", {"capabilities": items}, doing="set up migration")


def set_parameters(qmp: Qmp, wanted: Mapping[str, int]) -> None:
    """Set the named migration parameters.  Raises GuestError."""
    if wanted:
        qmp.execute("migrate-set-parameters", wanted, doing="set up migration")


def progress(qmp: Qmp) -> tuple[str, str]:
    """Return (status of the migration or "none", its error or "").  Raises GuestError."""

    def made(found: Any) -> tuple[str, str]:
        return str(found.get("status", "none")), str(found.get("error-desc", ""))

    return qmp.ask("query-migrate", made, doing="query migration")


def is_busy(migration: str) -> bool:
    """Say whether a migration status means a migration in progress."""
    return migration in _BUSY


def refuse_unusual(qmp: Qmp, found: Mapping[str, bool]) -> None:
    """Raise GuestError if another tool has set the guest up for a migration, or moves it now.

    found: as capabilities() returned it.
    """
    for name, state in found.items():
        if state and name not in _HARMLESS:
            raise GuestError(
                f"{qmp.who}: its migration capability {name} is on; another tool may be moving"
                " the guest",
                hint=f"if none does, switch it off (QMP: migrate-set-capabilities, {name} false)",
            )
    if "x-ignore-shared" not in found:
        raise GuestError(f"{qmp.who}: QEMU {qmp.version} lacks x-ignore-shared")
    if is_busy(progress(qmp)[0]):
        raise GuestError(
            f"{qmp.who}: a migration is in progress",
            hint="wait until it ends, or end it (QMP: migrate_cancel)",
        )


def cancel(qmp: Qmp, limit_s: float = 10.0) -> None:
    """End a migration in progress and wait until it has ended.  Raises GuestError."""
    if not is_busy(progress(qmp)[0]):
        return
    qmp.execute("migrate_cancel", doing="cancel migration")
    end = time.monotonic() + limit_s
    while is_busy(progress(qmp)[0]):
        if time.monotonic() > end:
            raise GuestError(f"{qmp.who}: cannot cancel migration: still busy after {limit_s:g} s")
        time.sleep(POLL_S)


def restore(qmp: Qmp, found: Mapping[str, Any]) -> None:
    """Put capabilities and parameters back; leave those that QEMU refuses.

    Never raises, because a guest that runs matters more than a setting.
    """
    with contextlib.suppress(GuestError):
        set_capabilities(qmp, found.get("capabilities", {}))
    with contextlib.suppress(GuestError):
        set_parameters(qmp, found.get("parameters", {}))


def let_run(qmp: Qmp) -> None:
    """Let a paused guest run, whatever became of its migration.

    A guest that runs already is left alone.  Raises GuestError if the guest does
    not run afterwards, because it was shut down meanwhile, or because another
    QEMU has locked its disk.
    """
    cancel(qmp)
    now = _settled(qmp)
    if now == "running":
        return
    if now not in ("paused", "postmigrate", "prelaunch", "finish-migrate"):
        raise GuestError(f"{qmp.who}: cannot resume: it is '{now}'")
    qmp.execute("cont", doing="resume", limit_s=30.0)
    now = status(qmp)
    if now != "running":
        raise GuestError(f"{qmp.who}: cannot resume: it is '{now}' after cont")


def _settled(qmp: Qmp, limit_s: float = 10.0) -> str:
    """Return the state of the guest once no migration is about to end.

    QEMU says "completed" a moment before it leaves finish-migrate, in which it refuses `cont`.
    Source: QEMU 7.2, migration/migration.c, migration_completion() and
    migration_iteration_finish().
    """
    end = time.monotonic() + limit_s
    while (now := status(qmp)) == "finish-migrate" and time.monotonic() < end:
        time.sleep(POLL_S)
    return now


def announce(qmp: Qmp) -> None:
    """Tell the network where the guest is now.  Never raises: the guest runs without it too."""
    with contextlib.suppress(GuestError):
        qmp.execute(
            "announce-self",
            {"initial": 50, "max": 550, "rounds": 5, "step": 100},
            doing="announce itself",
        )

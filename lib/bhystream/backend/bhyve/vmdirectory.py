"""The directory by which vm-bhyve's `vm start` calls bhyrecv, and its end: see vmstart.py."""

from __future__ import annotations

import contextlib
from pathlib import Path

from bhystream import durable, strict_json
from bhystream.backend.bhyve.locks import Locks
from bhystream.backend.tree import remove_tree
from bhystream.errors import BhyError

_END_S = 60.0


def directory_of(base: Path, stem: str) -> Path:
    """Return the directory for one start.  base: the state directory.  stem: the stream's id."""
    return base / "vm" / stem


def end(directory: Path) -> None:
    """Wait for the end of the supervisor whose bhyve has ended, and remove the directory.

    The guest is then as far away as before.  Never raises.  If the supervisor does not end, the
    directory stays, and vm-bhyve can start nothing by it.
    """
    found = _read(directory)
    if found is None:
        return
    locks, away = found
    if locks.is_removed_within(_END_S):
        with contextlib.suppress(BhyError):
            if away:
                locks.gone_to(away)
        remove_tree(directory)


def let_run(directory: Path) -> None:
    """Tell vm-bhyve that the guest runs here, and leave vm-bhyve's PATH to the system.

    Raises InputOutputError or AccessError if run.lock cannot be written.
    """
    if found := _read(directory):
        found[0].runs_supervised()
        remove_tree(directory)


def _read(directory: Path) -> tuple[Locks, str] | None:
    """Return the guest's locks, and the host to which it had moved; None if there is no start."""
    try:
        name, where, hostname, away = strict_json.loads(durable.read_file(directory / "locks"))
    except (OSError, ValueError):
        return None
    return Locks(str(name), Path(str(where)), str(hostname)), str(away)

"""Remove what is kept of streams that are over, so that it does not grow for ever.

    record       of a stream that is STARTED or DEAD, if nothing is left of its guest
                 here: older than 30 days, or beyond the newest 100
    .started     of that record, with it
    lock         of one stream, or of a QEMU: 30 days old, and free
    *.new        which a power cut has left of a file without its name: 30 days old

The fact that a stream was started, or never will be, is kept: it becomes a line
of 40 bytes in destination/over before the record is removed.  A guest that runs,
stands paused, or lies in files here keeps its record, and so does a guest about
which this cannot be found out.  bhyrecv does this at its end, when nobody waits
for it; bhysend removes only the locks, at its end.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from bhystream import durable, hypervisors
from bhystream.errors import BhyError
from bhystream.guest import DEAD, STARTED
from bhystream.handover.state import Lock, Record, Records

MAX_RECORDS = 100
MAX_AGE_SECONDS = 30 * 86400
# On FreeBSD each look at a guest runs a program.
_MOST_AT_ONCE = 50
_LOCKS = ("stream-*", "qemu-*")
_TRIED_AGAIN = (BhyError, OSError, MemoryError)


def prune(base: Path, records: Records) -> None:
    """Remove records, locks and *.new files that are not needed.  records: the destination's.

    Never raises: a later call tries again what fails.
    """
    with contextlib.suppress(*_TRIED_AGAIN):
        _prune_records(base, records)
    for directory in ("destination", "source", "loaded", "conf"):
        with contextlib.suppress(*_TRIED_AGAIN):
            for path in (base / directory).glob("*.new"):
                if _is_old(path):
                    path.unlink()
    prune_locks(base)


def _prune_records(base: Path, records: Records) -> None:
    over = [record for record in records.all() if record.phase in (STARTED, DEAD)]
    oldest_ns = time.time_ns() - MAX_AGE_SECONDS * 10**9
    many = over[: max(0, len(over) - MAX_RECORDS)]
    candidates = [record for record in over if record in many or record.time_ns < oldest_ns]
    gone = [record for record in candidates[:_MOST_AT_ONCE] if _is_gone(record)]
    if gone:
        taken = records.archive(gone)
        for record in taken:
            for path in (base / "loaded").glob(f"{record.id}.*.started"):
                durable.remove(path)
            records.remove(record.id)


def _is_gone(record: Record) -> bool:
    """Say whether it is certain that nothing of a guest is here any more."""
    with contextlib.suppress(BhyError, OSError):
        paused = hypervisors.open_paused(record.revive)
        try:
            return not paused.is_alive()
        finally:
            paused.close()
    return False


def prune_locks(base: Path) -> None:
    """Remove the old files of locks that are free.  Never raises."""
    for pattern in _LOCKS:
        with contextlib.suppress(*_TRIED_AGAIN):
            for path in (base / "lock").glob(pattern):
                with contextlib.suppress(*_TRIED_AGAIN):
                    if _is_old(path):
                        Lock(base, path.name, path.name, once=True).release()


def _is_old(path: Path) -> bool:
    return os.stat(path).st_mtime < time.time() - MAX_AGE_SECONDS

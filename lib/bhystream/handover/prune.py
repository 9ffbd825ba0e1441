"""What is kept of streams that are over, made smaller, so that it does not grow for ever.

    record       of a stream that is STARTED or DEAD, where nothing is left of its guest
                 here: older than 30 days, or beyond the newest 100
    its .started with it
    lock         of one stream, or of a QEMU: 30 days old, and free
    *.new        that a cut has left of a file before it got its name: 30 days old

What a record is for stays: that its stream was started, or never will be, is a
line in destination/over, 40 bytes, before the record goes.  A guest that runs,
stands, or lies in files here keeps its record, and so does one of which that
cannot be found out.  Done at the end of a bhyrecv, when nobody waits for it;
of the locks also at the end of a bhysend.
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

KEPT_RECORDS = 100
KEPT_SECONDS = 30 * 86400
# To look at one takes a program on FreeBSD.
_MOST_AT_ONCE = 50
_LOCKS = ("stream-*", "qemu-*")


def prune(base: Path, records: Records) -> None:
    """Make what is kept of streams smaller.  records: the destination's.

    Never raises: what cannot be done is done another time.
    """
    with contextlib.suppress(BhyError, OSError):
        _prune_records(base, records)
    for directory in ("destination", "source", "loaded"):
        with contextlib.suppress(OSError):
            for path in (base / directory).glob("*.new"):
                if _is_old(path):
                    path.unlink()
    prune_locks(base)


def _prune_records(base: Path, records: Records) -> None:
    over = [record for record in records.all() if record.phase in (STARTED, DEAD)]
    oldest_ns = time.time_ns() - KEPT_SECONDS * 10**9
    many = over[: max(0, len(over) - KEPT_RECORDS)]
    candidates = [record for record in over if record in many or record.time_ns < oldest_ns]
    gone = [record for record in candidates[:_MOST_AT_ONCE] if _is_gone(record)]
    if gone:
        taken = records.archive(gone)
        for record in taken:
            for path in (base / "loaded").glob(f"{record.id}.*.started"):
                durable.remove(path)
            records.remove(record.id)


def _is_gone(record: Record) -> bool:
    """Say whether surely nothing of a guest is here any more."""
    with contextlib.suppress(BhyError, OSError):
        paused = hypervisors.open_paused(record.revive)
        try:
            return not paused.is_alive()
        finally:
            paused.close()
    return False


def prune_locks(base: Path) -> None:
    """Remove the files of locks that nobody asks for any more.  Never raises."""
    for pattern in _LOCKS:
        for path in (base / "lock").glob(pattern):
            with contextlib.suppress(BhyError, OSError):
                if _is_old(path):
                    Lock(base, path.name, path.name, once=True).release()


def _is_old(path: Path) -> bool:
    return os.stat(path).st_mtime < time.time() - KEPT_SECONDS

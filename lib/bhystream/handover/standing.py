"""A guest that still stands at the source since an earlier stream, and is not sent again."""

from __future__ import annotations

from pathlib import Path

from bhystream import hypervisors
from bhystream.errors import BhyError, GuestError
from bhystream.handover.state import Lock, Record, Records


def refuse_held(base: Path, operand: str, lock_name: str | None = None) -> None:
    """Raise GuestError if the guest to be sent still stands here since an earlier stream.

    lock_name: the name of the guest's lock, if the caller has taken the lock: then
    the lock decides which records are the guest's, because several operands may
    name one guest.  The function removes a record whose guest is gone.  Raises
    RecordError, AccessError, InputOutputError, too.
    """
    records = Records(base, "source")
    if lock_name is None:
        found = records.find(operand)
    else:
        found = [record for record in records.all() if record.lock == lock_name]
    for record in found:
        if lock_name is None:
            # A process that is about to resume or end the guest goes first.
            Lock(base, record.lock, f"guest {record.guest}").release()
        _refuse(base, records, record)
    for error in records.broken():
        raise error


def _refuse(base: Path, records: Records, record: Record) -> None:
    """Raise GuestError if the guest of a record is here; if it is gone, remove the record."""
    # Few guests have a record, and every bhysend comes by here.
    from bhystream.handover.recorded import is_alive
    from bhystream.handover.where import Where, outcome, what_to_type

    try:
        if not is_alive(record):
            _forget(records, record)
            return
    except BhyError:
        return  # another guest has its place now; opening the guest will tell
    where = outcome(record.phase)
    there = f"it runs on {record.there}; " if where == Where.LEFT else ""
    raise GuestError(
        f"guest {record.guest}: {record.phase} here since an earlier stream",
        there + what_to_type(where, record, base),
    )


def _forget(records: Records, record: Record) -> None:
    """Remove the record of a guest that is gone, and the rest of the guest."""
    paused = hypervisors.open_paused(record.revive)
    paused.clear()
    paused.close()
    records.remove(record.id)

"""Find, by its record, a guest that a killed bhyrecv has left and that never ran; end it.

    READY   DEAD is recorded first, so that a later GO starts nothing
    DEAD    bhyrecv died, or failed, after recording DEAD and before the guest's end

`bhyrecv -q`, `--discard` and the next bhyrecv for the same guest do this.  Each
takes the stream's lock, which the stream's bhyrecv has as long as it lives.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from bhystream.errors import BhyError
from bhystream.guest import DEAD, READY
from bhystream.handover.recorded import end_guest
from bhystream.handover.state import Lock, Record, Records


def lock_stream(base: Path, id_: str) -> Lock:
    """Take a stream's lock.  Raises GuestError if the stream's bhyrecv still lives."""
    return Lock(base, f"stream-{id_}", f"stream {id_}", once=True)


def end_dead(base: Path, record: Record) -> None:
    """End what is left of a guest whose record is DEAD; if nothing is left, do nothing.

    Raises GuestError if the guest's bhyrecv lives, which then ends the guest itself.
    """
    with lock_stream(base, record.id):
        end_guest(record)


def sweep(base: Path, records: Records, lock: str) -> None:
    """Make room for a guest: end what is left of earlier ones that never ran.

    records: the destination's records.  lock: the name of the guest's lock, which the
    caller has taken, so that no bhyrecv of the earlier guests lives.  A guest that
    cannot be ended stays, and is in the way of the new one.  Raises AccessError or
    InputOutputError if DEAD cannot be recorded.
    """
    for record in records.all():
        if record.lock != lock or record.phase not in (READY, DEAD):
            continue
        if record.phase == READY and not records.change(record.id, READY, DEAD):
            continue
        with contextlib.suppress(BhyError):
            end_dead(base, record)

"""What a killed bhyrecv left of a guest that never ran: found by its record, and ended.

    READY   it is DEAD first, so that a GO which comes later starts nothing
    DEAD    its bhyrecv died, or failed, between saying so and the end of the guest

`bhyrecv -q`, `--discard` and the next bhyrecv for the same guest do it.  Each
takes the stream's lock, which its own bhyrecv has as long as that lives.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from bhystream.errors import BhyError
from bhystream.guest import DEAD, READY
from bhystream.handover.standing import end_guest
from bhystream.handover.state import Lock, Record, Records


def lock_stream(base: Path, id_: str) -> Lock:
    """Take a stream's lock.  Raises GuestError where its bhyrecv lives."""
    return Lock(base, f"stream-{id_}", f"stream {id_}", once=True)


def end_dead(base: Path, record: Record) -> None:
    """End what is left of a guest that is DEAD.  Nothing is no error.

    Raises GuestError where its bhyrecv lives: that one ends it itself.
    """
    with lock_stream(base, record.id):
        end_guest(record)


def sweep(base: Path, records: Records, lock: str) -> None:
    """Make room for a guest: end what is left of earlier ones that never ran.

    records: of the destination.  lock: the name of the guest's lock, which the
    caller has, so that no bhyrecv of theirs lives.  What cannot be ended stays,
    and is in the way of the guest.  Raises BhyError where DEAD cannot be recorded.
    """
    for record in records.all():
        if record.lock != lock or record.phase not in (READY, DEAD):
            continue
        if record.phase == READY and not records.change(record.id, READY, DEAD):
            continue
        with contextlib.suppress(BhyError):
            end_dead(base, record)

"""What the operator does with a guest that stands paused: -l, --discard, --resume.

Both programs have these verbs.  bhysend's guests are those that are held or in
doubt, and those whose bhysend and keeper both died before END; bhyrecv's are
those that `bhyrecv -u` left loaded, and what a killed bhyrecv has left.
"""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

from bhystream import hypervisors
from bhystream.commandline import Verb
from bhystream.errors import EXIT_OK, BhyError, GuestError, StaleError, UsageError
from bhystream.guest import DEAD, GO, HELD, LOADED, MOVED, PAUSED, READY, STARTED
from bhystream.handover import leftover, state
from bhystream.handover.recorded import end_guest, is_alive, open_alive
from bhystream.handover.state import Lock, Record, Records, Role
from bhystream.handover.where import Where, what_to_type
from bhystream.report import Console, host_name, printable
from bhystream.signals import Interrupts
from bhystream.stream.writer import write_all

_STDOUT = 1
_ID = 3  # the field of -l that has the stream id
_STREAM_ID = re.compile("[0-9a-f]{32}")
# The phases that a listing leaves out, because nobody has to decide anything.
OVER = (STARTED, DEAD)


def run(verb: Verb, role: Role, console: Console) -> int:
    """Do what the verb says for this role's guests; return the exit status.

    Raises BhyError if the verb cannot be done.
    """
    interrupts = Interrupts("nothing was changed")
    base = state.directory()
    records = Records(base, role)
    if verb.name == "-l":
        return _list(base, records, verb.guest, console)
    guest = verb.guest or ""
    record = _one(records, guest, verb.name)
    lock = Lock(base, record.lock, f"guest {record.guest}")
    interrupts.ignore(
        lambda name: console.say(f"{name}: too late, {verb.name} ends as soon as it is done")
    )
    try:
        # Read again under the lock: a keeper may have acted meanwhile.
        current = records.get(record.id)
        if current is not None and _is_left(current, guest, verb.name):
            if current.phase == DEAD:
                _end_dead(base, current, console)
            else:
                _clear(current, console)
        elif current is None or not _stands(current):
            raise GuestError(f"guest {record.guest}: it is not held any more")
        elif verb.name == "--discard":
            _discard(records, current, console)
        else:
            _refuse_to_resume(base, current, verb.in_doubt)
            _resume(records, current, console)
    finally:
        lock.release()
    return EXIT_OK


def _list(base: Path, records: Records, guest: str | None, console: Console) -> int:
    """List the guests that stand here; if a guest is named, also one that was started.

    Returns 69 if a record is broken: the list is then incomplete.  Raises
    GuestError if a guest is named that is not known here, so that a look at the
    wrong place does not pass for the news that the guest was not started.
    """
    if guest:
        rows = [_row(base, record) for record in records.find(guest)]
        if _STREAM_ID.fullmatch(guest) and not any(guest == row[_ID] for row in rows):
            # prune.py may have removed the record, and kept the id and the phase.
            phase = records.phase(guest)
            rows += [("-", phase, "-", guest, "-", "-")] if phase else []
        if not rows:
            raise GuestError(f"{guest}: no such guest or stream is recorded", state.looked_in(base))
    else:
        rows = [_row(base, record) for record in records.all() if _stands(record)]
    lines = ["\t".join(printable(field) for field in row) + "\n" for row in rows]
    write_all(_STDOUT, "".join(lines).encode(), "write the list")
    return max((console.fail(error) for error in records.broken()), default=EXIT_OK)


def _row(base: Path, record: Record) -> tuple[str, ...]:
    """Return the fields of -l for a record."""
    when = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.time_ns // 10**9))
    kept = f"keeper {record.keeper}" if record.keeper and _is_locked(base, record) else "-"
    return (record.guest, record.phase, when, record.id, record.operand, kept)


def _is_locked(base: Path, record: Record) -> bool:
    """Say whether a bhysend or a keeper works on a guest now."""
    try:
        Lock(base, record.lock, f"guest {record.guest}").release()
    except GuestError:
        return True
    return False


def _one(records: Records, guest: str, verb: str) -> Record:
    """Find the one guest that the operator means."""
    all_ = records.find(guest)
    found = [r for r in all_ if _stands(r) or _is_left(r, guest, verb)]
    if not found:
        if any(r.phase == STARTED for r in all_):
            raise GuestError(
                f"guest {guest}: it was started here; resume or end it in its hypervisor"
            )
        raise GuestError(f"guest {guest}: no such guest is held on {host_name()}")
    if len(found) > 1:
        ids = "\n".join(f"  {r.id} ({r.phase}, {r.operand})" for r in found)
        raise GuestError(f"guest {guest}: several are held; name one by its stream id", ids)
    return found[0]


def _stands(record: Record) -> bool:
    """Say whether the operator has to decide about a guest.

    This includes a guest that was told to run and still has its files: a
    --resume was cut short.
    """
    if record.phase != STARTED:
        return record.phase not in OVER
    with contextlib.suppress(BhyError):
        return hypervisors.lies_in_files(record.revive)
    return False


def _is_left(record: Record, guest: str, verb: str) -> bool:
    """Say whether the operator means the rest of a guest that is over, which only its id names."""
    return verb == "--discard" and record.phase in OVER and record.id == guest


def _end_dead(base: Path, record: Record, console: Console) -> None:
    """End what a killed bhyrecv has left.  The record stays: a GO may still be on the way."""
    leftover.end_dead(base, record)
    console.say(f"guest {record.guest}: it never ran here, and nothing is left of it")
    console.log(f"guest {record.guest}: the leftovers of stream {record.id} are removed")


def _clear(record: Record, console: Console) -> None:
    """Remove the files of a start whose guest has ended.  The record stays, for bhyrecv -q."""
    paused = hypervisors.open_paused(record.revive)
    try:
        with contextlib.suppress(StaleError):  # this guest does not run, but another does
            if paused.is_alive() and paused.runs():
                raise GuestError(
                    f"guest {record.guest}: it was started here, and runs; end it in its hypervisor"
                )
        paused.clear()
    finally:
        paused.close()
    console.say(f"guest {record.guest}: it does not run here; the files of its start are removed")
    console.log(f"guest {record.guest}: the leftovers of stream {record.id} are removed")


def _is_taken(record: Record) -> bool:
    """Say whether another guest has the name and has used the disks: this is no copy then."""
    paused = hypervisors.open_paused(record.revive)
    try:
        paused.runs()
    except StaleError:
        return True
    except BhyError:
        return False
    finally:
        paused.close()
    return False


def _discard(records: Records, record: Record, console: Console) -> None:
    was_alive = is_alive(record)
    if record.phase == READY:
        _bury(records, record)
    if was_alive and record.phase == PAUSED and not _is_taken(record):
        raise GuestError(
            f"guest {record.guest}: its stream is not complete, so this may be the only copy",
            f"let it run on: bhysend --resume {record.id}",
        )
    end_guest(record)
    if was_alive:
        console.say(f"guest {record.guest}: discarded here")
    else:
        console.say(f"guest {record.guest}: it was gone already; its record is removed")
    if record.phase != READY:
        records.remove(record.id)
    console.log(f"guest {record.guest}: stream {record.id} discarded")


def _bury(records: Records, record: Record) -> None:
    """Record DEAD for a guest that waits for GO, so that it never runs."""
    if not records.change(record.id, READY, DEAD):
        raise GuestError(f"guest {record.guest}: it was started just now")


def _refuse_to_resume(base: Path, record: Record, in_doubt: bool) -> None:
    """Refuse to resume a guest that may run elsewhere, or must not run here."""
    name = record.guest
    if record.phase == MOVED:
        raise GuestError(
            f"guest {name}: it runs on {record.there}",
            what_to_type(Where.LEFT, record, base),
        )
    if record.phase == READY:
        raise GuestError(f"guest {name}: only its source can let it run (GO)")
    if record.phase == GO and not in_doubt:
        raise GuestError(
            f"guest {name}: it may run on {record.there}", what_to_type(Where.DOUBT, record, base)
        )
    if record.phase != GO and in_doubt:
        raise UsageError(f"--in-doubt: guest {name} is {record.phase}, not in doubt")


def _resume(records: Records, record: Record, console: Console) -> None:
    paused = open_alive(record)
    if paused is None:
        raise GuestError(
            f"guest {record.guest}: it is gone, so it cannot be resumed",
            f"forget it: --discard {record.id}",
        )
    try:
        if record.phase in (GO, HELD):
            console.say(f"guest {record.guest}: resuming; the destination must not have started it")
        # Record it first: a guest that may run again must not be discarded by
        # the record of the time when it was held.
        records.write(record.with_phase(STARTED if record.phase in (LOADED, STARTED) else PAUSED))
        try:
            paused.resume()
        except BaseException:
            records.write(record)
            raise
    finally:
        paused.close()
    if record.phase not in (LOADED, STARTED):
        records.remove(record.id)
    console.say(f"guest {record.guest}: it runs on {host_name()}")
    for reason in paused.reasons if record.phase in (LOADED, STARTED) else ():
        console.say(f"guest {record.guest}: {reason}")
    console.log(f"guest {record.guest}: stream {record.id} resumed")

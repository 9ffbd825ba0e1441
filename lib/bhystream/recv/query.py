"""bhyrecv -q: what became of a stream here.

The answer goes to standard output, for `bhysend -A` at the source.  The question
may change something: a guest that waits for GO is first given up for good, so
that FAILED is true even if GO is still on its way.
"""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

from bhystream import hypervisors
from bhystream.errors import EXIT_OK, BhyError, GuestError, InDoubtError, UsageError
from bhystream.guest import DEAD, READY, STARTED
from bhystream.handover import leftover, state
from bhystream.handover.handshake import QUERY, Act
from bhystream.handover.recorded import open_alive
from bhystream.handover.state import Record, Records
from bhystream.recv.reply import Reply
from bhystream.report import Console, host_name
from bhystream.signals import Interrupts

# How long -q waits for a bhyrecv that has read GO and starts the guest now.
_START_SECONDS = 40.0


def run(id_: str, console: Console) -> int:
    """Answer for one stream; return the exit status.

    Raises UsageError if id_ is not a stream id, GuestError if the stream was never ready
    here, InDoubtError if the record cannot be read, or the guest not be looked at; and
    InputOutputError if nothing can be answered.
    """
    if not re.fullmatch("[0-9a-f]{32}", id_):
        raise UsageError(f"-q {id_}: not a stream id, 32 hexadecimal digits")
    Interrupts("nothing was answered: ask again")
    base = state.directory()
    reply = Reply(base, id_)
    records = Records(base, "destination")
    reply.hello()
    try:
        word = _ask(base, records, id_, console)
        record = records.get(id_)
    except BhyError as error:
        reply.say("RAN")
        raise InDoubtError(str(error), error.hint) from error
    if record and record.phase == DEAD:
        with contextlib.suppress(BhyError):
            leftover.end_dead(base, record)
    texts = ["it was not started there, and will not be"] if word == "FAILED" else []
    reply.say(word, *texts)
    if record and word == "RUNNING":
        _tidy(record)
    if word == "UNKNOWN":
        raise GuestError(f"no stream {id_} was ever ready on {host_name()}", state.looked_in(base))
    console.say(f"stream {id_}: {word}")
    return EXIT_OK


def _ask(base: Path, records: Records, id_: str, console: Console) -> str:
    """Return the answer by the record, after the acts that make it true."""
    while True:
        record = records.get(id_)
        acts, word = QUERY[record.phase if record else records.phase(id_)]
        if record and record.phase == STARTED:
            if _is_starting(base, record):
                return word
            if records.get(id_) == record:
                if _runs(record, console):
                    return "RUNNING"
                return "FAILED" if _never_ran(base, records, record) else word
        elif Act.RECORD_DEAD not in acts or records.change(id_, READY, DEAD):
            return word


def _is_starting(base: Path, record: Record) -> bool:
    """Wait for the bhyrecv that starts the guest; say whether it still lives after 40 s."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        with contextlib.suppress(GuestError), leftover.lock_stream(base, record.id):
            return False
        if time.monotonic() > deadline:
            return True
        time.sleep(0.1)


def _runs(record: Record, console: Console) -> bool:
    """Say whether a guest that was started is seen running."""
    try:
        paused = open_alive(record)
        if paused is None:
            return False
        try:
            return paused.runs()
        finally:
            paused.close()
    except BhyError as error:
        # The hypervisor may be busy with another client, which decides nothing.
        console.fail(error)
        return False


def _tidy(record: Record) -> None:
    """Remove the files of a running guest's start, which a killed bhyrecv has left."""
    with contextlib.suppress(BhyError):
        paused = hypervisors.open_paused(record.revive)
        paused.clear()
        paused.close()


def _never_ran(base: Path, records: Records, record: Record) -> bool:
    """Say whether a guest that was to be started never ran, and never will; record DEAD then.

    Its bhyrecv was killed after it had recorded STARTED and before it released the
    guest, and nobody else releases the guest.
    """
    with contextlib.suppress(BhyError), leftover.lock_stream(base, record.id):
        if hypervisors.was_never_released(record.revive):
            return records.change(record.id, STARTED, DEAD)
    return False

"""bhyrecv -q: what became of a stream here.

The answer goes to standard output, for `bhysend -A` at the source.  Asking may
change something: a guest that waits for GO is given up first, for good, so
that FAILED is true whatever still is on its way.
"""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

from bhystream import handshake, state
from bhystream.errors import OK, BhyError, GuestError, UsageError
from bhystream.handshake import QUERY, Act
from bhystream.reply import Reply
from bhystream.report import Console, host_name
from bhystream.standing import open_alive
from bhystream.state import Lock, Record, Records

# Of a bhyrecv that has got GO and starts the guest now.
_START_SECONDS = 40.0


def run(id_: str, console: Console) -> int:
    """Answer for one stream; return the exit status.  Raises BhyError."""
    if not re.fullmatch("[0-9a-f]{32}", id_):
        raise UsageError(f"-q {id_}: not a stream id, 32 hexadecimal digits")
    base = state.directory()
    reply = Reply(base, id_)
    records = Records(base, "destination")
    reply.hello()
    record = records.get(id_)
    if record and record.phase == handshake.STARTED:
        word = _started(base, record)
    else:
        word = _ask(records, id_)
        record = records.get(id_)
        if record and record.phase == handshake.DEAD:
            _clear(base, record)
    texts = ["it was not started there, and will not be"] if word == "FAILED" else []
    reply.say(word, *texts)
    if word == "UNKNOWN":
        raise GuestError(f"no stream {id_} was ever ready on {host_name()}")
    console.say(f"stream {id_}: {word}")
    return OK


def _ask(records: Records, id_: str) -> str:
    """Return the answer by the record, after the acts that make it true."""
    while True:
        record = records.get(id_)
        acts, word = QUERY[record.phase if record else None]
        if Act.RECORD_DEAD not in acts:
            return word
        if records.change(id_, handshake.READY, handshake.DEAD):
            return word


def _started(base: Path, record: Record) -> str:
    """Return RUNNING if the guest is seen running, else RAN."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        with contextlib.suppress(GuestError), Lock(base, f"stream-{record.id}", "the stream"):
            break
        if time.monotonic() > deadline:
            return QUERY[handshake.STARTED][1]
        time.sleep(0.1)
    paused = open_alive(record)
    if paused is None:
        return QUERY[handshake.STARTED][1]
    try:
        return "RUNNING" if paused.runs() else QUERY[handshake.STARTED][1]
    finally:
        paused.close()


def _clear(base: Path, record: Record) -> None:
    """End the guest that a killed bhyrecv left waiting; one that lives does it itself."""
    with contextlib.suppress(BhyError), Lock(base, f"stream-{record.id}", "the stream"):
        paused = open_alive(record)
        if paused is not None:
            try:
                paused.discard()
            finally:
                paused.close()

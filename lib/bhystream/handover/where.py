"""Where a guest of the source is, and what to type: decided and worded in this one module.

    record      acts done        resume failed   discard failed   nothing to do
    ------      ---------        -------------   --------------   -------------
    PAUSED      HERE                STANDS                           STANDS
    HELD        HERE                STANDS                           HELD
    GO          HERE or THERE       STANDS           LEFT            DOUBT
    MOVED       THERE                                LEFT            LEFT

The acts are those of handshake.SOURCE and handshake.RECORD.  bhysend, its
keeper, `bhysend -A` and the verbs all ask here, so that their messages use the
same words about a guest that stands paused.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from bhystream.errors import BhyError
from bhystream.guest import GO, HELD, MOVED, PAUSED
from bhystream.handover.handshake import Act
from bhystream.handover.state import Record, default_directory


class Where(Enum):
    """Where the copy of the guest is that runs, or may run on."""

    HERE = "it runs here"
    THERE = "it runs at the destination, and is gone here"
    STANDS = "it stands paused here, and runs nowhere else"
    HELD = "it stands paused here, and may run at the destination: plain form"
    DOUBT = "it stands paused here, and may run at the destination: GO may be out"
    LEFT = "it runs at the destination, and what is left here is to be ended"


_UNTOUCHED = {PAUSED: Where.STANDS, HELD: Where.HELD, GO: Where.DOUBT, MOVED: Where.LEFT}


def outcome(phase: str, acts: Sequence[Act] = (), undone: Sequence[Act] = ()) -> Where:
    """Return where a recorded guest is.

    phase: the record's, before the acts.  acts: what was to be done to the
    guest.  undone: the acts that were not done, the failed act first.
    """
    if Act.DISCARD in acts:
        return Where.LEFT if Act.DISCARD in undone else Where.THERE
    if Act.RESUME in acts:
        return Where.STANDS if Act.RESUME in undone else Where.HERE
    return _UNTOUCHED[phase]


def what_to_type(where: Where, record: Record, base: Path, name: str = "") -> str:
    """Return the lines that tell the operator what to type, "" if there is nothing to do.

    base: the state directory.  name: the guest's name for the lines; "" for the stream id.
    """
    name = name or record.id
    match where:
        case Where.STANDS:
            # A failed write may have left the record at GO, which --resume alone refuses.
            verb = "--resume --in-doubt" if record.phase == GO else "--resume"
            return f"let it run on: bhysend {verb} {name}"
        case Where.HELD:
            return (
                f"if it runs at the destination: bhysend --discard {name}\n"
                f"if it surely does not: bhysend --resume {name}"
            )
        case Where.LEFT:
            return f"end what is left here: bhysend --discard {name}"
        case Where.DOUBT:
            return in_doubt(record, base)
    return ""


class Unfinished(NamedTuple):
    """A guest on which an act has failed.  text: what follows "guest web1: ".  hint: its cure."""

    where: Where
    text: str
    hint: str


def unfinished(
    record: Record,
    acts: Sequence[Act],
    undone: Sequence[Act],
    error: BhyError,
    base: Path,
    host: str = "",
) -> Unfinished:
    """Return what to say of a guest on which an act has failed.

    record: as it is on disk.  acts, undone: as outcome() takes them.  error: what the
    act raised.  base: the state directory.  host: the destination's name, if the record
    may not have it.
    """
    where, host = outcome(record.phase, acts, undone), record.there or host
    match where:
        case Where.LEFT:
            text = f"it runs on {host}, and cannot be ended here: {error}"
            return Unfinished(where, text, what_to_type(where, record, base))
        case Where.THERE:
            text = f"it runs on {host}, and is gone here; its record stays: {error}"
            return Unfinished(where, text, what_to_type(Where.LEFT, record, base))
        case Where.HERE:
            text = f"it runs here; its record stays: {error}"
        case _:
            text = f"it stands paused here, and cannot be resumed: {error}"
    return Unfinished(where, text, what_to_type(Where.STANDS, record, base))


def in_doubt(record: Record, base: Path) -> str:
    """Return the lines that lead out of doubt, with commands that can be typed as they are."""
    host = record.there
    words = record.ask or ["ssh", host, "bhyrecv"]
    is_ssh = any(os.path.basename(word) == "ssh" for word in words[:-1])
    remote: list[str] = []
    if record.directory != str(default_directory()):
        name = f"BHYSEND_STATE_DIR={record.directory}"
        # ssh(1) passes its words to a shell at the destination.
        remote = ["env", shlex.quote(name) if is_ssh else name]
    at = len(words) - 1 if is_ssh else 0
    there = shlex.join([*words[:at], *remote, *words[at:]])
    here = ""
    if "BHYSEND_STATE_DIR" in os.environ:
        here = f"env {shlex.quote(f'BHYSEND_STATE_DIR={base}')} "
    return (
        f"it stands paused here until {host} has answered; ask it:\n"
        f"  {there} -q {record.id} | {here}bhysend -A\n"
        f"if {host} is lost, and the guest surely does not run there:\n"
        f"  {here}bhysend --resume --in-doubt {record.id}"
    )

"""Planted faults: wrong rows, wrong orders of acts, and wrong rules.

Each of MUTANTS names the invariant of search.py that it breaks.  A fault that the tables
have already, because somebody broke them (tests/planted), is no error here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from bhystream.guest import DEAD, GO, HELD, MOVED, PAUSED, STARTED
from bhystream.handover.handshake import (
    DESTINATION,
    QUERY,
    RECORD,
    SOURCE,
    Act,
    DestinationState,
    Event,
    SourceState,
)
from handshake_model.model import PLAIN_DESTINATION, Rules

SWEPT_RECORDS = Rules().swept
BURY = DESTINATION[DestinationState.READY, Event.FAILURE]
TAKE_BACK = SOURCE[SourceState.COMMITTED, Event.FAILED]

K = TypeVar("K")
V = TypeVar("V")


def altered(table: Mapping[K, V], key: K, row: V) -> dict[K, V]:
    """Return a copy of a table, with another row for one of its keys."""
    assert key in table
    return {**table, key: row}


def source(at: SourceState, event: Event, to: SourceState, *acts: Act) -> Rules:
    """Return the rules with another row for bhysend."""
    return Rules(source=altered(SOURCE, (at, event), (to, acts)))


def destination(at: DestinationState, event: Event, to: DestinationState, *acts: Act) -> Rules:
    """Return the rules with another row for bhyrecv."""
    return Rules(destination=altered(DESTINATION, (at, event), (to, acts)))


def record(phase: str, event: Event, *acts: Act) -> Rules:
    """Return the rules with another row, or one more, for a party that acts on the record."""
    return Rules(record={**RECORD, (phase, event): acts})


def query(phase: str | None, word: str, *acts: Act) -> Rules:
    """Return the rules with another row for `bhyrecv -q`."""
    return Rules(query=altered(QUERY, phase, (acts, word)))


def one_way(copied: Event) -> Rules:
    """Return the rules of a form without a way back."""
    return Rules(copied=copied, destination=PLAIN_DESTINATION)


MUTANTS = {
    "GO is written before it is recorded": (
        "I1",
        source(
            SourceState.OFFERED, Event.READY, SourceState.COMMITTED, Act.WRITE_GO, Act.RECORD_GO
        ),
    ),
    "GO is not recorded": (
        "I1",
        source(SourceState.OFFERED, Event.READY, SourceState.COMMITTED, Act.WRITE_GO),
    ),
    "what was recorded for nothing stays in doubt": (
        "I4",
        source(SourceState.COMMITTED, Event.UNSENT, SourceState.DOUBT),
    ),
    "a limit after GO resumes": (
        "I1",
        source(SourceState.COMMITTED, Event.DOUBT, *TAKE_BACK[:1], *TAKE_BACK[1]),
    ),
    "a limit after READY goes on": (
        "I5",
        source(
            SourceState.OFFERED,
            Event.FAILURE,
            SourceState.RUNS_THERE,
            Act.RECORD_MOVED,
            Act.DISCARD,
            Act.FORGET,
        ),
    ),
    "the guest is paused before it is recorded": (
        "I3",
        source(SourceState.RUNS, Event.PAUSE, SourceState.PAUSED, Act.PAUSE, Act.RECORD_PAUSED),
    ),
    "the guest is throttled before it is recorded": (
        "I3",
        source(SourceState.RUNS, Event.THROTTLE, SourceState.THROTTLED),
    ),
    "a throttled guest is forgotten": (
        "I3",
        source(SourceState.THROTTLED, Event.FAILURE, SourceState.RUNS_HERE, Act.FORGET),
    ),
    "the record is removed before the guest is resumed": (
        "I3",
        source(SourceState.PAUSED, Event.FAILURE, SourceState.RUNS_HERE, Act.FORGET, Act.RESUME),
    ),
    "the record is removed before the guest is ended": (
        "I3",
        source(
            SourceState.COMMITTED,
            Event.RUNNING,
            SourceState.RUNS_THERE,
            Act.RECORD_MOVED,
            Act.FORGET,
            Act.DISCARD,
        ),
    ),
    "READY is said before it is recorded": (
        "I6",
        destination(
            DestinationState.BUILDING,
            Event.ENDED,
            DestinationState.READY,
            Act.SAY_READY,
            Act.RECORD_READY,
        ),
    ),
    "READY is not said": (
        "I7",
        destination(
            DestinationState.BUILDING, Event.ENDED, DestinationState.READY, Act.RECORD_READY
        ),
    ),
    "the guest is let run on, to be powered off": (
        "I1",
        source(
            *(SourceState.COMMITTED, Event.RUNNING, SourceState.RUNS_THERE),
            *(Act.RECORD_MOVED, Act.RESUME, Act.DISCARD, Act.FORGET),
        ),
    ),
    "the keeper lets it run on, to be powered off": (
        "I1",
        record(MOVED, Event.ALONE, Act.RESUME, Act.DISCARD, Act.FORGET),
    ),
    "what a killed bhyrecv has left stays": ("I6", Rules(swept=frozenset())),
    "what was started is removed as if it had been left": (
        "I8",
        Rules(swept=SWEPT_RECORDS | {STARTED}),
    ),
    "the copy is released before it is recorded": (
        "I1",
        destination(
            DestinationState.READY,
            Event.GO,
            DestinationState.STARTING,
            Act.START,
            Act.RECORD_STARTED,
        ),
    ),
    "the start is not recorded": (
        "I1",
        destination(DestinationState.READY, Event.GO, DestinationState.STARTING, Act.START),
    ),
    "STARTED is recorded over DEAD": ("I1", Rules(recheck=False)),
    "RUNNING is said before the copy runs": (
        "I5",
        destination(
            *(DestinationState.READY, Event.GO, DestinationState.STARTING),
            *(Act.RECORD_STARTED, Act.SAY_RUNNING, Act.START),
        ),
    ),
    "a copy that ran is torn down": (
        "I2",
        destination(
            *(DestinationState.STARTING, Event.STARTED, DestinationState.NOTHING),
            *(Act.TEAR_DOWN, Act.RECORD_DEAD, Act.SAY_FAILED),
        ),
    ),
    "the keeper resumes after GO": ("I1", record(GO, Event.ALONE, *TAKE_BACK[1])),
    "the keeper leaves a paused guest": ("I4", record(PAUSED, Event.ALONE)),
    "the keeper leaves a guest that has moved": ("I4", record(MOVED, Event.ALONE)),
    "FAILED does not end a doubt": ("I6", record(GO, Event.FAILED)),
    "RUNNING does not end a doubt": ("I6", record(GO, Event.RUNNING)),
    "-q says FAILED of what was started": ("I1", query(STARTED, "FAILED")),
    "-q says FAILED of what it never heard of": ("I1", query(None, "FAILED")),
    "-q does not know the dead": ("I6", query(DEAD, "UNKNOWN")),
    "plain: END is written before it is recorded": (
        "I1",
        Rules(
            copied=Event.COPIED_PLAIN,
            destination=PLAIN_DESTINATION,
            source=altered(
                SOURCE,
                (SourceState.PAUSED, Event.COPIED_PLAIN),
                (SourceState.HELD, (Act.WRITE_END, Act.RECORD_HELD)),
            ),
        ),
    ),
    "plain: the copy is released before it is recorded": (
        "I8",
        Rules(
            copied=Event.COPIED_PLAIN,
            destination=altered(
                PLAIN_DESTINATION,
                (DestinationState.BUILDING, Event.ENDED),
                (DestinationState.STARTING, (Act.START, Act.RECORD_STARTED)),
            ),
        ),
    ),
    "plain: the keeper resumes a held guest": (
        "I1",
        Rules(
            copied=Event.COPIED_PLAIN,
            destination=PLAIN_DESTINATION,
            record={**RECORD, (HELD, Event.ALONE): TAKE_BACK[1]},
        ),
    ),
}

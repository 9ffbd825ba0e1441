"""The handshake as data: what each party does, for each thing that can happen.

Four parties act on one move.  bhysend and bhyrecv have a state in memory and
a durable record; the keeper acts on the source's record, and so does
`bhysend -A` if bhysend is gone; `bhyrecv -q` acts on the destination's.

    source record            destination record
    -------------            ------------------
    none     guest runs      none     not ready, or not known
    PAUSED   GO is not out   READY    a GO with this READY's nonce may start it
    GO       GO may be out   STARTED  may have run
    MOVED    runs at dest.   DEAD     never ran, and never will
    HELD     END may be out  LOADED   `bhyrecv -u`: the operator decides
             (plain form)

Each table maps (state, event) to (next state, acts).  The acts are done in
order, and a party may die between any two.  So each order is chosen for what
the next party finds: an act that may let a guest run is recorded before it is
done, never after.  A record is written durably, or not at all.

Why this is safe.  The destination starts the guest only from READY, by a GO that
has the nonce of this very READY, and records STARTED first; the source writes
GO only after recording GO, and from then on resumes the guest only on a FAILED.
The destination says FAILED only of a guest that never ran, and only after it
has made a start impossible: DEAD is recorded, and READY -> STARTED is refused.
The two changes of the destination's record, READY -> STARTED and READY ->
DEAD, exclude each other by a lock.  An answer counts only if it names this
stream, and comes from the host and state directory that said READY.

Why one copy always survives.  A paused guest is a process of the hypervisor,
which stays whichever of our processes dies.  Before GO is recorded, bhysend or
the keeper resumes the guest however bhysend ends, and takes back a pause that
was asked for and has not come about.  After that the guest stands paused and
recorded until an answer or the operator decides.  A guest that is to be ended is
ended while paused, and never runs first.  If somebody kills the hypervisor of a
guest, the guest has ended; nothing here mends that, or makes a second copy.

What others may do to the guest.  Somebody may tell the hypervisor to let the
paused guest run.  So bhysend asks the hypervisor at the last moment, before END
in the plain form and before GO in the answered one; if the guest is not paused
any more, this is a FAILURE.  Whoever lets it run after that makes two copies.

The destination's hypervisor may have been started long before END.  It holds
the guest, and outlives its bhyrecv, but only bhyrecv lets the guest run (START),
after recording STARTED.  So a guest that a killed bhyrecv has left in READY never
runs: the next bhyrecv on that host, or `bhyrecv -q`, records DEAD and ends it.
If the record says STARTED, only -q ends the guest, and only if it finds that the
hypervisor still waits for its release, which nobody is left to give; -q records
DEAD first.

tests/handover/test_handshake.py searches everything that these parties can do
together, with kills, cuts, delays and replays, and shows that the protocol goes
wrong without the nonce, the tombstone (DEAD), the keeper, the stream id, the
rule for FAILED, the difference between UNKNOWN and FAILED, the question to the
source's hypervisor, the withdrawal of a pause that was asked for, or the rule
that only bhyrecv lets a hypervisor go that was started early.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Generic, TypeVar

from bhystream.guest import DEAD, GO, LOADED, MOVED, PAUSED, READY, STARTED

# How long each side waits, by its monotonic clock.  The source waits longer for
# the answer to GO than the destination waits for GO, so that FAILED can still come.
ACCEPT_SECONDS = 60
READY_SECONDS = 60
GO_SECONDS = 60
ANSWER_SECONDS = 90


class Act(Enum):
    """One thing that a party does."""

    RECORD_PAUSED = "record PAUSED"
    RECORD_HELD = "record HELD"
    RECORD_GO = "record GO"
    RECORD_MOVED = "record MOVED"
    RECORD_READY = "record READY"
    RECORD_STARTED = "record STARTED, unless the record is not READY any more"
    RECORD_DEAD = "record DEAD"
    FORGET = "remove the record"
    PAUSE = "pause the guest"
    RESUME = "let the guest run on"
    DISCARD = "end the guest"
    START = "let the loaded guest run"
    TEAR_DOWN = "end the guest that was being built"
    WRITE_END = "write END"
    WRITE_GO = "write GO with the nonce of READY"
    SAY_READY = "answer READY with a new nonce"
    SAY_RUNNING = "answer RUNNING"
    SAY_FAILED = "answer FAILED"
    SAY_RAN = "answer RAN"


class Event(Enum):
    """One thing that happens to a party."""

    THROTTLE = "the guest changes too fast, and --throttle lets bhysend hold its vCPUs back"
    PAUSE = "the rounds are over"
    COPIED = "the last pages, the state and the -p command are done (answered form)"
    COPIED_PLAIN = "the same, in the plain form"
    COPIED_KEPT = "the last pages and the -p command are done, in the kept form"
    FAILURE = "anything that went wrong, a limit, an interrupt, an answer that is not due"
    READY = "the answer READY"
    RUNNING = "the answer RUNNING"
    FAILED = "the answer FAILED"
    DOUBT = "the answer RAN, no more answers, or the limit"
    UNSENT = "END or GO was recorded, and could not be written whole"
    ENDED = "END has verified, and the guest is loaded"
    GO = "GO, with our nonce"
    STARTED = "it runs"
    NEVER_RAN = "it could not be started, and its vCPUs never ran"
    MAY_HAVE_RAN = "whether it was started is not known"
    ALONE = "bhysend is gone, or has nothing to add"


class SourceState(Enum):
    """Where bhysend stands, by what it means for the guest."""

    RUNS = "the guest runs"
    THROTTLED = "the guest runs, but may stand at any moment: to be let run on any failure"
    PAUSED = "paused, to be resumed on any failure"
    OFFERED = "END is out, which starts nothing by itself"
    COMMITTED = "GO may be out: paused, until an answer"
    HELD = "plain form: END may be out: paused, for the operator to decide"
    RUNS_HERE = "over: the guest runs here"
    RUNS_THERE = "over: the guest runs at the destination"
    DOUBT = "over: the operator has to find out"


class DestinationState(Enum):
    """Where bhyrecv stands."""

    BUILDING = "nothing of the guest can run yet"
    READY = "loaded, and waiting for GO"
    STARTING = "told to run"
    RUNS = "over: it runs here"
    NOTHING = "over: nothing was started"
    DOUBT = "over: it may have run"


_RESUME = (Act.RESUME, Act.FORGET)
_TAKE_BACK = (Act.RECORD_PAUSED, Act.RESUME, Act.FORGET)
_END_HERE = (Act.RECORD_MOVED, Act.DISCARD, Act.FORGET)
_BURY = (Act.RECORD_DEAD, Act.TEAR_DOWN, Act.SAY_FAILED)

SOURCE: Mapping[tuple[SourceState, Event], tuple[SourceState, tuple[Act, ...]]] = {
    (SourceState.RUNS, Event.PAUSE): (SourceState.PAUSED, (Act.RECORD_PAUSED, Act.PAUSE)),
    (SourceState.RUNS, Event.FAILURE): (SourceState.RUNS_HERE, ()),
    (SourceState.RUNS, Event.THROTTLE): (SourceState.THROTTLED, (Act.RECORD_PAUSED,)),
    (SourceState.THROTTLED, Event.PAUSE): (SourceState.PAUSED, (Act.RECORD_PAUSED, Act.PAUSE)),
    (SourceState.THROTTLED, Event.FAILURE): (SourceState.RUNS_HERE, _RESUME),
    (SourceState.PAUSED, Event.COPIED): (SourceState.OFFERED, (Act.WRITE_END,)),
    (SourceState.PAUSED, Event.COPIED_PLAIN): (SourceState.HELD, (Act.RECORD_HELD, Act.WRITE_END)),
    (SourceState.PAUSED, Event.COPIED_KEPT): (SourceState.RUNS_HERE, _RESUME),
    (SourceState.PAUSED, Event.FAILURE): (SourceState.RUNS_HERE, _RESUME),
    (SourceState.HELD, Event.UNSENT): (SourceState.RUNS_HERE, _TAKE_BACK),
    (SourceState.OFFERED, Event.READY): (SourceState.COMMITTED, (Act.RECORD_GO, Act.WRITE_GO)),
    (SourceState.OFFERED, Event.FAILURE): (SourceState.RUNS_HERE, _RESUME),
    (SourceState.COMMITTED, Event.UNSENT): (SourceState.RUNS_HERE, _TAKE_BACK),
    (SourceState.COMMITTED, Event.FAILED): (SourceState.RUNS_HERE, _TAKE_BACK),
    (SourceState.COMMITTED, Event.RUNNING): (SourceState.RUNS_THERE, _END_HERE),
    (SourceState.COMMITTED, Event.DOUBT): (SourceState.DOUBT, ()),
}

DESTINATION: Mapping[tuple[DestinationState, Event], tuple[DestinationState, tuple[Act, ...]]] = {
    (DestinationState.BUILDING, Event.ENDED): (
        DestinationState.READY,
        (Act.RECORD_READY, Act.SAY_READY),
    ),
    (DestinationState.BUILDING, Event.FAILURE): (
        DestinationState.NOTHING,
        (Act.TEAR_DOWN, Act.SAY_FAILED),
    ),
    (DestinationState.READY, Event.GO): (
        DestinationState.STARTING,
        (Act.RECORD_STARTED, Act.START),
    ),
    (DestinationState.READY, Event.FAILURE): (DestinationState.NOTHING, _BURY),
    (DestinationState.STARTING, Event.STARTED): (DestinationState.RUNS, (Act.SAY_RUNNING,)),
    (DestinationState.STARTING, Event.NEVER_RAN): (DestinationState.NOTHING, _BURY),
    (DestinationState.STARTING, Event.MAY_HAVE_RAN): (DestinationState.DOUBT, (Act.SAY_RAN,)),
}

# What is done to the source's guest when bhysend is gone, by the guest's record:
# the keeper does it (on ALONE, and on an answer that still comes back in the
# command form), and `bhysend -A`.  A guest for which there is no entry is left as
# it stands: held, or in doubt.
RECORD: Mapping[tuple[str, Event], tuple[Act, ...]] = {
    (PAUSED, Event.ALONE): _RESUME,
    (PAUSED, Event.FAILED): _RESUME,
    (GO, Event.RUNNING): _END_HERE,
    (GO, Event.FAILED): _TAKE_BACK,
    (MOVED, Event.ALONE): (Act.DISCARD, Act.FORGET),
    (MOVED, Event.RUNNING): (Act.DISCARD, Act.FORGET),
}

# What `bhyrecv -q` does and answers, by the destination's record.  For STARTED
# -q answers RUNNING instead if it sees the guest running, and FAILED, after
# RECORD_DEAD, if it sees that bhyrecv was killed before START, and that nobody
# can start the guest any more.
QUERY: Mapping[str | None, tuple[tuple[Act, ...], str]] = {
    None: ((), "UNKNOWN"),
    READY: ((Act.RECORD_DEAD,), "FAILED"),
    DEAD: ((), "FAILED"),
    STARTED: ((), "RAN"),
    LOADED: ((), "RAN"),
}

S = TypeVar("S", SourceState, DestinationState)


class Machine(Generic[S]):
    """One party: its state, and the table that moves it.

    at: the state.  The state changes before the acts are done, so that if an act
    fails, the state says what may have happened.  undone: the acts of the last
    event that were not done, the failed act first.
    """

    def __init__(
        self,
        table: Mapping[tuple[S, Event], tuple[S, tuple[Act, ...]]],
        at: S,
        do: Callable[[Act], None],
    ) -> None:
        """do: does one act; on() passes on its exceptions."""
        self._table: Mapping[tuple[S, Event], tuple[S, tuple[Act, ...]]] = table
        self._do = do
        self.at: S = at
        self.undone: tuple[Act, ...] = ()

    def expects(self, event: Event) -> bool:
        """Say whether the event has a meaning now."""
        return (self.at, event) in self._table

    def on(self, event: Event) -> None:
        """Let an event happen.  Raises KeyError if it is not expected; what `do` raises."""
        self.at, self.undone = self._table[self.at, event]
        while self.undone:
            self._do(self.undone[0])
            self.undone = self.undone[1:]

"""The handshake as data: what each party does, for each thing that can happen.

Four parties act on one move.  bhysend and bhyrecv have a state in memory and
a durable record; the keeper, and `bhysend -A` where bhysend is gone, act on
the source's record; `bhyrecv -q` acts on the destination's.

    source record            destination record
    -------------            ------------------
    none     it runs         none     not ready, or never heard of
    PAUSED   GO is not out   READY    may be started, by a GO with our nonce
    GO       GO may be out   STARTED  may have run
    MOVED    it runs there   DEAD     never ran, and never will
    HELD     END may be out  LOADED   `bhyrecv -u`: the operator's
             (plain form)

Each table maps (state, event) to (next state, acts).  The acts are done in
order, and a party may die between any two, so each order is chosen for what
is found afterwards: what may have happened is recorded before it is done,
never after.  A record is written durably, or not at all.

Why this is safe, in four sentences.  The destination runs only from READY, by
a GO that has the nonce of this very READY, and records STARTED first; the
source writes GO only after recording GO, and from then on resumes only on a
FAILED.  FAILED is said only of a guest that never ran, after what would let it
run was made impossible: DEAD is recorded, and READY -> STARTED is refused.
The two changes of the destination's record, READY -> STARTED and READY ->
DEAD, exclude each other by a lock.  An answer counts only if it names this
stream, and comes from the host and state directory that said READY.

Why somebody always has the guest: a paused guest is a process of its
hypervisor's, which holds it whoever of ours dies.  Before GO is recorded every
end of bhysend resumes it, its own or the keeper's, and takes back a pause that
is asked for and has not come about; afterwards it stands paused and recorded,
until an answer or the operator decides.  It is ended as it stands, and never
let run first.  Who kills its hypervisor has ended it, and nothing here mends
that; nor does it ever make a second copy.

What others may do to it: somebody else may tell the hypervisor to let the
paused guest run.  So the hypervisor is asked at the last moment, before END in
the plain form and before GO in the answered one, and a guest that does not
stand any more is a FAILURE.  Who lets it run after that makes two of one.

The destination's hypervisor may have been started long before END.  It holds
the guest, and outlives its bhyrecv, but only bhyrecv lets it run (START), after
recording STARTED.  So what a killed bhyrecv leaves never runs: the next one on
that host removes it, and `bhyrecv -q`, where READY is recorded after recording
DEAD.  Where STARTED is, only -q does, and only of a hypervisor that it finds
before what lets it go, which nobody is left to give: DEAD is recorded first.

tests/handover/test_handshake.py searches everything that this composition can do, with
kills, cuts, delays and replays, and shows that it goes wrong without the
nonce, the tombstone (DEAD), the keeper, the stream id, the rule for FAILED,
the difference between UNKNOWN and FAILED, the question, or the two holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Generic, TypeVar

from bhystream.guest import DEAD, GO, LOADED, MOVED, PAUSED, READY, STARTED

# How long each waits, by its monotonic clock.  The source waits longer for the
# answer to GO than the destination takes one, so that FAILED can still come.
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

    PAUSE = "the rounds are over"
    COPIED = "the last pages, the state and the -p command are done (answered form)"
    COPIED_PLAIN = "the same, in the plain form"
    COPIED_KEPT = "the last pages and the -p command are done, in the kept form"
    FAILURE = "anything that went wrong, a limit, an interrupt, an answer that is not due"
    READY = "the answer READY"
    RUNNING = "the answer RUNNING"
    FAILED = "the answer FAILED"
    DOUBT = "the answer RAN, no more answers, or the limit"
    UNSENT = "what was recorded could not be written whole"
    ENDED = "END has verified, and the guest is loaded"
    GO = "GO, with our nonce"
    STARTED = "it runs"
    NEVER_RAN = "it could not be started, and its vCPUs never ran"
    MAY_HAVE_RAN = "whether it was started is not known"
    ALONE = "bhysend is gone, or has nothing to add"


class At(Enum):
    """Where bhysend stands, by what it means for the guest."""

    RUNS = "the guest runs"
    PAUSED = "paused, to be resumed on any failure"
    OFFERED = "END is out, which starts nothing by itself"
    COMMITTED = "GO may be out: paused, until an answer"
    HELD = "plain form: END may be out: paused, for the operator to decide"
    RUNS_ON = "over: the guest runs here"
    GONE = "over: the guest runs at the destination"
    DOUBT = "over: the operator has to find out"


class There(Enum):
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

SOURCE: Mapping[tuple[At, Event], tuple[At, tuple[Act, ...]]] = {
    (At.RUNS, Event.PAUSE): (At.PAUSED, (Act.RECORD_PAUSED, Act.PAUSE)),
    (At.RUNS, Event.FAILURE): (At.RUNS_ON, ()),
    (At.PAUSED, Event.COPIED): (At.OFFERED, (Act.WRITE_END,)),
    (At.PAUSED, Event.COPIED_PLAIN): (At.HELD, (Act.RECORD_HELD, Act.WRITE_END)),
    (At.PAUSED, Event.COPIED_KEPT): (At.RUNS_ON, _RESUME),
    (At.PAUSED, Event.FAILURE): (At.RUNS_ON, _RESUME),
    (At.HELD, Event.UNSENT): (At.RUNS_ON, _TAKE_BACK),
    (At.OFFERED, Event.READY): (At.COMMITTED, (Act.RECORD_GO, Act.WRITE_GO)),
    (At.OFFERED, Event.FAILURE): (At.RUNS_ON, _RESUME),
    (At.COMMITTED, Event.UNSENT): (At.RUNS_ON, _TAKE_BACK),
    (At.COMMITTED, Event.FAILED): (At.RUNS_ON, _TAKE_BACK),
    (At.COMMITTED, Event.RUNNING): (At.GONE, _END_HERE),
    (At.COMMITTED, Event.DOUBT): (At.DOUBT, ()),
}

DESTINATION: Mapping[tuple[There, Event], tuple[There, tuple[Act, ...]]] = {
    (There.BUILDING, Event.ENDED): (There.READY, (Act.RECORD_READY, Act.SAY_READY)),
    (There.BUILDING, Event.FAILURE): (There.NOTHING, (Act.TEAR_DOWN, Act.SAY_FAILED)),
    (There.READY, Event.GO): (There.STARTING, (Act.RECORD_STARTED, Act.START)),
    (There.READY, Event.FAILURE): (There.NOTHING, _BURY),
    (There.STARTING, Event.STARTED): (There.RUNS, (Act.SAY_RUNNING,)),
    (There.STARTING, Event.NEVER_RAN): (There.NOTHING, _BURY),
    (There.STARTING, Event.MAY_HAVE_RAN): (There.DOUBT, (Act.SAY_RAN,)),
}

# What is done to the source's guest when bhysend is gone, by its record: by the
# keeper (ALONE, and what still comes back in the command form), and by
# `bhysend -A`.  What is not here is left as it stands: held, or in doubt.
RECORD: Mapping[tuple[str, Event], tuple[Act, ...]] = {
    (PAUSED, Event.ALONE): _RESUME,
    (PAUSED, Event.FAILED): _RESUME,
    (GO, Event.RUNNING): _END_HERE,
    (GO, Event.FAILED): _TAKE_BACK,
    (MOVED, Event.ALONE): (Act.DISCARD, Act.FORGET),
    (MOVED, Event.RUNNING): (Act.DISCARD, Act.FORGET),
}

# What `bhyrecv -q` does and answers, by the destination's record.  For STARTED
# it answers RUNNING instead if it sees the guest running, and FAILED, after
# RECORD_DEAD, if it sees that bhyrecv was killed before START, and that nobody
# can do it any more.
QUERY: Mapping[str | None, tuple[tuple[Act, ...], str]] = {
    None: ((), "UNKNOWN"),
    READY: ((Act.RECORD_DEAD,), "FAILED"),
    DEAD: ((), "FAILED"),
    STARTED: ((), "RAN"),
    LOADED: ((), "RAN"),
}

S = TypeVar("S", At, There)


class Machine(Generic[S]):
    """One party: its state, and the table that moves it.

    at: the state.  It changes before the acts are done, so that where an act
    fails, the state says what may have happened.  undone: the acts of the last
    event that were not done, the failed one first.
    """

    def __init__(
        self,
        table: Mapping[tuple[S, Event], tuple[S, tuple[Act, ...]]],
        at: S,
        do: Callable[[Act], None],
    ) -> None:
        """do: does one act; what it raises comes out of on()."""
        self._table: Mapping[tuple[S, Event], tuple[S, tuple[Act, ...]]] = table
        self._do = do
        self.at: S = at
        self.undone: tuple[Act, ...] = ()

    def expects(self, event: Event) -> bool:
        """Say whether the event has a meaning now."""
        return (self.at, event) in self._table

    def on(self, event: Event) -> None:
        """Let an event happen.  Raises KeyError for one that is not expected."""
        self.at, self.undone = self._table[self.at, event]
        while self.undone:
            self._do(self.undone[0])
            self.undone = self.undone[1:]

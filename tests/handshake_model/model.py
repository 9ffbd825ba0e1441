"""The world of one move, as a finite model over the tables of handshake.py.

    host S (the source)                                  host D (the destination)
    -------------------                                  ------------------------
    bhysend -------- forward: END, GO ------------------>  bhyrecv
       |  record, guest      '-> tee: replayed on D, or on host E |  record, copy
    bhysend -A <---- back: READY RUNNING FAILED RAN -----------'
    the keeper

A World is one moment: immutable, hashable, and complete.  steps.py has the steps
out of a World.  handshake.Machine and the tables decide what bhysend and bhyrecv
do, and each act is a step: between any two acts anything else may happen.  There
are three kinds of steps:

    FREE     a program goes on.  If no FREE step is left, all programs have ended.
    CHANCE   the operator asks, or hands on an answer; a guest that was told to
             run begins to run; a hypervisor is started early, or a hypervisor
             that is left over is removed.
    FAULT    a program is killed, an act fails, a limit strikes, a channel is
             cut, a start goes wrong, a stream is replayed, a guest dies, or
             somebody else lets a guest run.

Nothing bounds how many faults there are, how long anything takes, or how often
the operator asks; one bhyrecv reads the stream itself, and one at a time reads a
recorded stream.  These points are easily overlooked:

- The guest's lock.  bhysend has it, and the keeper inherits it; then a party that
  acts on the record (the keeper, the third stage, the operator's `-A`) takes the
  lock, reads the record, and does the record's acts: that is `hand`.
- The third stage hands answers to bhysend while bhysend lives, and afterwards
  acts by the last final answer.  In the command form the keeper does the same
  steps.  A `-A` that believes no answer does what the keeper does.
- When the next program acts, the last act of a killed program has happened, or
  never will: the backends have to ensure this.
- A pause is ASKED for before the guest STANDS, and comes about whether the
  program that asked still lives or not.  A resume also takes back a request.
- If somebody kills the hypervisor of a paused guest, the guest has ended: LOST is
  no fault of our programs, but even then no second copy may run.
- Somebody else may let a paused guest run.  bhysend asks the hypervisor before an
  act that may start the destination's copy: before END in the plain form, before
  GO in the answered form.  A guest that is let run later (`late`) has two copies,
  and nothing can help.
- A BUILT copy is a process that its hypervisor holds, from before the first page
  on, or from END on.  The copy outlives its bhyrecv, but only a bhyrecv can let it
  run; the next bhyrecv, or -q, removes it.  A copy that was TOLD to run may begin
  at any time, even after its bhyrecv has died, and nobody may remove it.
- E is any other host: when a replay on E is over, the next replay is on another
  host.  Acts of a replay that nobody can see are done at once.
- The operator asks (`bhyrecv -q`) at any time while there is a record here, also
  on the wrong host, and about an older stream of this guest, which FAILED.  The
  operator hands an answer to `-A` at any later time, or twice, but resumes nothing
  without an answer.
- The plain form has no way back: the operator acts by bhyrecv's exit status.
  The kept form has no END that starts anything.

Rules holds the tables, and the rules that do not fit in tables; a planted fault
alters one of them.  The invariants are in search.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from bhystream.guest import DEAD, GO, HELD, MOVED, PAUSED, READY, STARTED
from bhystream.handover import handshake
from bhystream.handover.handshake import Act, DestinationState, Event, SourceState

# A copy of the guest.  BUILT: held, and only a bhyrecv can let it run.  TOLD: may run
# now or later.  RAN: ran, and has ended.  SWEPT: was removed, but was not BUILT.
NONE, BUILT, TOLD, RUNS, RAN, SWEPT = "none", "built", "told", "runs", "ran", "swept"
# The source's guest: RUNS, or one of these.  ASKED: runs, and will stand.  OVER: one of
# our programs has ended it.  LOST: its hypervisor was killed.
ASKED, STANDS, OVER, LOST = "asked", "stands", "over", "lost"

# The states of the keeper, and of a party that acts in bhysend's place.
WAITS, ENDED, KILLED = "waits", "ended", "killed"

SOURCE_RECORDS = {
    Act.RECORD_PAUSED: PAUSED,
    Act.RECORD_HELD: HELD,
    Act.RECORD_GO: GO,
    Act.RECORD_MOVED: MOVED,
}
DESTINATION_RECORDS = {
    Act.RECORD_READY: READY,
    Act.RECORD_STARTED: STARTED,
    Act.RECORD_DEAD: DEAD,
}
WRITES = {Act.WRITE_END: "END", Act.WRITE_GO: "GO"}
ANSWERS = {
    Act.SAY_READY: "READY",
    Act.SAY_RUNNING: "RUNNING",
    Act.SAY_FAILED: "FAILED",
    Act.SAY_RAN: "RAN",
}
HEARD = {
    "READY": Event.READY,
    "RUNNING": Event.RUNNING,
    "FAILED": Event.FAILED,
    "RAN": Event.DOUBT,
}
FINALS = (SourceState.RUNS_HERE, SourceState.RUNS_THERE, SourceState.DOUBT, SourceState.HELD)
FINALS_THERE = (DestinationState.RUNS, DestinationState.NOTHING, DestinationState.DOUBT)

SourceTable = Mapping[tuple[SourceState, Event], tuple[SourceState, tuple[Act, ...]]]
DestinationTable = Mapping[tuple[DestinationState, Event], tuple[DestinationState, tuple[Act, ...]]]
RecordTable = Mapping[tuple[str, Event], tuple[Act, ...]]
QueryTable = Mapping[str | None, tuple[tuple[Act, ...], str]]

# handshake.py has no table for a bhyrecv of the plain form, which starts on END.
PLAIN_DESTINATION: DestinationTable = {
    (DestinationState.BUILDING, Event.ENDED): (
        DestinationState.STARTING,
        (Act.RECORD_STARTED, Act.START),
    ),
    (DestinationState.BUILDING, Event.FAILURE): (DestinationState.NOTHING, (Act.TEAR_DOWN,)),
    (DestinationState.STARTING, Event.STARTED): (DestinationState.RUNS, ()),
    (DestinationState.STARTING, Event.NEVER_RAN): (
        DestinationState.NOTHING,
        (Act.RECORD_DEAD, Act.TEAR_DOWN),
    ),
    (DestinationState.STARTING, Event.MAY_HAVE_RAN): (DestinationState.DOUBT, ()),
}


@dataclass(frozen=True)
class Rules:
    """The tables, and the rules beside them.

    nonce: GO counts only for the bhyrecv whose nonce it has.
    keeper: there is a keeper.
    naming: an answer counts only if it names this stream.
    same_host: an answer counts only if it comes from the host that said READY.
    unknown_is_failed: UNKNOWN is taken for FAILED, which is a mistake.
    recheck: READY -> STARTED is refused if the record is not READY any more.
    asks: bhysend asks whether the guest still stands before the copy may start.
    takes_back: a resume in bhysend's place takes back a request for a pause.
    is_held: a hypervisor that is started early cannot run the guest by itself.
    swept: the phases of a record at which the rest of a dead bhyrecv is removed.
    meddling: somebody else may let a paused guest run (random schedules).
    refuse: no move begins while there is a record of this guest (random schedules).
    copied: the event after the last pages, by which the forms differ.
    used: collects the rows that are used and the ends that are reached.
    """

    source: SourceTable = field(default_factory=lambda: handshake.SOURCE)
    destination: DestinationTable = field(default_factory=lambda: handshake.DESTINATION)
    record: RecordTable = field(default_factory=lambda: handshake.RECORD)
    query: QueryTable = field(default_factory=lambda: handshake.QUERY)
    nonce: bool = True
    keeper: bool = True
    naming: bool = True
    same_host: bool = True
    unknown_is_failed: bool = False
    recheck: bool = True
    asks: bool = True
    takes_back: bool = True
    is_held: bool = True
    swept: frozenset[str | None] = frozenset((None, READY, DEAD))
    meddling: bool = True
    refuse: bool = True
    copied: Event = Event.COPIED
    used: set[object] = field(default_factory=set, compare=False)

    @property
    def plain(self) -> bool:
        """Say whether there is no way back, as in the plain form and the kept form."""
        return self.copied is not Event.COPIED


class Sender(NamedTuple):
    """bhysend.  at: None when bhysend is gone.  todo: the acts left of the present row."""

    at: SourceState | None = SourceState.RUNS
    todo: tuple[Act, ...] = ()


class Receiver(NamedTuple):
    """A bhyrecv, and its copy.

    at: None when bhyrecv is gone.  todo: the acts left, then the event that they led to.
    """

    host: str = "D"
    at: DestinationState | None = DestinationState.BUILDING
    todo: tuple[Act | Event, ...] = ()
    copy: str = NONE


class World(NamedTuple):
    """One moment.

    keeper: KILLED also if a `-A` was killed in the middle of its acts.
    hand: the acts left to the party that acts on the record.
    disk_d, disk_e: the record of this stream on hosts D and E.
    forward_ends, back_ends: nothing follows what is on the way.
    tape: what tee has recorded.
    third: the third stage is alive.  seen: the last final answer that it has read.
    answers: the answers that the operator got, and that `-A` believes.
    status: how bhyrecv ended, in the forms in which the operator goes by it.
    late: somebody let the source's guest run after bhysend had asked for the last time.
    """

    sender: Sender = Sender()
    keeper: str = WAITS
    hand: tuple[Act, ...] = ()
    guest: str = RUNS
    record: str | None = None
    receiver: Receiver = Receiver()
    replay: Receiver | None = None
    disk_d: str | None = None
    disk_e: str | None = None
    forward: tuple[str, ...] = ()
    forward_ends: bool = False
    tape: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    back_ends: bool = False
    third: bool = True
    seen: str | None = None
    answers: frozenset[str] = frozenset()
    status: DestinationState | None = None
    late: bool = False


def lock_is_free(world: World) -> bool:
    """Say whether no program has the guest's lock."""
    return world.sender.at is None and world.keeper != WAITS and not world.hand


def disk(world: World, host: str) -> str | None:
    """Return the record of this stream on a host."""
    return world.disk_d if host == "D" else world.disk_e

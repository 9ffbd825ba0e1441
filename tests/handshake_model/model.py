"""The world of one move, as a finite model over the tables of handshake.py.

    host S (the source)                                  host D (the destination)
    -------------------                                  ------------------------
    bhysend -------- forward: END, GO ------------------>  bhyrecv
       |  record, guest      '-> tee: replayed on D, or on host E |  record, copy
    bhysend -A <---- back: READY RUNNING FAILED RAN -----------'
    the keeper

A World is one moment: immutable, hashable, and all that there is.  The steps
out of it are in steps.py.  What bhysend and bhyrecv do comes
out of handshake.Machine and the tables, and is done act by act: between any two
acts anything else may happen.  There are three kinds of steps:

    FREE     a program goes on.  Where there is none, all programs have ended.
    CHANCE   the operator asks, or hands on; a guest told to run begins to; a
             hypervisor is started early, or what is left of one is removed.
    FAULT    a program is killed, an act fails, a limit strikes, a channel is
             cut, a start goes wrong, a stream is replayed, a guest dies, or is
             let run by somebody else.

Nothing bounds how many faults there are, how long anything takes, or how often
the operator asks; one bhyrecv reads the stream itself, and one at a time a
recorded one.  Easily overlooked:

- The guest's lock.  bhysend has it, and the keeper inherits it; then whoever
  acts on the record (the keeper, the third stage, the operator's `-A`) takes
  it, reads the record, and does its acts: that is `hand`.
- The third stage hands answers to bhysend while it lives, and afterwards acts
  by the last final one.  In the command form that is the keeper: the same steps.
  Without an answer that it believes, a `-A` does what the keeper does.
- What a program did just before it was killed has happened, or never will,
  when the next one acts: that is what the backends have to see to.
- A pause is ASKED for before the guest STANDS, and comes about whether the one
  who asked still lives or not.  Whoever resumes takes back a request, too.
- Who kills the hypervisor of a paused guest has ended the guest: LOST is no
  fault of ours, but even then no second copy may run.
- Somebody else may let a paused guest run.  bhysend asks before what may start
  the destination's copy: before END in the plain form, before GO in the answered
  one.  Who does it later (`late`) has made two of one, and nothing can help.
- A BUILT copy is a process that its hypervisor holds, from before the first page
  on, or from END on.  It outlives its bhyrecv, but only a bhyrecv can let it run;
  the next bhyrecv, or -q, removes it.  One that was TOLD to run may begin at any
  time, also after its bhyrecv has died, and is nobody's to remove.
- E is any other host: where a replay on E is over, the next one is on another.
  What it does that nobody can see is done at once.
- The operator asks (`bhyrecv -q`) at any time while there is a record here, also
  on the wrong host, and about an older stream of this guest, which FAILED.  He
  hands an answer to `-A` at any later time, or twice.  By himself he resumes
  nothing.
- The plain form has no way back: the operator acts by bhyrecv's exit status.
  The kept form has no END that starts anything.

Rules holds the tables, and what cannot be said in tables; a planted fault
alters one of them.  The invariants are in search.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from bhystream.guest import DEAD, GO, HELD, MOVED, PAUSED, READY, STARTED
from bhystream.handover import handshake
from bhystream.handover.handshake import Act, At, Event, There

# A copy of the guest.  BUILT: held, and only a bhyrecv can let it run.  TOLD: it may
# run, now or later.  RAN: it ran, and is no more.  SWEPT: removed, but was not BUILT.
NONE, BUILT, TOLD, RUNS, RAN, SWEPT = "none", "built", "told", "runs", "ran", "swept"
# The source's guest: RUNS, or one of these.  ASKED: it runs, and will stand.  OVER:
# ended by one of ours.  LOST: its hypervisor was killed.
ASKED, STANDS, OVER, LOST = "asked", "stands", "over", "lost"

# The keeper, and whoever acts in bhysend's place.
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
FINALS = (At.RUNS_ON, At.GONE, At.DOUBT, At.HELD)
FINALS_THERE = (There.RUNS, There.NOTHING, There.DOUBT)

SourceTable = Mapping[tuple[At, Event], tuple[At, tuple[Act, ...]]]
DestinationTable = Mapping[tuple[There, Event], tuple[There, tuple[Act, ...]]]
RecordTable = Mapping[tuple[str, Event], tuple[Act, ...]]
QueryTable = Mapping[str | None, tuple[tuple[Act, ...], str]]

# handshake.py has no table for a bhyrecv of the plain form, which starts on END.
PLAIN_DESTINATION: DestinationTable = {
    (There.BUILDING, Event.ENDED): (There.STARTING, (Act.RECORD_STARTED, Act.START)),
    (There.BUILDING, Event.FAILURE): (There.NOTHING, (Act.TEAR_DOWN,)),
    (There.STARTING, Event.STARTED): (There.RUNS, ()),
    (There.STARTING, Event.NEVER_RAN): (There.NOTHING, (Act.RECORD_DEAD, Act.TEAR_DOWN)),
    (There.STARTING, Event.MAY_HAVE_RAN): (There.DOUBT, ()),
}


@dataclass(frozen=True)
class Rules:
    """The tables, and the rules beside them.

    nonce: GO counts only for the bhyrecv whose nonce it has.
    keeper: there is one.
    naming: an answer counts only if it names this stream.
    same_host: an answer counts only if it comes from where READY came from.
    unknown_is_failed: no rule, but a mistake.
    recheck: READY -> STARTED is refused if the record is not READY any more.
    asks: bhysend asks whether the guest still stands before it lets another run.
    takes_back: who resumes in bhysend's place takes back a request for a pause.
    is_held: the hypervisor that is started early cannot run the guest by itself.
    swept: what is left of a dead bhyrecv is removed where the record is one of these.
    meddling: somebody else may let a paused guest run (random schedules).
    refuse: no move begins while there is a record of this guest (random schedules).
    copied: what the last pages lead to, which is another thing in each form.
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
        """Say whether there is no way back: the plain form, and the kept one."""
        return self.copied is not Event.COPIED


class Sender(NamedTuple):
    """bhysend.  at: None when it is gone.  todo: what is left of the row it is in."""

    at: At | None = At.RUNS
    todo: tuple[Act, ...] = ()


class Receiver(NamedTuple):
    """A bhyrecv, and its copy.

    at: None when bhyrecv is gone.  todo: the acts left, then what came of them.
    """

    host: str = "D"
    at: There | None = There.BUILDING
    todo: tuple[Act | Event, ...] = ()
    copy: str = NONE


class World(NamedTuple):
    """One moment.

    keeper: KILLED also where a `-A` was killed in the middle of its acts.
    hand: the acts left to whoever acts on the record.
    disk_d, disk_e: the record of this stream on those hosts.
    forward_ends, back_ends: nothing comes after what is on the way.
    tape: what tee has recorded.
    third: the third stage is alive.  seen: the last final answer it has read.
    answers: what the operator was answered, of what `-A` believes.
    status: the end of bhyrecv, where the operator goes by it.
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
    status: There | None = None
    late: bool = False


def lock_is_free(world: World) -> bool:
    """Say whether nobody has the guest's lock."""
    return world.sender.at is None and world.keeper != WAITS and not world.hand


def disk(world: World, host: str) -> str | None:
    """Return the record of this stream on a host."""
    return world.disk_d if host == "D" else world.disk_e

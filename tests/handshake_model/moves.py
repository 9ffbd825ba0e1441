"""One move for random.py: its bhysend, keeper, third stage and bhyrecvs.

A Party is a handshake.Machine and the acts that are left of its present row:
Machine calls `do` for each act, and `do` only notes the act.  A later step() does
each act by itself, so that all others can come in between.

Every step() does one of the possible things, and returns whether there was one;
the dice of Shared decide what goes wrong.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from bhystream.guest import DEAD, PAUSED, READY
from bhystream.handover.handshake import Act, DestinationState, Event, Machine, SourceState
from handshake_model.model import (
    ANSWERS,
    ASKED,
    BUILT,
    DESTINATION_RECORDS,
    ENDED,
    FINALS,
    FINALS_THERE,
    HEARD,
    KILLED,
    LOST,
    NONE,
    OVER,
    RUNS,
    SOURCE_RECORDS,
    STANDS,
    SWEPT,
    TOLD,
    WAITS,
    Rules,
)

HOSTS = ("a", "b", "c")
FINAL_WORDS = ("RUNNING", "FAILED")
S = TypeVar("S", SourceState, DestinationState)


class Answer(NamedTuple):
    """An answer of a bhyrecv."""

    word: str
    stream: int
    host: str
    nonce: int = 0


@dataclass(eq=False)
class Copy:
    """One copy of the guest, from its building to its end."""

    host: str
    state: str = NONE
    has_run: bool = False

    def run(self) -> None:
        self.state, self.has_run = RUNS, True


class Party(Generic[S]):
    """A Machine, and the acts left of its row.  machine: None when the party is gone."""

    def __init__(self, table: Mapping[tuple[S, Event], tuple[S, tuple[Act, ...]]], at: S) -> None:
        self.todo: deque[Act] = deque()
        self.machine: Machine[S] | None = Machine(table, at, self.todo.append)

    def on(self, *events: Event) -> bool:
        """Let the first of these events happen that is expected; say whether one was."""
        self.todo.clear()
        for event in events:
            if self.machine is not None and self.machine.expects(event):
                self.machine.on(event)
                return True
        return False

    def end(self) -> None:
        self.machine = None
        self.todo.clear()

    @property
    def is_idle(self) -> bool:
        return self.machine is not None and not self.todo


class Shared:
    """What all moves share: the guest's copies, the disks, the operator's notes, the dice.

    sources, received: the records, by host and stream id.  heard: the answers
    that the operator can hand to `-A`.  ends: counts how programs ended.
    faults: the probability of a fault at each point where one is possible.
    """

    def __init__(self, rng: random.Random, rules: Rules, ends: Counter[object]) -> None:
        self.rng, self.rules, self.ends = rng, rules, ends
        self.faults = rng.choice((0.001, 0.003, 0.01, 0.03, 0.1))
        self.sources: dict[tuple[str, int], str] = {}
        self.received: dict[tuple[str, int], str] = {}
        self.heard: list[Answer] = []
        self.copies = [Copy("a", RUNS, True)]
        self.moves: list[Move] = []

    def fault(self) -> bool:
        return self.rng.random() < self.faults


class Reader(Party[DestinationState]):
    """A bhyrecv, which reads the stream itself, or replays the tape."""

    def __init__(self, move: Move, host: str, live: bool) -> None:
        super().__init__(move.shared.rules.destination, DestinationState.BUILDING)
        self.move, self.host, self.live = move, host, live
        move.sweep(host)
        self.copy = Copy(host)
        move.shared.copies.append(self.copy)
        if move.shared.rng.random() < 0.5:  # an early start
            self.copy.state = BUILT if move.rules.is_held else TOLD
        self.nonce = move.shared.rng.getrandbits(64)
        self.outcome: Event | None = None
        self.place = 0

    def step(self) -> bool:
        """Do one thing; return whether there was one."""
        shared = self.move.shared
        if self.copy.state == TOLD and shared.rng.random() < 0.2:
            self.copy.run()
            return True
        if self.machine is None:
            return False
        if shared.fault():
            self.end()
        elif self.todo:
            self.act(self.todo.popleft())
        elif self.outcome:
            event, self.outcome = self.outcome, None
            self.on(event)
        elif self.machine.at in FINALS_THERE:
            shared.ends[self.machine.at] += 1
            self.end()
        else:
            return self.read()
        return True

    def end(self) -> None:
        """Be gone, and leave the copy as it is."""
        super().end()
        self.outcome = None
        if self.live:
            self.move.forward.clear()
            self.move.forward_ends = self.move.back_ends = True

    def be_swept(self) -> None:
        """Let another bhyrecv remove the rest of the copy."""
        if self.copy.state in (BUILT, TOLD, RUNS):
            self.copy.state = NONE if self.copy.state == BUILT else SWEPT

    def read(self) -> bool:
        """Read a message or the end, or run into a limit."""
        move = self.move
        if move.shared.fault():
            return self.on(Event.FAILURE)
        message = None
        if self.live and move.forward:
            message = move.forward.popleft()
        elif not self.live and self.place < len(move.tape):
            message = move.tape[self.place]
            self.place += 1
        elif not (move.forward_ends if self.live else move.sender.machine is None):
            return False
        if message == "END":
            if self.copy.state == NONE:
                self.copy.state = BUILT
            return self.on(Event.ENDED)
        good = message == self.nonce or (message is not None and not move.shared.rules.nonce)
        return self.on(Event.GO if good else Event.FAILURE)

    def act(self, act: Act) -> None:
        """Do one act, or fail to."""
        records, key = self.move.shared.received, (self.host, self.move.id)
        stale = self.move.shared.rules.recheck and records.get(key) != READY
        if act is Act.START:
            self.start()
        elif self.move.shared.fault() or (act is Act.RECORD_STARTED and stale):
            if not self.on(Event.NEVER_RAN, Event.FAILURE):
                self.end()
        elif act is Act.TEAR_DOWN:
            self.copy.state = NONE
        elif act in DESTINATION_RECORDS:
            records[key] = DESTINATION_RECORDS[act]
        else:
            self.say(ANSWERS[act])

    def start(self) -> None:
        """Tell the copy to run; one start in four goes wrong."""
        dice = self.move.shared.rng.randrange(8)
        if dice == 0:
            self.outcome = Event.NEVER_RAN
        elif dice == 1:
            self.copy.state = TOLD
            self.outcome = Event.MAY_HAVE_RAN
        else:
            self.copy.run()
            self.outcome = Event.STARTED

    def say(self, word: str) -> None:
        answer = Answer(word, self.move.id, self.host, self.nonce)
        self.move.shared.heard.append(answer)
        if self.live and not self.move.back_ends:
            self.move.back.append(answer)


class Move:
    """One move: its bhysend, keeper, third stage, channels and bhyrecvs.

    hand: the acts left to the party that acts on the record, as in model.py.
    tape: all messages that were written; a GO is its nonce.
    """

    def __init__(self, shared: Shared, stream: int, copy: Copy, target: str) -> None:
        self.shared, self.rules = shared, shared.rules
        self.id, self.copy, self.target = stream, copy, target
        self.key = (copy.host, self.id)
        self.sender: Party[SourceState] = Party(self.rules.source, SourceState.RUNS)
        self.nonce = 0
        self.keeper = WAITS if self.rules.keeper else ENDED
        self.hand: deque[Act] = deque()
        self.third = True
        self.seen: str | None = None
        self.forward: deque[object] = deque()
        self.back: deque[Answer] = deque()
        self.tape: list[object] = []
        self.forward_ends = self.back_ends = False
        self.live = Reader(self, target, True)
        self.readers = [self.live]

    def sweep(self, host: str) -> None:
        """Remove what dead bhyrecvs have left on a host, if the records allow that."""
        for move in self.shared.moves:
            key = (host, move.id)
            lives = any(r.host == host and r.machine is not None for r in move.readers)
            if not lives and self.shared.received.get(key) == READY:
                self.shared.received[key] = DEAD
            for reader in move.readers:
                is_left = reader.host == host and reader.machine is None
                record = self.shared.received.get((host, move.id))
                if is_left and record in self.rules.swept:
                    reader.be_swept()

    @property
    def record(self) -> str | None:
        return self.shared.sources.get(self.key)

    @property
    def is_locked(self) -> bool:
        return self.sender.machine is not None or self.keeper == WAITS or bool(self.hand)

    def has_run(self) -> bool:
        """Say whether a copy that was made of this stream has run."""
        return any(reader.copy.has_run for reader in self.readers)

    def go_on(self) -> bool:
        """Let each of the parties do one thing; return whether there was one."""
        parties = [self.step_sender, self.step_hypervisor, self.step_hand, self.step_third]
        moved = [step() for step in (*parties, *(reader.step for reader in self.readers))]
        return True in moved

    def step(self) -> bool:
        """Let one of the parties do one thing; return whether there was one."""
        rng = self.shared.rng
        party = rng.randrange(6)
        if party == 0:
            return self.step_sender()
        if party == 1:
            return self.step_hand()
        if party == 2:
            return self.step_third()
        if party == 3:
            return rng.choice(self.readers).step()
        if party == 4:
            return self.step_hypervisor()
        return self.step_wires()

    def do(self, act: Act) -> None:
        """Do one act of bhysend, or of a party that acts in its place."""
        if act in SOURCE_RECORDS:
            self.shared.sources[self.key] = SOURCE_RECORDS[act]
        elif act is Act.FORGET:
            self.shared.sources.pop(self.key, None)
        elif act in (Act.WRITE_END, Act.WRITE_GO):
            message = "END" if act is Act.WRITE_END else self.nonce
            self.tape.append(message)
            if not self.forward_ends:
                self.forward.append(message)
        elif self.copy.state in (RUNS, ASKED, STANDS):
            self.copy.state = {Act.PAUSE: STANDS, Act.RESUME: RUNS, Act.DISCARD: OVER}[act]

    def end_sender(self) -> None:
        self.sender.end()
        self.forward_ends = True

    def step_sender(self) -> bool:
        sender = self.sender
        if sender.machine is None:
            return False
        if self.shared.fault():
            self.end_sender()
        elif sender.todo:
            if sender.todo[0] is Act.PAUSE and self.copy.state == ASKED:
                return False
            act = sender.todo.popleft()
            if act is Act.PAUSE and self.copy.state == RUNS:
                self.copy.state = ASKED
                sender.todo.appendleft(act)
                return True
            epipe = act in (Act.WRITE_END, Act.WRITE_GO) and self.forward_ends
            refused = act is Act.PAUSE and self.copy.state != STANDS
            fault = refused or self.shared.fault()
            if not fault and not (epipe and self.shared.rng.random() < 0.5):
                self.do(act)
            elif not sender.on(Event.UNSENT, Event.FAILURE):
                self.end_sender()
        elif sender.machine.at in FINALS:
            self.shared.ends[sender.machine.at] += 1
            self.end_sender()
            self.keeper = ENDED
        elif self.shared.fault() or (self.back_ends and not self.back):
            return sender.on(Event.FAILURE, Event.DOUBT)
        else:
            return self.go_on_sending(sender)
        return True

    def go_on_sending(self, sender: Party[SourceState]) -> bool:
        """bhysend throttles the guest, or pauses it, or has sent everything."""
        assert sender.machine is not None
        is_throttled = sender.machine.at is SourceState.THROTTLED
        if is_throttled and self.copy.state in (RUNS, STANDS) and self.shared.rng.random() < 0.5:
            self.copy.state = {RUNS: STANDS, STANDS: RUNS}[self.copy.state]
            return True
        if is_throttled and self.copy.state == STANDS:
            self.copy.state = RUNS  # the throttle ends with the last live round
        if self.shared.rng.random() < 0.3:
            return sender.on(Event.THROTTLE, Event.PAUSE, Event.COPIED)
        return sender.on(Event.PAUSE, Event.COPIED)

    def hear(self, answer: Answer) -> None:
        """Hand an answer to bhysend, which waits."""
        if answer.word == "READY":
            self.nonce = answer.nonce
            if self.rules.asks and self.copy.state != STANDS:
                self.sender.on(Event.FAILURE)
                return
        self.sender.on(HEARD[answer.word], Event.FAILURE)

    def step_hypervisor(self) -> bool:
        """The source's hypervisor pauses the guest, is killed, or is asked by somebody else.

        Nobody asks too late here; the exhaustive search has that case.
        """
        if self.copy.state == ASKED:
            self.copy.state = STANDS
            return True
        # This has to be rare, since it would end most moves.
        if self.copy.state != STANDS or self.shared.rng.random() > 0.1 or not self.shared.fault():
            return False
        machine = self.sender.machine
        in_time = (
            machine.at in (SourceState.PAUSED, SourceState.OFFERED)
            if machine
            else self.record == PAUSED
        )
        in_time = in_time and self.rules.meddling
        self.copy.state = RUNS if in_time and self.shared.rng.random() < 0.5 else LOST
        return True

    def believes(self, answer: Answer) -> bool:
        ours = answer.stream == self.id or not self.rules.naming
        return ours and (answer.host == self.target or not self.rules.same_host)

    def given(self, answer: Answer) -> bool:
        """Take an answer from the operator; return whether it changes anything."""
        believed = answer.word in HEARD and self.believes(answer)
        if not self.is_locked:
            self.take_over(HEARD[answer.word] if believed else Event.ALONE)
        elif believed and self.sender.is_idle:
            self.hear(answer)
        else:
            return False
        return True

    def take_over(self, event: Event) -> None:
        """Read the record under the guest's lock, and begin to act on it."""
        if self.record is not None:
            alone = self.rules.record.get((self.record, Event.ALONE), ())
            self.hand.extend(self.rules.record.get((self.record, event), alone))

    def step_hand(self) -> bool:
        if self.keeper == WAITS and self.shared.fault():
            self.keeper = KILLED
        elif self.keeper == WAITS and self.sender.machine is None:
            self.keeper = ENDED
            self.take_over(Event.ALONE)
        elif not self.hand:
            return False
        elif self.shared.fault():
            self.hand.clear()
            self.keeper = KILLED
        else:
            act = self.hand.popleft()
            if act is not Act.RESUME or self.copy.state != ASKED or self.rules.takes_back:
                self.do(act)
        return True

    def step_third(self) -> bool:
        if not self.third:
            return False
        if self.shared.fault():
            self.third, self.seen, self.back_ends = False, None, True
            self.back.clear()
        elif self.back and not self.sender.todo:
            answer = self.back.popleft()
            self.seen = answer.word if answer.word in FINAL_WORDS else self.seen
            if self.sender.machine is not None:
                self.hear(answer)
        elif not self.is_locked and (self.seen or (self.back_ends and not self.back)):
            self.third = False
            self.take_over(HEARD[self.seen] if self.seen else Event.ALONE)
        else:
            return False
        return True

    def step_wires(self) -> bool:
        """Cut a channel, or replay the tape somewhere."""
        if not self.shared.fault():
            return False
        what = self.shared.rng.randrange(3)
        if what == 0:
            self.forward.clear()
            self.forward_ends = True
        elif what == 1:
            self.back.clear()
            self.back_ends = True
        elif self.tape:
            self.replay(self.shared.rng.choice(HOSTS))
        return True

    def replay(self, host: str) -> None:
        """Start a replay, unless there is a record, or another bhyrecv has the stream's lock."""
        locked = any(r.host == host and r.machine is not None for r in self.readers)
        if not locked and (host, self.id) not in self.shared.received:
            self.readers.append(Reader(self, host, False))

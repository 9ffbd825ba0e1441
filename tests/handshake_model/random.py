"""Random schedules: one guest, moved there and back, with more faults and more of everything.

The world of model.py is written here a second time, and larger: objects that
change instead of one immutable World; several moves of one guest between three
hosts, each with a new stream id; nonces, stream ids and hosts as values that are
compared.  Records of earlier moves stay on their disks.  The operator keeps every
answer that anybody got, and hands it to any `-A`.  Any number of replays read
what tee has recorded, while tee records.

A move is refused while there is any record of the guest on its host: otherwise
an answer about an earlier move would decide about this one.
"""

from __future__ import annotations

from bhystream.guest import GO, STARTED
from handshake_model.model import (
    BUILT,
    DESTINATION_RECORDS,
    HEARD,
    KILLED,
    OVER,
    RUNS,
    STANDS,
    SWEPT,
)
from handshake_model.moves import HOSTS, Answer, Move, Shared

MAX_MOVES = 5


class RecordError(Exception):
    """An invariant does not hold.  The argument is the invariant's name."""


class World(Shared):
    """One guest, three hosts, and the moves so far."""

    def run(self, nsteps: int) -> None:
        """Let nsteps things happen; then let all programs end, without faults.

        Raises RecordError if an invariant does not hold.
        """
        for _ in range(nsteps):
            if self.step():
                self.check()
        self.faults = 0.0
        while True in [move.go_on() for move in self.moves]:
            self.check()
        for move in self.moves:
            self.check_end(move)

    def step(self) -> bool:
        """Let one thing happen; return whether there was one."""
        rng = self.rng
        dice = rng.random()
        if dice < 0.06 or not self.moves:
            return self.begin()
        if dice < 0.08:
            move = rng.choice(self.moves)
            self.heard.append(self.ask(rng.choice(HOSTS), move.id))
            return True
        if dice < 0.12 and self.heard:
            return rng.choice(self.moves).given(rng.choice(self.heard))
        return rng.choice(self.moves[-2:] if dice < 0.8 else self.moves).step()

    def begin(self) -> bool:
        """Move the guest on, unless its lock or a record here forbids it."""
        copy = next((copy for copy in self.copies if copy.state == RUNS), None)
        if copy is None or len(self.moves) == MAX_MOVES:
            return False
        if self.rules.refuse and any(host == copy.host for host, _ in self.sources):
            return False
        if any(move.copy is copy and move.is_locked for move in self.moves):
            return False
        target = self.rng.choice([host for host in HOSTS if host != copy.host])
        self.moves.append(Move(self, len(self.moves), copy, target))
        return True

    def ask(self, host: str, stream: int) -> Answer:
        """Do what `bhyrecv -q` does, which takes any running copy of the guest for the stream's."""
        phase = self.received.get((host, stream))
        acts, word = self.rules.query[phase]
        for act in acts:
            self.received[host, stream] = DESTINATION_RECORDS[act]
        runs = any(copy.host == host and copy.state == RUNS for copy in self.copies)
        if phase == STARTED and runs:
            word = "RUNNING"
        for reader in self.moves[stream].readers:
            is_left = reader.host == host and reader.machine is None and phase is not None
            if is_left and self.received[host, stream] in self.rules.swept:
                reader.be_swept()
        return Answer(word, stream, host)

    def check(self) -> None:
        """Check every invariant.  Raises RecordError."""
        if sum(copy.state == RUNS for copy in self.copies) > 1:
            raise RecordError("I1")
        if any(copy.state == SWEPT for copy in self.copies):
            raise RecordError("I8")
        for move in self.moves:
            state = move.copy.state
            if state == RUNS:
                if move.has_run():
                    raise RecordError("I2")
                continue
            same = [other for other in self.moves if other.copy is move.copy]
            if state == STANDS and not any(other.record for other in same):
                raise RecordError("I3")
            if state == OVER and not any(other.has_run() for other in same):
                raise RecordError("I5")

    def check_end(self, move: Move) -> None:
        """Check the rest of a move when all programs have ended.

        Then ask the move's destination and let `-A` act.  Raises RecordError.
        """
        if move.sender.machine or any(reader.machine for reader in move.readers):
            raise RecordError("I7")
        if move.record is None:
            return
        stands = move.copy.state == STANDS
        if stands and move.keeper != KILLED and move.record != GO:
            raise RecordError("I4")
        if move.record != GO:
            return
        answer = self.ask(move.target, move.id)
        if answer.word == "UNKNOWN":
            raise RecordError("I6")
        move.take_over(HEARD[answer.word])
        while move.hand:
            move.do(move.hand.popleft())
            self.check()
        if answer.word != "RAN" and move.record is not None:
            raise RecordError("I6")
        left = [r.copy.state for r in move.readers if r.host == move.target]
        if answer.word == "FAILED" and BUILT in left:
            raise RecordError("I6")

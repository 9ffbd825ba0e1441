"""Random schedules: one guest, moved there and back, with more faults and more of all.

The same world as that of model.py, written a second time and larger:
objects that change instead of one immutable World; several moves of one guest
between three hosts, each with a new stream id; nonces, stream ids and hosts are
values that are compared.  Records of earlier moves stay on their disks.  The
operator keeps every answer that he or anybody got, and hands it to whatever
`-A` he likes.  Any number of replays read what tee recorded, while it records.

A move is refused while there is any record of the guest on its host: without
this, an answer about an earlier move would decide about this one.
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


class BrokenError(Exception):
    """An invariant does not hold.  Its argument is the name."""


class World(Shared):
    """One guest, three hosts, and the moves so far."""

    def run(self, nsteps: int) -> None:
        """Let things happen; then let all programs end, without faults.

        Raises BrokenError.
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
        """`bhyrecv -q`.  It takes any running copy of this guest for the stream's."""
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
        """Look at every invariant.  Raises BrokenError."""
        if sum(copy.state == RUNS for copy in self.copies) > 1:
            raise BrokenError("I1")
        if any(copy.state == SWEPT for copy in self.copies):
            raise BrokenError("I8")
        for move in self.moves:
            state = move.copy.state
            if state == RUNS:
                if move.has_run():
                    raise BrokenError("I2")
                continue
            same = [other for other in self.moves if other.copy is move.copy]
            if state == STANDS and not any(other.record for other in same):
                raise BrokenError("I3")
            if state == OVER and not any(other.has_run() for other in same):
                raise BrokenError("I5")

    def check_end(self, move: Move) -> None:
        """Look at what is left of a move when all programs have ended.

        Then ask its destination and let `-A` act.  Raises BrokenError.
        """
        if move.sender.machine or any(reader.machine for reader in move.readers):
            raise BrokenError("I7")
        if move.record is None:
            return
        stands = move.copy.state == STANDS
        if stands and move.keeper != KILLED and move.record != GO:
            raise BrokenError("I4")
        if move.record != GO:
            return
        answer = self.ask(move.target, move.id)
        if answer.word == "UNKNOWN":
            raise BrokenError("I6")
        move.take_over(HEARD[answer.word])
        while move.hand:
            move.do(move.hand.popleft())
            self.check()
        if answer.word != "RAN" and move.record is not None:
            raise BrokenError("I6")
        left = [r.copy.state for r in move.readers if r.host == move.target]
        if answer.word == "FAILED" and BUILT in left:
            raise BrokenError("I6")

"""One move in an answered form that is held up at a point, so that a test can harm it there.

Whatever the test does, in the end one copy of the guest runs.  If no program can know which copy,
none runs: the guest stands paused and recorded at the source, and the command that bhysend printed
for this case finds out which.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from support.processes import is_gone
from support.waiting import until

from .pipeline import BHYRECV, BHYSEND, Ended, Pipeline, Words, report
from .tap import AnswerTap, Tap
from .travel import Host, Traveller, keeper_of, processes_with, program_at

Gate = tuple[Path, int]
# The points in the stream: a section, in whose middle the stream is held up.
_SECTIONS = {
    "round-0": partial(Tap, "MEMORY", 0, 9),
    "state": partial(Tap, "STATE"),
    "END": partial(Tap, "END"),
    "GO": partial(Tap, "GO"),
}
THIRD = (*BHYSEND, "-A")
# After two live rounds comes the pause, whatever the guest does.
ROUNDS = ("-f", "-r", "2")
# What sh(1) may be.
SHELLS = ("sh", "dash", "bash")
# The processes of the three-stage form.  In the command form bhysend does the third stage's work.
STAGES = ("bhysend", "there", "bhyrecv", "back", "third")


def shell_of(way: Sequence[Words]) -> str:
    """Return the text of a shell that runs a pipeline and waits for it.

    The shell keeps no pipe open, so that bhysend notices the death of a stage, as that of an ssh.
    """
    first, *others = (shlex.join([str(word) for word in each]) for each in way)
    pipeline = " | ".join([f"{first} <&3 3<&-", *(f"{each} 3<&-" for each in others)])
    return f"exec 3<&0; {pipeline} & exec <&- >&- 3<&-; wait $!"


class Attempt:
    """A move in an answered form that is held up at a point.

    round-0   in the first round
    paused    by the command at the pause, before END
    state     when half of the state's first section is on its way
    END, GO   when half of it is on its way
    nowhere   it is not held up
    any other before the first answer with that word is passed on
    """

    def __init__(self, form: str, point: str, host: Host, guest: Traveller, gate: Gate) -> None:
        """Start nothing yet: a test may change send and receive before begin()."""
        self.form, self.point, self.host, self.guest, self.gate = form, point, host, guest, gate
        self.to = guest.next()
        self.marker = host.directory / "paused"
        self.tap: Tap | AnswerTap | None = None
        self.send: list[str] = guest.send(*ROUNDS)
        self.receive: list[str] = guest.receive(self.to)
        self.there: Words = ["cat"]
        self.back: Words = ["cat", "-"]
        if point == "paused":
            self.send[-1:-1] = ["-p", f": > {self.marker}; read -r line < {gate[0]}"]
        elif point in _SECTIONS:
            self.tap = _SECTIONS[point]()
            self.there = self.tap.argv
        elif point != "nowhere":
            self.tap = AnswerTap(point)
            self.back = self.tap.argv
        self.killed: list[str] = []
        # Whether bhysend can be expected to clean up; else the next bhysend does.
        self.is_tidy = True
        self.ended: list[Ended] = []

    @contextmanager
    def begin(self) -> Iterator[Attempt]:
        """Start the move and wait until it is held up; end its processes after the with block."""
        way: list[Words] = [self.there, self.receive, self.back]
        commands: list[Words] = [[*self.send[:-1], "-a", self.send[-1]], *way, THIRD]
        if self.form == "command":
            commands = [[*self.send, "sh", "-c", shell_of(way)]]
        with Pipeline(*commands, env=self.host.env) as self.pipeline, self.to.reaped():
            if self.tap:
                self.tap.reached()
            elif self.point == "paused":
                until(self.marker.exists, "the pause")
            self.look()
            yield self

    def look(self) -> None:
        """Find bhysend's keeper, if there is one by now."""
        self.keeper = keeper_of(self.pipeline[0].pid)

    def pid(self, who: str) -> int:
        """Return the pid of one of the processes that take part.

        Raises ValueError if there is no such process now.
        """
        if who == "keeper":
            if not self.keeper:
                raise ValueError("there is no keeper yet")  # pid 0 would be our own group
            return self.keeper
        if who == "hook":
            found = processes_with(str(self.marker))
            [pid] = [one for one in found if Path(f"/proc/{one}/exe").resolve().name in SHELLS]
            return pid
        if who == "source":
            assert self.guest.place.pid
            return self.guest.place.pid
        if who == "destination":
            [pid] = self.to.hypervisors()
            return pid
        if self.form != "command" or who == "bhysend":
            return self.pipeline[STAGES.index(who)].pid
        words: dict[str, Words] = {
            "there": self.there,
            "bhyrecv": self.receive,
            "back": self.back,
        }
        command = [str(word) for word in words[who]]
        [pid] = self._children(command[program_at(command) :])
        return pid

    def _children(self, argv: Sequence[str] = ()) -> list[int]:
        """Return the pids left in bhysend's session, with the command line argv or with any."""
        line = "\0".join(argv).encode()
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                pid = int(entry.name)
                if os.getsid(pid) != self.pipeline[0].pid or is_gone(pid):
                    continue
                if not argv or (entry / "cmdline").read_bytes().rstrip(b"\0") == line:
                    found.append(pid)
        return found

    def kill(self, *who: str) -> None:
        """Kill some of the processes that take part, and wait until they are gone."""
        self.killed += who
        pids = [self.pid(one) for one in who]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            until(lambda pid=pid: is_gone(pid), "the end of the killed")  # type: ignore[misc]

    def release(self, how: str) -> None:
        """Let the move go on.  how: what was held up is delivered "late", or "never"."""
        if self.tap is None:
            os.write(self.gate[1], b"\n")
        elif ("there" if isinstance(self.tap, Tap) else "back") not in self.killed:
            self.tap.go() if how == "late" else self.tap.close()

    def wait(self) -> list[Ended]:
        """Wait until all processes have ended."""
        self.ended = self.pipeline.wait()
        if self.form == "command":
            until(lambda: not self._children(), "the command's processes")
        until(lambda: is_gone(self.keeper) or not self.keeper, "the keeper")
        self.host.await_unlocked()
        # Read bhysend's messages again: a killed keeper, or bhysend after it, may have added some.
        self.ended[0] = self.pipeline[0].await_end()
        if self.ended[0].status == -signal.SIGKILL:
            # The socket of a killed bhysend stays until a program tries to connect.
            for path in (self.host.state / "run").glob("*"):
                path.unlink()
        return self.ended

    def said(self) -> str:
        return report(*self.ended)

    def said_so_far(self) -> str:
        """Return what all processes have written to their standard errors by now."""
        return "".join(stage.stderr for stage in self.pipeline.stages)

    # The outcome.

    def end(self) -> str:
        """Return where the guest is, "here", "there" or "doubt"; assert that there is one copy."""
        here, there = self.guest.place.runs(), self.to.runs()
        assert not (here and there), f"two copies\n{self.said()}"
        rows = [(row.guest, row.phase) for row in self.host.rows()]
        if rows == [(self.guest.name, "in-doubt")]:
            assert self.guest.place.is_held(self.host)
            return "doubt"
        assert rows == [], self.said()
        assert here or there, f"no copy\n{self.said()}"
        return "here" if here else "there"

    def check_statuses(self, end: str) -> None:
        """Assert that every program that was not killed says by its status where the guest is."""
        sources = [self.ended[0], *self.ended[4:]]
        good = {"here": range(64, 78), "there": range(1), "doubt": range(81, 82)}[end]
        for one in sources:
            assert one.status in good or one.status == -signal.SIGKILL, self.said()
            assert one.status >= 0 or "Traceback" not in one.stderr
        assert "Traceback" not in self.said()

    def way_out(self) -> str:
        """Return the command that bhysend printed for a guest in doubt."""
        [line] = set(
            re.findall(r"^bhysend: +(.*bhyrecv -q .* \| .*bhysend -A)$", self.said(), re.M)
        )
        return str(line)

    def ask(self) -> str:
        """Run the command of way_out(); return where the guest is then."""
        asked = self.host.shell(self.way_out())
        assert asked.status in (0, 69), report(asked)
        end = self.end()
        assert end == ("there" if asked.status == 0 else "here"), report(asked)
        return end

    def settle(self, end: str) -> None:
        """Assert that the guest is unharmed, nothing is left, and a second attempt succeeds."""
        if end == "there":
            self.guest.hand_over(self.host, self.to)
            self.guest.prove(1)
            return
        self._clear()
        self.to.assert_nothing_left()
        # If bhysend was killed before it had a keeper, the next bhysend removes what it left.
        was_early = self.point in ("HELLO", "nowhere") and "bhysend" in self.killed
        self.guest.run_on(self.host, sweeps=1, is_tidy=self.is_tidy and not was_early)
        self.guest.move(self.host, sweeps=1)

    def _clear(self) -> None:
        """Remove what a killed bhyrecv left at the destination, as an operator would."""
        for row in self.host.rows(BHYRECV):
            assert (row.guest, row.phase) == (self.guest.name, "ready")
            refused = self.host.run(*BHYRECV, "--resume", row.id)
            assert refused.status == 69, report(refused)
            self.host.act(BHYRECV, "--discard", row.id)
        assert self.host.rows(BHYRECV) == []
        self.to.forsake()

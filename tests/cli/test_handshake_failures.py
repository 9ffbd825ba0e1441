"""The answered forms when somebody dies, an answer is late, or a message never comes.

A move is held up at one point, somebody is killed there, and then what was held up is delivered
late, or never.  Whatever happens, in the end one copy of the guest runs, and where nobody can know
which, none does: it stands paused and recorded, and the command that bhysend has printed for this,
run as it was printed, finds out.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from guest import reaping

from .conftest import EVERY
from .pipeline import BHYRECV, BHYSEND, Ended, Pipeline, Words, report, run, until
from .tap import AnswerTap, Tap
from .travel import Host, Traveller, is_gone, limited, process_state, processes_with, qemu_at

pytestmark = pytest.mark.guest

Gate = tuple[Path, int]
THIRD = (*BHYSEND, "-A")
# Two live rounds, and then the pause, whatever the guest does.
ROUNDS = ("-f", "-r", "2")
# In the command form one process does the work of the shell's, and ends with them.
STAGES = ("bhysend", "there", "bhyrecv", "back", "third")


def shell_of(way: Sequence[Words]) -> str:
    """Return the shell's words for a pipeline that it leaves to itself.

    It keeps no end of a pipe, so that bhysend notices, as of ssh, when somebody dies.
    """
    first, *others = (shlex.join([str(word) for word in each]) for each in way)
    pipeline = " | ".join([f"{first} <&3 3<&-", *(f"{each} 3<&-" for each in others)])
    return f"exec 3<&0; {pipeline} & exec <&- >&- 3<&-; wait $!"


class Attempt:
    """A move in an answered form that is held up at a point.

    round-0   in the first round
    paused    by the command at the pause, before END
    GO        half of GO is on its way
    any other before an answer of that word is handed on
    """

    def __init__(self, form: str, point: str, host: Host, guest: Traveller, gate: Gate) -> None:
        """Nothing is started yet; send and receive may be changed."""
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
        elif point in ("round-0", "GO"):
            self.tap = Tap("GO") if point == "GO" else Tap("MEMORY", 0, 9)
            self.there = self.tap.argv
        else:
            self.tap = AnswerTap(point)
            self.back = self.tap.argv
        self.killed: list[str] = []
        self.ended: list[Ended] = []

    @contextmanager
    def begin(self) -> Iterator[Attempt]:
        """Start it, and wait until it is held up; in the end nothing of it is left."""
        way: list[Words] = [self.there, self.receive, self.back]
        commands: list[Words] = [[*self.send[:-1], "-a", self.send[-1]], *way, THIRD]
        if self.form == "command":
            commands = [[*self.send, "sh", "-c", shell_of(way)]]
        with Pipeline(*commands, env=self.host.env) as self.pipeline, reaping(self.to.qmp):
            if self.tap:
                self.tap.reached()
            else:
                until(self.marker.exists, "the pause")
            self.keeper = self._keeper()
            yield self

    def _keeper(self) -> int:
        """Return the pid of the keeper, 0 where there is none yet."""
        for pid in processes_with("bhystream.keeper"):
            with suppress(OSError):
                text = Path(f"/proc/{pid}/stat").read_text()
                if int(text[text.rindex(")") + 2 :].split()[1]) == self.pipeline[0].pid:
                    return pid
        return 0

    def pid(self, who: str) -> int:
        """Return the pid of one of those who take part."""
        if who == "keeper":
            return self.keeper
        if who == "source":
            return self.guest.place.pid
        if who == "destination":
            [pid] = qemu_at(self.to.qmp)
            return pid
        if self.form != "command" or who == "bhysend":
            return self.pipeline[STAGES.index(who)].pid
        words: dict[str, Words] = {
            "there": self.there,
            "bhyrecv": self.receive,
            "back": self.back,
        }
        [pid] = self._children([str(word) for word in words[who]])
        return pid

    def _children(self, argv: Sequence[str] = ()) -> list[int]:
        """Return who is left of the session of bhysend, of one command line or of any."""
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
        """Kill some of them."""
        self.killed += who
        pids = [self.pid(one) for one in who]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            until(lambda pid=pid: is_gone(pid), "the end of the killed")  # type: ignore[misc]

    def release(self, how: str) -> None:
        """Let it go on: what was held up is delivered late, or never."""
        if self.tap is None:
            os.write(self.gate[1], b"\n")
        elif ("there" if isinstance(self.tap, Tap) else "back") not in self.killed:
            self.tap.go() if how == "late" else self.tap.close()

    def wait(self) -> list[Ended]:
        """Wait until everybody has ended."""
        self.ended = self.pipeline.wait()
        if self.form == "command":
            until(lambda: not self._children(), "the command's processes")
        until(lambda: is_gone(self.keeper) or not self.keeper, "the keeper")
        self.host.await_unlocked()
        # What a killed keeper, or a bhysend after it, said last.
        self.ended[0] = self.pipeline[0].await_end()
        if self.ended[0].status == -signal.SIGKILL:
            # The socket of one who was killed stays until somebody wants to connect.
            for path in (self.host.state / "run").iterdir():
                path.unlink()
        return self.ended

    def said(self) -> str:
        return report(*self.ended)

    # What came of it.

    def end(self) -> str:
        """Return where the guest is: here, there, or in doubt; and see that there is one copy."""
        here = not is_gone(self.guest.place.pid) and self.guest.place.status() == "running"
        there = bool(qemu_at(self.to.qmp)) and self.to.status() == "running"
        assert not (here and there), f"two copies\n{self.said()}"
        rows = [(row.guest, row.phase) for row in self.host.rows()]
        if rows == [("proof", "in-doubt")]:
            assert self.guest.place.status() == "postmigrate"
            return "doubt"
        assert rows == [], self.said()
        assert here or there, f"no copy\n{self.said()}"
        return "here" if here else "there"

    def check_statuses(self, end: str) -> None:
        """Assert that who was not killed says where the guest is."""
        sources = [self.ended[0], *self.ended[4:]]
        good = {"here": range(64, 78), "there": range(1), "doubt": range(81, 82)}[end]
        for one in sources:
            assert one.status in good or one.status == -signal.SIGKILL, self.said()
            assert one.status >= 0 or "Traceback" not in one.stderr
        assert "Traceback" not in self.said()

    def way_out(self) -> str:
        """Return the command that was printed for a guest in doubt."""
        [line] = set(
            re.findall(r"^bhysend: +(.*bhyrecv -q .* \| .*bhysend -A)$", self.said(), re.M)
        )
        return str(line)

    def ask(self) -> str:
        """Run that command; return where the guest is then."""
        asked = self.host.shell(self.way_out())
        assert asked.status in (0, 69), report(asked)
        end = self.end()
        assert end == ("there" if asked.status == 0 else "here"), report(asked)
        return end

    def settle(self, end: str) -> None:
        """See the guest unharmed where it is, nothing left behind, and a second move succeed."""
        if end == "there":
            self.guest.hand_over(self.host, self.to)
            self.guest.prove(1)
        else:
            self._clear()
            self.to.assert_nothing_left()
            self.guest.run_on(self.host, sweeps=1)
        self.guest.move(self.host, sweeps=1)

    def _clear(self) -> None:
        """End what a killed bhyrecv left at the destination, as its operator does."""
        for row in self.host.rows(BHYRECV):
            assert (row.guest, row.phase) == ("proof", "ready")
            refused = self.host.run(*BHYRECV, "--resume", row.id)
            assert refused.status == 69, report(refused)
            self.host.act(BHYRECV, "--discard", row.id)
        assert self.host.rows(BHYRECV) == []
        self.to.forsake()


@pytest.fixture(params=["three-stages", "command"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclass(frozen=True)
class Case:
    """Who dies where, what becomes of what was held up, and where the guest is then.

    end: "doubt-here": the operator has to ask, and finds that the guest never ran there.
    """

    point: str
    who: str
    release: str
    end: str
    forms: tuple[str, ...] = ("three-stages", "command")


ONE, TWO = ("three-stages",), ("command",)
CASES = [
    # Before the destination has said anything.
    Case("HELLO", "bhysend", "never", "here"),
    Case("HELLO", "there", "late", "here", ONE),
    Case("HELLO", "back", "never", "here"),
    Case("HELLO", "bhyrecv", "late", "here", TWO),
    Case("HELLO", "third", "late", "here", ONE),
    # In round 0.
    Case("round-0", "bhysend", "late", "here"),
    Case("round-0", "keeper", "late", "there", TWO),
    Case("round-0", "third", "late", "here", ONE),
    Case("round-0", "there", "never", "here", TWO),
    Case("round-0", "bhyrecv", "never", "here", ONE),
    Case("round-0", "destination", "late", "here"),
    # Paused, END not written.
    Case("paused", "bhysend", "late", "here"),
    Case("paused", "keeper", "late", "there", ONE),
    Case("paused", "third", "late", "here", ONE),
    Case("paused", "there", "late", "here", ONE),
    Case("paused", "back", "late", "here", TWO),
    Case("paused", "bhyrecv", "late", "here"),
    Case("paused", "destination", "late", "here", ONE),
    # END is read, READY is on its way.
    Case("READY", "bhysend", "late", "here"),
    Case("READY", "keeper", "late", "there", ONE),
    Case("READY", "third", "late", "here", ONE),
    Case("READY", "there", "late", "here"),
    Case("READY", "back", "never", "here", ONE),
    Case("READY", "bhyrecv", "late", "doubt-here"),
    Case("READY", "bhyrecv", "never", "here", TWO),
    Case("READY", "source", "late", "there", ONE),
    # GO is on its way.
    Case("GO", "bhysend", "late", "there"),
    Case("GO", "bhysend", "never", "here"),
    Case("GO", "keeper", "never", "here", ONE),
    Case("GO", "third", "late", "doubt-there", ONE),
    Case("GO", "third", "never", "doubt-here", ONE),
    Case("GO", "there", "never", "here", TWO),
    Case("GO", "back", "late", "doubt-there", TWO),
    Case("GO", "bhyrecv", "late", "doubt-here"),
    Case("GO", "source", "late", "there", ONE),
    # It runs there, RUNNING is on its way.
    Case("RUNNING", "bhysend", "late", "there"),
    Case("RUNNING", "bhysend", "never", "doubt-there"),
    Case("RUNNING", "keeper", "late", "there", TWO),
    Case("RUNNING", "third", "late", "doubt-there", ONE),
    Case("RUNNING", "there", "late", "there", ONE),
    Case("RUNNING", "back", "never", "doubt-there"),
    Case("RUNNING", "bhyrecv", "late", "there", ONE),
    Case("RUNNING", "bhyrecv", "never", "doubt-there", TWO),
    Case("RUNNING", "source", "late", "there", TWO),
]


@pytest.mark.parametrize(
    "form, case",
    [
        pytest.param(form, case, id=f"{case.point}-{case.who}-{case.release}-{form}")
        for case in CASES
        for form in case.forms
        if EVERY or form == case.forms[-1] or case.point in ("READY", "GO", "RUNNING")
    ],
)
def test_one_copy_is_left(form: str, case: Case, host: Host, small: Traveller, gate: Gate) -> None:
    attempt = Attempt(form, case.point, host, small, gate)
    with attempt.begin():
        attempt.kill(case.who)
        attempt.release(case.release)
        attempt.wait()
        first, _, then = case.end.partition("-")
        end = attempt.end()
        assert end == first, attempt.said()
        attempt.check_statuses(end)
        if end == "doubt":
            end = attempt.ask()
            assert end == then
        attempt.settle(end)


# Two die.


@pytest.mark.parametrize("point, end", [("paused", "here"), ("RUNNING", "there")])
def test_the_third_stage_does_what_the_keeper_cannot(
    point: str, end: str, host: Host, small: Traveller, gate: Gate
) -> None:
    attempt = Attempt("three-stages", point, host, small, gate)
    with attempt.begin():
        attempt.kill("keeper", "bhysend")
        attempt.release("late")
        attempt.wait()
        assert attempt.end() == end, attempt.said()
        attempt.check_statuses(end)
        attempt.settle(end)


@pytest.mark.parametrize("release, end", [("late", "there"), ("never", "here")])
def test_the_operator_finds_out_when_all_are_dead(
    release: str, end: str, form: str, host: Host, small: Traveller, gate: Gate
) -> None:
    """Nobody is left who could print the way out, so the operator asks for it."""
    attempt = Attempt(form, "GO", host, small, gate)
    third = ["third"] if form == "three-stages" else []
    with attempt.begin():
        attempt.kill("keeper", "bhysend", *third)
        attempt.release(release)
        attempt.wait()
        assert attempt.end() == "doubt", attempt.said()
        attempt.ended = [host.run(*BHYSEND, "--resume", "proof")]
        assert attempt.ended[0].status == 69, attempt.said()
        assert "it may run on" in attempt.said()
        assert attempt.end() == "doubt"
        again = host.run(*small.send())
        assert again.status == 69, report(again)
        assert "in-doubt here since an earlier stream" in again.stderr
        assert attempt.ask() == end
        attempt.settle(end)


def test_a_lost_destination_is_the_operators_word(
    form: str, host: Host, small: Traveller, gate: Gate
) -> None:
    attempt = Attempt(form, "GO", host, small, gate)
    with attempt.begin():
        attempt.kill("bhyrecv", "destination")
        attempt.release("never")
        [sent, *_] = attempt.wait()
        assert attempt.end() == "doubt"
        assert sent.status == 81, attempt.said()
        assert re.search(
            r"^bhysend: +.*bhysend --resume --in-doubt [0-9a-f]{32}$", sent.stderr, re.M
        )
        assert host.run(*BHYSEND, "--resume", "proof").status == 69
        resumed = host.run(*BHYSEND, "--resume", "--in-doubt", "proof")
        assert resumed.status == 0, report(resumed)
        assert "the destination must not have started it" in resumed.stderr
        attempt.settle("here")


def test_a_destination_that_dies_before_go_is_in_doubt(
    form: str, host: Host, small: Traveller, gate: Gate
) -> None:
    """GO is recorded there, and nobody can know any more whether the guest ran."""
    attempt = Attempt(form, "READY", host, small, gate)
    with attempt.begin():
        attempt.kill("destination")
        attempt.release("late")
        attempt.wait()
        assert attempt.end() == "doubt", attempt.said()
        attempt.check_statuses("doubt")
        asked = host.shell(attempt.way_out())
        assert asked.status == 81, report(asked)
        assert "cannot say whether it ran there" in asked.stderr
        assert attempt.end() == "doubt"
        resumed = host.run(*BHYSEND, "--resume", "--in-doubt", "proof")
        assert resumed.status == 0, report(resumed)
        attempt.settle("here")


def test_in_doubt_is_said_of_what_is_in_doubt_only(host: Host, small: Traveller) -> None:
    [sent, _] = run(small.send(), ["cat"], env=host.env)
    assert sent.status == 80, report(sent)
    refused = host.run(*BHYSEND, "--resume", "--in-doubt", "proof")
    assert refused.status == 64, report(refused)
    host.act(BHYSEND, "--resume", "proof")
    small.run_on(host)


# GO comes late.


def test_a_go_that_is_overtaken_starts_nothing(
    form: str, host: Host, small: Traveller, gate: Gate
) -> None:
    """The way there stands still with GO in it; the operator asks; then it goes on."""
    attempt = Attempt(form, "GO", host, small, gate)
    with attempt.begin():
        stopped, bhyrecv = attempt.pid("there"), attempt.pid("bhyrecv")
        os.kill(stopped, signal.SIGSTOP)
        until(lambda: process_state(stopped) == "T", "the stop")
        # The way back breaks, so bhysend ends in doubt.
        attempt.kill("third" if form == "three-stages" else "back")
        sent = attempt.pipeline[0].await_end()
        attempt.ended = [sent]
        assert sent.status == 81, attempt.said()
        asked = host.shell(attempt.way_out())
        assert asked.status == 69, report(asked)
        assert "it runs here" in asked.stderr
        assert small.place.status() == "running"
        assert not is_gone(bhyrecv)
        attempt.release("late")
        os.kill(stopped, signal.SIGCONT)
        until(lambda: is_gone(bhyrecv), "the end of bhyrecv")
        if form == "three-stages":
            received = attempt.pipeline[2].await_end()
            assert received.status == 76, report(received)
        assert "GO came too late" in "".join(one.stderr for one in attempt.pipeline.stages)
        attempt.wait()
        assert attempt.end() == "here"
        attempt.settle("here")


@pytest.mark.parametrize("point, end", [("GO", "here"), ("RUNNING", "there")])
def test_asking_while_bhysend_waits(
    point: str, end: str, form: str, host: Host, small: Traveller, gate: Gate
) -> None:
    """A second third stage comes with the answer; the first one's comes too late."""
    attempt = Attempt(form, point, host, small, gate)
    with attempt.begin():
        [row] = host.rows()
        there = f"ssh here env BHYSEND_STATE_DIR={host.state} bhyrecv -q {row.id}"
        asked = host.shell(f"{there} | env BHYSEND_STATE_DIR={host.state} bhysend -A proof")
        if form == "three-stages":
            sent = attempt.pipeline[0].await_end()
            assert sent.status == asked.status, report(sent, asked)
        attempt.release("late")
        attempt.wait()
        assert attempt.ended[0].status == asked.status, report(asked, *attempt.ended)
        assert attempt.end() == end, report(asked, *attempt.ended)
        attempt.check_statuses(end)
        attempt.settle(end)


# Asking the wrong one.


def test_another_state_directory_knows_nothing(host: Host, small: Traveller, gate: Gate) -> None:
    other = Host(host.directory / "other")
    attempt = Attempt("three-stages", "RUNNING", host, small, gate)
    with attempt.begin():
        attempt.kill("third")
        attempt.release("late")
        attempt.wait()
        assert attempt.end() == "doubt"
        right = attempt.way_out()
        # The destination's: there is no such stream there, and that is no FAILED.
        there, _, here = right.partition(" | ")
        wrong = host.shell(f"{there.replace(str(host.state), str(other.state))} | {here}")
        assert wrong.status == 81, report(wrong)
        assert "UNKNOWN" not in wrong.stderr
        assert "was ever ready on" in wrong.stderr
        assert attempt.end() == "doubt"
        # The source's: there is no such guest there.
        wrong = host.shell(f"{there} | {here.replace(str(host.state), str(other.state))}")
        assert wrong.status == 81, report(wrong)
        assert "another BHYSEND_STATE_DIR" in wrong.stderr
        assert attempt.end() == "doubt"
        # Somebody else's FAILED of this very stream: believed of the destination alone.
        [row] = host.rows()
        hello = f"bhys1 {row.id} HELLO elsewhere/0123456789abcdef {host.state}"
        lie = f"{hello}\\nbhys1 {row.id} FAILED no\\n"
        wrong = host.shell(f"printf '{lie}' | {here}")
        assert wrong.status == 81, report(wrong)
        assert "not to elsewhere" in wrong.stderr
        assert attempt.end() == "doubt"
        assert attempt.ask() == "there"
        attempt.settle("there")


# What cannot be recorded is not done.


@pytest.mark.parametrize("who, point", [("bhysend", "READY"), ("bhyrecv", "GO")])
def test_what_cannot_be_recorded_is_not_done(
    who: str, point: str, form: str, host: Host, small: Traveller, gate: Gate
) -> None:
    """No file of bhysend may have a byte when GO is due; nor of bhyrecv when it has come."""
    attempt = Attempt(form, point, host, small, gate)
    with attempt.begin():
        limit = host.run("prlimit", "--fsize=0", "--pid", str(attempt.pid(who)))
        assert limit.status == 0, report(limit)
        attempt.release("late")
        attempt.wait()
        assert attempt.end() == "here", attempt.said()
        attempt.check_statuses("here")
        assert attempt.ended[0].status == (74 if who == "bhysend" else 69), attempt.said()
        attempt.settle("here")


# Limits.


@dataclass(frozen=True)
class Limit:
    """A limit, in seconds: of which program, where it is waited for, and what comes of it."""

    program: str
    name: str
    point: str
    end: str
    says: str


LIMITS = [
    Limit("send", "READY", "READY", "here", "no READY came for 2 s"),
    Limit("send", "ANSWER", "RUNNING", "doubt-there", "no answer came for 2 s"),
    Limit("receive", "GO", "GO", "here", "no GO came for 2 s"),
]


@pytest.mark.parametrize("limit", LIMITS, ids=[limit.point for limit in LIMITS])
def test_nobody_waits_for_ever(limit: Limit, host: Host, small: Traveller, gate: Gate) -> None:
    attempt = Attempt("three-stages", limit.point, host, small, gate)
    command = limited(getattr(attempt, limit.program), f"handshake.{limit.name}_SECONDS=2")
    setattr(attempt, limit.program, command)
    with attempt.begin():
        # Until then the message is held up; afterwards it comes, and changes nothing.
        if limit.program == "send":
            until(lambda: not host.files("run"), "the end of the conversation")
        else:
            until(lambda: not qemu_at(attempt.to.qmp), "the end of the guest there")
        attempt.release("late")
        attempt.wait()
        first, _, then = limit.end.partition("-")
        assert attempt.end() == first, attempt.said()
        assert limit.says in attempt.ended[0].stderr, attempt.said()
        attempt.check_statuses(first)
        if then:
            assert attempt.ask() == then
        attempt.settle(then or first)


# Two at once.


def test_a_second_bhysend_is_refused_and_the_first_goes_on(
    form: str, host: Host, small: Traveller, gate: Gate
) -> None:
    attempt = Attempt(form, "round-0", host, small, gate)
    with attempt.begin():
        command = [*small.send("-a")] if form == "three-stages" else [*small.send(), "cat"]
        [second] = run(command, env=host.env)
        assert second.status == 69, report(second)
        assert second.output == b""
        attempt.release("late")
        attempt.wait()
        assert attempt.end() == "there", attempt.said()
        attempt.check_statuses("there")
        attempt.settle("there")


# Signals from the terminal, to all who stand in the command form's foreground.


@pytest.mark.parametrize(
    "point, name",
    [
        ("HELLO", "SIGINT"),
        ("round-0", "SIGINT"),
        ("round-0", "SIGHUP"),
        ("paused", "SIGINT"),
        ("paused", "SIGTERM"),
        ("READY", "SIGINT"),
        ("READY", "SIGHUP"),
    ],
)
def test_a_signal_before_go_brings_the_guest_back(
    point: str, name: str, host: Host, small: Traveller, gate: Gate
) -> None:
    attempt = Attempt("command", point, host, small, gate)
    with attempt.begin():
        os.killpg(attempt.pipeline[0].pid, signal.Signals[name])
        until(lambda: not host.files("run"), "the end of the conversation")
        if point != "paused":
            attempt.release("late")
        [sent] = attempt.wait()
        assert attempt.end() == "here", attempt.said()
        # At the pause the command of -p gets the signal too, and may be the first to say so.
        assert sent.status == 75 or (sent.status == 69 and point == "paused"), attempt.said()
        assert "it runs here" in sent.stderr
        attempt.settle("here")


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGTERM"])
@pytest.mark.parametrize("point", ["GO", "RUNNING"])
def test_a_signal_after_go_is_told_that_it_is_too_late(
    point: str, name: str, host: Host, small: Traveller, gate: Gate
) -> None:
    attempt = Attempt("command", point, host, small, gate)
    with attempt.begin():
        for _ in range(2):
            os.killpg(attempt.pipeline[0].pid, signal.Signals[name])
            until(lambda: f"{name}: too late, GO is out" in attempt.pipeline[0].stderr, "a line")
        attempt.release("late")
        [sent] = attempt.wait()
        assert sent.status == 0, attempt.said()
        assert attempt.end() == "there"
        attempt.settle("there")


def ignores(pid: int, number: signal.Signals) -> bool:
    """Say whether a process ignores a signal.  Source: proc_pid_status(5), SigIgn."""
    text = Path(f"/proc/{pid}/status").read_text()
    [mask] = re.findall(r"^SigIgn:\s+([0-9a-f]+)$", text, re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("point", ["round-0", "paused", "GO"])
def test_a_stop_from_the_terminal_freezes_no_paused_guest(
    point: str, host: Host, small: Traveller, gate: Gate
) -> None:
    """While the guest runs, Ctrl-Z stops bhysend, and never the command.

    The kernel drops SIGTSTP where no shell could send SIGCONT, as it is here; so what they would
    do is read from their signal masks.
    """
    attempt = Attempt("command", point, host, small, gate)
    with attempt.begin():
        assert ignores(attempt.pid("bhysend"), signal.SIGTSTP) == (point != "round-0")
        for who in ("keeper", "there", "bhyrecv", "back"):
            assert ignores(attempt.pid(who), signal.SIGTSTP)
        if point == "round-0":
            os.kill(attempt.pid("bhysend"), signal.SIGSTOP)
            os.kill(attempt.pid("bhysend"), signal.SIGCONT)
        os.killpg(attempt.pipeline[0].pid, signal.SIGTSTP)
        attempt.release("late")
        [sent] = attempt.wait()
        assert sent.status == 0, attempt.said()
        assert attempt.end() == "there"
        attempt.settle("there")


def test_a_signal_to_all_three_stages_after_go_leaves_one_copy(
    host: Host, small: Traveller, gate: Gate
) -> None:
    """Without the command form bhyrecv gets the signal too, and gives up what waits for GO."""
    attempt = Attempt("three-stages", "GO", host, small, gate)
    with attempt.begin():
        for who in ("bhysend", "bhyrecv", "third"):
            os.kill(attempt.pid(who), signal.SIGINT)
        attempt.pipeline[2].await_end()
        attempt.release("late")
        attempt.wait()
        assert attempt.end() == "here", attempt.said()
        attempt.check_statuses("here")
        attempt.settle("here")

"""The answered forms when a process dies, an answer is late, or a message never comes.

A move is held up at one point, a process is killed there, and then the message that was held up is
delivered late, or never.  In every case one copy of the guest runs in the end.  If no program can
know which copy, none runs: the guest stands paused and recorded at the source, and the command that
bhysend printed for this case, run as it was printed, finds out.
"""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass
from typing import Any

import pytest

from support.processes import is_gone, process_state
from support.waiting import until

from .attempt import Attempt, Gate
from .kinds import ANY, EVERY, G4, G5, QEMU, matrix
from .pipeline import BHYRECV, BHYSEND, report, run
from .travel import Host, Traveller, limited

FORMS = ("three-stages", "command")


def in_both(qemu: str) -> pytest.MarkDecorator:
    """Return the mark for `kind` and `form`: the stand-in in both, QEMU in one."""
    both = [(form,) for form in FORMS]
    return pytest.mark.parametrize("kind, form", matrix(both, [(qemu,)]))


@dataclass(frozen=True)
class Case:
    """The process that dies, at which point, the fate of the delayed message, the guest's place.

    end: "doubt-here": the operator has to ask, and finds that the guest never ran there.
    """

    point: str
    who: str
    release: str
    end: str
    forms: tuple[str, ...] = FORMS

    def __str__(self) -> str:
        return f"{self.point}-{self.who}-{self.release}"


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
    # bhyrecv has read END, and READY is on its way.
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
    # The guest runs there, and RUNNING is on its way.
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


# At these points different processes settle, in the two forms, what a killed bhysend leaves.
LATE = ("GO", "RUNNING")
EACH = [(form, case) for case in CASES for form in case.forms]
# With QEMU each process is killed once at least, and each point is used once at least.
COVERED = {
    "HELLO-bhysend-never": "command",
    "HELLO-third-late": "three-stages",
    "round-0-keeper-late": "command",
    "round-0-destination-late": "three-stages",
    "paused-bhysend-late": "three-stages",
    "paused-destination-late": "three-stages",
    "READY-bhyrecv-late": "command",
    "READY-there-late": "command",
    "READY-source-late": "three-stages",
    "GO-bhysend-late": "command",
    "GO-third-never": "three-stages",
    "GO-source-late": "three-stages",
    "RUNNING-bhysend-never": "three-stages",
    "RUNNING-back-never": "command",
    "RUNNING-source-late": "command",
}


def of_case(form: str, case: Case) -> list[Any]:
    """Return the parameters of a case in a form."""
    differs = form == case.forms[-1] or (case.who == "bhysend" and case.point in LATE)
    # A -p command holds up the pause.  With -p bhyve's disks come at the pause, so the
    # destination's bhyve starts only after that.
    is_none_yet = (case.point, case.who) == ("paused", "destination")
    is_standins = not is_none_yet and (EVERY or differs)
    is_qemus = EVERY or COVERED.get(str(case)) == form
    row = [(form, case)]
    return [
        each
        for each in matrix(row, row if is_qemus else [])
        if is_standins or each.values[0] == "qemu"
    ]


@pytest.mark.parametrize(
    "kind, form, case", [row for form, case in EACH for row in of_case(form, case)]
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


# Two processes die.


@pytest.mark.parametrize("kind", [QEMU, G5, G4])
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


@pytest.mark.parametrize("kind", [QEMU, G5, G4])
@pytest.mark.parametrize(
    "release, end, form", [("late", "there", "command"), ("never", "here", "three-stages")]
)
def test_the_operator_finds_out_when_all_are_dead(
    release: str, end: str, form: str, host: Host, small: Traveller, gate: Gate
) -> None:
    """No program is left to print the command for the operator, so the operator asks for it."""
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


@in_both("command")
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


@in_both("command")
def test_a_destination_that_dies_before_go_has_not_run(
    form: str, host: Host, small: Traveller, gate: Gate
) -> None:
    """bhyrecv recorded GO, but the hypervisor was gone before bhyrecv could start the guest."""
    attempt = Attempt(form, "READY", host, small, gate)
    with attempt.begin():
        attempt.kill("destination")
        attempt.release("late")
        attempt.wait()
        assert attempt.end() == "here", attempt.said()
        attempt.check_statuses("here")
        assert attempt.ended[0].status == 69, attempt.said()
        attempt.settle("here")


@in_both("three-stages")
def test_what_a_killed_bhyrecv_left_ready_is_not_in_the_way_of_the_next(
    form: str, host: Host, small: Traveller, gate: Gate
) -> None:
    attempt = Attempt(form, "READY", host, small, gate)
    with attempt.begin():
        attempt.kill("bhyrecv")
        attempt.release("never")
        attempt.wait()
        assert attempt.end() == "here", attempt.said()
        assert [row.phase for row in host.rows(BHYRECV)] == ["ready"]
        assert len(attempt.to.hypervisors()) == 1
        small.run_on(host, sweeps=1)
        small.move(host, to=attempt.to, sweeps=1)
        assert host.rows(BHYRECV) == []


@ANY
def test_in_doubt_is_said_of_what_is_in_doubt_only(host: Host, small: Traveller) -> None:
    [sent, _] = run(small.send(), ["cat"], env=host.env)
    assert sent.status == 80, report(sent)
    refused = host.run(*BHYSEND, "--resume", "--in-doubt", "proof")
    assert refused.status == 64, report(refused)
    host.act(BHYSEND, "--resume", "proof")
    small.run_on(host)


# GO comes late.


@in_both("three-stages")
def test_a_go_that_is_overtaken_starts_nothing(
    form: str, host: Host, small: Traveller, gate: Gate
) -> None:
    """GO is stuck on its way to the destination; the operator asks; then GO goes on."""
    attempt = Attempt(form, "GO", host, small, gate)
    with attempt.begin():
        stopped, bhyrecv = attempt.pid("there"), attempt.pid("bhyrecv")
        os.kill(stopped, signal.SIGSTOP)
        until(lambda: process_state(stopped) == "T", "the stop")
        # The way back breaks, so bhysend ends with the guest in doubt.
        attempt.kill("third" if form == "three-stages" else "back")
        sent = attempt.pipeline[0].await_end()
        attempt.ended = [sent]
        assert sent.status == 81, attempt.said()
        asked = host.shell(attempt.way_out())
        assert asked.status == 69, report(asked)
        assert "it runs here" in asked.stderr
        assert small.place.runs()
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


WAITING = [
    (form, point, end) for form in FORMS for point, end in (("GO", "here"), ("RUNNING", "there"))
]


@pytest.mark.parametrize("kind, form, point, end", matrix(WAITING, [WAITING[0], WAITING[3]]))
def test_asking_while_bhysend_waits(
    point: str, end: str, form: str, host: Host, small: Traveller, gate: Gate
) -> None:
    """A second third stage brings the answer; the answer of the first comes too late."""
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


# The operator asks the wrong program.


@ANY
def test_another_state_directory_knows_nothing(host: Host, small: Traveller, gate: Gate) -> None:
    other = Host(host.directory / "other")
    attempt = Attempt("three-stages", "RUNNING", host, small, gate)
    with attempt.begin():
        attempt.kill("third")
        attempt.release("late")
        attempt.wait()
        assert attempt.end() == "doubt"
        right = attempt.way_out()
        # The wrong destination: it has no such stream, and must not answer FAILED.
        there, _, here = right.partition(" | ")
        wrong = host.shell(f"{there.replace(str(host.state), str(other.state))} | {here}")
        assert wrong.status == 81, report(wrong)
        assert "UNKNOWN" not in wrong.stderr
        assert "was ever ready on" in wrong.stderr
        assert attempt.end() == "doubt"
        # The wrong source: it has no such guest.
        wrong = host.shell(f"{there} | {here.replace(str(host.state), str(other.state))}")
        assert wrong.status == 81, report(wrong)
        assert "another BHYSEND_STATE_DIR" in wrong.stderr
        assert attempt.end() == "doubt"
        # A FAILED for this very stream from another host: bhysend believes only the destination.
        [row] = host.rows()
        hello = f"bhys1 {row.id} HELLO elsewhere/0123456789abcdef {host.state}"
        lie = f"{hello}\\nbhys1 {row.id} FAILED no\\n"
        wrong = host.shell(f"printf '{lie}' | {here}")
        assert wrong.status == 81, report(wrong)
        assert "not to elsewhere" in wrong.stderr
        assert attempt.end() == "doubt"
        assert attempt.ask() == "there"
        attempt.settle("there")


# Steps that cannot be recorded are not taken.


UNWRITTEN = [
    (form, who, point) for form in FORMS for who, point in (("bhysend", "READY"), ("bhyrecv", "GO"))
]


@pytest.mark.parametrize("kind, form, who, point", matrix(UNWRITTEN, [UNWRITTEN[0], UNWRITTEN[3]]))
def test_what_cannot_be_recorded_is_not_done(
    who: str, point: str, form: str, host: Host, small: Traveller, gate: Gate
) -> None:
    """bhysend may write no byte into a file when GO is due, or bhyrecv none when GO has come."""
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
    """A limit in seconds: the program it belongs to, the point of the wait, and the outcome."""

    program: str
    name: str
    point: str
    end: str
    says: str

    def __str__(self) -> str:
        return self.point


LIMITS = [
    Limit("send", "READY", "READY", "here", "no READY came for 2 s"),
    Limit("send", "ANSWER", "RUNNING", "doubt-there", "no answer came for "),
    Limit("receive", "GO", "GO", "here", "no GO came for 2 s"),
]


@pytest.mark.parametrize("kind, limit", matrix([(limit,) for limit in LIMITS], [(LIMITS[2],)]))
def test_nobody_waits_for_ever(limit: Limit, host: Host, small: Traveller, gate: Gate) -> None:
    attempt = Attempt("three-stages", limit.point, host, small, gate)
    command = limited(
        getattr(attempt, limit.program),
        f"handover.handshake.{limit.name}_SECONDS=2",
        "send.flush._STALL_S=1",
    )
    setattr(attempt, limit.program, command)
    with attempt.begin():
        # The message is held up until the limit is over; then it comes, and changes nothing.
        if limit.program == "send":
            until(lambda: not host.files("run"), "the end of the conversation")
        else:
            until(lambda: not attempt.to.is_building(), "the end of the guest there")
        attempt.release("late")
        attempt.wait()
        first, _, then = limit.end.partition("-")
        assert attempt.end() == first, attempt.said()
        assert limit.says in attempt.ended[0].stderr, attempt.said()
        attempt.check_statuses(first)
        if then:
            assert attempt.ask() == then
        attempt.settle(then or first)


# Two moves at once.


@in_both("command")
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

"""The answered forms when the terminal sends a signal to all processes in the foreground.

Before GO the signal brings the guest back; after GO bhysend says that the signal is too late.  A
stop signal freezes no paused guest.  One copy of the guest runs in the end, as in
test_handshake_failures.py.
"""

from __future__ import annotations

import os
import signal

import pytest

from support.processes import ignores
from support.waiting import until

from .attempt import Attempt, Gate
from .kinds import ANY, matrix
from .travel import Host, Traveller, processes_with

BEFORE_GO = [
    ("HELLO", "SIGINT"),
    ("round-0", "SIGINT"),
    ("round-0", "SIGHUP"),
    ("paused", "SIGINT"),
    ("paused", "SIGTERM"),
    ("READY", "SIGINT"),
    ("READY", "SIGHUP"),
]


@pytest.mark.parametrize(
    "kind, point, name", matrix(BEFORE_GO, [("paused", "SIGINT"), ("READY", "SIGHUP")])
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
        # At the pause the -p command gets the signal too, and its failure may be seen first.
        assert sent.status == 75 or (sent.status == 69 and point == "paused"), attempt.said()
        assert "it runs here" in sent.stderr
        attempt.settle("here")


AFTER_GO = [
    (point, name) for point in ("GO", "RUNNING") for name in ("SIGINT", "SIGHUP", "SIGTERM")
]


@pytest.mark.parametrize("kind, point, name", matrix(AFTER_GO, [("GO", "SIGINT")]))
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


@pytest.mark.parametrize(
    "kind, point", matrix([("round-0",), ("paused",), ("GO",)], [("round-0",)])
)
def test_a_stop_from_the_terminal_freezes_no_paused_guest(
    point: str, host: Host, small: Traveller, gate: Gate
) -> None:
    """While the guest runs, Ctrl-Z stops bhysend, but never the command.

    The kernel drops SIGTSTP if no shell could send SIGCONT, which is the case here; so the test
    reads from the processes' signal masks what they would do.
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
    """In the three-stage form bhyrecv gets the signal too, and gives up its wait for GO."""
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


@ANY
def test_a_bhysend_that_is_stopped_while_its_guest_is_paused_is_ended(
    host: Host, small: Traveller, gate: Gate
) -> None:
    """The keeper cannot know whether a stopped bhysend will go on, so the keeper kills it first."""
    attempt = Attempt("three-stages", "paused", host, small, gate)
    with attempt.begin():
        os.kill(attempt.pid("bhysend"), signal.SIGSTOP)
        sent, *_, third = attempt.wait()
        assert (sent.status, third.status) == (-signal.SIGKILL, 69), attempt.said()
        assert "bhysend is gone; the guest runs on here" in sent.stderr
        # bhysend's -p command has ended too, because its move is over.
        until(lambda: not processes_with(str(attempt.marker)), "the end of the command")
        assert attempt.end() == "here"
        attempt.settle("here")

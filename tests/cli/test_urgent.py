"""From END to the answer that the guest runs the programs are urgent, and nobody else ever is.

The rounds, the state, a command of -p and the guest have their turns on the CPUs as all others do.
"""

from __future__ import annotations

import os

import pytest

from support.processes import is_gone
from support.scheduling import OTHER, URGENT, policy
from support.waiting import until

from .attempt import Attempt, Gate
from .travel import Host, Traveller


def policies(pid: int) -> set[int]:
    """Return the policies of all threads of a process."""
    return {policy(int(task)) for task in os.listdir(f"/proc/{pid}/task")}


@pytest.mark.parametrize(
    ("point", "urgent"),
    [
        ("paused", "nobody"),
        ("END", "bhysend"),
        ("READY", "both"),
        ("GO", "both"),
        ("RUNNING", "bhysend"),
    ],
)
def test_who_is_urgent(host: Host, small: Traveller, gate: Gate, point: str, urgent: str) -> None:
    sender = OTHER if urgent == "nobody" else URGENT
    receiver = URGENT if urgent == "both" else OTHER
    attempt = Attempt("three-stages", point, host, small, gate)
    with attempt.begin():
        bhysend = attempt.pid("bhysend")
        # bhysend's main thread, and the one that takes the answers.
        assert policies(bhysend) == {sender}
        bhyrecv = attempt.pid("bhyrecv")
        if point == "RUNNING":  # bhyrecv has said it, and goes on
            until(lambda: is_gone(bhyrecv) or policies(bhyrecv) == {OTHER}, "bhyrecv's policy")
        else:
            assert policies(bhyrecv) == {receiver}
        third = URGENT if point in ("GO", "RUNNING") else OTHER  # it has seen READY
        until(lambda: policies(attempt.pid("third")) == {third}, "the third stage's policy")
        others = [attempt.keeper] if attempt.keeper else []
        if point == "paused":
            others.append(attempt.pid("hook"))
        for pid in (attempt.pid("source"), *attempt.to.hypervisors(), *others):
            assert policies(pid) == {OTHER}
        attempt.release("late")
        attempt.wait()
        assert attempt.end() == "there", attempt.said()
        attempt.settle("there")

"""A real-time priority for a block: whose it is, that it ends, and that children do not get it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from bhystream.urgent import urgently
from support.scheduling import OTHER, URGENT, policy


@pytest.fixture
def thread() -> Iterator[threading.Thread]:
    """A thread that waits until the test is over."""
    over = threading.Event()
    made = threading.Thread(target=over.wait)
    made.start()
    yield made
    over.set()
    made.join()


def test_a_block_is_urgent_and_what_follows_is_not(thread: threading.Thread) -> None:
    assert thread.native_id
    with pytest.raises(KeyError), urgently(None, thread.native_id):
        assert (policy(0), policy(thread.native_id)) == (URGENT, URGENT)
        raise KeyError
    assert (policy(0), policy(thread.native_id)) == (OTHER, OTHER)


def test_what_is_started_in_a_block_is_not_urgent() -> None:
    code = "import os; print(os.sched_getscheduler(0))"
    found = []
    with urgently():
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
        started = threading.Thread(target=lambda: found.append(policy(0)))
        started.start()
        started.join()
    assert (int(done.stdout), found) == (OTHER, [OTHER])


def test_a_chosen_policy_stays() -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        with urgently():
            assert policy(0) == os.SCHED_BATCH
        assert policy(0) == os.SCHED_BATCH
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def test_a_user_who_may_not_be_urgent_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(id_: int, policy: int, param: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with urgently():
        assert policy(0) == OTHER


def test_a_thread_that_has_ended_is_no_error(thread: threading.Thread) -> None:
    with urgently(2**22 + 1):
        assert policy(0) == URGENT
    assert policy(0) == OTHER


def test_a_system_that_cannot_spare_the_children_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "SCHED_RESET_ON_FORK", raising=False)
    with urgently():
        assert policy(0) == OTHER

"""A real-time priority for a block: whose it is, when it ends, and that children do not get it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from bhystream import urgent
from bhystream.urgent import urgently
from support.scheduling import NICE, OTHER, URGENT, policy

may_be_urgent = pytest.mark.skipif(URGENT == OTHER, reason="nobody may have a priority here")


@pytest.fixture
def thread() -> Iterator[threading.Thread]:
    """A thread that waits until the test is over."""
    over = threading.Event()
    made = threading.Thread(target=over.wait)
    made.start()
    yield made
    over.set()
    made.join()


def assert_nothing_is_left() -> None:
    assert policy(0) == OTHER
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGPROF) == signal.SIG_DFL


@may_be_urgent
def test_a_block_is_urgent_and_what_follows_is_not(thread: threading.Thread) -> None:
    assert thread.native_id
    with pytest.raises(KeyError), urgently(None, thread.native_id):
        assert (policy(0), policy(thread.native_id)) == (URGENT, URGENT)
        assert os.sched_getparam(0).sched_priority == os.sched_get_priority_min(os.SCHED_RR)
        raise KeyError
    assert policy(thread.native_id) == OTHER
    assert os.sched_getscheduler(0) == OTHER
    assert_nothing_is_left()


@may_be_urgent
def test_what_is_started_in_a_block_is_not_urgent() -> None:
    code = "import os; print(os.sched_getscheduler(0))"
    found = []
    with urgently():
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
        started = threading.Thread(target=lambda: found.append(policy(0)))
        started.start()
        started.join()
    assert (int(done.stdout), found) == (OTHER, [OTHER])


@may_be_urgent
def test_who_computes_is_not_urgent_any_more(
    thread: threading.Thread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urgent, "_CPU_S", 0.02)
    assert thread.native_id
    with urgently(thread.native_id):
        end = time.process_time() + 10
        while policy(0) == URGENT and time.process_time() < end:
            pass
        assert (policy(0), policy(thread.native_id)) == (OTHER, OTHER)
    assert_nothing_is_left()


@may_be_urgent
def test_a_chosen_policy_stays() -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        with urgently():
            assert policy(0) == os.SCHED_BATCH
        assert policy(0) == os.SCHED_BATCH
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@may_be_urgent
@pytest.mark.parametrize("nice", [-5, 10])
def test_a_chosen_nice_value_stays(nice: int) -> None:
    os.setpriority(os.PRIO_PROCESS, 0, NICE + nice)
    try:
        with urgently():
            assert (policy(0), os.getpriority(os.PRIO_PROCESS, 0)) == (OTHER, NICE + nice)
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, NICE)


@may_be_urgent
def test_a_user_who_may_not_clear_the_flag_gives_the_priority_back() -> None:
    """A user who has the priority by RLIMIT_RTPRIO may not clear SCHED_RESET_ON_FORK."""
    code = """if True:
        import os
        from bhystream.urgent import urgently
        found = []
        with urgently():
            found.append(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)
            os.setresuid(65534, 65534, 65534)
        found.append(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)
        print(*found)
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, check=True, text=True)
    assert done.stdout == f"{URGENT} {OTHER}\n"


@may_be_urgent
def test_a_thread_may_end_in_a_block() -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    assert thread.native_id
    with urgently(thread.native_id):
        over.set()
        thread.join()
    assert_nothing_is_left()


def test_a_thread_that_has_ended_is_no_error() -> None:
    with urgently(2**22 + 1):
        assert policy(0) == URGENT
    assert_nothing_is_left()


def test_a_user_who_may_not_be_urgent_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(id_: int, policy: int, param: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with urgently():
        assert policy(0) == OTHER
        assert_nothing_is_left()


def test_a_system_that_cannot_spare_the_children_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "SCHED_RESET_ON_FORK", raising=False)
    with urgently():
        assert_nothing_is_left()

"""A guest that changes its memory twice as fast as the link carries, and --throttle.

Each guest rewrites the same pages again and again, so that no number of rounds gets them all
through; only if its vCPUs stand for a part of the time do the rounds get smaller.
"""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from support.waiting import until

from .kinds import ANY
from .pipeline import BHYSEND, Pipeline, Stage, report, run
from .travel import Host, Traveller, keeper_of

# Half of the rates at which the guests of kinds.py rewrite their memory; -d is less than the
# working sets take.
LINK = {"qemu": ("-B", "8M"), "g5": ("-B", "4M")}
MANY = ("--throttle", "95")


def test_without_a_throttle_bhysend_gives_up_and_says_what_would_fit(
    kind: str, host: Host, small: Traveller
) -> None:
    to = small.next()
    [sent] = run([*small.send("-r", "4", *LINK[kind]), *small.receive(to)], env=host.env)
    assert sent.status == 75, report(sent)
    assert "after 4 rounds" in sent.stderr
    assert "allow more with -d, -r or -T" in sent.stderr
    assert "ms would fit" in sent.stderr
    to.assert_nothing_left()
    small.run_on(host, sweeps=1)


def test_a_throttled_guest_moves(kind: str, host: Host, small: Traveller) -> None:
    to = small.next()
    [sent] = run([*small.send("-v", *LINK[kind], *MANY), *small.receive(to)], env=host.env)
    assert sent.status == 0, report(sent)
    assert "; throttled by " in sent.stderr.splitlines()[-1]
    small.hand_over(host, to)
    small.prove(1)


def throttled(kind: str, small: Traveller) -> list[str]:
    """Return a command that throttles the guest and does not come to an end by itself."""
    return small.send("-d", "0ms", "-r", "1000", *LINK[kind], *MANY)


def is_recorded(host: Host) -> bool:
    return [row.phase for row in host.rows()] == ["paused"]


def stop_while_the_guest_stands(bhysend: Stage, small: Traveller) -> None:
    """Stop bhysend at a moment at which its throttle has stopped the guest."""

    def stands() -> bool:
        bhysend.kill(signal.SIGSTOP)
        time.sleep(0.3)
        before = small.place.beats()
        time.sleep(0.7)
        if small.place.beats() == before:
            return True
        bhysend.kill(signal.SIGCONT)
        time.sleep(0.05 * random.random())
        return False

    until(stands, "a guest that stands")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_guest_runs_on_if_its_bhysend_ends(
    number: int, kind: str, host: Host, small: Traveller
) -> None:
    """The throttle stands on record before a vCPU is stopped."""
    with Pipeline(throttled(kind, small), ["cat"], env=host.env) as pipeline:
        until(lambda: is_recorded(host), "the record")
        stop_while_the_guest_stands(pipeline[0], small)
        pipeline[0].kill(number)
        pipeline[0].kill(signal.SIGCONT)
        sent, _ = pipeline.wait()
        host.await_unlocked()
        said = pipeline[0].stderr  # the keeper speaks after bhysend has ended
    if number == signal.SIGKILL:
        assert "bhysend is gone; the guest runs on here; it was throttled" in said
    else:
        assert sent.status == 75, report(sent)
    assert host.rows() == []
    small.run_on(host, sweeps=1)


@ANY
def test_without_its_keeper_a_throttled_guest_waits_for_the_operator(
    kind: str, host: Host, small: Traveller
) -> None:
    with Pipeline(throttled(kind, small), ["cat"], env=host.env) as pipeline:
        until(lambda: is_recorded(host), "the record")
        stop_while_the_guest_stands(pipeline[0], small)
        os.kill(keeper_of(pipeline[0].pid), signal.SIGKILL)
        pipeline[0].kill()
        pipeline.wait()
    host.await_unlocked()
    assert is_recorded(host)
    host.act(BHYSEND, "--resume", "proof")
    assert host.rows() == []
    small.run_on(host, sweeps=1)


@ANY
def test_a_signal_that_stops_bhysend_does_not_stop_its_guest_for_good(
    kind: str, host: Host, small: Traveller
) -> None:
    """The keeper ends a bhysend that is stopped while its guest may stand."""
    with Pipeline(throttled(kind, small), ["cat"], env=host.env) as pipeline:
        until(lambda: is_recorded(host), "the record")
        stop_while_the_guest_stands(pipeline[0], small)
        pipeline.wait()
        host.await_unlocked()
        assert "bhysend is gone; the guest runs on here" in pipeline[0].stderr
    small.run_on(host, sweeps=1)

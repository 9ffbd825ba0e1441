"""bhysend is killed at each point of a pause; the next process lets the guest go, or ends it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bhystream.backend.bhyve import fifo, paused
from bhystream.backend.bhyve.checkpoint import settle
from bhystream.errors import GuestEndedError, GuestError
from bhystream.guest import Json
from cli.pipeline import ROOT
from standin.rig import await_true

from .bhyve_child import POINTS
from .bhyve_rig import ID, Two, two_hosts
from .revived import open_paused

# The points at which a record is known, so that the guest can be let go.
ALL = tuple(point for point in POINTS if point != "rehearsing")


def killed(two: Two, point: str) -> Json:
    """Run a bhysend that is killed at a point; return its record, {} if it printed none."""
    words = [sys.executable, "-m", "backend.bhyve_child", str(two.base), str(two.config()), point]
    child = subprocess.run(
        words, env=two.here.environment, cwd=ROOT / "tests", capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    found: Json = json.loads(child.stdout or "{}")
    return found


@pytest.mark.parametrize("point", ALL)
def test_the_guest_runs_on_when_it_is_resumed(two: Two, point: str) -> None:
    guest = two.start()
    record = killed(two, point)
    for _ in range(2):
        open_paused(record).resume()
    two.assert_runs_on()
    assert settle(two.here.host.run_dir, "g", "guest g", 20.0)
    assert guest.process.poll() is None
    # Another bhysend can pause the guest.
    two.hold().resume()
    two.assert_runs_on()


@pytest.mark.parametrize("point", ALL)
def test_only_a_guest_that_stands_is_ended(two: Two, point: str) -> None:
    guest = two.start()
    found = open_paused(killed(two, point))
    if point == "held":
        assert not found.runs()
        found.discard("elsewhere")
        assert guest.await_exit() == -signal.SIGKILL
        assert two.held() == [] and not two.here.host.exists("g")
    elif point == "asked":
        # bhyve serves the request, so the guest comes to stand.
        await_true(found.stands, "the hold")
        found.discard("elsewhere")
        assert guest.await_exit() == -signal.SIGKILL
    else:
        with pytest.raises(GuestError, match="it runs, so it is not ended here"):
            found.discard("elsewhere")
        found.resume()
        two.assert_runs_on()


@pytest.mark.parametrize("point", ["asked", "held"])
def test_a_guest_that_dies_without_us_is_gone(two: Two, point: str) -> None:
    guest = two.start()
    found = open_paused(killed(two, point))
    guest.kill()
    assert not found.is_alive() and not found.runs()
    with pytest.raises(GuestEndedError):
        found.resume()
    found.discard("")
    assert two.held() == []


def test_a_rehearsal_ends_by_itself_and_is_swept(two: Two) -> None:
    guest = two.start()
    assert killed(two, "rehearsing") == {}
    assert two.held() == [ID]
    two.here.settings(fail=[])
    made = two.source()
    made.prepare("f" * 32)
    assert two.held() == ["f" * 32]
    made.close()
    assert guest.process.poll() is None
    two.assert_runs_on()


# One step of each kind while the FPU is stored.  test_bhyve_journal.py has all steps.
STORING = (
    *("write:1", "half file:1", "rename:1", "memory:1", "half memory:1", "set_register:9"),
    *("mark:1", "resume_cpu:1", "instruction:5", "instruction:20", "suspend_cpu:2"),
    *("half memory:2", "remove:1"),
)


@pytest.fixture
def one() -> Iterator[Two]:
    with two_hosts(generation=4) as made:
        yield made


@pytest.mark.parametrize("point", STORING)
def test_a_guest_whose_fpu_was_being_stored_goes_on(one: Two, point: str) -> None:
    guest = one.start()
    found = open_paused(killed(one, point))
    assert found.stands() and not found.runs()
    found.resume()
    one.assert_runs_on()
    assert guest.process.poll() is None
    one.hold().resume()
    one.assert_runs_on()


def test_a_guest_whose_fpu_was_being_stored_can_be_moved(one: Two) -> None:
    one.start()
    open_paused(killed(one, "instruction:20")).resume()
    ended = one.move()
    assert ended.status == 0, ended.stderr
    one.assert_moved()


def test_a_guest_whose_fpu_was_being_stored_can_be_ended(one: Two) -> None:
    guest = one.start()
    found = open_paused(killed(one, "instruction:5"))
    found.discard("")
    assert guest.await_exit() == -signal.SIGKILL
    assert one.held() == [] and not one.here.host.exists("g")


def test_one_who_is_killed_while_he_lets_it_go_has_let_it_go(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.start()
    found = open_paused(killed(two, "releasing"))
    monkeypatch.setattr(paused, "_SERVED_S", 0.0)
    monkeypatch.setattr(paused, "_SETTLE_S", 20.0)
    found.resume()
    two.assert_runs_on()
    assert fifo.pending(two.base / "held" / ID / "ckp.meta") == 0

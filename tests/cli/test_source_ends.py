"""The guest ends, or another program lets the paused guest run, during a move."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from backend.qemu_rig import state_of

from .attempt import Attempt, Gate
from .kinds import own
from .pair import Pair, paired
from .pipeline import BHYRECV, BHYSEND, Ended, report, run
from .travel import Host

FORMS = ("three-stages", "command")
# Before END the guest's end is the end of the move; from END on the destination has all of it.
BEFORE = ("HELLO", "round-0", "paused")
FALSE = ("Traceback", "it runs here", "goes on trying", "it stands paused here")


@pytest.mark.standin
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("point", BEFORE)
def test_a_guest_that_ends_is_not_moved(form: str, point: str, host: Host, gate: Gate) -> None:
    with closing(own("g5")) as guest:
        attempt = Attempt(form, point, host, guest, gate)
        with attempt.begin():
            attempt.kill("source")
            attempt.release("late")
            attempt.wait()
            assert attempt.ended[0].status == 69, attempt.said()
            assert "has ended" in attempt.ended[0].stderr
            assert not [words for words in FALSE if words in attempt.said()]
            assert not attempt.to.runs()
        attempt.to.assert_nothing_left()
        assert host.rows() == []
        assert not host.is_locked()


@pytest.mark.standin
def test_the_keeper_finds_that_a_guest_has_ended(host: Host, gate: Gate) -> None:
    with closing(own("g5")) as guest:
        attempt = Attempt("command", "paused", host, guest, gate)
        with attempt.begin():
            attempt.kill("source", "bhysend")
            attempt.release("late")
            attempt.wait()
            assert not [words for words in FALSE if words in attempt.said()]
            assert not attempt.to.runs()
        assert host.rows() == []
        assert not host.is_locked()


# Guests of QEMU, in each form.


@pytest.fixture
def pair() -> Iterator[Pair]:
    with paired() as made:
        yield made


SENDING = {
    "command": ((), (*BHYRECV, "there")),
    "plain": ((), ()),
    "kept": (("-k",), ()),
    "warm": (("-r", "0"), (*BHYRECV, "there")),
}


def send(pair: Pair, form: str, hook: str) -> Ended:
    """Send the guest in a form, with a -p command; assert that nothing is recorded or arrives."""
    options, command = SENDING[form]
    words = [*BHYSEND, *options, "-p", hook, f"qemu:{pair.here}", *command]
    sent = run(words, *([] if command else [["cat"]]), env=pair.env)[0]
    assert not Path(pair.there).exists(), report(sent)
    [listed] = run([*BHYSEND, "-l"], env=pair.env)
    assert (listed.status, listed.output) == (0, b""), report(listed)
    return sent


@pytest.mark.guest
@pytest.mark.parametrize("form", SENDING)
@pytest.mark.parametrize("then", ["", "; exit 1"], ids=["alone", "hook-fails-too"])
def test_a_qemu_that_ends_in_the_pause_is_the_end(pair: Pair, form: str, then: str) -> None:
    sent = send(pair, form, f"kill -9 {pair.pid}{then}")
    assert sent.status == 69, report(sent)
    why = f"bhysend: guest here: its QEMU (process {pair.pid}) has ended"
    assert sent.stderr.splitlines().count(why) == 1, report(sent)
    assert not [words for words in FALSE if words in sent.stderr], report(sent)


ASK = """\
import sys
from guest.qmp import run_command
from pathlib import Path
for command in sys.argv[2:]:
    run_command(Path(sys.argv[1]), command, {})
"""


@pytest.mark.guest
@pytest.mark.parametrize("form", SENDING)
@pytest.mark.parametrize("commands", [("cont",), ("cont", "stop")], ids="-".join)
def test_a_pause_that_another_monitor_ends_is_the_end_of_the_move(
    pair: Pair, form: str, commands: tuple[str, ...]
) -> None:
    """Even if the guest was stopped again: the state that was sent is no longer the guest's."""
    tests = str(Path(__file__).resolve().parents[1])
    words = ["env", f"PYTHONPATH={tests}", sys.executable, "-c", ASK, pair.second, *commands]
    sent = send(pair, form, shlex.join(words))
    assert sent.status == 69, report(sent)
    assert "another program let the guest run while it stood paused" in sent.stderr
    assert "it runs here" in sent.stderr
    assert state_of(pair.here) == "running"

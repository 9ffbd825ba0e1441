"""A guest that a killed bhyrecv left: the guest never runs, and the next bhyrecv removes it."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bhystream.backend.bhyve.sink import Checked
from bhystream.errors import IncompatibleError

from .arriving import ID, Arriving, arriving


@pytest.fixture
def guest() -> Iterator[Arriving]:
    with arriving() as made:
        yield made


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from backend.arriving import Arriving
from bhystream.backend.bhyve.sink import BhyveSink
guest = pickle.loads(Path(sys.argv[1]).read_bytes())
late, step = sys.argv[2] == "late", sys.argv[3]
def die(*args, **words):
    os.kill(os.getpid(), signal.SIGKILL)
if "." in step:
    import importlib
    module, _, rest = step.rpartition(":")
    owner = importlib.import_module(module)
    *path, name = rest.split(".")
    for one in path:
        owner = getattr(owner, one)
    setattr(owner, name, die)
sink = guest.sink()
guest.build(sink, late=late)
die()
"""

_RESTORE = "bhystream.backend.bhyve.restore:Restore"
STEPS = [
    "bhystream.backend.bhyve.restore:Child",  # the VM exists, the process does not
    *(f"{_RESTORE}.{name}" for name in ("_await_maps", "_map", "_await_read", "_stop")),
    "bhystream.backend.bhyve.waitingrestore:WaitingRestore.load",
]


def killed(guest: Arriving, step: str, how: str) -> None:
    """Let a separate bhyrecv process be killed at a step, so that nothing is undone."""
    pickled = guest.directory / "guest"
    pickled.write_bytes(pickle.dumps(guest.bare()))
    words = [sys.executable, "-c", KILLED, str(pickled), how, step]
    assert subprocess.run(words).returncode == -signal.SIGKILL


@pytest.mark.parametrize("how", ["early", "late"])
@pytest.mark.parametrize("step", [*STEPS, "ready"])
def test_what_a_killed_bhyrecv_leaves_never_runs_and_the_next_one_removes_it(
    guest: Arriving, step: str, how: str
) -> None:
    killed(guest, step, how)
    assert guest.left() != []
    assert guest.console.lines() == []
    sink = guest.sink()
    guest.build(sink)
    assert len(guest.processes()) == 1
    sink.start()
    guest.await_unbroken()


def test_the_next_one_may_be_of_another_stream(guest: Arriving) -> None:
    killed(guest, "ready", "early")
    [left] = guest.processes()
    sink = guest.sink(id_="f" * 32)
    guest.build(sink)
    assert left not in guest.processes()
    sink.abort()
    assert guest.left() == []


def test_a_vm_that_others_made_is_not_taken_for_what_is_left(guest: Arriving) -> None:
    killed(guest, "ready", "early")
    guest.there.host.destroy("g")
    guest.there.host.create("g")
    [reason] = guest.sink(force=True).check(guest.head)
    assert reason.startswith("name: a VM g is here already")


def test_one_of_which_a_record_speaks_is_not_ended_by_the_next(guest: Arriving) -> None:
    """The guest may have been started: --again claims that it does not run, which is not enough."""
    sink = guest.sink()
    guest.build(sink)
    guest.there.settings(fail=["slow-restore"])
    (guest.base / "destination" / f"{ID}.json").touch()
    pid = sink.record()["process"]["pid"]
    other = guest.sink()
    [reason] = other.check(guest.head)
    assert reason.startswith("name: a VM g is here already")
    other._stage = Checked(sink._checked.guest)
    with pytest.raises(IncompatibleError, match="a bhyve starts, or runs, from this stream"):
        other.open(guest.plan)
    other.abort()
    assert pid in guest.processes()
    assert sink._checked.waiting().is_held()
    sink.abort()

"""Moves between stand-ins that end badly: where the guest is then, and who says so."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.pipeline import Ended, Pipeline, report, until
from cli.travel import fifo, is_gone, processes_with
from standin.rig import Console, assert_unbroken, await_true

from .bhyve_rig import Two, require_sink, two_hosts


@pytest.fixture
def two() -> Iterator[Two]:
    require_sink()
    with two_hosts() as made:
        yield made


def records(two: Two) -> list[str]:
    return [path.stem for path in (two.base / "source").glob("*.json")]


def verb(two: Two, *options: str) -> Ended:
    [ended] = two.run(two.send(*options))
    return ended


# The destination.


def test_a_guest_that_the_destination_cannot_start_runs_on(two: Two) -> None:
    two.start()
    two.there.settings(fail=["restore"])
    ended = two.move("-f")
    assert ended.status == 69, ended.stderr
    assert "bhyve -r: Failed to restore kernel structs" in ended.stderr
    assert "guest g: it runs here" in ended.stderr
    two.assert_runs_on()
    assert two.left() == []
    two.there.settings(fail=[])
    ended = two.move("-f")
    assert ended.status == 0, ended.stderr
    two.assert_moved()


def test_a_guest_that_may_have_run_at_the_destination_is_in_doubt(two: Two) -> None:
    guest = two.start()
    two.there.settings(fail=["restore-late"])
    ended = two.move("-f")
    assert ended.status == 81, ended.stderr
    assert two.here.pid("g") is None
    assert two.there.pid("g") is None
    assert len(records(two)) == 1
    # It is kept on disk, and comes back when the operator says so.
    assert verb(two, "--resume").status == 69
    done = verb(two, "--resume", "--in-doubt")
    assert done.status == 0, report(done)
    Console(guest.console.path).await_sweeps(1)
    assert_unbroken(guest.console)
    assert records(two) == [] and two.held() == []


def test_a_slow_start_at_the_destination_is_waited_for(two: Two) -> None:
    guest = two.start()
    two.there.settings(fail=["slow-restore"])
    with Pipeline([*two.send("-f"), *two.receive()], env=two.here.environment) as pipeline:
        await_true(lambda: two.there.host.exists("g"), "bhyve -r")
        assert guest.await_exit() == 5
        (two.there.directory / "release").touch()
        [ended] = pipeline.wait()
    assert ended.status == 0, ended.stderr
    two.assert_moved()


# bhyve dies.


@pytest.mark.parametrize("form", ["command", "plain"])
def test_a_bhyve_that_is_killed_in_its_suspend_is_not_called_running(two: Two, form: str) -> None:
    guest = two.start()
    two.here.settings(fail=["die"])
    if form == "command":
        sent = two.move("-f")
    else:
        sent, received = two.run(two.send("-f"), two.receive())
        assert received.status in range(64, 78), report(received)
    assert guest.await_exit() == -signal.SIGKILL
    assert sent.status == 69, report(sent)
    assert "its bhyve has ended, and left nothing to go on from" in sent.stderr
    assert "it runs here" not in sent.stderr
    assert "goes on trying" not in sent.stderr
    assert two.there.pid("g") is None
    assert two.left() == []


# bhysend and its keeper die.


@pytest.fixture
def gate(two: Two) -> Iterator[Path]:
    """A FIFO that a command at the pause reads."""
    path = two.directory / "gate"
    with fifo(path) as fd:
        yield path
        os.write(fd, b"\n")


def paused_move(two: Two, gate: Path) -> Pipeline:
    """Start a move and wait until it stands in the pause."""
    marker = two.directory / "paused"
    hook = f": > {marker}; read -r line < {gate}"
    command = [*two.send("-f", "-p", hook), *two.receive()]
    pipeline = Pipeline(command, env=two.here.environment)
    until(marker.exists, "the pause")
    return pipeline


def keeper_of(two: Two) -> int:
    """Return the keeper of this state directory."""
    [pid] = [pid for pid in processes_with("bhystream.keeper") if mentions(pid, two.base)]
    return pid


def mentions(pid: int, base: Path) -> bool:
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    return f"BHYSEND_STATE_DIR={base}\0".encode() in environment


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        await_true(lambda pid=pid: is_gone(pid), "the end of the killed")  # type: ignore[misc]


def test_the_keeper_brings_it_back_when_bhysend_is_killed(two: Two, gate: Path) -> None:
    guest = two.start()
    with paused_move(two, gate) as pipeline:
        assert guest.await_exit() == 5
        kill(pipeline[0].pid)
        two.assert_comes_back()
    assert two.left() == []


@pytest.mark.parametrize("is_left", [True, False], ids=["G4", "G5"])
def test_both_killed_in_the_pause(is_left: bool) -> None:
    """With the VM left behind it is brought back; else its memory is gone, and that is said."""
    require_sink()
    with two_hosts(generation=4 if is_left else 5, node_left=is_left) as two:
        guest = two.start()
        gate = two.directory / "gate"
        with fifo(gate) as fd:
            with paused_move(two, gate) as pipeline:
                assert guest.await_exit() == 5
                kill(keeper_of(two), pipeline[0].pid)
            os.write(fd, b"\n")
        listed = verb(two, "-l")
        assert re.match(r"g\tpaused\t", listed.output.decode()), report(listed)
        done = verb(two, "--resume")
        if is_left:
            assert done.status == 0, report(done)
            two.assert_runs_on()
        else:
            assert done.status == 69, report(done)
            assert "it is gone, so it cannot be resumed" in done.stderr
            assert "forget it: --discard" in done.stderr
            done = verb(two, "--discard")
            assert done.status == 0, report(done)
            assert "it was gone already" in done.stderr
        assert records(two) == []
        assert list(two.staging.iterdir()) == []


# vm-bhyve.


@pytest.fixture(params=[0, 5], ids=["exit-0", "exit-5"])
def vm(request: pytest.FixtureRequest) -> Iterator[Two]:
    require_sink()
    with two_hosts(suspend_status=request.param) as made, made.supervise():
        yield made


def test_a_guest_of_vm_bhyves_moves_away_and_is_not_started_again(vm: Two) -> None:
    ended = vm.move("-f")
    assert ended.status == 0, ended.stderr
    assert vm.guests[0].await_exit() == 0
    assert vm.lock("run") == "moved-by-bhysend"  # this host's name is the destination's too
    assert vm.lock("suspending") is None
    log = (vm.here.directory / "vm" / "g" / "vm-bhyve.log").read_text()
    assert "run 2" not in log
    vm.assert_moved()


def test_a_guest_of_vm_bhyves_that_cannot_move_runs_on_without_its_supervisor(vm: Two) -> None:
    vm.there.settings(fail=["restore"])
    ended = vm.move("-f")
    assert ended.status == 69, ended.stderr
    assert vm.guests[0].await_exit() == 0
    assert vm.lock("run") == os.uname().nodename
    assert vm.lock("suspending") is None
    assert vm.here.host.bridge_of("tap-g-0-4-0") == "bridge0"
    vm.assert_runs_on()
    # And it can be moved again, by what was noted of its start.
    vm.there.settings(fail=[])
    ended = vm.move("-f")
    assert ended.status == 0, ended.stderr
    vm.assert_moved()


def test_a_guest_of_vm_bhyves_that_is_refused_keeps_its_supervisor(vm: Two) -> None:
    vm.there.host.create("g")
    ended = vm.move("-f")
    assert ended.status == 76, ended.stderr
    vm.there.host.destroy("g")
    assert vm.lock("suspending") is None
    assert vm.guests[0].process.poll() is None
    vm.assert_runs_on()


def test_a_guest_of_vm_bhyves_that_is_held_is_locked(vm: Two) -> None:
    sent, received = vm.run(vm.send("-f"), vm.receive())
    assert (sent.status, received.status) == (80, 0), report(sent, received)
    assert vm.lock("run") == "held-by-bhysend"
    assert not list((vm.here.directory / "vm" / "g").glob("*.save*"))
    vm.arrived().await_sweeps(1)
    done = verb(vm, "--discard")
    assert done.status == 0, report(done)
    assert vm.lock("run") == "moved-by-bhysend"
    vm.assert_moved()

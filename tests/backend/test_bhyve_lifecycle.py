"""A bhyve guest whose move, keeper, host or supervisor fails.

Each test asks three questions after a fault: does the guest still exist, is
there only one copy of it, and do the messages say so?
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.backend import process
from bhystream.backend.bhyve import paused as paused_module
from bhystream.backend.bhyve.paused import BhyvePaused
from bhystream.errors import GuestEndedError
from bhystream.guest import PAUSED
from bhystream.handover import standing
from bhystream.handover.state import Record, Records
from cli.pipeline import Ended, Pipeline, report
from cli.travel import fifo, processes_with
from standin.rig import Spec, assert_unbroken, await_true
from support.processes import is_gone
from support.waiting import until

from .bhyve_rig import ID, Two, require_sink, small_tmpfs, two_hosts


@pytest.fixture
def two() -> Iterator[Two]:
    require_sink()
    with two_hosts() as made:
        yield made


@pytest.fixture(params=[4, 5], ids=["G4", "G5"])
def both(request: pytest.FixtureRequest) -> Iterator[Two]:
    require_sink()
    with two_hosts(generation=request.param) as made:
        yield made


def records(two: Two) -> list[str]:
    return [path.stem for path in (two.base / "source").glob("*.json")]


def verb(two: Two, *options: str) -> Ended:
    [ended] = two.run(two.send(*options))
    return ended


# The destination.


def test_a_guest_that_the_destination_cannot_start_runs_on(both: Two) -> None:
    both.start()
    both.there.settings(fail=["restore"])
    ended = both.move("-f")
    assert ended.status == 69, ended.stderr
    assert "guest g: it runs here" in ended.stderr
    both.assert_runs_on()
    assert both.left() == []
    both.there.settings(fail=[])
    ended = both.move("-f")
    assert ended.status == 0, ended.stderr
    both.assert_moved()


def test_a_guest_that_may_have_run_at_the_destination_is_in_doubt(both: Two) -> None:
    guest = both.start()
    both.there.settings(fail=["restore-late"])
    ended = both.move("-f")
    assert ended.status == 81, ended.stderr
    assert guest.process.poll() is None  # the guest stands paused
    assert len(records(both)) == 1
    beats = guest.console.beats()
    assert verb(both, "--resume").status == 69
    assert guest.console.beats() == beats
    done = verb(both, "--resume", "--in-doubt")
    assert done.status == 0, report(done)
    guest.console.await_sweeps(1)
    assert_unbroken(guest.console)
    assert records(both) == [] and both.held() == []


def test_the_end_of_a_guest_in_doubt_is_the_operator_s(two: Two) -> None:
    guest = two.start()
    two.there.settings(fail=["restore-late"])
    assert two.move("-f").status == 81
    beats = guest.console.beats()
    done = verb(two, "--discard")
    assert done.status == 0, report(done)
    assert guest.await_exit() == -signal.SIGKILL
    assert guest.console.beats() == beats
    assert not two.here.host.exists("g") and two.held() == [] and records(two) == []


# bhyve.


@pytest.mark.parametrize("form", ["command", "plain"])
def test_a_bhyve_that_is_killed_in_the_pause_is_not_called_running(two: Two, form: str) -> None:
    guest = two.start()
    two.here.settings(fail=["hold-die"])
    if form == "command":
        sent = two.move("-f")
    else:
        sent, received = two.run(two.send("-f"), two.receive())
        assert received.status in range(64, 78), report(received)
    assert guest.await_exit() == -signal.SIGKILL
    assert sent.status == 69, report(sent)
    assert "has ended" in sent.stderr
    assert "it runs here" not in sent.stderr
    assert two.there.pid("g") is None
    assert two.left() == []


def test_a_guest_that_powers_off_during_the_rounds_is_not_called_held(two: Two) -> None:
    guest = two.start()
    # The changed pages take longer than 1 ms to send, so the rounds go on while the guest runs.
    words = [*two.send("-v", "-B", "4M", "-d", "1ms", "-r", "1000"), *two.receive()]
    sent = subprocess.Popen(words, stderr=subprocess.PIPE, env=two.here.environment, text=True)
    assert sent.stderr is not None
    for line in sent.stderr:
        if "bhysend: guest g: round 1:" in line:
            break
    guest.power_off()
    said = sent.communicate(timeout=60)[1]
    assert sent.returncode == 69
    assert "its bhyve has ended" in said
    assert "it runs here" not in said
    assert two.left() == []


def test_a_device_that_cannot_be_saved_is_refused_before_memory(both: Two) -> None:
    spec = Spec(devices=(*Spec().devices, ("0.9.0", "nvme")))
    guest = both.start(spec)
    ended = both.move("-f", without="0.9.0")
    assert ended.status == 69, ended.stderr
    assert "a device that cannot be saved is the usual reason" in ended.stderr
    assert "guest g: it runs here" in ended.stderr
    both.assert_runs_on()
    assert guest.stderr().count("Failed to snapshot nvme@pci.0.9.0") == 1


def test_a_guest_with_vcpus_that_never_started_is_refused_by_all_forms(two: Two) -> None:
    two.start(Spec(keys={"standin.waiting": "1"}))
    with (two.directory / "kept").open("wb") as file:
        [kept] = two.run_into(file, two.send("-k"))
    for ended in (two.move("-f"), kept, verb(two, "-nP")):
        assert ended.status == 76, report(ended)
        assert "vcpus: 1 of 2 were never started" in ended.stderr
    two.assert_runs_on()


def test_a_guest_that_is_gone_says_nothing_of_the_next(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.start()
    found = two.hold()
    recorded(two, found)
    two.guests[0].kill()
    two.here.host.destroy("g")
    again = two.start()
    with pytest.raises(GuestEndedError):
        BhyvePaused(two.here.host, found.record).resume()
    standing.refuse_held(two.base, "g")  # does not raise: the guest may be sent
    assert Records(two.base, "source").all() == []
    assert again.process.poll() is None
    two.assert_runs_on()


def recorded(two: Two, found: BhyvePaused, phase: str = PAUSED) -> Records:
    kept = Records(two.base, "source")
    name = found.record.name
    kept.write(Record(ID, name, name, "standin-g", phase, dict(found.record.to_json())))
    return kept


def test_after_a_crash_of_the_host_nothing_of_it_is_left_to_do(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = two.start()
    found = two.hold()
    kept = recorded(two, found)
    guest.kill()
    two.here.host.destroy("g")
    for module in (process, paused_module):
        monkeypatch.setattr(module, "boot_id", lambda: "another")
    again = two.start()
    late = BhyvePaused(two.here.host, found.record)
    assert not late.is_alive() and not late.runs()
    standing.refuse_held(two.base, "g")
    assert kept.all() == [] and two.held() == []
    assert again.process.poll() is None


# bhysend and its keeper.


@pytest.fixture
def gate(both: Two) -> Iterator[Path]:
    """A FIFO that the -p command of paused_move() reads."""
    path = both.directory / "gate"
    with fifo(path) as fd:
        yield path
        os.write(fd, b"\n")


def paused_move(two: Two, gate: Path) -> Pipeline:
    """Start a move and wait until the guest is paused and the -p command waits."""
    marker = two.directory / "paused"
    hook = f": > {marker}; read -r line < {gate}"
    command = [*two.send("-f", "-p", hook), *two.receive()]
    pipeline = Pipeline(command, env=two.here.environment)
    until(marker.exists, "the pause")
    return pipeline


def keeper_of(two: Two) -> int:
    """Return the pid of this state directory's keeper."""
    [pid] = [pid for pid in processes_with("bhystream.send.keeper") if mentions(pid, two.base)]
    return pid


def mentions(pid: int, base: Path) -> bool:
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    return f"BHYSEND_STATE_DIR={base}\0".encode() in environment


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        await_true(lambda pid=pid: is_gone(pid), "the end of the killed")  # type: ignore[misc]


def test_the_keeper_lets_it_go_when_bhysend_is_killed(both: Two, gate: Path) -> None:
    both.start()
    with paused_move(both, gate) as pipeline:
        kill(pipeline[0].pid)
        both.assert_comes_back()
    assert both.left() == []


def test_both_killed_in_the_pause(both: Two, gate: Path) -> None:
    """The guest stays paused when both processes die, and any bhysend can resume it."""
    guest = both.start()
    with paused_move(both, gate) as pipeline:
        kill(keeper_of(both), pipeline[0].pid)
        beats = guest.console.beats()
        listed = verb(both, "-l")
        assert re.match(r"g\tpaused\t", listed.output.decode()), report(listed)
        assert guest.console.beats() == beats
        done = verb(both, "--resume")
        assert done.status == 0, report(done)
    both.assert_runs_on()
    assert records(both) == []


def test_somebody_who_lets_it_run_in_the_pause_ends_the_move(both: Two, gate: Path) -> None:
    both.start()
    with paused_move(both, gate) as pipeline:
        [directory] = (both.base / "held").iterdir()
        subprocess.run(["cat", directory / "ckp.meta"], stdout=subprocess.DEVNULL, check=True)
        with open(gate, "w") as file:
            file.write("\n")
        [ended] = pipeline.wait()
    assert ended.status == 69, report(ended)
    assert "another program let the guest run while it stood paused" in ended.stderr
    both.assert_runs_on()
    assert both.left() == []


def test_a_guest_that_is_held_waits_for_its_operator(both: Two) -> None:
    guest = both.start()
    sent, received = both.run(both.send("-f"), both.receive())
    assert (sent.status, received.status) == (80, 0), report(sent, received)
    beats = guest.console.beats()
    both.arrived().await_sweeps(1)
    assert guest.process.poll() is None and guest.console.beats() == beats
    [again] = both.run(both.send("-f"))
    assert again.status == 69 and "bhysend --discard" in again.stderr
    done = verb(both, "--discard")
    assert done.status == 0, report(done)
    both.assert_moved()


def test_a_kept_guest_stands_for_a_moment_and_its_copy_starts_elsewhere(
    both: Two, tmp_path: Path
) -> None:
    guest = both.start()
    with (tmp_path / "kept").open("wb") as file:
        [ended] = both.run_into(file, both.send("-k"))
    assert ended.status == 0, ended.stderr
    both.assert_runs_on()
    with (tmp_path / "kept").open("rb") as file:
        [ended] = both.run_from(file, both.receive())
    assert ended.status == 0, ended.stderr
    both.arrived().await_sweeps(1)
    assert_unbroken(guest.console)
    copy = both.arrived().beats()
    assert copy == list(range(copy[0], copy[0] + len(copy)))


def test_a_full_disk_is_seen_before_the_guest_is_paused(two: Two) -> None:
    two.start()
    with small_tmpfs(two.base / "held", "1m"):
        ended = two.move("-f")
        assert ended.status == 69, ended.stderr
        assert "state directory: " in ended.stderr
        assert "guest g: it runs here" in ended.stderr
    two.assert_runs_on()


# vm-bhyve.


@pytest.fixture
def vm() -> Iterator[Two]:
    require_sink()
    with two_hosts() as made, made.supervise():
        yield made


def vm_log(two: Two) -> str:
    return (two.here.directory / "vm" / "g" / "vm-bhyve.log").read_text()


def test_a_guest_of_vm_bhyves_moves_away_and_is_not_started_again(vm: Two) -> None:
    ended = vm.move("-f")
    assert ended.status == 0, ended.stderr
    assert vm.guests[0].await_exit() == 0
    assert vm.lock("run") == "moved-by-bhysend"  # both ends have this host's name
    assert vm.lock("suspending") is None
    assert "run 2" not in vm_log(vm)
    assert "suspended" in vm_log(vm)  # told before the kill, so on_fault is ignored
    vm.assert_moved()


def test_a_guest_of_vm_bhyves_that_cannot_move_keeps_its_supervisor(vm: Two) -> None:
    vm.there.settings(fail=["restore"])
    ended = vm.move("-f")
    assert ended.status == 69, ended.stderr
    assert vm.guests[0].process.poll() is None  # the supervisor
    assert vm.lock("run") == os.uname().nodename
    assert vm.lock("suspending") is None
    vm.assert_runs_on()
    vm.there.settings(fail=[])
    ended = vm.move("-f")
    assert ended.status == 0, ended.stderr
    vm.assert_moved()


def test_a_guest_of_vm_bhyves_that_is_held_is_not_booted_if_this_host_restarts(vm: Two) -> None:
    sent, received = vm.run(vm.send("-f"), vm.receive())
    assert (sent.status, received.status) == (80, 0), report(sent, received)
    assert vm.lock("run") == "held-by-bhysend"
    assert vm.lock("suspending") is None
    assert vm.guests[0].process.poll() is None
    assert not list((vm.here.directory / "vm" / "g").glob("*.save*"))
    vm.arrived().await_sweeps(1)
    done = verb(vm, "--discard")
    assert done.status == 0, report(done)
    assert vm.guests[0].await_exit() == 0
    assert vm.lock("run") == "moved-by-bhysend"
    vm.assert_moved()


def test_a_guest_of_vm_bhyves_that_stays_is_as_it_was_to_vm_bhyve(vm: Two) -> None:
    """Whether it is resumed, or was never paused, or bhysend was killed before the pause."""
    [sent] = vm.run(vm.send("-f"))
    assert sent.status == 80, report(sent)
    done = verb(vm, "--resume")
    assert done.status == 0, report(done)
    assert vm.lock("run") == os.uname().nodename
    with Pipeline(vm.send("-B", "1M"), ["cat"], env=vm.here.environment) as pipeline:
        await_true(lambda: vm.lock("run") == "held-by-bhysend", "the rehearsal")
        pipeline[0].kill()
        pipeline.wait()
    vm.guests[0].console.await_sweeps(1)
    assert vm.lock("run") == "held-by-bhysend"
    [sent] = vm.run(vm.send("-T", "1s", "-B", "1M"))
    assert sent.status == 75, report(sent)
    assert vm.lock("run") == os.uname().nodename
    ended = vm.move("-f")
    assert ended.status == 0, ended.stderr
    vm.assert_moved()


def test_a_supervisor_that_would_start_it_again_is_refused_at_first(vm: Two) -> None:
    conf = vm.here.directory / "vm" / "g" / "g.conf"
    conf.write_text(conf.read_text() + 'on_fault="restart"\n')
    vm.here.settings(knows_suspending_lock=False)
    ended = vm.move("-f")
    assert ended.status == 76, ended.stderr
    assert "on_fault is restart" in ended.stderr
    vm.here.settings(knows_suspending_lock=True)
    ended = vm.move("-f")
    assert ended.status == 0, ended.stderr
    assert "run 2" not in vm_log(vm)
    assert "suspended" in vm_log(vm)  # told before the kill, so on_fault is ignored
    vm.assert_moved()


def test_a_supervisor_that_has_changed_since_is_not_let_start_it_again(vm: Two) -> None:
    sent, received = vm.run(vm.send("-f"), vm.receive())
    assert (sent.status, received.status) == (80, 0), report(sent, received)
    conf = vm.here.directory / "vm" / "g" / "g.conf"
    conf.write_text(conf.read_text() + 'on_fault="restart"\n')
    vm.here.settings(knows_suspending_lock=False)
    done = verb(vm, "--discard")
    assert done.status == 69, report(done)
    assert "vm-bhyve would start it again (on_fault)" in done.stderr
    assert vm.guests[0].process.poll() is None and vm.here.pid("g") is not None
    vm.here.settings(knows_suspending_lock=True)
    assert verb(vm, "--discard").status == 0
    vm.assert_moved()

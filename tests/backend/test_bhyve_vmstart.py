"""A guest that vm-bhyve's `vm start` starts at the destination, and supervises from then on.

vm-bhyve is played by the stand-in's supervisor here; tests/bhyve runs the real one.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cli.pipeline import BHYRECV, Ended, Pipeline
from cli.travel import processes_with
from standin.rig import Spec, await_true
from support.processes import process_state

from .bhyve_rig import UUID, Two, require_sink, two_hosts

TAP = "tap9"
CPUS = Spec().cpus


class Managed:
    """Two hosts; at the destination vm-bhyve has the guest g, and has never run it."""

    def __init__(self, two: Two) -> None:
        self.two, self.there = two, two.there
        self.directory = self.there.directory / "vm" / "g"
        self.directory.mkdir()
        self.conf = self.directory / "g.conf"
        self.conf.write_text(f'uuid="{UUID}"\n')
        self.describe(Spec())

    def describe(self, spec: Spec) -> None:
        """Let `vm start` start such a guest, with a tap that it makes itself."""
        config = self.there.write_config("g", spec, self.two.arrived().path)
        text = config.read_text().replace("tap-g-0-4-0", TAP)
        lines = [line for line in text.splitlines() if "standin." not in line]
        config.write_text("\n".join([*lines, f"uuid={UUID}", ""]))
        program = self.there.directory / "vm-start"
        python = shlex.join([sys.executable, "-P", "-m", "bhystream.standin.supervisor"])
        words = f"-t {TAP}:bridge0 $1 -- -k {config}"
        program.write_text(f"#!/bin/sh\n{python} {words} </dev/null >/dev/null 2>&1 &\n")
        program.chmod(0o755)

    def receive(self, *options: str) -> list[str]:
        """Return bhyrecv's words, with no -o at all."""
        words = self.two.receive(*options)
        lent = [at + 1 for at, word in enumerate(words) if word == "-o"]
        return [word for at, word in enumerate(words) if at not in lent and word != "-o"]

    def move(self, *options: str) -> Ended:
        """Move g.  options: bhysend's."""
        [ended] = self.two.run([*self.two.send("-f", *options), *self.receive()])
        return ended

    def waiting_pid(self) -> int:
        """Return the pid of the stopped bhyve that waits for its last page, 0 if there is none."""
        for path in (self.two.base_there / "loaded").glob("*.started"):
            process = json.loads(path.read_text())["process"]
            if process and process_state(process["pid"]) == "T":
                return int(process["pid"])
        return 0

    def booted(self) -> int:
        """Return how often the guest has begun from nothing at the destination."""
        return self.two.arrived().beats().count(1)

    def lock(self) -> list[str]:
        """Return the lines of run.lock; [] if there is none."""
        with suppress(FileNotFoundError):
            return (self.directory / "run.lock").read_text().splitlines()
        return []

    def log(self) -> str:
        return (self.directory / "vm-bhyve.log").read_text()

    def await_supervisor_gone(self) -> None:
        await_true(lambda: self.lock() == [], "the end of the supervisor")
        assert not self.there.host.has_tap(TAP)
        assert not self.there.host.exists("g")
        assert not list((self.two.base_there / "vm").iterdir())


@pytest.fixture
def vm() -> Iterator[Managed]:
    require_sink()
    with two_hosts() as two:
        two.start()
        yield Managed(two)


def test_a_guest_arrives_as_vm_bhyve_starts_it_and_reboots(vm: Managed) -> None:
    """It needs no -o, and no earlier start there; a reboot inside goes by the system's bhyve."""
    ended = vm.move()
    assert ended.status == 0, ended.stderr
    vm.two.assert_moved()
    assert vm.there.host.has_tap(TAP)
    assert vm.lock() == [os.uname().nodename]
    assert not list((vm.two.base_there / "vm").iterdir())
    assert vm.booted() == 0
    pid = vm.there.pid("g")
    assert pid is not None
    os.kill(pid, signal.SIGUSR1)
    await_true(lambda: vm.there.pid("g") not in (None, pid), "the guest after its reboot")
    assert "starting bhyve (run 2)" in vm.log()
    again = vm.there.pid("g")
    assert again is not None
    os.kill(again, signal.SIGTERM)
    vm.await_supervisor_gone()
    assert vm.log().endswith(": stopped\n")


def parent_of(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[1])


@contextmanager
def waiting(vm: Managed) -> Iterator[Pipeline]:
    """Begin a move, slowly, and yield when the destination's bhyve waits for its last page."""
    words = [*vm.two.send("-f", "-B", "3M"), *vm.receive()]
    with Pipeline(words, env=vm.two.here.environment) as pipeline:
        await_true(lambda: vm.lock() == ["waits-for-bhyrecv"], "run.lock's word")
        await_true(lambda: vm.waiting_pid() != 0, "the bhyve that waits")
        yield pipeline


ON_FAULT = pytest.mark.parametrize("on_fault", ["shutdown", "restart"])


def before_suspending_lock(vm: Managed, on_fault: str) -> None:
    """Let vm-bhyve be older than 1.7.0, and act by on_fault after bhyve was killed."""
    vm.there.settings(knows_suspending_lock=False)
    vm.conf.write_text(f'uuid="{UUID}"\non_fault="{on_fault}"\n')


@ON_FAULT
def test_a_move_that_fails_leaves_no_guest_and_no_supervisor(vm: Managed, on_fault: str) -> None:
    before_suspending_lock(vm, on_fault)
    with waiting(vm) as pipeline:
        pipeline[0].kill(signal.SIGTERM)
        [ended] = pipeline.wait()
        assert ended.status == 75, ended.stderr
    vm.await_supervisor_gone()
    assert vm.booted() == 0
    vm.two.assert_runs_on()


@ON_FAULT
def test_what_a_killed_bhyrecv_leaves_boots_nothing(vm: Managed, on_fault: str) -> None:
    """Neither vm-bhyve nor `vm start` boots the guest, and the next bhyrecv cleans up."""
    before_suspending_lock(vm, on_fault)
    with waiting(vm) as pipeline:
        found = processes_with(f"{BHYRECV[-1]}\0g\0")
        [bhyrecv] = [pid for pid in found if pid != pipeline[0].pid]
        os.kill(bhyrecv, signal.SIGKILL)
        [ended] = pipeline.wait()
        assert ended.status in (69, 74), ended.stderr
    vm.two.guests[0].console.await_sweeps(1)
    assert vm.lock() == ["waits-for-bhyrecv"]
    ended = vm.move()
    assert ended.status == 0, ended.stderr
    vm.two.assert_moved()
    assert vm.booted() == 0
    assert vm.lock() == [os.uname().nodename]


@ON_FAULT
def test_a_bhyve_that_is_killed_while_it_waits_is_not_booted_anew(
    vm: Managed, on_fault: str
) -> None:
    before_suspending_lock(vm, on_fault)
    with waiting(vm) as pipeline:
        pid = vm.waiting_pid()
        supervisor = parent_of(pid)
        os.kill(supervisor, signal.SIGSTOP)  # it acts when bhyrecv has noticed already
        os.kill(pid, signal.SIGKILL)
        await_true(lambda: not vm.there.host.exists("g"), "the end of the VM")
        time.sleep(0.5)
        os.kill(supervisor, signal.SIGCONT)
        [ended] = pipeline.wait()
        assert ended.status in (69, 74), ended.stderr
    vm.await_supervisor_gone()
    assert vm.booted() == 0
    vm.two.assert_runs_on()


@ON_FAULT
def test_a_bhyve_that_fails_after_go_is_not_booted_anew(vm: Managed, on_fault: str) -> None:
    """Its vCPUs never ran, so the guest runs on at the source."""
    before_suspending_lock(vm, on_fault)
    vm.there.settings(fail=["restore"])
    ended = vm.move()
    assert ended.status == 69, ended.stderr
    vm.await_supervisor_gone()
    assert vm.booted() == 0
    vm.two.assert_runs_on()


def test_a_guest_with_a_command_at_the_pause_arrives_supervised(vm: Managed) -> None:
    """Its bhyve is started when all is there, because the disks may have to come first."""
    ended = vm.move("-p", "true")
    assert ended.status == 0, ended.stderr
    vm.two.assert_moved()
    assert vm.lock() == [os.uname().nodename]


def test_a_guest_that_was_left_loaded_is_started_supervised(vm: Managed, tmp_path: Path) -> None:
    with (tmp_path / "stream").open("wb") as file:
        [ended] = vm.two.run_into(file, vm.two.send("-f"))
        assert ended.status == 80, ended.stderr
    with (tmp_path / "stream").open("rb") as file:
        [ended] = vm.two.run_from(file, vm.receive("-u"))
        assert ended.status == 0, ended.stderr
    assert vm.lock() == ["held-by-bhysend"]
    [ended] = vm.two.run(vm.two.receive("--resume"))
    assert ended.status == 0, ended.stderr
    [ended] = vm.two.run(vm.two.send("--discard"))
    assert ended.status == 0, ended.stderr
    vm.two.assert_moved()
    assert vm.lock() == [os.uname().nodename]
    assert vm.there.host.has_tap(TAP)


def test_another_machine_is_refused_before_memory_moves(vm: Managed) -> None:
    vm.describe(Spec(cpus=CPUS + 1))
    ended = vm.move()
    assert ended.status == 69, ended.stderr
    assert f"vm-bhyve starts another machine: cpus: the stream says {CPUS}, here" in ended.stderr
    vm.await_supervisor_gone()
    vm.two.assert_runs_on()


def test_vm_bhyve_that_loses_path_is_not_asked(vm: Managed) -> None:
    vm.there.settings(keeps_path=False)
    ended = vm.move()
    assert ended.status == 69, ended.stderr
    assert "vm-bhyve does not find bhyve through the PATH of its caller" in ended.stderr
    assert not (vm.directory / "vm-bhyve.log").exists()
    vm.two.assert_runs_on()


def test_a_guest_that_vm_bhyve_boots_instead_is_stopped_at_once(vm: Managed) -> None:
    """A `vm` that sets PATH anew runs the system's bhyve, which would boot from the disks."""
    program = vm.there.directory / "vm-start"
    lines = program.read_text().splitlines()
    program.write_text("\n".join([lines[0], f"PATH={os.environ['PATH']}", *lines[1:], ""]))
    ended = vm.move()
    assert ended.status == 69, ended.stderr
    assert "vm start began to boot the guest, and was stopped at once" in ended.stderr
    vm.two.assert_runs_on()


def test_what_vm_start_says_is_passed_on(vm: Managed) -> None:
    (vm.there.directory / "vm-start").write_text("#!/bin/sh\necho no such switch >&2\nexit 3\n")
    ended = vm.move()
    assert ended.status == 69, ended.stderr
    assert "guest g: vm start: no such switch; it ended with status 3" in ended.stderr
    vm.two.assert_runs_on()


def test_a_guest_comes_back_to_where_it_moved_from(vm: Managed) -> None:
    """If it does not come back after all, vm-bhyve still does not start it here."""
    gone = ["hv2", "moved by bhysend"]
    (vm.directory / "run.lock").write_text("\n".join([*gone, ""]))
    vm.there.settings(fail=["restore"])
    ended = vm.move()
    assert ended.status == 69, ended.stderr
    assert vm.lock() == gone
    vm.there.settings(fail=[])
    ended = vm.move()
    assert ended.status == 0, ended.stderr
    vm.two.assert_moved()

"""`bhyve -r` waiting and released: what a failure leaves, and whether the guest may have run."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.bhyve import fpu as fpus
from bhystream.backend.bhyve import loaded, restore
from bhystream.backend.bhyve.config import parse
from bhystream.backend.bhyve.lastpage import LastPage
from bhystream.backend.bhyve.listening import listener, listens
from bhystream.backend.bhyve.loaded import start_waiting
from bhystream.backend.bhyve.restore import Restore
from bhystream.backend.bhyve.restoredguest import RestoredGuest
from bhystream.backend.bhyve.restoring import TooLateError
from bhystream.backend.bhyve.waitingrestore import WaitingRestore
from bhystream.backend.launch import Child
from bhystream.backend.process import is_same, is_stopped
from bhystream.errors import GuestError, InputOutputError
from bhystream.guest import State
from bhystream.standin.kernel import StandinHost
from standin.rig import Spec, await_true

from .arriving import (
    Arriving,
    again,
    arriving,
    fpu,
    hold,
    is_clean,
    kern,
    process_of,
    restore_of,
    restored_of,
)


@pytest.fixture
def guest() -> Iterator[Arriving]:
    with arriving() as made:
        yield made


def config_of(guest: Arriving) -> Path:
    """Return the path of the configuration that bhyve -r reads."""
    return Path(f"{restored_of(guest).files.memory}.conf")


def fails(guest: Arriving, message: str, kind: type[GuestError] = GuestError) -> None:
    """Assert that the restore fails, and that nothing but the guest's files is left."""
    with pytest.raises(kind, match=message):
        hold(guest)
    assert is_clean(guest)


# Waiting.


def test_a_guest_is_held_and_nothing_of_it_runs(guest: Arriving) -> None:
    one = hold(guest)
    assert one.is_held() and not one.is_released
    assert is_stopped(process_of(one))
    assert not listens(guest.there.host, "g")
    assert os.getsid(process_of(one).pid) == process_of(one).pid
    assert one.started.node == guest.there.host.node_id("g")
    assert guest.console.lines() == []
    for view in one.memory:
        assert bytes(view) == guest.image.read_bytes()
    one.undo()
    assert is_clean(guest)


@pytest.mark.parametrize("spec", [Spec(), Spec(has_rom=False)], ids=["rom", "no-rom"])
def test_a_guest_is_released_and_is_nobodys(spec: Spec) -> None:
    with arriving(spec) as guest:
        one = hold(guest)
        one.load([kern(guest)], fpu(guest))
        assert one.is_held()
        one.release()
        assert not one.is_held()
        assert not one.may_have_run
        found = listener(guest.there.host, "g")
        assert found is not None
        assert is_same(found, process_of(one))
        one.close()
        guest.await_unbroken()


def test_a_guest_of_more_than_3_gib_is_held_and_stays_sparse() -> None:
    with arriving(Spec(memory="3073M", touched="16M")) as guest:
        one = hold(guest)
        assert [len(view) for view in one.memory] == [3 << 30, 1 << 20]
        one.load([kern(guest)], fpu(guest))
        one.release()
        one.close()
        guest.await_unbroken()
        assert guest.memory().stat().st_blocks * 512 < 256 << 20


def test_no_byte_of_the_marks_is_left(guest: Arriving) -> None:
    """Nor in the file, which another attempt would read."""
    made = restore_of(guest)
    one = made.hold(len(kern(guest)))
    one.load([kern(guest)], fpu(guest))
    one.release()
    assert restored_of(guest).files.memory.read_bytes() == guest.image.read_bytes()


def test_its_configuration_is_for_us_alone(guest: Arriving) -> None:
    one = restore_of(guest)
    one.hold(len(kern(guest)))
    assert stat.S_IMODE(config_of(guest).stat().st_mode) == 0o600
    assert parse(config_of(guest).read_text())["cpus"] == "2"


def test_its_input_is_the_null_device(guest: Arriving) -> None:
    """With a terminal as standard input, bhyve would read in pieces and show a spinner."""
    one = hold(guest)
    assert os.readlink(f"/proc/{process_of(one).pid}/fd/0") == "/dev/null"


def test_who_it_is_stands_on_the_disk_before_it_is_run(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    real = RestoredGuest.write_started

    def write(self: RestoredGuest, started: Any) -> None:
        if started.process is not None:
            seen.append(Path(f"/proc/{started.process.pid}/exe").resolve().name.encode())
        real(self, started)

    monkeypatch.setattr(RestoredGuest, "write_started", write)
    one = hold(guest)
    assert seen and not seen[0].startswith(b"python")
    assert len(guest.started()) == 1
    one.undo()


@pytest.mark.parametrize("what", ["vm", "process"])
def test_what_cannot_be_written_down_is_not_run(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def full(self: RestoredGuest, started: Any) -> None:
        if (started.process is None) == (what == "vm"):
            raise InputOutputError("cannot write: No space left on device")

    monkeypatch.setattr(RestoredGuest, "write_started", full)
    with pytest.raises(InputOutputError, match="No space left"):
        restore_of(guest).hold(len(kern(guest)))
    assert is_clean(guest)


def test_a_vm_whose_bhyve_cannot_be_run_is_forgotten(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **words: Any) -> None:
        raise InputOutputError("cannot open the log: No space left on device")

    monkeypatch.setattr(restore, "Child", full)
    with pytest.raises(InputOutputError, match="cannot open the log"):
        restore_of(guest).hold(len(kern(guest)))
    assert is_clean(guest)


# Failures before bhyve waits.


def test_one_that_ends_before_it_is_held_is_told_in_its_words(guest: Arriving) -> None:
    guest.there.settings(fail=["restore-early"])
    fails(guest, "bhyve -r: Failed to pause PCI device state")
    again(guest)


def test_one_that_ends_where_another_goes_round_never_ran(guest: Arriving) -> None:
    """It is chance whether bhyve is stopped before it ends or not."""
    guest.there.settings(fail=["short-read"])
    made = []
    with pytest.raises(GuestError, match="bhyve -r: Failed to restore VM memory"):
        made.append(hold(guest))
        made[0].load([kern(guest)], fpu(guest))
        made[0].release()
    assert not any(one.may_have_run for one in made)
    assert is_clean(guest)
    again(guest)


def test_one_that_had_read_all_before_the_cut_is_not_taken_for_held(guest: Arriving) -> None:
    guest.there.settings(fail=["late-cut"])
    fails(guest, "had read the memory before it could be stopped", TooLateError)
    again(guest)


def test_one_that_was_too_fast_is_tried_again(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore_of(guest)
    restored = restored_of(guest)
    tries: list[int] = []
    real = Restore._launch

    def launch(self: Restore, undo: ExitStack, start: None) -> Any:
        tries.append(1)
        guest.there.settings(fail=["late-cut"] if len(tries) < loaded.ATTEMPTS else [])
        return real(self, undo, start)

    monkeypatch.setattr(Restore, "_launch", launch)
    one = start_waiting(guest.there.host, restored, restored.files, len(kern(guest)))
    assert len(tries) == loaded.ATTEMPTS
    one.load([kern(guest)], fpu(guest))
    one.release()
    guest.await_unbroken()


def test_one_that_is_always_too_fast_is_given_up(guest: Arriving) -> None:
    restore_of(guest)
    restored = restored_of(guest)
    guest.there.settings(fail=["late-cut"])
    with pytest.raises(TooLateError):
        start_waiting(guest.there.host, restored, restored.files, len(kern(guest)))
    assert is_clean(guest)


def test_one_that_takes_too_long_to_read_is_ended(guest: Arriving) -> None:
    guest.there.settings(fail=["slow-read"])
    one = restore_of(guest)
    one.limit_s = 0.0
    with pytest.raises(GuestError, match="bhyve -r: its memory is not read after 0 s"):
        one.hold(len(kern(guest)))
    assert is_clean(guest)


def test_a_slow_read_is_waited_for(guest: Arriving) -> None:
    guest.there.settings(fail=["slow-read"])
    made: list[WaitingRestore] = []
    thread = threading.Thread(target=lambda: made.append(hold(guest)))
    thread.start()
    await_true(lambda: guest.started() != [], "bhyve -r")
    assert made == []
    (guest.there.directory / "release").touch()
    thread.join(30)
    [one] = made
    assert one.is_held()
    one.undo()


def test_a_guest_of_that_name_that_runs_is_left_alone(guest: Arriving) -> None:
    other = guest.there.launch("g", Spec(touched="1M"))
    other.console.await_beats(1)
    with pytest.raises(GuestError, match="a bhyve of that name runs here"):
        made_unchecked(guest).hold(1)
    other.console.await_sweeps(1)


def made_unchecked(guest: Arriving) -> Restore:
    """Return a restore of a guest that no check() has accepted: its name may be in use."""
    restored = RestoredGuest(
        kind="standin",
        vmm_dir=str(guest.there.directory),
        name="g",
        staging=str(guest.staging_root),
        kept=str(guest.base / "loaded" / "x"),
        keys={"cpus": "2"},
        memory_bytes=64 << 20,
        manager="",
    )
    return Restore(guest.there.host, restored, restored.files)


def test_a_vm_of_that_name_is_left_alone(guest: Arriving) -> None:
    guest.there.host.create("g")
    with pytest.raises(GuestError, match="a VM of that name is here; destroy it first"):
        made_unchecked(guest).hold(1)
    assert guest.there.host.exists("g")


def test_a_socket_that_others_left_proves_nothing(guest: Arriving) -> None:
    """If the socket stayed, a guest that never ran would count as one that may have run."""
    path = guest.there.directory / "run" / "g"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    guest.there.settings(fail=["restore"])
    one = hold(guest)
    assert not path.exists()
    one.load([kern(guest)], fpu(guest))
    with pytest.raises(GuestError, match="bhyve -r: Failed to restore"):
        one.release()
    assert not one.may_have_run


def test_a_socket_that_cannot_be_removed_starts_nothing(guest: Arriving) -> None:
    (guest.there.directory / "run" / "g").mkdir()
    with pytest.raises(InputOutputError, match="cannot remove"):
        restore_of(guest).hold(1)
    assert is_clean(guest)


def test_a_program_that_cannot_be_run_leaves_nothing(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandinHost, "program", lambda self: ["/nonexistent/bhyve"])
    fails(guest, "bhyve -r: .*/nonexistent/bhyve: not found")


def test_files_that_cannot_be_written_start_nothing(guest: Arriving) -> None:
    one = restore_of(guest)
    config_of(guest).mkdir()
    with pytest.raises(InputOutputError, match="cannot write"):
        one.hold(1)
    assert is_clean(guest)


def interrupt(*args: object) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["_await_maps", "_map", "_await_read", "_stop"])
def test_an_interrupt_leaves_nothing(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    one = restore_of(guest)
    with monkeypatch.context() as patch:
        patch.setattr(Restore, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            one.hold(len(kern(guest)))
    assert is_clean(guest)
    again(guest)


@pytest.mark.parametrize("step", ["_await_maps", "_map", "_await_read", "_stop"])
def test_zeros_never_run_where_we_die_before_it_is_held(guest: Arriving, step: str) -> None:
    """bhyrecv is killed and undoes nothing: bhyve ends by itself, or waits for the last page."""
    assert run_killed(guest, KILLED, step) == -signal.SIGKILL
    await_true(lambda: not listens(guest.there.host, "g"), "the end of the socket")
    assert guest.console.lines() == []


KILLED = """
import json, os, signal, sys
from bhystream.backend.bhyve.restoredguest import RestoredGuest
from bhystream.backend.bhyve.restore import Restore
from bhystream.hypervisors import recorded_host
step, record, kern_bytes = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
restored = RestoredGuest.from_json(record)
def die(self, *args):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(Restore, step, die)
Restore(recorded_host(restored.vmm_dir), restored, restored.files).hold(kern_bytes)
"""


def run_killed(guest: Arriving, script: str, step: str) -> int:
    restore_of(guest)
    record = json.dumps(dict(restored_of(guest).to_json()))
    words = [sys.executable, "-c", script, step, record, str(len(kern(guest)))]
    return subprocess.run(words).returncode


def test_one_that_was_never_let_begin_ends_with_us(guest: Arriving) -> None:
    """bhyrecv dies after it has made the process, before the line that lets it become bhyve."""
    script = KILLED.replace("setattr(Restore, step, die)", "RestoredGuest.write_started = die")
    assert run_killed(guest, script, "_map") == -signal.SIGKILL
    await_true(lambda: guest.processes() == [], "the shell's end")
    assert not listens(guest.there.host, "g")


# What happens to a waiting bhyve.


def test_it_stands_held_whatever_else_happens_to_it(guest: Arriving) -> None:
    """After a SIGCONT bhyve loops in its read for the last page, and can be stopped again."""
    one = hold(guest)
    one.load([kern(guest)], fpu(guest))
    os.kill(process_of(one).pid, signal.SIGCONT)
    process = process_of(one)
    await_true(lambda: not is_stopped(process), "a process that goes on")
    assert not listens(guest.there.host, "g")
    one.release()
    guest.await_unbroken()


def test_one_that_is_killed_while_it_is_held_is_said(guest: Arriving) -> None:
    one = hold(guest)
    os.kill(process_of(one).pid, signal.SIGKILL)
    await_true(lambda: not one.is_held(), "its end")
    with pytest.raises(GuestError, match="bhyve -r: "):
        one.release()
    assert not one.may_have_run
    assert is_clean(guest)


def test_one_that_has_ended_is_not_loaded(guest: Arriving) -> None:
    """Otherwise bhyrecv would say READY although bhyve is dead."""
    one = hold(guest)
    one.require_held()
    os.kill(process_of(one).pid, signal.SIGKILL)
    await_true(lambda: not one.is_held(), "its end")
    for act in (one.require_held, lambda: one.load([kern(guest)], ())):
        with pytest.raises(GuestError, match="bhyve -r: "):
            act()
    assert restored_of(guest).files.kern.stat().st_size == 0
    one.undo()
    assert is_clean(guest)


def test_one_that_ends_while_it_is_loaded_is_not_said_to_be(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = hold(guest)

    def fill(self: LastPage, data: bytes) -> None:
        os.kill(process_of(one).pid, signal.SIGKILL)
        await_true(lambda: not one.is_held(), "its end")

    monkeypatch.setattr(LastPage, "fill", fill)
    with pytest.raises(GuestError, match="bhyve -r: "):
        one.load([kern(guest)], ())
    one.undo()


def test_an_fpu_is_not_waited_for_when_its_bhyve_has_ended(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the pause would take 10 s longer for each vCPU."""
    one = hold(guest)
    real = Child.go_on

    def die(self: Child) -> None:
        os.kill(self.pid, signal.SIGKILL)
        await_true(self.has_ended, "its end")

    monkeypatch.setattr(Child, "go_on", die)
    monkeypatch.setattr(fpus, "LIMIT_S", math.inf)
    with pytest.raises(GuestError, match="bhyve -r: "):
        one.load([kern(guest)], fpu(guest))
    monkeypatch.setattr(Child, "go_on", real)
    one.undo()
    assert is_clean(guest)


def test_who_waits_for_it_is_heard_meanwhile(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While bhyve reads, the source must not conclude that the pipeline keeps bytes back."""
    restore_of(guest)
    restored, has_memory = restored_of(guest), []
    mapped: list[memoryview] = []
    real = LastPage.is_read

    def is_read(self: LastPage, memory: Sequence[memoryview]) -> bool:
        mapped.extend(memory)
        return True in has_memory and real(self, memory)

    monkeypatch.setattr(LastPage, "is_read", is_read)
    made = Restore(
        guest.there.host, restored, restored.files, lambda: has_memory.append(mapped != [])
    )
    made.limit_s = 20.0
    one = made.hold(len(kern(guest)))
    assert set(has_memory) == {False, True}
    mapped.clear()
    one.undo()


def test_the_fpu_is_loaded_while_it_goes_round(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = fpus.load

    def load(vm: Any, memory: memoryview, states: Sequence[State], *more: Any) -> None:
        seen.append((is_stopped(process_of(one)), len(memory), list(states)))
        real(vm, memory, states, *more)

    monkeypatch.setattr(fpus, "load", load)
    one = hold(guest)
    one.load([kern(guest)], fpu(guest))
    assert seen == [(False, 64 << 20, fpu(guest))]
    assert is_stopped(process_of(one))
    one.release()
    guest.await_unbroken()


def test_an_fpu_that_cannot_be_loaded_is_an_error_before_it_runs(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise GuestError("cannot load the FPU")

    monkeypatch.setattr(fpus, "load", refuse)
    one = hold(guest)
    with pytest.raises(GuestError, match="cannot load the FPU"):
        one.load([kern(guest)], [State("fpu/0", b"0", is_optional=True)])
    one.undo()
    assert is_clean(guest) and not one.may_have_run


def test_without_fpu_states_it_is_not_woken(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = hold(guest)
    monkeypatch.setattr(fpus, "load", interrupt)
    monkeypatch.setattr("bhystream.backend.launch.Child.go_on", interrupt)
    one.load([kern(guest)], ())
    assert one.is_held()
    one.undo()

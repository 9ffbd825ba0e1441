"""SIGKILL at every step while the FPU is saved: another process puts all back, to the byte."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bhystream.backend.bhyve import fpu, lent
from bhystream.backend.bhyve import registers as reg
from bhystream.backend.bhyve.journal import Journal, Phase
from bhystream.backend.bhyve.savedvcpu import SavedVcpu
from bhystream.errors import GuestError
from bhystream.standin.vm import StandinVm

from .dying import JOURNAL_BYTES, Dying, Memory
from .fpu_rig import LOW_BYTES, Machine, closed  # noqa: F401

NCPUS = 2  # at CPL 0, and at CPL 3
_CAP = 1000


@pytest.fixture(params=["intel", "amd"])
def held(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    machine = Machine(tmp_path / "a", NCPUS, str(request.param))
    machine.start()
    return machine


def store(vm: StandinVm, memory: Memory, journal: Journal) -> None:
    assert fpu.save(vm, memory, NCPUS, journal).reasons == ()  # type: ignore[arg-type]


def put_back(vm: StandinVm, memory: Memory, journal: Journal) -> None:
    lent.put_back(vm, memory, journal)  # type: ignore[arg-type]


def killed(
    machine: Machine,
    act: Callable[[StandinVm, Memory, Journal], None],
    count: int,
    name: str = "",
) -> bool:
    """Let another process act, and be killed at a step; return False if it has fewer steps."""
    child = os.fork()
    if not child:
        status = 1
        try:
            dying = Dying(name, count)
            dying.install()
            vm = StandinVm(machine.directory, "g", is_writable=True)
            act(vm, vm.map(0, LOW_BYTES, is_writable=True), machine.journal)  # type: ignore[arg-type]
            (machine.directory / "taken").write_text(json.dumps(dying.taken))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def deaths(
    machine: Machine, act: Callable[[StandinVm, Memory, Journal], None], ready: Callable[[], object]
) -> Iterator[int]:
    """Kill a process at its first step, the next one at its second, and so on; yield each time.

    ready: called before each process.  Ends when a process has done all its steps.
    """
    for count in range(1, _CAP):
        ready()
        if not killed(machine, act, count):
            return
        yield count
    raise AssertionError("it does not end")


def taken(machine: Machine) -> list[str]:
    """Return the steps of the last process that was not killed."""
    found: list[str] = json.loads((machine.directory / "taken").read_text())
    return found


def mend(machine: Machine) -> None:
    """Put back what the journal says, as --resume does."""
    if machine.journal.exists():
        lent.put_back(machine.vm, machine.low, machine.journal)
    assert not machine.journal.exists()


def test_whoever_is_killed_while_he_stores_it_all_is_put_back(held: Machine) -> None:
    before = held.seen()
    wanted = fpu.save(held.vm, held.low, NCPUS, held.journal)
    found = 0
    for found in deaths(held, store, lambda: None):
        mend(held)
        assert held.seen() == before, found
    steps = taken(held)
    assert len(steps) == found
    assert {"half file", "rename", "mark", "half memory", "instruction", "remove"} <= set(steps)
    assert held.save() == wanted


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("half memory", 1),
        ("set_descriptor", 4),
        ("resume_cpu", 2),
        ("instruction", 5),
        ("instruction", 20),  # the second vCPU's, in the gate: its own CPL is 3, there it is 0
        ("half memory", 4),
        ("remove", 2),
    ],
)
def test_whoever_is_killed_while_he_puts_it_back_the_next_one_does(
    held: Machine, name: str, count: int
) -> None:
    before = held.seen()

    def ready() -> None:
        assert killed(held, store, count, name)

    for at in deaths(held, put_back, ready):
        mend(held)
        assert held.seen() == before, at
    assert held.seen() == before
    held.save()


def test_the_gates_cpl_is_among_the_deaths(tmp_path: Path) -> None:
    """Check that the parameter ("instruction", 20) above means a vCPU in the gate."""
    machine = Machine(tmp_path / "a", NCPUS, "amd")
    machine.start()
    assert killed(machine, store, 20, "instruction")
    assert machine.cpus[1].get("cpl") == 0
    mend(machine)
    assert machine.cpus[1].get("cpl") == 3


@pytest.mark.parametrize("after", [1, 2, 4, 7])
def test_an_nmi_that_the_stub_swallowed_is_given_back(tmp_path: Path, after: int) -> None:
    machine = Machine(tmp_path / "a", NCPUS, "amd")
    machine.start()
    cpu = machine.cpus[1]
    registers, memory = cpu.state(), machine.low[:]

    def ready() -> None:
        cpu.put("nmi_pending", 0)
        cpu.put("nmi_after", after)

    for at in deaths(machine, store, ready):
        mend(machine)
        came = cpu.get("nmi_after") == 0
        assert (cpu.get("nmi_pending"), cpu.get("nmi_blocked")) == (came, 0), at
        assert cpu.state() == registers and machine.low[:] == memory, at
    assert "inject_nmi" in taken(machine)


def test_twice_is_no_error(held: Machine) -> None:
    before = held.seen()
    assert killed(held, store, 5, "instruction")
    text = (held.directory / "journal").read_bytes()
    mend(held)
    Journal(held.directory / "journal").write(SavedVcpu.read(held.vm, held.low, 0))
    assert len((held.directory / "journal").read_bytes()) == len(text)
    mend(held)
    assert held.seen() == before


def test_nothing_is_changed_where_no_journal_can_be_written(held: Machine) -> None:
    (held.directory / "journal").mkdir()
    before = held.seen()
    saved = fpu.save(held.vm, held.low, NCPUS, held.journal)
    assert held.seen() == before
    assert not saved.states and "cannot write" in saved.reasons[0]
    assert [path.name for path in held.directory.glob("journal*")] == ["journal"]


def test_it_is_no_ones_but_the_owners(held: Machine) -> None:
    assert killed(held, store, 5, "instruction")
    assert (held.directory / "journal").stat().st_mode & 0o777 == 0o600


def test_registers_that_cannot_be_put_back_leave_the_journal(
    held: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = held.seen()
    assert killed(held, store, 5, "instruction")

    def refuse(vm: StandinVm, vcpu: int, number: int, value: int) -> None:
        raise GuestError("cannot set a register")

    with monkeypatch.context() as patch:
        patch.setattr(StandinVm, "set_register", refuse)
        with pytest.raises(GuestError, match="cannot be put back: cannot set a register"):
            lent.put_back(held.vm, held.low, held.journal)
    assert held.journal.exists()
    mend(held)
    assert held.seen() == before


def test_a_vcpu_that_cannot_end_the_stub_leaves_the_journal(
    held: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert killed(held, store, 5, "instruction")
    monkeypatch.setattr(StandinVm, "run", lambda *_: reg.EXIT_SVM)
    with pytest.raises(GuestError, match=r"cannot run \(exit code 19\)"):
        lent.put_back(held.vm, held.low, held.journal)
    assert held.journal.exists()


@pytest.mark.parametrize("phase", list(Phase))
def test_it_is_read_as_it_was_written(held: Machine, phase: Phase) -> None:
    kept = SavedVcpu.read(held.vm, held.low, 1)
    held.journal.write(kept)
    held.journal.mark(phase)
    assert held.journal.read() == (kept, phase)
    held.journal.remove()
    held.journal.remove()
    assert not held.journal.exists()


HEAD_BYTES = 16


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:HEAD_BYTES],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"B" + data[1:],
        lambda data: data[:8] + b"\2" + data[9:],  # version
        lambda data: data[:12] + b"\4" + data[13:],  # phase
        lambda data: data[:13] + b"\1" + data[14:],  # padding
        lambda data: data[:20] + b"\1" + data[21:],  # masked registers
        lambda data: data[:16] + b"\7" + data[17:],  # vCPU
    ],
)
def test_a_journal_that_is_none_of_ours_changes_nothing(
    held: Machine, spoil: Callable[[bytes], bytes]
) -> None:
    held.journal.write(SavedVcpu.read(held.vm, held.low, 0))
    path = held.directory / "journal"
    data = path.read_bytes()
    assert len(data) == JOURNAL_BYTES
    path.write_bytes(spoil(data))
    held.cpus[0][reg.RAX] = 5
    before = held.seen()
    with pytest.raises(GuestError):
        lent.put_back(held.vm, held.low, held.journal)
    assert held.seen() == before and held.journal.exists()

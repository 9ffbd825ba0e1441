"""FPU registers saved at one VM and loaded at another: the stub runs in the stand-in's interpreter.

Every vCPU and the memory must be as before, to the byte, after each save.  The
stand-in refuses every instruction and register that it does not know.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.bhyve import fpu, stub
from bhystream.backend.bhyve import registers as reg
from bhystream.backend.bhyve.carriable import carriable
from bhystream.backend.bhyve.host import SegmentDescriptor
from bhystream.backend.bhyve.lent import NotPutBackError
from bhystream.errors import GuestError
from bhystream.guest import State
from bhystream.standin.cpu import FPU_BYTES, Cpu
from bhystream.standin.gate import Gate
from bhystream.standin.guest import Guest
from bhystream.standin.vm import StandinVm

from .fpu_rig import LOW_BYTES, Machine, closed  # noqa: F401


@pytest.fixture(params=["intel", "amd"])
def vendor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def held(tmp_path: Path, vendor: str) -> Machine:
    machine = Machine(tmp_path / "a", 3, vendor)
    machine.start()
    return machine


@pytest.fixture
def restoring(tmp_path: Path, vendor: str) -> Iterator[Machine]:
    """A VM whose bhyve waits to restore it: the vCPU threads wait too."""
    machine = Machine(tmp_path / "b", 3, vendor)
    guest = Guest(machine.memory, [], Gate(), machine.ncpus)
    guest.hold_vcpus()
    yield machine
    guest._let_go()
    guest._cpu_file.close()


def one(held: Machine) -> State:
    return held.save().states[0]


def test_every_vcpu_is_saved_one_after_the_other(held: Machine) -> None:
    saved = held.save()
    assert saved.reasons == ()
    assert [state.name for state in saved.states] == ["fpu/0", "fpu/1", "fpu/2"]
    assert all(state.is_optional for state in saved.states)
    for state, cpu in zip(saved.states, held.cpus, strict=True):
        assert struct.unpack_from("<Q", state.data)[0] == 7
        assert state.data[8:424] == cpu.fpu(0, 416)
        assert state.data[520 + 32 : 520 + 416] == cpu.fpu(32, 384)
        assert state.data[520 + 576 :] == cpu.fpu(576, 256)


def test_what_was_saved_is_loaded(held: Machine, restoring: Machine) -> None:
    saved = held.save()
    low, states = restoring.low[:], [cpu.state() for cpu in restoring.cpus]
    fpu.load(restoring.vm, restoring.low, saved.states)
    assert restoring.low[:] == low
    for here, there, state in zip(held.cpus, restoring.cpus, states, strict=True):
        assert there.fpu(0, FPU_BYTES) == here.fpu(0, FPU_BYTES)
        assert there.get("xcr0") == 7
        assert there.get("suspended") == 1
        assert there.state() == state


def test_a_component_in_its_initial_state_is_in_it_again(held: Machine, restoring: Machine) -> None:
    """XRSTOR comes last, because FXRSTOR alone would leave XMM in use."""
    held.cpus[0].put_fpu(160, bytes(256))
    held.cpus[0].put_fpu(512, b"\5")
    fpu.load(restoring.vm, restoring.low, held.save().states)
    assert restoring.cpus[0].fpu(512, 8) == bytes((5, 0, 0, 0, 0, 0, 0, 0))


def test_xmm_is_carried_where_xcr0_lacks_it(held: Machine, restoring: Machine) -> None:
    held.cpus[0].put("xcr0", 1)
    fpu.load(restoring.vm, restoring.low, held.save().states)
    assert restoring.cpus[0].fpu(0, 416) == held.cpus[0].fpu(0, 416)
    assert restoring.cpus[0].get("xcr0") == 1


def test_a_guest_without_xsave_is_carried_by_fxsave(held: Machine, restoring: Machine) -> None:
    held.cpus[0][reg.CR4] &= ~reg.CR4_XSAVE
    saved = held.save()
    assert len(saved.states[0].data) == 8 + 512
    assert saved.states[0].data[:8] == bytes(8)
    fpu.load(restoring.vm, restoring.low, saved.states[:1])
    assert restoring.cpus[0].fpu(0, 416) == held.cpus[0].fpu(0, 416)
    assert restoring.cpus[0].get("xcr0") == 1


@pytest.mark.parametrize("cpl", [0, 1, 2, 3])
def test_every_cpl_is_left_as_it_was(held: Machine, cpl: int) -> None:
    cpu = held.cpus[1]
    cpu.put("cpl", cpl)
    cpu[reg.CS] = cpu[reg.CS] & ~3 | cpl
    assert len(held.save().states) == 3


def leave_long_mode(cpu: Cpu) -> None:
    cpu[reg.EFER] = 0


def add_levels(cpu: Cpu) -> None:
    cpu[reg.CR4] |= reg.CR4_LA57


def single_step(cpu: Cpu) -> None:
    cpu[reg.RFLAGS] |= reg.RFLAGS_TF


def end_an_exit_in_an_event(cpu: Cpu) -> None:
    cpu.put("event_1", 0x800000EC)


def inject_an_exception(cpu: Cpu) -> None:
    cpu.put("event_2", 0x8000030E)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (leave_long_mode, "it is not in long mode"),
        (add_levels, "it has page tables of five levels"),
        (single_step, "it single-steps"),
        (end_an_exit_in_an_event, "an event is about to be delivered to it"),
        (inject_an_exception, "an event is about to be delivered to it"),
    ],
)
def test_a_vcpu_that_must_be_left_alone_is(held: Machine, change: Any, reason: str) -> None:
    change(held.cpus[1])
    saved = held.save()
    assert [state.name for state in saved.states] == ["fpu/0", "fpu/2"]
    assert saved.reasons == (f"the FPU registers of vCPU 1 are not carried: {reason}",)


@pytest.mark.parametrize("field", ["entry_event", "pending_debug"])
def test_an_event_in_an_intel_cpus_vmcs_is_seen(tmp_path: Path, field: str) -> None:
    machine = Machine(tmp_path / "a", 1)
    machine.start()
    machine.cpus[0].put(field, 0x800000EC)
    assert "an event is about to be delivered" in machine.save().reasons[0]


def map_rip(machine: Machine, cpu: Cpu, before: bytes) -> None:
    """Put a vCPU in a shadow at the beginning of a page.  before: the byte before that page."""
    cpu[reg.RIP] = 0x401000
    cpu[reg.INTR_SHADOW] = 1
    entries = ((0x5000, 0x20027), (0x20000, 0x21027), (0x21010, 0x22027), (0x22000, 0x30027))
    for at, value in entries:
        machine.low[at : at + 8] = struct.pack("<Q", value)
    machine.low[0x30FFF:0x31000] = before


def test_a_shadow_that_a_hlt_left_is_no_shadow(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "a", 1, "amd")
    machine.start()
    map_rip(machine, machine.cpus[0], b"\xf4")
    saved = fpu.save(machine.vm, machine.low, 1, machine.journal)
    assert not saved.reasons
    assert machine.cpus[0][reg.INTR_SHADOW] == 0


@pytest.mark.parametrize("before", [b"\xfb", b"\x90"])
def test_a_vcpu_in_a_shadow_is_left_alone(tmp_path: Path, before: bytes) -> None:
    machine = Machine(tmp_path / "a", 1, "amd")
    machine.start()
    map_rip(machine, machine.cpus[0], before)
    assert "it stands in an interrupt shadow" in machine.save().reasons[0]


def test_the_stub_lies_where_the_guest_has_nothing(held: Machine) -> None:
    for slot in range(96, 150):
        held.low[0x5000 + slot * 8] = 0x27
    seen: list[int] = []
    make = stub.make

    def spy(cpl: int, slot: int, **how: bool) -> stub.Stub:
        seen.append(slot)
        return make(cpl, slot, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stub, "make", spy)
        held.save()
    assert seen == [150] * 3


def test_a_guest_that_uses_all_of_its_addresses_is_left_alone(held: Machine) -> None:
    held.low[0x5000:0x6000] = b"\x27\0\0\0\0\0\0\0" * 512
    assert "it uses all of its address space" in held.save().reasons[0]


def test_page_tables_outside_of_memory_are_no_failure(held: Machine) -> None:
    held.cpus[1][reg.CR3] = 1 << 40
    saved = held.save()
    assert len(saved.states) == 2 and "no memory at 0x10000000000" in saved.reasons[0]


@pytest.mark.parametrize("after", range(1, 14))
def test_an_nmi_between_any_two_instructions_is_given_back(tmp_path: Path, after: int) -> None:
    machine = Machine(tmp_path / "a", 2)
    machine.start()
    cpu = machine.cpus[1]
    before, registers = machine.low[:], cpu.state()
    cpu.put("nmi_after", after)
    saved = fpu.save(machine.vm, machine.low, 2, machine.journal)
    assert len(saved.states) == 2
    assert machine.low[:] == before and cpu.state() == registers
    assert cpu.get("nmi_blocked") == 0
    came = cpu.get("nmi_after") == 0
    assert cpu.get("nmi_pending") == came
    assert saved.states[1].data[8:424] == cpu.fpu(0, 416)


def test_an_nmi_that_waits_is_swallowed_and_given_back(held: Machine) -> None:
    held.cpus[0].put("nmi_pending", 1)
    assert len(held.save().states) == 3


def test_a_guest_in_its_nmi_handler_stays_there(held: Machine) -> None:
    """If the stub used IRET, the next NMI would be delivered."""
    held.cpus[0].put("nmi_blocked", 1)
    held.cpus[0].put("nmi_pending", 1)
    assert len(held.save().states) == 3


class Failing(StandinVm):
    """A VM whose calls fail.  fails: (call, how many times it still fails)."""

    fails: Sequence[tuple[str, int]] = ()
    calls = 0

    def _count(self, what: str) -> None:
        self.calls += 1
        for name, times in self.fails:
            if name == what and times > 0:
                self.fails = [(n, t - (n == what)) for n, t in self.fails]
                raise GuestError(f"cannot {what}")


class FailsToRun(Failing):
    def run(self, vcpu: int) -> int:
        self._count("run")
        return super().run(vcpu)


class FailsToSet(Failing):
    def set_register(self, vcpu: int, number: int, value: int) -> None:
        if number == reg.CR3:
            self._count("set CR3")
        super().set_register(vcpu, number, value)


def test_a_run_that_fails_is_a_reason_and_everything_is_put_back(held: Machine) -> None:
    held.vm = FailsToRun(held.directory, "g", is_writable=True)
    held.vm.fails = [("run", 1)]
    saved = held.save()
    assert len(saved.states) == 2 and "cannot run" in saved.reasons[0]


def test_a_register_that_cannot_be_set_at_first_is_set_again(held: Machine) -> None:
    held.vm = FailsToSet(held.directory, "g", is_writable=True)
    held.vm.fails = [("set CR3", 2)]
    saved = held.save()
    assert len(saved.states) == 2 and "cannot set CR3" in saved.reasons[0]


def test_an_nmi_is_not_read_out_of_the_guests_own_memory(held: Machine) -> None:
    """If the vCPU has to be put back twice, the stub's count is gone the second time."""

    class FailsToTell(Failing):
        def descriptor(self, vcpu: int, number: int) -> SegmentDescriptor:
            if number == reg.IDTR and self.calls < 2:
                self.calls += 1
                if self.calls == 2:
                    raise GuestError("cannot tell")
            return super().descriptor(vcpu, number)

    held.vm = FailsToTell(held.directory, "g", is_writable=True)
    assert held.low[stub.BASE_GPA + stub.NMIS]
    assert len(held.save().states) == 3


def test_registers_that_cannot_be_put_back_are_an_error(held: Machine) -> None:
    held.vm = FailsToSet(held.directory, "g", is_writable=True)
    held.vm.fails = [("set CR3", 99)]
    with pytest.raises(NotPutBackError, match="vCPU 0 has run code of ours"):
        fpu.save(held.vm, held.low, held.ncpus, held.journal)


def test_registers_that_read_back_as_others_are_an_error(held: Machine) -> None:
    class Drifts(StandinVm):
        def set_register(self, vcpu: int, number: int, value: int) -> None:
            super().set_register(vcpu, number, value + (number == reg.RSP))

    held.vm = Drifts(held.directory, "g", is_writable=True)
    with pytest.raises(NotPutBackError, match="they read back different"):
        fpu.save(held.vm, held.low, held.ncpus, held.journal)


def test_memory_that_a_device_keeps_writing_is_an_error(held: Machine) -> None:
    low = held.low

    class Written:
        def __len__(self) -> int:
            return len(low)

        def __getitem__(self, where: Any) -> Any:
            return low[where]

        def __setitem__(self, where: Any, data: Any) -> None:
            low[where] = data
            low[stub.BASE_GPA + 0x5800] = low[stub.BASE_GPA + 0x5800] ^ 1

    with pytest.raises(NotPutBackError):
        fpu.save(held.vm, Written(), held.ncpus, held.journal)  # type: ignore[arg-type]


def test_no_signal_interrupts_it(held: Machine) -> None:
    class Killed(Exception):
        pass

    def interrupt(number: int, frame: object) -> None:
        raise Killed

    class Interrupting(StandinVm):
        def set_register(self, vcpu: int, number: int, value: int) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            super().set_register(vcpu, number, value)

    held.vm = Interrupting(held.directory, "g", is_writable=True)
    before = held.seen()
    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(Killed):
            fpu.save(held.vm, held.low, held.ncpus, held.journal)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert held.seen() == before


def test_an_fxsave_that_ffxsr_would_cut_short_is_whole(held: Machine) -> None:
    seen: list[int] = []

    class Watching(StandinVm):
        def run(self, vcpu: int) -> int:
            seen.extend(self.registers(vcpu, (reg.EFER,)))
            return super().run(vcpu)

    held.vm = Watching(held.directory, "g", is_writable=True)
    held.cpus[0][reg.EFER] |= reg.EFER_FFXSR
    held.save()
    assert seen and not any(efer & reg.EFER_FFXSR for efer in seen)


def test_too_little_memory_is_a_reason(held: Machine) -> None:
    with memoryview(held.low)[: stub.END_GPA - 4096] as view:
        saved = fpu.save(held.vm, view, held.ncpus, held.journal)
    assert not saved.states and "memory" in saved.reasons[0]


def changed(state: State, at: int, data: bytes) -> State:
    return State(state.name, state.data[:at] + data + state.data[at + len(data) :], True)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("fpu/0", b"", "with 0 bytes is not of an FPU"),
        ("fpu/0", bytes(519), "with 519 bytes"),
        ("fpu/0", bytes((16 << 10) + 1), "with 16385 bytes"),
        ("fpu/0", bytes(521), "has 1 bytes for XCR0 0x0"),
        ("fpu/0", b"\1" + bytes(519), "has 0 bytes for XCR0 0x1"),
        ("fpu/00", bytes(520), "state fpu/00"),
        ("fpu/x", bytes(520), "state fpu/x"),
        ("fpu/\u0661", bytes(520), "is not of an FPU"),
        ("fpu/3", bytes(520), "no vCPU waits for it"),
        ("other", bytes(520), "state other"),
    ],
)
def test_a_state_that_save_never_made_is_refused(
    restoring: Machine, name: str, data: bytes, said: str
) -> None:
    with pytest.raises(GuestError, match=said):
        fpu.load(restoring.vm, restoring.low, [State(name, data, True)])


def test_a_state_that_comes_twice_is_refused(held: Machine, restoring: Machine) -> None:
    with pytest.raises(GuestError, match="no vCPU waits"):
        fpu.load(restoring.vm, restoring.low, [one(held)] * 2)


@pytest.mark.parametrize(
    ("at", "data"),
    [
        (0, struct.pack("<Q", 1 << 60 | 1)),  # XCR0
        (0, struct.pack("<Q", 2)),
        (8 + 24, b"\xff\xff\xff\xff"),  # MXCSR of FXSAVE
        (520 + 512, b"\xff"),  # XSTATE_BV
        (520 + 520, b"\1"),  # XCOMP_BV
    ],
)
def test_registers_that_the_cpu_refuses_are_an_error_and_all_is_put_back(
    held: Machine, restoring: Machine, at: int, data: bytes
) -> None:
    state = changed(one(held), at, data)
    low, before = restoring.low[:], restoring.cpus[0].state()
    with pytest.raises(GuestError, match="vCPU 0: it refuses them"):
        fpu.load(restoring.vm, restoring.low, [state])
    assert restoring.low[:] == low and restoring.cpus[0].state() == before
    assert restoring.cpus[0].get("suspended") == 1


def test_a_vcpu_that_nobody_runs_is_an_error(
    held: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fpu, "LIMIT_S", 0.01)
    stopped = Machine(tmp_path / "b", 3)
    before = stopped.seen()
    with pytest.raises(GuestError, match="it does not run"):
        fpu.load(stopped.vm, stopped.low, [one(held)])
    assert stopped.seen() == before


def test_a_running_guest_says_early_what_cannot_be_carried(held: Machine) -> None:
    for cpu in held.cpus:
        cpu.put("suspended", 0)
    assert carriable(held.vm, 3) == []
    held.cpus[1].reset()
    held.cpus[2][reg.EFER] = 0
    assert carriable(held.vm, 3) == [
        "the FPU registers of vCPU 1 are not carried: it was never started",
        "the FPU registers of vCPU 2 are not carried: it is not in long mode",
    ]


def test_only_the_saving_stub_has_an_out() -> None:
    """At the destination bhyve would see the OUT, and end because of x86.strictio."""
    for has_xsave in (False, True):
        ends = [
            stub.assemble(at, rows)
            for is_save in (True, False)
            for at, rows in stub.routines(is_save=is_save, has_xsave=has_xsave)
        ]
        half = len(ends) // 2
        assert sum(b"\xe6\xf4" in code for code in ends[:half]) == 2
        assert not any(b"\xe6\xf4" in code for code in ends[half:])


def test_a_mapping_of_its_own_is_a_memory_too(held: Machine) -> None:
    with held.vm.map(0, LOW_BYTES, is_writable=True) as mapping:
        assert isinstance(mapping, mmap.mmap)
        assert len(fpu.save(held.vm, mapping, 3, held.journal).states) == 3

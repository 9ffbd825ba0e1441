"""vCPUs of the stand-in: the file, the interpreter, and a guest's FPU carried over or lost."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bhystream.backend.bhyve import fpu, stub
from bhystream.backend.bhyve import registers as reg
from bhystream.backend.bhyve.host import SegmentDescriptor
from bhystream.backend.bhyve.journal import Journal
from bhystream.errors import GuestError
from bhystream.standin import cpu as cpu_file
from bhystream.standin import node
from bhystream.standin.cpu import Cpu, Cpus
from bhystream.standin.gate import Gate
from bhystream.standin.guest import Guest
from bhystream.standin.interpreter import EXIT_PAUSE, Fault, Interpreter
from bhystream.standin.node import Memory
from bhystream.standin.proof import Boot
from bhystream.standin.vm import StandinVm

from .rig import await_true

LOW_BYTES = 8 << 20
NCPUS = 3
BOOT = Boot(NCPUS, LOW_BYTES // 4096, 256, 128, 4 << 20, 4 << 20)


def host(directory: Path, vendor: str = "intel") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "host.json").write_text(json.dumps({"cpu_vendor": vendor}))
    return directory


class LocalGuest:
    """A guest of the stand-in in this process.  told: the guest's complaints."""

    def __init__(self, directory: Path) -> None:
        host(directory)
        node.create(directory, "g")
        maps = node.memory_maps(LOW_BYTES, is_wired=False)
        node.write_map(directory, "g", node.Map(maps, (NCPUS, 1, 1), is_active=True))
        self.memory = Memory(directory, "g", LOW_BYTES, has_log=False)
        self.low = self.memory.segments()[0][1]
        self.guest = Guest(self.memory, [], Gate(), NCPUS)
        self.told: list[str] = []
        self.guest._tell = self.told.append  # type: ignore[assignment, method-assign]
        self.cpus = Cpus(node.beside(directory, "g", "cpu"), is_intel=True)
        self.journal = Journal(directory / "journal")
        self.vm = StandinVm(directory, "g", is_writable=True)

    def boot(self) -> None:
        """Start the guest."""
        self.guest.boot(BOOT)
        self.guest.prepare()
        self.guest.resume_vcpus()

    def steps(self) -> list[int]:
        """Return the step count of each vCPU."""
        return [vcpu.registers.step for vcpu in self.guest._vcpus]

    def await_steps(self, count: int = 20) -> None:
        """Wait until every vCPU has made `count` more steps."""
        wanted = [step + count for step in self.steps()]
        await_true(lambda: all(a >= b for a, b in zip(self.steps(), wanted, strict=True)), "steps")

    def pause(self) -> None:
        """Pause the guest's vCPUs."""
        self.guest.pause_vcpus()

    def take(self, other: LocalGuest, saved: fpu.Saved | None) -> None:
        """Take over the other's guest, as a restore does.  saved: None loses the FPU."""
        self.guest.hold_vcpus()
        self.low[:] = other.low[:]
        if saved is not None:
            fpu.load(self.vm, self.low, saved.states)
        for name, blob in other.guest.save_kernel():
            self.guest.load_kernel(name, blob)
        self.guest.prepare()
        self.guest.resume_vcpus()


@pytest.fixture
def here(tmp_path: Path) -> LocalGuest:
    place = LocalGuest(tmp_path / "here")
    place.boot()
    place.await_steps()
    return place


@pytest.fixture
def there(tmp_path: Path) -> LocalGuest:
    return LocalGuest(tmp_path / "there")


def test_a_guest_whose_fpu_was_saved_runs_on_and_notices_nothing(here: LocalGuest) -> None:
    for _ in range(3):
        here.pause()
        assert fpu.save(here.vm, here.low, NCPUS, here.journal).reasons == ()
        here.guest.resume_vcpus()
        here.await_steps()
    assert here.told == []
    assert not here.vm.waiting_vcpus()


def test_a_guest_whose_fpu_is_carried_goes_on_where_it_was(
    here: LocalGuest, there: LocalGuest
) -> None:
    here.pause()
    there.take(here, fpu.save(here.vm, here.low, NCPUS, here.journal))
    there.await_steps()
    assert there.told == [] and here.told == []


def test_a_guest_whose_fpu_is_not_carried_says_so(here: LocalGuest, there: LocalGuest) -> None:
    here.pause()
    there.take(here, None)
    there.await_steps()
    assert sorted(line[:10] for line in there.told) == [f"fpu vcpu {n}" for n in range(NCPUS)]


def test_an_fpu_of_another_moment_is_noticed(here: LocalGuest, there: LocalGuest) -> None:
    here.pause()
    saved = fpu.save(here.vm, here.low, NCPUS, here.journal)
    step = here.steps()[0]
    here.guest.resume_vcpus()
    here.await_steps(3)
    here.pause()
    there.take(here, saved)
    await_true(lambda: len(there.told) == NCPUS, "complaints")
    assert any(f"found step {step}" in line for line in there.told)


def test_a_register_that_was_not_put_back_is_noticed(here: LocalGuest) -> None:
    here.pause()
    here.vm.set_register(1, reg.RDX, 1)
    here.guest.resume_vcpus()
    here.await_steps()
    assert here.told == ["registers vcpu 1: expected those of before the pause"]


def test_a_held_guests_vcpus_wait_and_a_running_ones_do_not(here: LocalGuest) -> None:
    assert here.vm.waiting_vcpus() == frozenset()
    here.pause()
    assert here.vm.waiting_vcpus() == frozenset(range(NCPUS))


def test_an_instruction_that_is_no_stub_s_is_refused_loudly(here: LocalGuest) -> None:
    here.pause()
    made = stub.make(0, 96, is_save=True, has_xsave=True)
    pages = made.pages[: stub.ENTRY] + b"\x0f\xa2" + made.pages[stub.ENTRY + 2 :]
    put(here.vm, here.cpus[0], here, made, pages)
    with pytest.raises(GuestError, match="no such instruction at 0x300000004000: 0f a2"):
        here.vm.run(0)


def put(vm: StandinVm, cpu: Cpu, place: LocalGuest, made: stub.Stub, pages: bytes = b"") -> None:
    place.low[stub.BASE_GPA : stub.END_GPA] = pages or made.pages
    for number, hidden in made.descriptors:
        cpu.put_hidden(number, hidden)
    for number, value in made.values:
        cpu[number] = value
    cpu.put("suspended", 0)


def no_tss(made: dict[int, SegmentDescriptor]) -> None:
    made[reg.TR] = SegmentDescriptor(0, 0, 0x8B)


def no_gdt(made: dict[int, SegmentDescriptor]) -> None:
    made[reg.GDTR] = SegmentDescriptor(made[reg.GDTR].base, 0, 0)


@pytest.mark.parametrize("change", [no_tss, no_gdt])
def test_a_stub_without_its_tables_is_a_triple_fault(
    here: LocalGuest, change: Callable[[dict[int, SegmentDescriptor]], None]
) -> None:
    here.pause()
    made = stub.make(3, 96, is_save=True, has_xsave=True)
    hidden = dict(made.descriptors)
    change(hidden)
    cpu = here.cpus[1]
    put(here.vm, cpu, here, stub.Stub(made.pages, made.values, tuple(hidden.items())))
    with pytest.raises(GuestError, match="triple fault"):
        here.vm.run(1)


def test_a_page_that_is_not_the_user_s_is_not_run_at_cpl_3(here: LocalGuest) -> None:
    here.pause()
    made = stub.make(3, 96, is_save=True, has_xsave=True)
    pages = bytearray(made.pages)
    pages[0x3000 + 4 * 8] &= ~4  # clears U in the PTE of the code
    put(here.vm, here.cpus[1], here, made, bytes(pages))
    with pytest.raises(Fault, match="vector 14"):
        Interpreter(here.cpus[1], here.low)._execute()


def test_supervisor_mode_may_not_execute_a_user_page_under_smep(here: LocalGuest) -> None:
    here.pause()
    made = stub.make(0, 96, is_save=True, has_xsave=True)
    cpu = here.cpus[0]
    put(here.vm, cpu, here, made)
    cpu[reg.CR4] |= reg.CR4_SMEP
    interpreter = Interpreter(cpu, here.low)
    interpreter._rip = cpu[reg.RIP]
    with pytest.raises(Fault, match="vector 14"):
        interpreter._execute()


def test_the_loading_stub_spins_with_pause_until_it_is_suspended(here: LocalGuest) -> None:
    here.pause()
    cpu = here.cpus[0]
    put(here.vm, cpu, here, stub.make(0, 96, is_save=False, has_xsave=False))
    assert here.vm.run(0) == EXIT_PAUSE
    assert here.low[stub.BASE_GPA + stub.FLAG] == stub.DONE
    assert here.vm.run(0) == EXIT_PAUSE
    here.vm.suspend_cpu(0)
    assert here.vm.run(0) == reg.EXIT_DEBUG


def test_a_vcpu_that_is_not_suspended_cannot_be_resumed(here: LocalGuest) -> None:
    with pytest.raises(GuestError, match="Invalid argument"):
        here.vm.resume_cpu(0)


@pytest.mark.parametrize("vendor", ["intel", "amd"])
def test_an_intel_cpu_tells_its_vmcs_and_an_amd_one_does_not(tmp_path: Path, vendor: str) -> None:
    cpu = cpu_file.create(tmp_path / "c", 1, is_intel=vendor == "intel")[0]
    cpu[reg.CR4] = 0x20
    if vendor == "amd":
        assert cpu[reg.CR4] == 0x20
        cpu[reg.INTR_SHADOW] = 1
        with pytest.raises(GuestError):
            cpu[reg.VMCS_CR4_SHADOW]
        return
    assert cpu[reg.CR4] == 0x2020 and cpu[reg.VMCS_CR4_SHADOW] == 0x20
    with pytest.raises(GuestError):
        cpu[reg.INTR_SHADOW] = 1
    with pytest.raises(GuestError):
        cpu[reg.VMCS_CR4_SHADOW] = 1


def test_what_is_no_register_or_vcpu_is_refused(here: LocalGuest) -> None:
    for wrong in (reg.LAST, reg.GDTR, -5):
        with pytest.raises(GuestError, match="Invalid argument"):
            here.vm.registers(0, [wrong])
        with pytest.raises(GuestError, match="Invalid argument"):
            here.vm.set_register(0, wrong, 0)
    with pytest.raises(GuestError, match="has no descriptor"):
        here.vm.descriptor(0, reg.RAX)
    with pytest.raises(GuestError, match="no vCPU 3"):
        here.vm.pending_event(NCPUS)


def test_a_vm_without_a_bhyve_has_no_vcpus(tmp_path: Path) -> None:
    node.create(host(tmp_path / "d"), "g")
    with pytest.raises(GuestError, match="no vCPUs"):
        StandinVm(tmp_path / "d", "g").waiting_vcpus()


def test_the_clock_that_was_set_is_remembered(here: LocalGuest) -> None:
    here.vm.set_rtc(1_700_000_000)
    assert here.cpus.rtc_seconds == 1_700_000_000


def test_one_call_at_a_time_has_a_vcpu(here: LocalGuest, tmp_path: Path) -> None:
    other = cpu_file.Cpus(tmp_path / "here" / "vmm" / "g.cpu", is_intel=True)
    read: list[list[int]] = []
    with other.locked():
        reader = threading.Thread(target=lambda: read.append(here.vm.registers(0, [reg.RAX])))
        reader.start()
        assert not read
    reader.join()
    assert len(read) == 1


def test_only_a_vm_that_may_be_changed_gives_a_writable_mapping(
    here: LocalGuest, tmp_path: Path
) -> None:
    with here.vm.map(0, LOW_BYTES, is_writable=True) as mapping:
        mapping[0xF0000] = 7
    assert here.low[0xF0000] == 7
    reader = StandinVm(tmp_path / "here", "g")
    with pytest.raises(GuestError, match="cannot map"):
        reader.map(0, LOW_BYTES, is_writable=True)

"""A vCPU of a paused guest, and twelve pages of its memory, lent to the stub and given back.

"Given back" means: written, read again and compared.  While the stub has the
vCPU, the vCPU is resumed in the kernel with the stub's registers; a guest that
ran with those registers would be lost.  So bhysend blocks all signals during
that time.  If something cannot be put back, lent() tries again, and then raises
NotPutBackError.

A SIGKILL cannot be blocked.  For that case a journal (journal.py) says what must
be put back.  At the source the guest stays paused, and the bhysend that finds
the journal puts all back.  At the destination there is no journal: bhyve is ended.

What becomes of a vCPU whose thread is killed in VM_RUN (FreeBSD 15.1, read):

- The thread leaves the guest at the next interrupt, for the signal's AST
  (vmx.c, vmx_run(), svm.c, svm_run(): vcpu_should_yield()), and the ioctl
  unlocks the vCPU, which is then idle (vmm_dev.c, vmmdev_ioctl()).  Until the
  vCPU is idle, ioctls that name it wait; freebsd_vm.py tries again after EBUSY.
- The vCPU stands anywhere in the stub: perhaps at CPL 0, which on AMD only the
  stub can undo, or with the stub's INT half delivered, which the guest would
  then get.  So the vCPU runs to the stub's end before anything is put back.
- If the vCPU was resumed (VM_RESUME_CPU) and has never run, nobody else runs
  it: bhyve's threads wait in user space until the guest is resumed.  The vCPU
  is first suspended again, as it was found.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping

from bhystream.backend.bhyve import registers as reg
from bhystream.backend.bhyve import stub
from bhystream.backend.bhyve.host import Vm
from bhystream.backend.bhyve.journal import Journal, Phase
from bhystream.backend.bhyve.physical import Lowmem
from bhystream.backend.bhyve.savedvcpu import SavedVcpu
from bhystream.errors import AccessError, GuestError

LIMIT_S = 10.0
_TRIES = 3
_KEPT_CR4 = reg.CR4_DE | reg.CR4_PSE | reg.CR4_MCE | reg.CR4_PGE
"""The bits of CR4 that keep the guest's values in the stub; not PCID, SMEP or SMAP."""

_RUNS_NEVER = (reg.EXIT_VMX, reg.EXIT_SVM, reg.EXIT_SUSPENDED, reg.EXIT_DEBUG)


class NotPutBackError(GuestError):
    """Registers or memory of a paused guest are not what they were: the guest must not run."""


@contextlib.contextmanager
def lent(
    vm: Vm, memory: Lowmem, vcpu: int, made: stub.Stub, journal: Journal | None
) -> Iterator[None]:
    """Let a suspended vCPU run the stub in this block; afterwards put all back as it was.

    vm: opened for writing.  memory: writable.  journal: None if a guest that
    is left behind is ended anyway (at the destination).  All signals are
    blocked in the block.  Raises NotPutBackError, whatever the block has
    raised, if something cannot be put back; the journal then stays.  Raises
    GuestError if nothing was changed.
    """
    if len(memory) < stub.END_GPA:
        raise GuestError(f"its memory ends below {stub.END_GPA:#x}")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        saved = SavedVcpu.read(vm, memory, vcpu)
        if journal:
            journal.write(saved)
        phase = Phase.SET
        try:
            _set(vm, memory, vcpu, made, saved.values)
            if journal:
                journal.mark(Phase.RUNS)
            phase = Phase.RUNS
            vm.resume_cpu(vcpu)
            yield
        finally:
            _give_back(saved, vm, memory, phase, journal)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def run_to_end(vm: Vm, memory: Lowmem, vcpu: int) -> None:
    """Run a vCPU until the stub has ended, successfully or not.

    Raises GuestError if the vCPU cannot run, or if the stub has not ended in LIMIT_S seconds.
    """
    end = time.monotonic() + LIMIT_S
    while not _has_ended(vm, memory, vcpu):
        code = vm.run(vcpu)
        if code in _RUNS_NEVER or time.monotonic() > end:
            raise GuestError(f"it cannot run (exit code {code})")


def _has_ended(vm: Vm, memory: Lowmem, vcpu: int) -> bool:
    """Say whether the stub has set the flag, and the vCPU is not in an NMI's handler after that."""
    return bool(flag(memory)) and stub.is_at_own_cpl(vm.registers(vcpu, (reg.RIP,))[0])


def flag(memory: Lowmem) -> int:
    """Return the stub's flag: 0 while the stub works, then stub.DONE or stub.FAILED."""
    return memory[stub.BASE_GPA + stub.FLAG]


def put_back(vm: Vm, memory: Lowmem, journal: Journal) -> None:
    """Put back what the journal of a killed bhysend says, and remove the journal.

    The guest stands paused.  If this bhysend is killed here, the journal stays
    for the next one.  vm, memory: as lent()'s.  Raises GuestError, and leaves
    the journal, if something cannot be put back: then the guest must not run.
    """
    saved, phase = journal.read()
    vm.suspend_cpu(saved.vcpu)
    vm.registers(saved.vcpu, (reg.RIP,))  # waits until the killed thread has left the vCPU
    if phase == Phase.RUNS and not _has_ended(vm, memory, saved.vcpu):
        vm.resume_cpu(saved.vcpu)
        run_to_end(vm, memory, saved.vcpu)
    _give_back(saved, vm, memory, phase, journal)


def _set(vm: Vm, memory: Lowmem, vcpu: int, made: stub.Stub, before: Mapping[int, int]) -> None:
    """Set the vCPU's registers and memory to the stub's.

    EFER.FFXSR is cleared, because with it AMD's FXSAVE may leave the XMM registers out.
    """
    memory[stub.BASE_GPA : stub.END_GPA] = made.pages
    efer = before[reg.EFER] & ~reg.EFER_FFXSR | reg.EFER_LME | reg.EFER_LMA
    vm.set_register(vcpu, reg.EFER, efer)
    vm.set_register(vcpu, reg.INTR_SHADOW, 0)
    for number, hidden in made.descriptors:
        vm.set_descriptor(vcpu, number, hidden)
    for number, value in made.values:
        kept = before[reg.CR4] & _KEPT_CR4 if number == reg.CR4 else 0
        vm.set_register(vcpu, number, value | kept)


def _give_back(
    saved: SavedVcpu, vm: Vm, memory: Lowmem, phase: Phase, journal: Journal | None
) -> None:
    """Suspend the vCPU, put all back, and inject the NMI that the stub swallowed.

    Only the stub's pages say whether the stub swallowed an NMI, so the phase
    is noted before those pages are overwritten.  Two injected NMIs count as one.
    """
    failed: Exception = GuestError("")
    for _ in range(_TRIES):
        try:
            vm.suspend_cpu(saved.vcpu)
            vm.registers(saved.vcpu, (reg.RIP,))  # waits until the vCPU has stopped
            if phase == Phase.RUNS:
                nmis = memory[stub.BASE_GPA + stub.NMIS]
                phase = Phase.BACK_NMI if nmis else Phase.BACK
                if journal:
                    journal.mark(phase)
            saved.put_back(vm, memory)
            if phase == Phase.BACK_NMI:
                vm.inject_nmi(saved.vcpu)
            if journal:
                journal.remove()
            return
        except (GuestError, AccessError) as error:
            failed = error
    raise NotPutBackError(
        f"vCPU {saved.vcpu} has run code of ours, and its registers cannot be put back: {failed}"
    ) from failed

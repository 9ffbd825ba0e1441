"""A vCPU of a held guest, and twelve pages of its memory, lent to the stub and given back.

Given back means: read again and compared.  In the stub's time the vCPU is
resumed in the kernel and its registers are ours; a guest that ran with them
would be lost.  So no signal is taken in that time, and what cannot be put back
is tried again, then said (NotPutBackError).

A SIGKILL is taken, and what then is to be put back stands in a journal
(journal.py).  At the source the guest stays held, and whoever finds the journal
puts all back.  At the destination there is none: bhyve is ended.

What becomes of a vCPU whose thread is killed in VM_RUN.  Read, FreeBSD 15.1:

- The thread leaves the guest at the next interrupt, for the signal's AST
  (vmx.c, vmx_run(), svm.c, svm_run(): vcpu_should_yield()), and the ioctl
  unlocks the vCPU, which is idle then (vmm_dev.c, vmmdev_ioctl()).  Until it is,
  ioctls that name the vCPU wait; an EBUSY is tried again (freebsd_vm.py).
- It stands anywhere in the stub: at CPL 0, which nobody but the stub undoes on
  AMD, or with the stub's INT half delivered, which the guest would get then.
  So it is let run to the stub's end before anything is put back.
- A vCPU that was resumed (VM_RESUME_CPU) and never run is run by nobody else:
  bhyve's threads wait in user space until the guest is let go.  It is suspended
  again first, as it was found.
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
from bhystream.backend.bhyve.kept import Kept
from bhystream.backend.bhyve.physical import Lowmem
from bhystream.errors import AccessError, GuestError

LIMIT_S = 10.0
_TRIES = 3
_KEPT_CR4 = reg.CR4_DE | reg.CR4_PSE | reg.CR4_MCE | reg.CR4_PGE
"""What of CR4 the stub leaves to the guest; no PCID, no SMEP, no SMAP."""

_RUNS_NEVER = (reg.EXIT_VMX, reg.EXIT_SVM, reg.EXIT_SUSPENDED, reg.EXIT_DEBUG)


class NotPutBackError(GuestError):
    """Registers or memory of a held guest are not what they were: it must not run."""


@contextlib.contextmanager
def lent(
    vm: Vm, memory: Lowmem, vcpu: int, made: stub.Stub, journal: Journal | None
) -> Iterator[None]:
    """Let a suspended vCPU run the stub in this block; then all is as it was.

    vm: opened to be changed.  memory: writable.  journal: None where a guest
    that we leave behind is ended.  No signal is taken.  Raises
    NotPutBackError, whatever the block has raised, and leaves the journal
    then; GuestError where nothing was changed.
    """
    if len(memory) < stub.END_GPA:
        raise GuestError(f"its memory ends below {stub.END_GPA:#x}")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        kept = Kept.read(vm, memory, vcpu)
        if journal:
            journal.write(kept)
        phase = Phase.SET
        try:
            _set(vm, memory, vcpu, made, kept.values)
            if journal:
                journal.mark(Phase.RUNS)
            phase = Phase.RUNS
            vm.resume_cpu(vcpu)
            yield
        finally:
            _give_back(kept, vm, memory, phase, journal)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def run_to_end(vm: Vm, memory: Lowmem, vcpu: int) -> None:
    """Run a vCPU until the stub has ended, well or not.  Raises GuestError where it cannot run."""
    end = time.monotonic() + LIMIT_S
    while not _has_ended(vm, memory, vcpu):
        code = vm.run(vcpu)
        if code in _RUNS_NEVER or time.monotonic() > end:
            raise GuestError(f"it cannot run (exit code {code})")


def _has_ended(vm: Vm, memory: Lowmem, vcpu: int) -> bool:
    """Say whether the flag is set, and no NMI has led away from the stub's end since."""
    return bool(flag(memory)) and stub.is_at_own_cpl(vm.registers(vcpu, (reg.RIP,))[0])


def flag(memory: Lowmem) -> int:
    """Return the stub's flag."""
    return memory[stub.BASE_GPA + stub.FLAG]


def put_back(vm: Vm, memory: Lowmem, journal: Journal) -> None:
    """Put back what the journal of one who was killed says, and remove it.

    The guest stands held.  Whoever is killed in here leaves the journal to the
    next.  vm, memory: as lent()'s.  Raises GuestError, and leaves the journal:
    then the guest must not run.
    """
    kept, phase = journal.read()
    vm.suspend_cpu(kept.vcpu)
    vm.registers(kept.vcpu, (reg.RIP,))  # waits until the killed thread has left it
    if phase == Phase.RUNS and not _has_ended(vm, memory, kept.vcpu):
        vm.resume_cpu(kept.vcpu)
        run_to_end(vm, memory, kept.vcpu)
    _give_back(kept, vm, memory, phase, journal)


def _set(vm: Vm, memory: Lowmem, vcpu: int, made: stub.Stub, before: Mapping[int, int]) -> None:
    """Give the vCPU the stub.  FFXSR would let AMD's FXSAVE leave XMM out."""
    memory[stub.BASE_GPA : stub.END_GPA] = made.pages
    efer = before[reg.EFER] & ~reg.EFER_FFXSR | reg.EFER_LME | reg.EFER_LMA
    vm.set_register(vcpu, reg.EFER, efer)
    vm.set_register(vcpu, reg.INTR_SHADOW, 0)
    for number, hidden in made.descriptors:
        vm.set_descriptor(vcpu, number, hidden)
    for number, value in made.values:
        kept = before[reg.CR4] & _KEPT_CR4 if number == reg.CR4 else 0
        vm.set_register(vcpu, number, value | kept)


def _give_back(kept: Kept, vm: Vm, memory: Lowmem, phase: Phase, journal: Journal | None) -> None:
    """Suspend the vCPU, put all back, and give it the NMI that the stub swallowed.

    How many there were is known only while the stub's pages are there, so it
    is noted before they go; an NMI that is given twice is one.
    """
    failed: Exception = GuestError("")
    for _ in range(_TRIES):
        try:
            vm.suspend_cpu(kept.vcpu)
            vm.registers(kept.vcpu, (reg.RIP,))  # waits until it has left the stub
            if phase == Phase.RUNS:
                nmis = memory[stub.BASE_GPA + stub.NMIS]
                phase = Phase.BACK_NMI if nmis else Phase.BACK
                if journal:
                    journal.mark(phase)
            kept.put_back(vm, memory)
            if phase == Phase.BACK_NMI:
                vm.inject_nmi(kept.vcpu)
            if journal:
                journal.remove()
            return
        except (GuestError, AccessError) as error:
            failed = error
    raise NotPutBackError(
        f"vCPU {kept.vcpu} has run code of ours, and its registers cannot be put back: {failed}"
    ) from failed

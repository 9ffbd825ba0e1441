"""A vCPU of a held guest, and twelve pages of its memory, lent to the stub and given back.

Given back means: read again and compared.  In the stub's time the vCPU is
resumed in the kernel and its registers are ours; a guest that ran with them
would be lost.  So no signal is taken in that time, and what cannot be put back
is tried again, then said (NotPutBackError).  Only a SIGKILL of ours in these
milliseconds leaves the guest as it must not run.

What vmm lets be set, FreeBSD 15.1, read: svm.c, svm_setreg(); vmcb.c,
vmcb_write(), vmcb_setdesc(); vmx.c, vmx_setreg(), vmx_setdesc(); vmcs.c.  All of
it but the CPL on AMD, which the stub leaves as it is, and the interrupt shadow,
which is not set again (fpu.py).  What the segments' hidden parts are in the
VMCB is turned into the VMCS's format and back without a loss.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from bhystream.backend.bhyve import registers as reg
from bhystream.backend.bhyve import stub
from bhystream.backend.bhyve.host import Vm
from bhystream.backend.bhyve.physical import Lowmem
from bhystream.errors import AccessError, GuestError

_TRIES = 3
_KEPT_NUMBERS = (
    *(reg.RAX, reg.RCX, reg.RDX, reg.RSP, reg.RFLAGS, reg.EFER, reg.CR0, reg.CR2, reg.CR3, reg.CR4),
    *reg.SEGMENTS,
    reg.RIP,
)
"""What the stub changes, and what is set for it; RIP, where VM_RUN goes on, last."""

_KEPT_DESCRIPTORS = (*reg.SEGMENTS, reg.GDTR, reg.IDTR)
_KEPT_CR4 = reg.CR4_DE | reg.CR4_PSE | reg.CR4_MCE | reg.CR4_PGE
"""What of CR4 the stub leaves to the guest; no PCID, no SMEP, no SMAP."""

_MASKS_AND_SHADOWS = (
    *(reg.VMCS_CR0_MASK, reg.VMCS_CR0_SHADOW, reg.VMCS_CR4_MASK, reg.VMCS_CR4_SHADOW),
)


class NotPutBackError(GuestError):
    """Registers or memory of a held guest are not what they were: it must not run."""


def kept_registers(vm: Vm, vcpu: int) -> dict[int, int]:
    """Return the registers that lent() puts back, by number."""
    return dict(zip(_KEPT_NUMBERS, vm.registers(vcpu, _KEPT_NUMBERS), strict=True))


def vmcs_fields(vm: Vm, vcpu: int, *fields: int) -> list[int] | None:
    """Return fields of an Intel CPU's VMCS; None on AMD's, which refuses the numbers."""
    try:
        return vm.registers(vcpu, fields)
    except GuestError:
        return None


class _Kept:
    """What a vCPU and the memory under the stub were, and how they become that again."""

    def __init__(self, vm: Vm, memory: Lowmem, vcpu: int) -> None:
        self._vm = vm
        self._memory = memory
        self._vcpu = vcpu
        self.values = kept_registers(vm, vcpu)
        self._hidden = {number: vm.descriptor(vcpu, number) for number in _KEPT_DESCRIPTORS}
        self._masked = self._read_masked()
        self._pages = bytes(memory[stub.BASE_GPA : stub.END_GPA])

    def _read_masked(self) -> dict[int, tuple[int, int]]:
        """Return mask, and what the guest reads of those bits, of CR0 and CR4, on Intel.

        The register itself may have others there (NE, VMXE); to set it sets
        both.  Source: vmx.c, vmx_setup_cr_shadow(), vmx_setreg().
        """
        found = vmcs_fields(self._vm, self._vcpu, *_MASKS_AND_SHADOWS)
        if found is None:
            return {}
        mask_0, shadow_0, mask_4, shadow_4 = found
        return {reg.CR0: (mask_0, shadow_0 & mask_0), reg.CR4: (mask_4, shadow_4 & mask_4)}

    def put_back(self) -> None:
        """Put all back and compare it.  Raises GuestError.

        The registers first: an ioctl that sets one waits until the vCPU has
        left the stub, to suspend it does not.
        """
        for number in _KEPT_NUMBERS:
            mask, visible = self._masked.get(number, (0, 0))
            value = self.values[number] & ~mask | visible
            self._vm.set_register(self._vcpu, number, value)
        for number, hidden in self._hidden.items():
            self._vm.set_descriptor(self._vcpu, number, hidden)
        self._memory[stub.BASE_GPA : stub.END_GPA] = self._pages
        found = {number: self._vm.descriptor(self._vcpu, number) for number in _KEPT_DESCRIPTORS}
        if (
            kept_registers(self._vm, self._vcpu) != self.values
            or found != self._hidden
            or self._read_masked() != self._masked
            or bytes(self._memory[stub.BASE_GPA : stub.END_GPA]) != self._pages
        ):
            raise GuestError("they read back as others")


@contextmanager
def lent(vm: Vm, memory: Lowmem, vcpu: int, made: stub.Stub) -> Iterator[None]:
    """Let a suspended vCPU run the stub in this block; then all is as it was.

    vm: opened to be changed.  memory: writable.  No signal is taken: the guest
    would be left with our registers.  Raises NotPutBackError, whatever the
    block has raised; GuestError where nothing was changed.
    """
    if len(memory) < stub.END_GPA:
        raise GuestError(f"its memory ends below {stub.END_GPA:#x}")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        kept = _Kept(vm, memory, vcpu)
        try:
            _set(vm, memory, vcpu, made, kept.values)
            vm.resume_cpu(vcpu)
            yield
        finally:
            _put_back(kept, vm, memory, vcpu)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


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


def _put_back(kept: _Kept, vm: Vm, memory: Lowmem, vcpu: int) -> None:
    """Suspend the vCPU, put all back, and give it the NMI that the stub swallowed."""
    failed: Exception = GuestError("")
    nmis: int | None = None
    for _ in range(_TRIES):
        try:
            vm.suspend_cpu(vcpu)
            vm.registers(vcpu, (reg.RIP,))  # waits until it has left the stub
            nmis = memory[stub.BASE_GPA + stub.NMIS] if nmis is None else nmis
            kept.put_back()
            if nmis:
                vm.inject_nmi(vcpu)
            return
        except (GuestError, AccessError) as error:
            failed = error
    raise NotPutBackError(
        f"vCPU {vcpu} has run code of ours, and its registers cannot be put back: {failed}"
    ) from failed

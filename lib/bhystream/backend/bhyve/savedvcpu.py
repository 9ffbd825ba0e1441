"""The registers of a vCPU, and the memory under the stub, as they were before the stub ran.

vmm lets all of these registers be set, except two: the CPL on AMD, which the
stub leaves as it is, and the interrupt shadow, which is not set again (fpu.py).
vmm turns the hidden parts of the segments from the VMCB's format into the
VMCS's and back without a loss.
Source: FreeBSD 15.1, read: svm.c, svm_setreg(); vmcb.c, vmcb_write(),
vmcb_setdesc(); vmx.c, vmx_setreg(), vmx_setdesc(); vmcs.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from bhystream.backend.bhyve import registers as reg
from bhystream.backend.bhyve import stub
from bhystream.backend.bhyve.host import SegmentDescriptor, Vm
from bhystream.backend.bhyve.physical import Lowmem
from bhystream.errors import GuestError

_NUMBERS = (
    *(reg.RAX, reg.RCX, reg.RDX, reg.RSP, reg.RFLAGS, reg.EFER, reg.CR0, reg.CR2, reg.CR3, reg.CR4),
    *reg.SEGMENTS,
    reg.RIP,
)
"""The registers that the stub changes, or that are set for it; RIP, where VM_RUN goes on, last."""

_DESCRIPTORS = (*reg.SEGMENTS, reg.GDTR, reg.IDTR)
_MASKS_AND_SHADOWS = (
    *(reg.VMCS_CR0_MASK, reg.VMCS_CR0_SHADOW, reg.VMCS_CR4_MASK, reg.VMCS_CR4_SHADOW),
)

# vCPU; the number of masked registers, 0 or 2.  The structures below follow in their order.
_HEAD = struct.Struct("<II")
_VALUES = struct.Struct(f"<{len(_NUMBERS)}Q")
_HIDDEN = struct.Struct("<QII")
_MASKED = struct.Struct("<QQ")
PACKED_BYTES = (
    _HEAD.size
    + _VALUES.size
    + len(_DESCRIPTORS) * _HIDDEN.size
    + 2 * _MASKED.size
    + stub.LENGTH_BYTES
)


def saved_registers(vm: Vm, vcpu: int) -> dict[int, int]:
    """Return the registers that are put back, by number.  Raises GuestError if vmm refuses."""
    return dict(zip(_NUMBERS, vm.registers(vcpu, _NUMBERS), strict=True))


def vmcs_fields(vm: Vm, vcpu: int, *fields: int) -> list[int] | None:
    """Return fields of an Intel CPU's VMCS, or None on AMD, where vmm refuses the numbers."""
    try:
        return vm.registers(vcpu, fields)
    except GuestError:
        return None


def _read_masked(vm: Vm, vcpu: int) -> dict[int, tuple[int, int]]:
    """Return the mask of CR0 and of CR4, and the masked bits as the guest reads them, on Intel.

    The register itself may have other values in those bits (NE, VMXE).  vmm
    sets the register and the guest's view of it together.
    Source: FreeBSD 15.1, vmx.c, vmx_setup_cr_shadow(), vmx_setreg().
    """
    found = vmcs_fields(vm, vcpu, *_MASKS_AND_SHADOWS)
    if found is None:
        return {}
    mask_0, shadow_0, mask_4, shadow_4 = found
    return {reg.CR0: (mask_0, shadow_0 & mask_0), reg.CR4: (mask_4, shadow_4 & mask_4)}


@dataclass(frozen=True)
class SavedVcpu:
    """A vCPU's registers and the guest's twelve pages, to be put back.

    values: the registers, by number.  hidden: the hidden parts of the segment
    registers, by number.  masked: see _read_masked(); {} on AMD.  pages: the
    stub.LENGTH_BYTES bytes of the guest's memory at stub.BASE_GPA.
    """

    vcpu: int
    values: dict[int, int]
    hidden: dict[int, SegmentDescriptor]
    masked: dict[int, tuple[int, int]]
    pages: bytes

    @staticmethod
    def read(vm: Vm, memory: Lowmem, vcpu: int) -> SavedVcpu:
        """Return a suspended vCPU as it is now.  Raises GuestError if vmm refuses."""
        return SavedVcpu(
            vcpu,
            saved_registers(vm, vcpu),
            {number: vm.descriptor(vcpu, number) for number in _DESCRIPTORS},
            _read_masked(vm, vcpu),
            bytes(memory[stub.BASE_GPA : stub.END_GPA]),
        )

    def put_back(self, vm: Vm, memory: Lowmem) -> None:
        """Put all back, read it again and compare; a second call does no harm.

        The registers come first, because an ioctl that sets a register waits
        until the vCPU has stopped; the ioctl that suspends a vCPU does not wait.
        Raises GuestError if vmm refuses, or if something reads back different.
        """
        for number, before in self.values.items():
            mask, visible = self.masked.get(number, (0, 0))
            vm.set_register(self.vcpu, number, before & ~mask | visible)
        for number, hidden in self.hidden.items():
            vm.set_descriptor(self.vcpu, number, hidden)
        memory[stub.BASE_GPA : stub.END_GPA] = self.pages
        if SavedVcpu.read(vm, memory, self.vcpu) != self:
            raise GuestError("they read back different")

    def pack(self) -> bytes:
        """Return the saved vCPU as PACKED_BYTES bytes."""
        masked = [self.masked.get(number, (0, 0)) for number in (reg.CR0, reg.CR4)]
        return b"".join(
            [
                _HEAD.pack(self.vcpu, len(self.masked)),
                _VALUES.pack(*(self.values[number] for number in _NUMBERS)),
                *(_HIDDEN.pack(one.base, one.limit, one.access) for one in self.hidden.values()),
                *(_MASKED.pack(*pair) for pair in masked),
                self.pages,
            ]
        )

    @staticmethod
    def unpack(data: bytes) -> SavedVcpu:
        """Return the vCPU that pack() packed.  Raises ValueError if pack() cannot have made it."""
        if len(data) != PACKED_BYTES:
            raise ValueError(f"{len(data)} bytes")
        vcpu, count = _HEAD.unpack_from(data)
        at = _HEAD.size
        values = dict(zip(_NUMBERS, _VALUES.unpack_from(data, at), strict=True))
        at += _VALUES.size
        hidden = {}
        for number in _DESCRIPTORS:
            hidden[number] = SegmentDescriptor(*_HIDDEN.unpack_from(data, at))
            at += _HIDDEN.size
        pairs = [_MASKED.unpack_from(data, at + index * _MASKED.size) for index in range(2)]
        at += 2 * _MASKED.size
        if count not in (0, 2) or (count == 0 and any(map(any, pairs))):
            raise ValueError(f"{count} masked registers")
        masked = dict(zip((reg.CR0, reg.CR4), pairs, strict=True)) if count else {}
        return SavedVcpu(vcpu, values, hidden, masked, data[at:])

"""What a vCPU, and the memory under the stub, were before the stub was lent to it.

What vmm lets be set, FreeBSD 15.1, read: svm.c, svm_setreg(); vmcb.c,
vmcb_write(), vmcb_setdesc(); vmx.c, vmx_setreg(), vmx_setdesc(); vmcs.c.  All of
it but the CPL on AMD, which the stub leaves as it is, and the interrupt shadow,
which is not set again (fpu.py).  What the segments' hidden parts are in the
VMCB is turned into the VMCS's format and back without a loss.
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
"""What the stub changes, and what is set for it; RIP, where VM_RUN goes on, last."""

_DESCRIPTORS = (*reg.SEGMENTS, reg.GDTR, reg.IDTR)
_MASKS_AND_SHADOWS = (
    *(reg.VMCS_CR0_MASK, reg.VMCS_CR0_SHADOW, reg.VMCS_CR4_MASK, reg.VMCS_CR4_SHADOW),
)

# vCPU; how many masked registers there are, 0 or 2; then the rest, each in its own order.
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


def kept_registers(vm: Vm, vcpu: int) -> dict[int, int]:
    """Return the registers that are put back, by number."""
    return dict(zip(_NUMBERS, vm.registers(vcpu, _NUMBERS), strict=True))


def vmcs_fields(vm: Vm, vcpu: int, *fields: int) -> list[int] | None:
    """Return fields of an Intel CPU's VMCS; None on AMD's, which refuses the numbers."""
    try:
        return vm.registers(vcpu, fields)
    except GuestError:
        return None


def _read_masked(vm: Vm, vcpu: int) -> dict[int, tuple[int, int]]:
    """Return mask, and what the guest reads of those bits, of CR0 and CR4, on Intel.

    The register itself may have others there (NE, VMXE); to set it sets
    both.  Source: vmx.c, vmx_setup_cr_shadow(), vmx_setreg().
    """
    found = vmcs_fields(vm, vcpu, *_MASKS_AND_SHADOWS)
    if found is None:
        return {}
    mask_0, shadow_0, mask_4, shadow_4 = found
    return {reg.CR0: (mask_0, shadow_0 & mask_0), reg.CR4: (mask_4, shadow_4 & mask_4)}


@dataclass(frozen=True)
class Kept:
    """What is put back.

    values: registers, by number.  hidden: of segment registers.  masked: see
    _read_masked(); {} on AMD.  pages: of the memory that the stub takes.
    """

    vcpu: int
    values: dict[int, int]
    hidden: dict[int, SegmentDescriptor]
    masked: dict[int, tuple[int, int]]
    pages: bytes

    @staticmethod
    def read(vm: Vm, memory: Lowmem, vcpu: int) -> Kept:
        """Return what a suspended vCPU is now.  Raises GuestError."""
        return Kept(
            vcpu,
            kept_registers(vm, vcpu),
            {number: vm.descriptor(vcpu, number) for number in _DESCRIPTORS},
            _read_masked(vm, vcpu),
            bytes(memory[stub.BASE_GPA : stub.END_GPA]),
        )

    def put_back(self, vm: Vm, memory: Lowmem) -> None:
        """Put all back and compare it; twice is no error.  Raises GuestError.

        The registers first: an ioctl that sets one waits until the vCPU has
        left the stub, to suspend it does not.
        """
        for number, before in self.values.items():
            mask, visible = self.masked.get(number, (0, 0))
            vm.set_register(self.vcpu, number, before & ~mask | visible)
        for number, hidden in self.hidden.items():
            vm.set_descriptor(self.vcpu, number, hidden)
        memory[stub.BASE_GPA : stub.END_GPA] = self.pages
        if Kept.read(vm, memory, self.vcpu) != self:
            raise GuestError("they read back as others")

    def pack(self) -> bytes:
        """Return it as PACKED_BYTES bytes."""
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
    def unpack(data: bytes) -> Kept:
        """Return what pack() made.  Raises ValueError for what it never makes."""
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
        return Kept(vcpu, values, hidden, masked, data[at:])

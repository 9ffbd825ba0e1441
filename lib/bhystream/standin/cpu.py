"""The vCPUs of a guest as vmm knows them: DIR/vmm/NAME.cpu.

The stand-in and every process that opens the VM map this file.  For each vCPU
the file has registers, hidden parts and FPU, and says whether the vCPU may run.
The guest's FPU is in this file only, and in no blob of a snapshot: as in bhyve,
a restore loses the FPU unless the backend carries it over.

    0       u64 ncpus, u64 seconds given to VM_RTC_SETTIME, u64 offset of the HPET
    4096    one vCPU after the other, STRIDE_BYTES each:
      0       registers, u64 each, by vmm's numbers
      0x200   hidden parts of ES to GDTR: u64 base, u32 limit, u32 access
      0x300   further state of vmm and of the CPU, u64 each, in the order of NAMES
      0x1000  the FPU: an XSAVE image of standard format

A lock on the file plays vmm's rule that only one ioctl at a time uses a vCPU.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bhystream.backend.bhyve import registers as reg
from bhystream.backend.bhyve.host import SegmentDescriptor
from bhystream.errors import GuestError

HEAD_BYTES = 4096
STRIDE_BYTES = 0x8000
FPU_BYTES = 0x4000
XSTATE_BV = 512

NAMES = (
    *("suspended", "event_1", "event_2", "entry_event", "pending_debug"),
    *("nmi_pending", "nmi_blocked", "nmi_after", "cpl", "xcr0", "cr0_shadow", "cr4_shadow"),
    "tsc_offset",
)
"""nmi_after: the number of instructions until an NMI arrives, 0 for no NMI.

entry_event, pending_debug and the shadows are fields of an Intel CPU's VMCS.
tsc_offset: the guest's TSC minus the host's, modulo 2**64.
"""

CR0_MASK, CR4_MASK = 0x60000020, 0x2000  # NW, CD, NE; VMXE
_CR0_ONES, _CR4_ONES = reg.CR0_NE, 0x2000
_CR0_ZEROS = 0x60000000

_WORD = struct.Struct("<Q")
_HIDDEN = struct.Struct("<QII")
_HIDDEN_AT, _NAMES_AT, _FPU_AT = 0x200, 0x300, 0x1000
_PLACES = {name: _NAMES_AT + 8 * index for index, name in enumerate(NAMES)}

# FCW and MXCSR have their values after a reset; XMM and the rest are zero.
_RESET_FPU = struct.pack("<H22xII", 0x37F, 0x1F80, 0xFFFF)


class Cpu:
    """One vCPU in the file."""

    def __init__(self, mapping: mmap.mmap, index: int, *, is_intel: bool) -> None:
        self._mapping = mapping
        self._at = HEAD_BYTES + index * STRIDE_BYTES
        self._is_intel = is_intel

    def __getitem__(self, number: int) -> int:
        """Return a register, by vmm's number.  Raises GuestError if vmm cannot read the register.

        Source: sys/amd64/vmm: intel/vmx.c, vmx_getreg(); amd/svm.c, svm_getreg().
        """
        fields = {
            reg.VMCS_ENTRY_INTR_INFO: "entry_event",
            reg.VMCS_PENDING_DEBUG: "pending_debug",
            reg.VMCS_CR0_SHADOW: "cr0_shadow",
            reg.VMCS_CR4_SHADOW: "cr4_shadow",
        }
        masks = {reg.VMCS_CR0_MASK: CR0_MASK, reg.VMCS_CR4_MASK: CR4_MASK}
        if number < 0 and self._is_intel and number in masks:
            return masks[number]
        if number < 0 and self._is_intel and number in fields:
            return self.get(fields[number])
        if not 0 <= number < reg.LAST or number in (reg.GDTR, reg.IDTR):
            raise GuestError(f"cannot read register {number}: Invalid argument")
        return self._word(number * 8)

    def __setitem__(self, number: int, value: int) -> None:
        """Set a register, by vmm's number.  Raises GuestError if vmm cannot set the register.

        Source: sys/amd64/vmm: intel/vmx.c, vmx_setreg(); intel/vmcs.c,
        vmcs_fix_regval(); amd/svm.c, svm_setreg().
        """
        forces_shadow = number == reg.INTR_SHADOW and value and self._is_intel
        if not 0 <= number < reg.LAST or number in (reg.GDTR, reg.IDTR) or forces_shadow:
            raise GuestError(f"cannot set register {number}: Invalid argument")
        if self._is_intel and number == reg.CR0:
            self.put("cr0_shadow", value)
            value = (value | _CR0_ONES) & ~_CR0_ZEROS
        if self._is_intel and number == reg.CR4:
            self.put("cr4_shadow", value)
            value |= _CR4_ONES
        self._put_word(number * 8, value)

    def hidden(self, number: int) -> SegmentDescriptor:
        """Return the hidden part of a segment register.  Raises GuestError if it has none."""
        return SegmentDescriptor(*_HIDDEN.unpack_from(self._mapping, self._hidden_at(number)))

    def put_hidden(self, number: int, value: SegmentDescriptor) -> None:
        """Set the hidden part of a segment register.  Raises GuestError if it has none."""
        at = self._hidden_at(number)
        _HIDDEN.pack_into(self._mapping, at, value.base, value.limit, value.access)

    def get(self, name: str) -> int:
        """Return the value of one of NAMES."""
        return self._word(_PLACES[name])

    def put(self, name: str, value: int) -> None:
        """Set the value of one of NAMES."""
        self._put_word(_PLACES[name], value)

    def fpu(self, at: int, length_bytes: int) -> bytes:
        """Return bytes of the FPU.  at: an offset in the XSAVE image."""
        start = self._at + _FPU_AT + at
        return self._mapping[start : start + length_bytes]

    def put_fpu(self, at: int, data: bytes) -> None:
        """Set bytes of the FPU.  at: an offset in the XSAVE image."""
        start = self._at + _FPU_AT + at
        self._mapping[start : start + len(data)] = data

    def state(self) -> bytes:
        """Return registers and hidden parts as bytes, for a comparison."""
        return self._mapping[self._at : self._at + _NAMES_AT]

    def reset(self) -> None:
        """Set the state of a vCPU that was never started."""
        self._mapping[self._at : self._at + STRIDE_BYTES] = bytes(STRIDE_BYTES)
        self.put_fpu(0, _RESET_FPU)
        self.put("xcr0", 1)
        self.put("suspended", 1)
        self[reg.CR0], self[reg.CR4], self[reg.RFLAGS] = 0x60000010, 0, 2
        self[reg.RIP], self[reg.CS] = 0xFFF0, 0xF000

    def start(self, index: int) -> None:
        """Set the state of a vCPU in the middle of 64-bit code, except the FPU.

        index: the vCPU's number.  A vCPU with an odd number is in user mode, and
        no two vCPUs have the same registers.
        """
        cpl = 3 if index % 2 else 0
        for number in range(reg.LAST):
            if number not in (reg.GDTR, reg.IDTR, reg.INTR_SHADOW):
                self[number] = 0x1111_0000_0000 * (index + 1) + number
        for number in range(reg.ES, reg.GDTR + 1):
            access = 0 if number >= reg.IDTR else 0xC093 | cpl << 5
            hidden = SegmentDescriptor(0x2222_0000 * (index + 1) + number, 0xFFF0 + number, access)
            self.put_hidden(number, hidden)
            if number < reg.IDTR:
                self[number] = number * 8 | cpl
        code = SegmentDescriptor(0, 0xFFFFFFFF, 0xA09B | cpl << 5)
        self.put_hidden(reg.CS, code)
        self[reg.RFLAGS], self[reg.EFER] = 0x246, 0xD01
        self[reg.CR0], self[reg.CR3], self[reg.CR4] = 0x80050033, 0x5005, 0x3606F0
        self.put("cpl", cpl)
        self.put("xcr0", 7)

    def _hidden_at(self, number: int) -> int:
        if not reg.ES <= number <= reg.GDTR:
            raise GuestError(f"register {number} has no descriptor: Invalid argument")
        return self._at + _HIDDEN_AT + (number - reg.ES) * _HIDDEN.size

    def _word(self, at: int) -> int:
        found: int = _WORD.unpack_from(self._mapping, self._at + at)[0]
        return found

    def _put_word(self, at: int, value: int) -> None:
        _WORD.pack_into(self._mapping, self._at + at, value & ((1 << 64) - 1))


class Cpus:
    """The open file of vCPUs.  Each thread that must exclude others needs an object of its own."""

    def __init__(self, path: Path, *, is_intel: bool) -> None:
        """Open the file.  Raises GuestError if the VM has no vCPUs yet."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise GuestError(f"no vCPUs: {error.strerror}") from error
        self._mapping = mmap.mmap(self._fd, 0)
        self.ncpus: int = _WORD.unpack_from(self._mapping)[0]
        self._cpus = [Cpu(self._mapping, n, is_intel=is_intel) for n in range(self.ncpus)]

    def __getitem__(self, index: int) -> Cpu:
        """Return a vCPU.  Raises GuestError if no vCPU has that number."""
        if not 0 <= index < self.ncpus:
            raise GuestError(f"no vCPU {index}: Invalid argument")
        return self._cpus[index]

    def __iter__(self) -> Iterator[Cpu]:
        return iter(self._cpus)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the file until the with block ends; other callers of locked() wait."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    @property
    def rtc_seconds(self) -> int:
        """The seconds since the Epoch that the clock was set to last, 0 if never."""
        found: int = _WORD.unpack_from(self._mapping, 8)[0]
        return found

    @rtc_seconds.setter
    def rtc_seconds(self, seconds: int) -> None:
        _WORD.pack_into(self._mapping, 8, seconds)

    @property
    def hpet_offset(self) -> int:
        """The HPET's counter minus that of an HPET which never stood still, modulo 2**32."""
        found: int = _WORD.unpack_from(self._mapping, 16)[0]
        return found

    @hpet_offset.setter
    def hpet_offset(self, ticks: int) -> None:
        _WORD.pack_into(self._mapping, 16, ticks)

    def close(self) -> None:
        """Close the file.  A second call does nothing."""
        if self._fd >= 0:
            self._mapping.close()
            os.close(self._fd)
            self._fd = -1


def create(path: Path, ncpus: int, *, is_intel: bool) -> Cpus:
    """Make and open the file of vCPUs that were never started.

    Raises OSError if the file cannot be made.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.truncate(fd, HEAD_BYTES + ncpus * STRIDE_BYTES)
        os.pwrite(fd, _WORD.pack(ncpus), 0)
    finally:
        os.close(fd)
    cpus = Cpus(path, is_intel=is_intel)
    for cpu in cpus:
        cpu.reset()
    return cpus

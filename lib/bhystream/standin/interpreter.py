"""VM_RUN of the stand-in: an interpreter of the instructions of backend/bhyve/stub.py.

Every other instruction is a fault of the stub, and raises GuestError.  The
interpreter plays everything that the instructions depend on as a CPU does, so
that a wrong table, selector or flag shows: four levels of page tables with their
U and W bits, SMEP and SMAP, gates and their DPL, the TSS's RSP0, far returns
with and without a change of CPL, IOPL, #NM, #UD, #GP, and NMIs between any two
instructions.

The CPL is a field of its own, as on AMD, and only the vCPU changes that field.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable

from bhystream.backend.bhyve import registers as reg
from bhystream.backend.bhyve.host import SegmentDescriptor
from bhystream.errors import GuestError

from .cpu import XSTATE_BV, Cpu

EXIT_PAUSE = 7

_BATCH = 64
_ADDRESS = 0x000FFFFFFFFFF000
_UD, _NMI, _NM, _DF, _GP, _PF = 6, 2, 7, 8, 13, 14
_WITH_ERROR = frozenset({_DF, _GP, _PF})
_MXCSR_MASK = 0xFFFF
_XCR0_ALLOWED = 0x7
# The standard format has x87 and SSE in the legacy region, and AVX behind the header.
_AVX_AT, _AVX_BYTES = 576, 256
_LEGACY_BYTES, _HEADER_BYTES = 512, 64
# FXSAVE leaves the bytes from here to the end to software.  Source: SDM, FXSAVE.
_SOFTWARE_AT = 464


class Fault(Exception):
    """An exception that the vCPU raises."""

    def __init__(self, vector: int, error: int = 0) -> None:
        super().__init__(f"vector {vector}")
        self.vector = vector
        self.error = error


class Exit(Exception):
    """The vCPU leaves the guest."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit {code}")
        self.code = code


class Interpreter:
    """An interpreter for one vCPU, whose memory is the guest's lowmem."""

    def __init__(self, cpu: Cpu, lowmem: mmap.mmap) -> None:
        self._cpu = cpu
        self._lowmem = lowmem
        self._rip = 0
        self._table: tuple[tuple[bytes, int, Callable[[int, int], None]], ...] = (
            # The opcode; the number of bytes that follow (1: imm8, 4: an address relative to RIP,
            # 5: both); the function that executes the instruction, given the address and the imm8.
            (b"\xcd", 1, lambda _, vector: self._interrupt(vector)),
            (b"\xc6\x05", 5, lambda at, value: self._write(at, bytes((value,)))),
            (b"\xe6", 1, lambda _, port: self._out()),
            (b"\xf3\x90", 0, lambda *_: self._pause()),
            (b"\xeb", 1, lambda _, by: self._jump(by)),
            (b"\x31\xc9", 0, lambda *_: self._set(reg.RCX, 0)),
            (b"\x0f\x01\xd0", 0, lambda *_: self._xgetbv()),
            (b"\x0f\x01\xd1", 0, lambda *_: self._xsetbv()),
            (b"\x89\x05", 4, lambda at, _: self._store(at, reg.RAX)),
            (b"\x89\x15", 4, lambda at, _: self._store(at, reg.RDX)),
            (b"\x8b\x05", 4, lambda at, _: self._fetch(at, reg.RAX)),
            (b"\x8b\x15", 4, lambda at, _: self._fetch(at, reg.RDX)),
            (b"\x48\x0f\xae\x25", 4, lambda at, _: self._xsave(at)),
            (b"\x48\x0f\xae\x2d", 4, lambda at, _: self._xrstor(at)),
            (b"\x48\x0f\xae\x05", 4, lambda at, _: self._fxsave(at)),
            (b"\x48\x0f\xae\x0d", 4, lambda at, _: self._fxrstor(at)),
            (b"\x48\x8d\x25", 4, lambda at, _: self._set(reg.RSP, at)),
            (
                b"\xfe\x05",
                4,
                lambda at, _: self._write(at, bytes(((self._read(at, 1)[0] + 1) & 255,))),
            ),
            (b"\x48\xcb", 0, lambda *_: self._return(is_interrupt=False)),
            (b"\x48\xcf", 0, lambda *_: self._return(is_interrupt=True)),
        )

    def run(self) -> int:
        """Run at most _BATCH instructions; return the exit code.

        The vCPU may get suspended at any time.  Raises GuestError if an
        instruction is none of the stub's, in a triple fault, which would reset a
        CPU, and outside of long mode.
        """
        for _ in range(_BATCH):
            if self._cpu.get("suspended"):
                return reg.EXIT_DEBUG
            try:
                self._one()
            except Exit as left:
                return left.code
        return reg.EXIT_BOGUS

    def _one(self) -> None:
        cpu = self._cpu
        self._rip = cpu[reg.RIP]
        try:
            for event in ("entry_event", "event_1", "event_2"):
                if cpu.get(event):
                    vector = cpu.get(event) & 0xFF
                    cpu.put(event, 0)
                    self._deliver(vector, self._rip)
                    return
            if cpu.get("nmi_pending") and not cpu.get("nmi_blocked"):
                cpu.put("nmi_pending", 0)
                cpu.put("nmi_blocked", 1)
                self._deliver(_NMI, self._rip)
                return
            self._execute()
        except Fault as fault:
            self._fault(fault)
        self._count_down()

    def _count_down(self) -> None:
        left = self._cpu.get("nmi_after")
        if left:
            self._cpu.put("nmi_after", left - 1)
            if left == 1:
                self._cpu.put("nmi_pending", 1)

    def _fault(self, fault: Fault) -> None:
        error = fault.error if fault.vector in _WITH_ERROR else None
        try:
            self._deliver(fault.vector, self._rip, error)
        except Fault as second:
            raise GuestError(
                f"triple fault of the stand-in at {self._rip:#x}: {fault}, then {second}"
            ) from second

    def _execute(self) -> None:
        code = self._read(self._rip, 16, is_fetch=True)
        for opcode, length, act in self._table:
            if not code.startswith(opcode):
                continue
            end = len(opcode) + length
            rest = code[len(opcode) : end]
            after = self._rip + end
            self._cpu[reg.RIP] = after
            at = after + struct.unpack("<i", rest[:4])[0] if length >= 4 else 0
            try:
                act(at, rest[-1] if length in (1, 5) else 0)
            except Fault:
                self._cpu[reg.RIP] = self._rip
                raise
            return
        raise GuestError(f"the stand-in has no such instruction at {self._rip:#x}: {code.hex(' ')}")

    # Memory.

    def _read(self, address: int, length: int, *, is_fetch: bool = False, cpl: int = -1) -> bytes:
        found = b""
        while len(found) < length:
            part = min(length - len(found), 4096 - (address + len(found)) % 4096)
            try:
                gpa = self._translate(address + len(found), is_fetch=is_fetch, cpl=cpl)
            except Fault:
                if is_fetch and found:
                    return found  # the instruction may end before the page that is not mapped
                raise
            found += self._lowmem[gpa : gpa + part]
        return found

    def _write(self, address: int, data: bytes, cpl: int = -1) -> None:
        while data:
            part = min(len(data), 4096 - address % 4096)
            gpa = self._translate(address, is_write=True, cpl=cpl)
            self._lowmem[gpa : gpa + part] = data[:part]
            address, data = address + part, data[part:]

    def _translate(
        self, address: int, *, is_write: bool = False, is_fetch: bool = False, cpl: int = -1
    ) -> int:
        """Return the gpa of a linear address.  Raises Fault.  cpl: -1 stands for the vCPU's."""
        cpu = self._cpu
        cpl = cpu.get("cpl") if cpl < 0 else cpl
        cr4 = cpu[reg.CR4]
        if (
            not cpu[reg.CR0] & reg.CR0_PG
            or not cr4 & reg.CR4_PAE
            or not cpu[reg.EFER] & reg.EFER_LMA
        ):
            raise GuestError(f"the stand-in runs nothing outside of long mode, at {address:#x}")
        table, rights = cpu[reg.CR3] & _ADDRESS, 7
        for shift in (39, 30, 21, 12):
            entry_at = table + (address >> shift & 0x1FF) * 8
            entry = int.from_bytes(self._lowmem[entry_at : entry_at + 8], "little")
            if not entry & 1 or (shift != 12 and entry & 0x80):
                cpu[reg.CR2] = address
                raise Fault(_PF, is_write << 1 | (cpl == 3) << 2)
            rights &= entry
            table = entry & _ADDRESS
        is_user = bool(rights & 4)
        is_barred = (
            (cpl == 3 and not is_user)
            or (is_write and not rights & 2)
            or (cpl < 3 and is_user and is_fetch and cr4 & reg.CR4_SMEP)
            or (cpl < 3 and is_user and not is_fetch and cr4 & reg.CR4_SMAP)
        )
        if is_barred:
            cpu[reg.CR2] = address
            raise Fault(_PF, 1 | is_write << 1 | (cpl == 3) << 2)
        return table + address % 4096

    def _descriptor(self, selector: int) -> SegmentDescriptor:
        """Return the GDT's descriptor of a selector.  Raises Fault."""
        gdt = self._cpu.hidden(reg.GDTR)
        at = selector & ~7
        if not at or selector & 4 or at + 7 > gdt.limit:
            raise Fault(_GP, at)
        word = int.from_bytes(self._read(gdt.base + at, 8, cpl=0), "little")
        access = word >> 40 & 0xF0FF
        if not access & 0x80:
            raise Fault(_GP, at)
        return SegmentDescriptor(0, 0xFFFFFFFF, access)

    # Control.

    def _interrupt(self, vector: int) -> None:
        """Execute INT.  Raises Fault: among others, if the gate's DPL is below the CPL."""
        idt = self._cpu.hidden(reg.IDTR)
        if vector * 16 + 15 > idt.limit:
            raise Fault(_GP, vector * 8 + 2)
        access = self._read(idt.base + vector * 16 + 5, 1, cpl=0)[0]
        if access >> 5 & 3 < self._cpu.get("cpl"):
            raise Fault(_GP, vector * 8 + 2)
        self._deliver(vector, self._cpu[reg.RIP])

    def _deliver(self, vector: int, rip: int, error: int | None = None) -> None:
        """Enter a 64-bit interrupt gate.  Source: SDM, 6.14.  Raises Fault."""
        cpu = self._cpu
        idt = cpu.hidden(reg.IDTR)
        if vector * 16 + 15 > idt.limit:
            raise Fault(_GP, vector * 8 + 2)
        gate = self._read(idt.base + vector * 16, 16, cpl=0)
        low, selector, ist, access, middle, high, _ = struct.unpack("<HHBBHII", gate)
        if access & 0x9F != 0x8E or ist:
            raise Fault(_GP, vector * 8 + 2)
        code = self._descriptor(selector)
        if code.access & 0x2018 != 0x2018 or code.access >> 5 & 3:
            raise Fault(_GP, selector & ~7)
        frame = [rip, cpu[reg.CS], cpu[reg.RFLAGS], cpu[reg.RSP], cpu[reg.SS]]
        stack, is_outer = cpu[reg.RSP], bool(cpu.get("cpl"))
        if is_outer:
            tss = cpu.hidden(reg.TR)
            stack = int.from_bytes(self._read(tss.base + 4, 8, cpl=0), "little")
        stack = (stack & ~15) - 8 * len(frame)
        self._write(stack, struct.pack("<5Q", *frame), cpl=0)
        if error is not None:
            stack -= 8
            self._write(stack, struct.pack("<Q", error), cpl=0)
        cpu.put("cpl", 0)
        cpu[reg.CS] = selector & ~3
        cpu.put_hidden(reg.CS, code)
        if is_outer:
            cpu[reg.SS] = 0
            cpu.put_hidden(reg.SS, SegmentDescriptor(0, 0, 0x10000))
        cpu[reg.RSP] = stack
        cpu[reg.RFLAGS] &= ~(reg.RFLAGS_IF | reg.RFLAGS_TF)
        cpu[reg.RIP] = low | middle << 16 | high << 32

    def _return(self, *, is_interrupt: bool) -> None:
        """Execute LRETQ or IRETQ.  Source: SDM.  Raises Fault."""
        cpu = self._cpu
        stack = cpu[reg.RSP]
        count = 5 if is_interrupt else 2
        words = list(struct.unpack(f"<{count}Q", self._read(stack, 8 * count)))
        rip, selector = words[0], words[1] & 0xFFFF
        target = selector & 3
        is_outer = target > cpu.get("cpl")
        if target < cpu.get("cpl"):
            raise Fault(_GP, selector & ~7)
        code = self._descriptor(selector)
        if code.access & 0x2018 != 0x2018 or code.access >> 5 & 3 != target:
            raise Fault(_GP, selector & ~7)
        if is_interrupt:
            cpu.put("nmi_blocked", 0)
            cpu[reg.RFLAGS] = words[2]
            self._load_stack(words[3], words[4] & 0xFFFF, target)
        elif is_outer:
            rsp, ss = struct.unpack("<2Q", self._read(stack + 16, 16))
            self._load_stack(rsp, ss & 0xFFFF, target)
        else:
            cpu[reg.RSP] = stack + 16
        cpu[reg.CS] = selector
        cpu.put_hidden(reg.CS, code)
        cpu[reg.RIP] = rip
        cpu.put("cpl", target)
        if is_outer:
            self._drop_inner(target)

    def _load_stack(self, rsp: int, selector: int, cpl: int) -> None:
        cpu = self._cpu
        hidden = SegmentDescriptor(0, 0, 0x10000)
        if selector & ~3 or cpl == 3:
            hidden = self._descriptor(selector)
            if hidden.access & 0x1A != 0x12 or hidden.access >> 5 & 3 != cpl or selector & 3 != cpl:
                raise Fault(_GP, selector & ~7)
        cpu[reg.SS], cpu[reg.RSP] = selector, rsp
        cpu.put_hidden(reg.SS, hidden)

    def _drop_inner(self, cpl: int) -> None:
        """Load a null selector into the data segments that the outer CPL may not use."""
        for number in (reg.DS, reg.ES, reg.FS, reg.GS):
            hidden = self._cpu.hidden(number)
            if not hidden.access & 0x10000 and hidden.access >> 5 & 3 < cpl:
                self._cpu[number] = 0
                self._cpu.put_hidden(number, SegmentDescriptor(0, 0, 0x10000))

    def _out(self) -> None:
        if self._cpu[reg.RFLAGS] >> 12 & 3 < self._cpu.get("cpl"):
            raise Fault(_GP)  # the I/O bitmap is empty
        raise Exit(reg.EXIT_INOUT)

    def _pause(self) -> None:
        self._count_down()
        raise Exit(EXIT_PAUSE)

    def _jump(self, by: int) -> None:
        self._cpu[reg.RIP] += by - 256 if by & 0x80 else by

    # Registers and FPU.

    def _set(self, number: int, value: int) -> None:
        self._cpu[number] = value

    def _store(self, at: int, number: int) -> None:
        self._write(at, struct.pack("<I", self._cpu[number] & 0xFFFFFFFF))

    def _fetch(self, at: int, number: int) -> None:
        self._cpu[number] = int.from_bytes(self._read(at, 4), "little")

    def _pair(self) -> int:
        return (self._cpu[reg.RDX] & 0xFFFFFFFF) << 32 | self._cpu[reg.RAX] & 0xFFFFFFFF

    def _require_fpu(self, at: int, boundary: int, *, needs_xsave: bool) -> None:
        if needs_xsave and not self._cpu[reg.CR4] & reg.CR4_XSAVE:
            raise Fault(_UD)
        if self._cpu[reg.CR0] & (reg.CR0_TS | reg.CR0_EM):
            raise Fault(_NM)
        if at % boundary:
            raise Fault(_GP)

    def _xgetbv(self) -> None:
        if not self._cpu[reg.CR4] & reg.CR4_XSAVE:
            raise Fault(_UD)
        xcr0 = self._cpu.get("xcr0")
        self._cpu[reg.RAX], self._cpu[reg.RDX] = xcr0 & 0xFFFFFFFF, xcr0 >> 32

    def _xsetbv(self) -> None:
        """Execute XSETBV as vmm does.  Source: sys/amd64/vmm/intel/vmx.c, vmx_emulate_xsetbv()."""
        if not self._cpu[reg.CR4] & reg.CR4_XSAVE:
            raise Fault(_UD)
        value = self._pair()
        lacks_sse = value & 4 and not value & 2
        if self._cpu.get("cpl") or not value & 1 or value & ~_XCR0_ALLOWED or lacks_sse:
            raise Fault(_GP)
        self._cpu.put("xcr0", value)

    def _fxsave(self, at: int) -> None:
        self._require_fpu(at, 16, needs_xsave=False)
        self._write(at, self._cpu.fpu(0, _SOFTWARE_AT))

    def _fxrstor(self, at: int) -> None:
        self._require_fpu(at, 16, needs_xsave=False)
        image = self._read(at, _SOFTWARE_AT)
        self._require_mxcsr(image)
        self._cpu.put_fpu(0, image)
        self._mark(3)

    def _xsave(self, at: int) -> None:
        self._require_fpu(at, 64, needs_xsave=True)
        mask = self._pair() & self._cpu.get("xcr0")
        used = int.from_bytes(self._cpu.fpu(XSTATE_BV, 8), "little")
        if mask & 1:
            self._write(at, self._cpu.fpu(0, 24))
            self._write(at + 32, self._cpu.fpu(32, 128))
        if mask & 6:
            self._write(at + 24, self._cpu.fpu(24, 8))
        if mask & 2:
            self._write(at + 160, self._cpu.fpu(160, 256))
        if mask & 4:
            self._write(at + _AVX_AT, self._cpu.fpu(_AVX_AT, _AVX_BYTES))
        old = int.from_bytes(self._read(at + XSTATE_BV, 8), "little")
        self._write(at + XSTATE_BV, struct.pack("<Q", old & ~mask | used & mask))

    def _xrstor(self, at: int) -> None:
        self._require_fpu(at, 64, needs_xsave=True)
        mask = self._pair() & self._cpu.get("xcr0")
        image = self._read(at, _AVX_AT)
        used = int.from_bytes(image[XSTATE_BV : XSTATE_BV + 8], "little")
        if used & ~self._cpu.get("xcr0") or any(
            image[XSTATE_BV + 8 : _LEGACY_BYTES + _HEADER_BYTES]
        ):
            raise Fault(_GP)
        if mask & 6:
            self._require_mxcsr(image)
            self._cpu.put_fpu(24, image[24:28])
        if mask & 1:
            empty = struct.pack("<H22x", 0x37F)
            self._cpu.put_fpu(0, image[:24] if used & 1 else empty)
            self._cpu.put_fpu(32, image[32:160] if used & 1 else bytes(128))
        if mask & 2:
            self._cpu.put_fpu(160, image[160:416] if used & 2 else bytes(256))
        if mask & 4:
            upper = self._read(at + _AVX_AT, _AVX_BYTES) if used & 4 else bytes(_AVX_BYTES)
            self._cpu.put_fpu(_AVX_AT, upper)
        old = int.from_bytes(self._cpu.fpu(XSTATE_BV, 8), "little")
        self._cpu.put_fpu(XSTATE_BV, struct.pack("<Q", old & ~mask | used & mask))

    def _require_mxcsr(self, image: bytes) -> None:
        if int.from_bytes(image[24:28], "little") & ~_MXCSR_MASK:
            raise Fault(_GP)

    def _mark(self, components: int) -> None:
        old = int.from_bytes(self._cpu.fpu(XSTATE_BV, 8), "little")
        self._cpu.put_fpu(XSTATE_BV, struct.pack("<Q", old | components))

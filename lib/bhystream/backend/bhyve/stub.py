"""The few instructions with which a vCPU saves or loads its own FPU registers.

A stock vmm offers no other way to these registers.  Each vCPU runs the stub once,
while the guest stands paused, in an environment of its own: page tables, GDT, IDT
and TSS, in twelve pages of the guest's memory that are put back afterwards (lent.py).

    at the vCPU's own CPL                at CPL 0, by a gate of our IDT
    int $0x80 ------------------------->  XGETBV, XSAVE64, FXSAVE64
    flag = 1  <---------------- lretq --  (or XSETBV, FXRSTOR64, XRSTOR64)
    out %al, $0xf4     (save only)
    spin

Why the vCPU keeps its CPL outside of the gate: on AMD the CPL is a separate
field of the VMCB, loaded by VMRUN, and vmm lets nobody write that field (svm.c,
svm_setreg()).  A guest that was stopped in user mode begins at CPL 3 whatever
CS and SS say, and must end there.  So the stub's pages are user pages, IOPL is
3, the gate is open to CPL 3, and a far return leads back.

Why a far return and no IRET: an IRET ends the blocking of NMIs (svm.c,
clear_nmi_blocking(); VMX's virtual NMIs), also for a guest that stands in its
NMI handler.  The stub's NMI handler counts an NMI that comes while the stub
runs, and lent.py later injects it again.  Only that handler ends in an IRET,
which there ends the blocking that the NMI itself began.

Why the window lies in a PML4 slot that the guest does not use: VMRUN does not
flush the TLB of an ASID that stays (svm_pmap_activate()), so the stub must not
meet the guest's translations, nor the guest the stub's.  On Intel, setting CR3
flushes the TLB (vmx.c, vmx_setreg()).

Why the pages lie at 0xd0000: every guest's memory begins at 0, and bhyve's
memory map calls 0xc0000 to 0xfffff a hole, in which bhyve emulates a ROM
(e820.c, E820_ROM_MEM_BASE).  The hole is memory all the same, but no guest gives
it to a device, and a device that goes on during the pause (e1000, xhci) writes
only where its guest told it to.

Order: XRSTOR comes last.  The components that are set in XCR0 come from the
XSAVE image, with its XSTATE_BV, so that a component that was in its initial
state is in it again.  The others (XMM, if bit 1 of XCR0 is 0) come from the
FXSAVE image.  MXCSR is in both.  XSETBV comes first, since bhyve restores XCR0
only later.  On AMD XSETBV is not intercepted, on Intel vmx_emulate_xsetbv()
emulates it; both need CR4.OSXSAVE.  If the guest never set CR4.OSXSAVE, there
is only the FXSAVE image.

Source: FreeBSD 15.1, read: sys/amd64/vmm/amd/svm.c, vmcb_init(), svm_run();
sys/amd64/vmm/intel/vmx.c; sys/amd64/vmm/vmm.c, restore_guest_fpustate(),
save_guest_fpustate(); usr.sbin/bhyve/amd64/e820.c.  Run on 15.1, emulated AMD:
a simpler stub at CPL 0 with the same save and restore instructions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from bhystream.backend.bhyve import registers as reg
from bhystream.backend.bhyve.host import SegmentDescriptor
from bhystream.guest import PAGE_BYTES

BASE_GPA = 0xD0000
NPAGES = 12
LENGTH_BYTES = NPAGES * PAGE_BYTES
END_GPA = BASE_GPA + LENGTH_BYTES

# Offsets in the twelve pages.  The first four pages are page tables, which the stub does not map.
_PML4, _PDPT, _PD, _PT = (index * PAGE_BYTES for index in range(4))
ENTRY = 0x4000
_DONE = ENTRY + 2
_FAILED = ENTRY + 0x40
_GATE = ENTRY + 0x80
_FAULT = ENTRY + 0x100
_NMI = ENTRY + 0x140
_GDT = 0x5000
_TSS = 0x5100
_FRAME_DONE, _FRAME_FAILED = 0x5200, 0x5240
FLAG = 0x5300
NMIS = 0x5301
XCR0 = 0x5308
FXSAVE = 0x5400
_IDT = 0x6000
_STACK, _STACK_0 = 0x7800, 0x8000
XSAVE = 0x8000

FXSAVE_BYTES = 512

DONE, FAILED = 1, 2
"""Values of the flag; it is 0 until the vCPU is back at its own CPL."""

_VECTOR = 0x80
_NMI_VECTOR = 2
_CODE_0, _DATA_0, _CODE, _DATA, _TR = 0x08, 0x10, 0x18, 0x20, 0x28
_TSS_BYTES = 0x68
_SLOT_SHIFT = 39
_SLOTS = range(96, 200)
"""PML4 slots of the lower half, far from where systems put code, heaps, libraries and stacks."""

# Page table bits: present, writable, user, accessed, dirty.
_TABLE, _PAGE = 0x27, 0x67

# One instruction: its text; its first bytes; the offset of its operand in the twelve pages, which
# is encoded relative to RIP in 32 bits after those bytes; and the bytes after these 32 bits.
_Row = tuple[str, str] | tuple[str, str, int] | tuple[str, str, int, str]

_ENTRY_ROWS: tuple[_Row, ...] = (
    ("int    $0x80", "cd 80"),
    ("movb   $1, flag(%rip)", "c6 05", FLAG, "01"),
)
_FAILED_ROWS: tuple[_Row, ...] = (("movb   $2, flag(%rip)", "c6 05", FLAG, "02"),)
# Neither the kernel nor bhyve emulates port 0xf4.  Source: sys/amd64/vmm/vmm_ioport.c.
_OUT_ROWS: tuple[_Row, ...] = (("outb   %al, $0xf4", "e6 f4"),)
_SPIN_ROWS: tuple[_Row, ...] = (
    ("pause", "f3 90"),
    ("jmp    . - 2", "eb fc"),
)
_XGETBV_ROWS: tuple[_Row, ...] = (
    ("xorl   %ecx, %ecx", "31 c9"),
    ("xgetbv", "0f 01 d0"),
    ("movl   %eax, xcr0(%rip)", "89 05", XCR0),
    ("movl   %edx, xcr0+4(%rip)", "89 15", XCR0 + 4),
    ("xsave64 area(%rip)", "48 0f ae 25", XSAVE),
)
_FXSAVE_ROWS: tuple[_Row, ...] = (("fxsave64 image(%rip)", "48 0f ae 05", FXSAVE),)
_XSETBV_ROWS: tuple[_Row, ...] = (
    ("xorl   %ecx, %ecx", "31 c9"),
    ("movl   xcr0(%rip), %eax", "8b 05", XCR0),
    ("movl   xcr0+4(%rip), %edx", "8b 15", XCR0 + 4),
    ("xsetbv", "0f 01 d1"),
)
_FXRSTOR_ROWS: tuple[_Row, ...] = (("fxrstor64 image(%rip)", "48 0f ae 0d", FXSAVE),)
_XRSTOR_ROWS: tuple[_Row, ...] = (("xrstor64 area(%rip)", "48 0f ae 2d", XSAVE),)
_BACK_ROWS: tuple[_Row, ...] = (
    ("leaq   frame_done(%rip), %rsp", "48 8d 25", _FRAME_DONE),
    ("lretq", "48 cb"),
)
_FAULT_ROWS: tuple[_Row, ...] = (
    ("leaq   frame_failed(%rip), %rsp", "48 8d 25", _FRAME_FAILED),
    ("lretq", "48 cb"),
)
_NMI_ROWS: tuple[_Row, ...] = (
    ("incb   nmis(%rip)", "fe 05", NMIS),
    ("iretq", "48 cf"),
)


@dataclass(frozen=True)
class Stub:
    """What is set for a vCPU that is to run the stub.

    pages: the LENGTH_BYTES bytes for BASE_GPA.  values: (register, value) of
    each register, RIP last.  descriptors: (register, hidden part).
    """

    pages: bytes
    values: tuple[tuple[int, int], ...]
    descriptors: tuple[tuple[int, SegmentDescriptor], ...]


def assemble(at: int, rows: tuple[_Row, ...]) -> bytes:
    """Return the bytes of instructions.  at: their offset in the twelve pages."""
    code = b""
    for row in rows:
        opcode = bytes.fromhex(row[1])
        if len(row) == 2:
            code += opcode
            continue
        tail = bytes.fromhex(row[3]) if len(row) == 4 else b""
        after = at + len(code) + len(opcode) + 4 + len(tail)
        code += opcode + struct.pack("<i", row[2] - after) + tail
    return code


def free_slot(pml4: bytes) -> int | None:
    """Return a PML4 slot of _SLOTS that a guest does not use, or None if it uses them all.

    pml4: the 4096 bytes of the guest's PML4.
    """
    return next((slot for slot in _SLOTS if not pml4[slot * 8] & 1), None)


def is_at_own_cpl(rip: int) -> bool:
    """Say whether a vCPU whose RIP is at this place in the stub is at its own CPL."""
    return ENTRY <= rip % (1 << _SLOT_SHIFT) < _GATE


def make(cpl: int, slot: int, *, is_save: bool, has_xsave: bool) -> Stub:
    """Return the stub for a vCPU.

    cpl: the vCPU's CPL, 0 to 3.  slot: from free_slot().  is_save: save the
    registers, else load them.  has_xsave: use XSAVE and XCR0 too, which needs
    CR4.OSXSAVE.
    """
    base = slot << _SLOT_SHIFT
    pages = bytearray(LENGTH_BYTES)

    def put(at: int, data: bytes) -> None:
        pages[at : at + len(data)] = data

    _put_tables(put, slot)
    for at, rows in routines(is_save=is_save, has_xsave=has_xsave):
        put(at, assemble(at, rows))
    code, data = _CODE | cpl, _DATA | cpl
    put(_GDT, _gdt(cpl, base))
    put(_TSS + 4, struct.pack("<Q", base + _STACK_0))  # RSP0
    put(_TSS + 0x66, struct.pack("<H", _TSS_BYTES))  # no I/O bitmap
    for vector in range(256):
        target = {_VECTOR: _GATE, _NMI_VECTOR: _NMI}.get(vector, _FAULT)
        put(_IDT + vector * 16, _gate(base + target, dpl=3 if vector == _VECTOR else 0))
    for at, target in ((_FRAME_DONE, _DONE), (_FRAME_FAILED, _FAILED)):
        put(at, struct.pack("<4Q", base + target, code, base + _STACK, data))
    return Stub(bytes(pages), _values(cpl, base, has_xsave=has_xsave), _descriptors(cpl, base))


def routines(*, is_save: bool, has_xsave: bool) -> list[tuple[int, tuple[_Row, ...]]]:
    """Return the routines, each with its offset.

    Only a save ends in an OUT: at the destination bhyve itself would see the exit.
    """
    end = (_OUT_ROWS if is_save else ()) + _SPIN_ROWS
    if is_save:
        work = (_XGETBV_ROWS if has_xsave else ()) + _FXSAVE_ROWS
    elif has_xsave:
        work = _XSETBV_ROWS + _FXRSTOR_ROWS + _XRSTOR_ROWS
    else:
        work = _FXRSTOR_ROWS
    return [
        (ENTRY, _ENTRY_ROWS + end),
        (_FAILED, _FAILED_ROWS + end),
        (_GATE, work + _BACK_ROWS),
        (_FAULT, _FAULT_ROWS),
        (_NMI, _NMI_ROWS),
    ]


def _put_tables(put: Callable[[int, bytes], None], slot: int) -> None:
    """Map the eight pages after the page tables at their offsets in the window, and no others."""
    put(_PML4 + slot * 8, struct.pack("<Q", BASE_GPA + _PDPT | _TABLE))
    put(_PDPT, struct.pack("<Q", BASE_GPA + _PD | _TABLE))
    put(_PD, struct.pack("<Q", BASE_GPA + _PT | _TABLE))
    for page in range(ENTRY // PAGE_BYTES, NPAGES):
        put(_PT + page * 8, struct.pack("<Q", BASE_GPA + page * PAGE_BYTES | _PAGE))


def _gdt(cpl: int, base: int) -> bytes:
    """Return null, code and data of CPL 0, code and data of the vCPU's CPL, and the TSS."""
    ring = cpl << 45
    tss = base + _TSS
    low = _TSS_BYTES - 1 | (tss & 0xFFFFFF) << 16 | 0x8B << 40 | (tss >> 24 & 0xFF) << 56
    return struct.pack(
        "<7Q",
        0,
        0x00AF9B000000FFFF,
        0x00CF93000000FFFF,
        0x00AF9B000000FFFF | ring,
        0x00CF93000000FFFF | ring,
        low,
        tss >> 32,
    )


def _gate(target: int, dpl: int) -> bytes:
    """Return a 64-bit interrupt gate to CPL 0."""
    low, middle, high = target & 0xFFFF, target >> 16 & 0xFFFF, target >> 32
    return struct.pack("<HHBBHII", low, _CODE_0, 0, 0x8E | dpl << 5, middle, high, 0)


def _values(cpl: int, base: int, *, has_xsave: bool) -> tuple[tuple[int, int], ...]:
    """Return the registers; lent.py sets EFER, and adds the bits of CR4 that the guest keeps."""
    cr0 = reg.CR0_PG | reg.CR0_WP | reg.CR0_NE | reg.CR0_ET | reg.CR0_MP | reg.CR0_PE
    cr4 = reg.CR4_PAE | reg.CR4_FXSR | reg.CR4_XMM | (reg.CR4_XSAVE if has_xsave else 0)
    data = _DATA | cpl
    return (
        (reg.CR4, cr4),
        (reg.CR3, BASE_GPA + _PML4),
        (reg.CR0, cr0),
        (reg.CS, _CODE | cpl),
        *((number, data) for number in (reg.SS, reg.DS, reg.ES, reg.FS, reg.GS)),
        (reg.LDTR, 0),
        (reg.TR, _TR),
        (reg.RSP, base + _STACK),
        (reg.RFLAGS, 0x3002),  # IOPL 3, interrupts off
        (reg.RIP, base + ENTRY),
    )


def _descriptors(cpl: int, base: int) -> tuple[tuple[int, SegmentDescriptor], ...]:
    """Return the hidden parts, in the format of vmm.h, which is the VMCS's."""
    ring = cpl << 5
    data = SegmentDescriptor(0, 0xFFFFFFFF, 0xC093 | ring)
    return (
        (reg.CS, SegmentDescriptor(0, 0xFFFFFFFF, 0xA09B | ring)),
        *((number, data) for number in (reg.SS, reg.DS, reg.ES, reg.FS, reg.GS)),
        (reg.LDTR, SegmentDescriptor(0, 0, 0x10000)),
        (reg.TR, SegmentDescriptor(base + _TSS, _TSS_BYTES - 1, 0x8B)),
        (reg.GDTR, SegmentDescriptor(base + _GDT, 7 * 8 - 1, 0)),
        (reg.IDTR, SegmentDescriptor(base + _IDT, 256 * 16 - 1, 0)),
    )

"""The numbers of a vCPU's registers, and the bits of the registers that are used here.

Source: FreeBSD 15.1, sys/amd64/include/vmm.h, enum vm_reg_name and enum
vm_exitcode (up to EFER the same in FreeBSD 14); sys/x86/include/specialreg.h.
"""

from __future__ import annotations

RAX, RBX, RCX, RDX, RSI, RDI, RBP = range(7)
CR0, CR3, CR4, DR7, RSP, RIP, RFLAGS = range(15, 22)
ES, CS, SS, DS, FS, GS, LDTR, TR, IDTR, GDTR = range(22, 32)
EFER, CR2 = 32, 33
INTR_SHADOW = 38
LAST = 49

SEGMENTS = (ES, CS, SS, DS, FS, GS, LDTR, TR)
"""The registers with a selector and a hidden part; IDTR and GDTR have only a hidden part."""

# Exit codes of VM_RUN.
EXIT_INOUT = 0
EXIT_VMX = 1
EXIT_BOGUS = 2
EXIT_SUSPENDED = 14
EXIT_SVM = 19
EXIT_DEBUG = 21

CR0_PE, CR0_MP, CR0_EM, CR0_TS, CR0_ET, CR0_NE = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
CR0_WP, CR0_PG = 0x10000, 0x80000000
CR4_DE, CR4_PSE, CR4_PAE, CR4_MCE, CR4_PGE = 0x8, 0x10, 0x20, 0x40, 0x80
CR4_FXSR, CR4_XMM, CR4_LA57 = 0x200, 0x400, 0x1000
CR4_XSAVE, CR4_SMEP, CR4_SMAP = 0x40000, 0x100000, 0x200000
EFER_LME, EFER_LMA, EFER_FFXSR = 0x100, 0x400, 0x4000
RFLAGS_TF, RFLAGS_IF, RFLAGS_VM = 0x100, 0x200, 0x20000


def vmcs(encoding: int) -> int:
    """Return the register number under which vmm reads a field of an Intel CPU's VMCS.

    The field cannot be written.  On AMD vmm refuses the number, which would
    mean a VMCB field of 0 bytes.  Source: FreeBSD 15.1, sys/amd64/vmm/intel/vmcs.c,
    vmcs_getreg(); vmx.c, vmx_setreg(); sys/amd64/vmm/amd/vmcb.c, vmcb_access(), read.
    """
    return encoding - 0x80000000


# Source: sys/amd64/vmm/intel/vmcs.h, and the SDM for the pending debug exceptions.
VMCS_ENTRY_INTR_INFO = vmcs(0x4016)
VMCS_CR0_MASK, VMCS_CR4_MASK = vmcs(0x6000), vmcs(0x6002)
VMCS_CR0_SHADOW, VMCS_CR4_SHADOW = vmcs(0x6004), vmcs(0x6006)
VMCS_PENDING_DEBUG = vmcs(0x6822)

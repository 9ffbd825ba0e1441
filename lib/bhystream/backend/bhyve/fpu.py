"""The guest's FPU registers, which bhyve's snapshots leave out: optional states "fpu/N".

bhyve does not save vcpu->guestfpu (sys/amd64/vmm/vmm.c, vm_snapshot_vcpus()),
so a restored guest finds its FPU as after a reset.  Run on FreeBSD 15.1,
emulated AMD: the loss is real, and this module prevents it.  While the guest
stands held, each vCPU in turn runs a few instructions of ours (stub.py) that
store or load the vCPU's FPU.  Afterwards registers and memory are put back.

    save    at the source.  bhyve's vCPU threads wait in user space
            (checkpoint_cpu_resume()), so only we call VM_RUN.
    load    at the destination, before bhyve restores the registers.  bhyve's
            vCPU threads try VM_RUN every millisecond and find their vCPUs
            suspended (vmexit_debug()); VM_RESUME_CPU lets one thread in.

A failure to save does no harm: the vCPU stays as it was, and save() reports the
reason.  But if registers or memory cannot be put back, the guest must not run,
and NotPutBackError is raised.

save() leaves these vCPUs alone, and reports the reason for each:

- a vCPU that is not in long mode: a vCPU that was never started, or that runs
  a boot loader or a 32-bit system.  EFER, and on Intel the PDPTEs, would have to
  be changed and changed back for systems that hardly exist.  64-bit systems are
  carried whole, with their 32-bit programs; only the segments of x87's last
  instruction (FCS, FDS) are lost, as in any 64-bit XSAVE.
- a vCPU to which an event is about to be delivered: VM_RUN would deliver the
  event to the stub.  VM_GET_INTINFO reports such an event; on Intel the VMCS may
  hold another, since vmx_run() injects before it tests whether the vCPU is
  suspended.
- a vCPU that single-steps, or stands in an interrupt shadow.  A shadow that a
  HLT has left is over (RIP has moved on, so svm_inj_interrupts() and
  vmx_inject_interrupts() drop the shadow), and is not restored.  No shadow could
  be restored: both functions drop a shadow if RIP has moved in the meantime.

The kernel leaves HLT when a vCPU is suspended (vm_handle_hlt()): RIP then
points past the HLT, and the guest sees one wake-up without a cause.

Unverified: Intel, and any machine that is not emulated.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bhystream.backend.bhyve import registers as reg
from bhystream.backend.bhyve import stub
from bhystream.backend.bhyve.carriable import not_carried
from bhystream.backend.bhyve.host import Vm
from bhystream.backend.bhyve.journal import Journal
from bhystream.backend.bhyve.lent import LIMIT_S, NotPutBackError, flag, lent, run_to_end
from bhystream.backend.bhyve.physical import ADDRESS, Lowmem, Physical
from bhystream.backend.bhyve.savedvcpu import saved_registers, vmcs_fields
from bhystream.backend.bhyve.snapshot import FPU_NAME
from bhystream.errors import AccessError, GuestError
from bhystream.guest import PAGE_BYTES, State

STATE_PREFIX = "fpu/"
STATE_LIMIT_BYTES = 16 << 10
"""The limit of one state.  Payload: u64 XCR0, FXSAVE64 image, XSAVE64 image without final zeros.

If the vCPU has not enabled XSAVE, XCR0 is 0, and there is no XSAVE image.
"""

_POLL_S = 0.0002
_HEAD = struct.Struct("<Q")
_LEAST_BYTES = _HEAD.size + stub.FXSAVE_BYTES
_LEAST_XSAVE_BYTES = 512 + 64  # legacy region and header
_VALID = 1 << 31  # the VMCS holds an event
_HLT = b"\xf4"


@dataclass(frozen=True)
class Saved:
    """What save() found.

    states: one for each vCPU that could be saved.  reasons: one line for each
    vCPU that could not.
    """

    states: tuple[State, ...]
    reasons: tuple[str, ...]


def save(vm: Vm, memory: Lowmem, ncpus: int, journal: Journal) -> Saved:
    """Save the FPU registers of every vCPU of a guest that stands held at the source.

    vm: opened to be changed.  memory: lowmem at gpa 0, writable; save() changes
    the memory and puts it back, so read no pages in the meantime.  journal: the
    process that finds the guest after we were killed in save() puts back what
    the journal says.  A vCPU that cannot be saved becomes a reason.  Raises
    NotPutBackError.
    """
    states, reasons = [], []
    with Physical(vm, memory) as physical:
        for vcpu in range(ncpus):
            try:
                image = _save(vm, memory, physical, vcpu, journal)
                states.append(State(f"{STATE_PREFIX}{vcpu}", image, is_optional=True))
            except NotPutBackError:
                raise
            except (GuestError, AccessError) as error:
                reasons.append(not_carried(vcpu, str(error)))
    return Saved(tuple(states), tuple(reasons))


def load(
    vm: Vm, memory: Lowmem, states: Sequence[State], has_ended: Callable[[], bool] = lambda: False
) -> None:
    """Load FPU registers into the vCPUs of a guest whose bhyve waits to restore it.

    vm, memory: as save()'s.  states: the optional states "fpu/N", not trusted.
    bhyve's threads must run, not be stopped.  has_ended: says whether bhyve has
    ended, so that load() waits no longer.  Raises GuestError if a state is
    wrong or the registers cannot be loaded here, AccessError if vmm may not be
    asked, and NotPutBackError.
    """
    waiting = vm.waiting_vcpus()
    parsed = [parse(state) for state in states]
    for vcpu, xcr0, image in parsed:
        if vcpu not in waiting or sum(one[0] == vcpu for one in parsed) > 1:
            raise GuestError(f"state {STATE_PREFIX}{vcpu}: no vCPU waits for it")
        before = saved_registers(vm, vcpu)
        slot = stub.free_slot(bytes(PAGE_BYTES)) or 0
        made = stub.make(_cpl(before), slot, is_save=False, has_xsave=bool(xcr0))
        pages = bytearray(made.pages)
        _HEAD.pack_into(pages, stub.XCR0, xcr0)
        pages[stub.FXSAVE : stub.FXSAVE + stub.FXSAVE_BYTES] = image[: stub.FXSAVE_BYTES]
        rest = image[stub.FXSAVE_BYTES :]
        pages[stub.XSAVE : stub.XSAVE + len(rest)] = rest
        with lent(vm, memory, vcpu, replace(made, pages=bytes(pages)), None):
            end = time.monotonic() + LIMIT_S
            while not flag(memory) and time.monotonic() < end and not has_ended():
                time.sleep(_POLL_S)
            found = flag(memory)
        if found != stub.DONE:
            how = "refuses them" if found else "does not run"
            raise GuestError(f"cannot load the FPU registers of vCPU {vcpu}: it {how}")


def _save(vm: Vm, memory: Lowmem, physical: Physical, vcpu: int, journal: Journal) -> bytes:
    """Return a vCPU's payload.  Raises GuestError with the reason, or NotPutBackError."""
    before = saved_registers(vm, vcpu)
    slot = _require_carriable(vm, physical, vcpu, before)
    has_xsave = bool(before[reg.CR4] & reg.CR4_XSAVE)
    made = stub.make(_cpl(before), slot, is_save=True, has_xsave=has_xsave)
    with lent(vm, memory, vcpu, made, journal):
        run_to_end(vm, memory, vcpu)
        if flag(memory) != stub.DONE:
            raise GuestError("it faults when it saves them")
        pages = bytes(memory[stub.BASE_GPA : stub.END_GPA])
    xcr0 = pages[stub.XCR0 : stub.XCR0 + _HEAD.size]
    image = pages[stub.FXSAVE : stub.FXSAVE + stub.FXSAVE_BYTES]
    area = pages[stub.XSAVE :].rstrip(b"\0").ljust(_LEAST_XSAVE_BYTES, b"\0") if has_xsave else b""
    payload = xcr0 + image + area
    if len(payload) > STATE_LIMIT_BYTES:
        raise GuestError(f"they have {len(payload)} bytes")
    return payload


def _require_carriable(vm: Vm, physical: Physical, vcpu: int, before: Mapping[int, int]) -> int:
    """Return a PML4 slot for the stub.  Raises GuestError if the vCPU is to be left alone."""
    if not before[reg.EFER] & reg.EFER_LMA:
        raise GuestError("it is not in long mode")
    if before[reg.CR4] & reg.CR4_LA57:
        raise GuestError("it has page tables of five levels")
    if before[reg.RFLAGS] & reg.RFLAGS_TF:
        raise GuestError("it single-steps")
    entry, debug = vmcs_fields(vm, vcpu, reg.VMCS_ENTRY_INTR_INFO, reg.VMCS_PENDING_DEBUG) or (0, 0)
    if vm.pending_event(vcpu) != (0, 0) or entry & _VALID or debug:
        raise GuestError("an event is about to be delivered to it")
    cr3 = before[reg.CR3]
    if vm.registers(vcpu, (reg.INTR_SHADOW,))[0]:
        behind = physical.translate(cr3, (before[reg.RIP] - 1) & ((1 << 64) - 1))
        if behind is None or physical.read(behind, 1) != _HLT:
            raise GuestError("it stands in an interrupt shadow")
    slot = stub.free_slot(physical.read(cr3 & ADDRESS, PAGE_BYTES))
    if slot is None:
        raise GuestError("it uses all of its address space")
    return slot


def _cpl(values: Mapping[int, int]) -> int:
    """Return a vCPU's CPL: CS.RPL, except in real mode (0) and in virtual 8086 mode (3)."""
    if not values[reg.CR0] & reg.CR0_PE:
        return 0
    return 3 if values[reg.RFLAGS] & reg.RFLAGS_VM else values[reg.CS] & 3


def parse(state: State) -> tuple[int, int, bytes]:
    """Return vCPU, XCR0 and both images.  Raises GuestError for a state that save() never makes."""
    named = FPU_NAME.fullmatch(state.name)
    size = len(state.data)
    if not named or not _LEAST_BYTES <= size <= STATE_LIMIT_BYTES:
        raise GuestError(f"state {state.name} with {size} bytes is not of an FPU")
    xcr0 = _HEAD.unpack_from(state.data)[0]
    rest = size - _LEAST_BYTES
    if rest < _LEAST_XSAVE_BYTES if xcr0 else rest:
        raise GuestError(f"state {state.name} has {rest} bytes for XCR0 {xcr0:#x}")
    return int(named[1]), xcr0, state.data[_HEAD.size :]

"""Which vCPUs' FPU registers cannot be carried (fpu.py), as far as a running guest shows."""

from __future__ import annotations

from bhystream.backend.bhyve import registers as reg
from bhystream.backend.bhyve.host import Host, Vm
from bhystream.errors import GuestError, Reason


def reasons(host: Host, name: str, ncpus: int) -> list[Reason]:
    """Return why FPU registers of a running guest cannot be carried, as far as is known so early.

    Raises GuestError if the VM cannot be opened, AccessError if it may not be.
    """
    vm = host.open_vm(name)
    try:
        return [Reason(one) for one in carriable(vm, ncpus)]
    except GuestError as error:
        return [Reason(f"fpu: {error}")]
    finally:
        vm.close()


def carriable(vm: Vm, ncpus: int) -> list[str]:
    """Return why FPU registers of a running guest cannot be carried, as far as known so early.

    Returns one line for each such vCPU.  Costs each vCPU one exit.  Raises
    GuestError, or AccessError if vmm may not be asked.
    """
    waiting = vm.waiting_vcpus()
    found = []
    for vcpu in range(ncpus):
        if vcpu in waiting:
            found.append(not_carried(vcpu, "it was never started"))
        elif not vm.registers(vcpu, (reg.EFER,))[0] & reg.EFER_LMA:
            found.append(not_carried(vcpu, "it is not in long mode"))
    return found


def not_carried(vcpu: int, why: str) -> str:
    """Return the line that says why a vCPU's FPU registers are not carried."""
    return f"the FPU registers of vCPU {vcpu} are not carried: {why}"

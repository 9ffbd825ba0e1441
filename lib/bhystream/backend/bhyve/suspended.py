"""Suspend the vCPUs of a running guest for a moment, and let them run again: the throttle.

The kernel keeps a set of suspended vCPUs (VM_DEBUG_CPUS).  A vCPU in it leaves the guest, and
bhyve's thread of it asks the kernel each millisecond whether it may run.

Every vCPU of a guest that is sent was started, see Opened.require_started().  But a guest
that takes a vCPU off line and on again lets it wait between INIT and SIPI, and a vCPU that
was resumed then would run from wherever its registers say.

Source: sys/dev/vmm/vmm_vm.c, vm_suspend_cpu() and vm_resume_cpu();
usr.sbin/bhyve/amd64/vmexit.c, vmexit_debug() and vmexit_ipi().
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from bhystream.backend.bhyve.host import Vm


def suspend(vm: Vm, suspended: set[int]) -> None:
    """Suspend every vCPU that does not wait already.  Raises GuestError.

    vm: opened for writing.  suspended: gets the vCPUs, each one before it is suspended.
    """
    sockets, cores, threads = vm.topology()
    waiting = vm.waiting_vcpus()
    for vcpu in range(sockets * cores * threads):
        if vcpu not in waiting:
            suspended.add(vcpu)
            vm.suspend_cpu(vcpu)


def resume(vm: Vm, suspended: AbstractSet[int] | None = None) -> None:
    """Let vCPUs run that wait: those of `suspended`, or all if it is None.  Raises GuestError.

    vm: opened for writing.
    """
    for vcpu in sorted(vm.waiting_vcpus()):
        if suspended is None or vcpu in suspended:
            vm.resume_cpu(vcpu)

"""Suspend the vCPUs of a running guest for a moment, and let them run again: the throttle.

The kernel keeps a set of suspended vCPUs (VM_DEBUG_CPUS).  A vCPU in it leaves the guest, and
bhyve's thread of it asks the kernel each millisecond whether it may run.  Every vCPU of a
guest that is sent was started, see Opened.require_started(), so all may be resumed.

Source: sys/dev/vmm/vmm_vm.c, vm_suspend_cpu() and vm_resume_cpu();
usr.sbin/bhyve/amd64/vmexit.c, vmexit_debug().
"""

from __future__ import annotations

from bhystream.backend.bhyve.host import Vm


def suspend(vm: Vm) -> None:
    """Suspend every vCPU.  vm: opened for writing.  Raises GuestError."""
    sockets, cores, threads = vm.topology()
    for vcpu in range(sockets * cores * threads):
        vm.suspend_cpu(vcpu)


def resume(vm: Vm) -> None:
    """Let every suspended vCPU run.  vm: opened for writing.  Raises GuestError."""
    for vcpu in sorted(vm.waiting_vcpus()):
        vm.resume_cpu(vcpu)

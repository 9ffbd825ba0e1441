"""FreeBsdVm's ioctls, against a kernel that a class plays.

tests/bhyve checks what FreeBSD's own kernel answers.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.bhyve import ioctl
from bhystream.backend.bhyve import registers as reg
from bhystream.backend.bhyve.freebsd_vm import FreeBsdVm, numbers_in
from bhystream.backend.bhyve.host import SegmentDescriptor
from bhystream.errors import AccessError, GuestError


class Kernel:
    """A kernel with one vCPU's registers, which writes through the pointers that it gets."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.fails: list[int] = []
        self.registers = {reg.RAX: 5, reg.RIP: 0xFFFF_FFFF_8000_0000, reg.vmcs(0x6006): 1 << 63}
        self.hidden = SegmentDescriptor(1 << 40, 0xFFFF, 0x1F093)
        self.seen: tuple[Any, ...] = ()

    def __call__(self, fd: int, number: int, argument: Any) -> int:
        self.calls.append(number)
        if self.fails:
            code = self.fails.pop(0)
            raise OSError(code, os.strerror(code))
        if number == ioctl.VM_GET_REGISTER_SET:
            numbers = (ctypes.c_int * argument.count).from_address(argument.regnums)
            values = (ctypes.c_uint64 * argument.count).from_address(argument.regvals)
            for index, wanted in enumerate(numbers):
                if wanted not in self.registers:
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                values[index] = self.registers[wanted]
        elif number == ioctl.VM_SET_REGISTER:
            self.registers[argument.regnum] = argument.regval
        elif number == ioctl.VM_GET_SEGMENT_DESCRIPTOR:
            desc = argument.desc
            desc.base, desc.limit, desc.access = self.hidden
        elif number == ioctl.VM_SET_SEGMENT_DESCRIPTOR:
            desc = argument.desc
            self.seen = (argument.cpuid, argument.regnum, desc.base, desc.limit, desc.access)
        elif not self._tell(number, argument):
            self.seen = tuple(getattr(argument, name) for name, *_ in argument._fields_)
        return 0

    def _tell(self, number: int, argument: Any) -> bool:
        if number == ioctl.VM_GET_INTINFO:
            argument.info1, argument.info2 = 0x800000EC, 0x8000030E
        elif number == ioctl.VM_GET_CPUS:
            assert argument.which == ioctl.VM_DEBUG_CPUS
            ctypes.memset(argument.cpus, 0, argument.cpusetsize)
            ctypes.memmove(argument.cpus + 8, b"\5", 1)
        elif number == ioctl.VM_RUN:
            ctypes.memset(argument.cpuset, 0xFF, argument.cpusetsize)
            ctypes.memmove(argument.vm_exit, (21).to_bytes(4, "little") + b"\xff" * 300, 304)
        else:
            return False
        return True


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    played = Kernel()
    monkeypatch.setattr(fcntl, "ioctl", played)
    return played


@pytest.fixture
def vm(tmp_path: Path, kernel: Kernel) -> FreeBsdVm:
    node = tmp_path / "web1"
    node.write_bytes(bytes(8192))
    return FreeBsdVm("web1", str(node), is_writable=True)


def test_registers_come_back_in_the_order_in_which_they_were_asked(
    vm: FreeBsdVm, kernel: Kernel
) -> None:
    found = vm.registers(1, [reg.RIP, reg.vmcs(0x6006), reg.RAX])
    assert found == [0xFFFF_FFFF_8000_0000, 1 << 63, 5]
    vm.set_register(1, reg.RAX, 1 << 63 | 1)
    assert vm.registers(1, [reg.RAX]) == [1 << 63 | 1]


def test_a_register_that_the_kernel_does_not_know_is_said(vm: FreeBsdVm) -> None:
    with pytest.raises(GuestError, match="guest web1: cannot read registers of vCPU 1: Invalid"):
        vm.registers(1, [reg.TR])


def test_hidden_parts_are_read_and_set(vm: FreeBsdVm, kernel: Kernel) -> None:
    assert vm.descriptor(0, reg.TR) == kernel.hidden
    vm.set_descriptor(3, reg.GS, SegmentDescriptor(7, 8, 9))
    assert kernel.seen == (3, reg.GS, 7, 8, 9)


def test_events_and_waiting_vcpus_are_read(vm: FreeBsdVm) -> None:
    assert vm.pending_event(0) == (0x800000EC, 0x8000030E)
    assert vm.waiting_vcpus() == {64, 66}
    assert numbers_in(bytes(128)) == frozenset()


def test_a_run_returns_the_exit_code(vm: FreeBsdVm) -> None:
    assert vm.run(0) == reg.EXIT_DEBUG


@pytest.mark.parametrize(
    ("call", "number", "seen"),
    [
        (lambda vm: vm.resume_cpu(2), ioctl.VM_RESUME_CPU, (2,)),
        (lambda vm: vm.suspend_cpu(2), ioctl.VM_SUSPEND_CPU, (2,)),
        (lambda vm: vm.inject_nmi(2), ioctl.VM_INJECT_NMI, (2,)),
        (lambda vm: vm.set_rtc(1 << 33), ioctl.VM_RTC_SETTIME, (1 << 33,)),
    ],
)
def test_what_names_only_a_vcpu_names_it(
    vm: FreeBsdVm,
    kernel: Kernel,
    call: Callable[[FreeBsdVm], None],
    number: int,
    seen: tuple[int, ...],
) -> None:
    call(vm)
    assert kernel.calls == [number] and kernel.seen == seen


@pytest.mark.parametrize("code", [errno.EINTR, errno.EBUSY])
def test_what_a_signal_or_a_passing_state_has_ended_is_tried_again(
    vm: FreeBsdVm, kernel: Kernel, code: int
) -> None:
    kernel.fails = [code] * 3
    assert vm.run(0) == reg.EXIT_DEBUG
    assert kernel.calls == [ioctl.VM_RUN] * 4
    kernel.fails = [code] * 1000
    with pytest.raises(GuestError, match="cannot run vCPU 0"):
        vm.run(0)


def test_another_error_is_not_tried_again(vm: FreeBsdVm, kernel: Kernel) -> None:
    kernel.fails = [errno.ENXIO]
    with pytest.raises(GuestError, match="cannot suspend vCPU 0"):
        vm.suspend_cpu(0)
    kernel.fails = [errno.EPERM]
    with pytest.raises(AccessError):
        vm.suspend_cpu(0)
    assert len(kernel.calls) == 2


def test_a_node_is_mapped_to_be_written_only_if_asked(
    vm: FreeBsdVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FreeBsdVm, "maps", lambda self: [])  # a file has no memory map
    with vm.map(4096, 4096, is_writable=True) as mapping:
        mapping[0] = 7
    with vm.map(4096, 4096) as mapping:
        assert mapping[0] == 7
        with pytest.raises(TypeError):
            mapping[0] = 8
    reader = FreeBsdVm("web1", str(tmp_path / "web1"))
    with pytest.raises(AccessError, match="cannot map its memory at 0x0"):
        reader.map(0, 4096, is_writable=True)

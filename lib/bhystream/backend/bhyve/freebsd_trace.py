"""A bhyve that we start, traced until it is about to read its memory file: ptrace(2).

bhyve reads all of lowmem with one read(2), which locks its range of the file,
and ftruncate(2) waits for that lock.  So bhyrecv has to cut the file before the
read begins.  Source: sys/kern/vfs_vnops.c, vn_io_fault() and vn_truncate();
read.  Between the moment when the VM's memory appears and the read, bhyve only
makes its devices, which may take hardly any time.  So bhyrecv does not race
bhyve: bhyrecv traces the process before it becomes bhyve, and stops it at each
system call, until bhyve is about to seek in the file and the VM has its memory.

To miss that moment is fatal.  A bhyve that restores a FILE.kern of zeros gives
its vCPUs an XCR0 of 0, and the next VM_RUN loads that XCR0: a general protection
fault in the host's kernel.  Run on FreeBSD 15.1, emulated AMD: the host panics.
Source: sys/amd64/vmm/vmm.c, vm_snapshot_vcpus() and restore_guest_fpustate().

Until the restore is done, bhyve's vCPU threads ask for VM_RUN every millisecond,
and vmm answers at once that the vCPU is not to run.  One such question can be
answered here instead: with the exit of an OUT instruction, whose port bhyve then
writes.  The system call becomes a sched_yield(2), which returns 0 as VM_RUN does,
and the answer goes into bhyve's struct vm_exit.  vmm knows nothing of it, so the
vCPU's registers stay as they are.  Source: usr.sbin/bhyve/bhyverun.c,
vm_loop(); amd64/inout.c, emulate_inout(); sys/kern/subr_syscall.c, syscallenter():
a system call is read anew if the tracer has changed a register.

The kernel kills a traced process when its tracer dies
(kern.kill_on_debugger_exit, 1 by default).  So if bhyrecv is killed while it
traces bhyve, no bhyve is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from bhystream.backend.bhyve import ioctl, registers
from bhystream.backend.bhyve.host import PortWrite
from bhystream.errors import GuestError

# Source: sys/sys/ptrace.h; sys/sys/syscall.h.
_PT_CONTINUE, _PT_ATTACH, _PT_DETACH, _PT_IO, _PT_LWPINFO = 7, 10, 11, 12, 13
_PT_GETNUMLWPS, _PT_GETLWPLIST, _PT_SUSPEND, _PT_TO_SCE, _PT_SET_EVENT_MASK = 14, 15, 18, 20, 26
_PT_GETREGS, _PT_SETREGS = 33, 34
_PIOD_READ_D, _PIOD_WRITE_D = 1, 2
_PL_EVENT_SIGNAL = 1
_PL_FLAG_SCE = 0x04
_SYS_IOCTL, _SYS_SCHED_YIELD, _SYS_LSEEK = 54, 331, 478
_WTRAPPED = 32  # Source: sys/sys/wait.h
_NEXT = 1  # for ptrace(2), this address means: continue from the place of the stop
_POLL_S = 0.0002
_STOPS_S = 5.0
# struct vm_exit as far as u.inout: exitcode, inst_length, rip; then port and size, and the value.
# Source: sys/amd64/include/vmm.h.
_EXIT = struct.Struct("<iiQHHI")

# What VM_RUN answers while bhyve keeps the vCPU from running; the second, if the thread is wanted
# elsewhere.  Source: sys/amd64/vmm/amd/svm.c, svm_run(); intel/vmx.c, vmx_run().
_REFUSALS = (registers.EXIT_DEBUG, registers.EXIT_BOGUS)

Copied: TypeAlias = "ctypes.Structure | ctypes.Array[ctypes.c_char]"


class LwpInfo(ctypes.Structure):
    """struct ptrace_lwpinfo: which thread has stopped, and why."""

    _fields_ = (
        ("lwpid", ctypes.c_int32),
        ("event", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("sigmask", ctypes.c_uint32 * 4),
        ("siglist", ctypes.c_uint32 * 4),
        ("siginfo", ctypes.c_uint64 * 10),
        ("tdname", ctypes.c_char * 20),
        ("child_pid", ctypes.c_int32),
        ("syscall_code", ctypes.c_uint),
        ("syscall_narg", ctypes.c_uint),
    )


class Registers(ctypes.Structure):
    """struct reg of amd64.  Source: sys/x86/include/reg.h."""

    _fields_ = (
        ("r15_to_r8", ctypes.c_uint64 * 8),
        ("rdi", ctypes.c_uint64),
        ("rsi", ctypes.c_uint64),
        ("rbp", ctypes.c_uint64),
        ("rbx", ctypes.c_uint64),
        ("rdx", ctypes.c_uint64),
        ("rcx", ctypes.c_uint64),
        ("rax", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 7),
    )


class IoDescriptor(ctypes.Structure):
    """struct ptrace_io_desc."""

    _fields_ = (
        ("op", ctypes.c_int),
        ("offs", ctypes.c_void_p),
        ("addr", ctypes.c_void_p),
        ("len", ctypes.c_size_t),
    )


def _ptrace(request: int, pid: int, address: object, data: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_int, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int)
    libc.ptrace.restype = ctypes.c_int
    ctypes.set_errno(0)
    done: int = libc.ptrace(request, pid, address, data)
    if done == -1 and (number := ctypes.get_errno()):
        raise OSError(number, os.strerror(number))
    return done


class Trace:
    """host.Trace over ptrace(2): a child of ours, which is stopped until run_until()."""

    def __init__(self, pid: int) -> None:
        """Attach to a child of ours, and stop it.  Raises GuestError if that fails."""
        self._pid = pid
        self._is_attached = False
        self._is_stopped = True
        self._passed = 0  # the signal that has stopped it, and that it is to get
        try:
            _ptrace(_PT_ATTACH, pid, None, 0)
            self._is_attached = True
            os.waitpid(pid, 0)
        except OSError as error:
            raise GuestError(f"cannot trace process {pid}: {error.strerror}") from None

    def run_until(self, is_ready: Callable[[], bool], limit_s: float) -> bool:
        """Let the child run until it is about to seek in a file, and a condition holds.

        The child is stopped when this method returns True.  Returns False if
        the child has ended, or after limit_s seconds; the child's exit status
        is left for its parent to collect.
        """
        return any(info.syscall_code == _SYS_LSEEK and is_ready() for info in self._calls(limit_s))

    def _calls(self, limit_s: float) -> Iterator[LwpInfo]:
        """Let the child run from one system call to the next; yield the thread that stands there.

        Ends when the child has ended, or after limit_s seconds.
        """
        end = time.monotonic() + limit_s
        with contextlib.suppress(OSError):
            while True:
                self._go_on(_PT_TO_SCE)
                found = self._await_stop(end)
                if found is None:
                    return
                if found == signal.SIGTRAP and (info := self._info(self._pid)).flags & _PL_FLAG_SCE:
                    yield info

    def _go_on(self, request: int) -> None:
        """Let the child go on, with the signal that it is to get.  Raises OSError."""
        _ptrace(request, self._pid, _NEXT, self._passed)
        self._is_stopped = False
        self._passed = 0

    def _await_stop(self, end: float) -> int | None:
        """Return the signal that stops the child; None if it has ended, or at a monotonic time."""
        while time.monotonic() < end:
            found = os.waitid(os.P_PID, self._pid, os.WEXITED | _WTRAPPED | os.WNOHANG | os.WNOWAIT)
            if found is None:
                time.sleep(_POLL_S)
                continue
            if found.si_code != os.CLD_TRAPPED:
                self._is_attached = False
                return None
            os.waitid(os.P_PID, self._pid, _WTRAPPED | os.WNOHANG)
            self._is_stopped = True
            # SIGTRAP and SIGSTOP come from the trace.
            if found.si_status not in (signal.SIGTRAP, signal.SIGSTOP):
                self._passed = found.si_status
            return int(found.si_status)
        return None

    def write_ports(self, writes: Sequence[PortWrite], limit_s: float) -> bool:
        """See host.Trace.

        A thread that stands at a system call stays there until let_go(): a thread that reads
        gigabytes of memory would keep all others from being seen.  One thread takes all
        writes, so they happen in their order; and once that thread is back with a question,
        the last one has happened.
        """
        left = [*writes]
        taker = 0
        with contextlib.suppress(OSError):
            if (stands := self._info(self._pid)).flags & _PL_FLAG_SCE:
                _ptrace(_PT_SUSPEND, stands.lwpid, None, 0)
            for info in self._calls(limit_s):
                if info.syscall_code != _SYS_IOCTL or taker not in (0, info.lwpid):
                    continue
                if (at := self._refused_run(info.lwpid)) is None:
                    continue
                if not left:
                    return True
                taker = info.lwpid
                self._answer(taker, at, left.pop(0))
        return False

    def _refused_run(self, thread: int) -> int | None:
        """Return where the answer to a thread's VM_RUN goes, if no vCPU ran for the last one.

        None: the ioctl is another, or the answer does not look as it does in the sources.
        """
        regs = self._registers(thread)
        if regs.rsi & 0xFFFFFFFF != ioctl.VM_RUN:
            return None
        run = ioctl.VmRun()
        self._copy(_PIOD_READ_D, regs.rdx, run)
        last = (ctypes.c_char * _EXIT.size)()
        self._copy(_PIOD_READ_D, run.vm_exit, last)
        return run.vm_exit if _EXIT.unpack(last.raw)[0] in _REFUSALS else None

    def _answer(self, thread: int, at: int, write: PortWrite) -> None:
        """Answer a thread's VM_RUN with a write to a port; at: where the answer goes."""
        answer = (ctypes.c_char * _EXIT.size)()
        _EXIT.pack_into(
            answer, 0, registers.EXIT_INOUT, 0, 0, write.nbytes, write.port, write.value
        )
        self._copy(_PIOD_WRITE_D, at, answer)
        regs = self._registers(thread)
        regs.rax = _SYS_SCHED_YIELD
        _ptrace(_PT_SETREGS, thread, ctypes.byref(regs), 0)

    def _registers(self, thread: int) -> Registers:
        regs = Registers()
        _ptrace(_PT_GETREGS, thread, ctypes.byref(regs), 0)
        return regs

    def _copy(self, op: int, there: int, here: Copied) -> None:
        """Copy from or to the child's memory.  Raises OSError, also if only a part was copied."""
        size = ctypes.sizeof(here)
        wanted = IoDescriptor(op, there, ctypes.addressof(here), size)
        _ptrace(_PT_IO, self._pid, ctypes.byref(wanted), 0)
        if wanted.len != size:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

    def let_go(self) -> None:
        """See host.Trace."""
        if not self._is_attached:
            return
        try:
            self._stop()
            self._take_stops()
            self._go_on(_PT_DETACH)
        except OSError as error:
            if self._is_attached:
                raise GuestError(
                    f"cannot end the trace of process {self._pid}: {error.strerror}"
                ) from None
        self._is_attached = False

    def _stop(self) -> None:
        """Stop a child that runs, because _calls() has reached its limit.  Raises OSError.

        Our SIGSTOP has to be seen: PT_DETACH would leave it pending, and the child stopped.
        """
        if self._is_stopped:
            return
        os.kill(self._pid, signal.SIGSTOP)
        end = time.monotonic() + _STOPS_S
        while (found := self._await_stop(end)) != signal.SIGSTOP:
            if found is None:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            self._go_on(_PT_CONTINUE)

    def _take_stops(self) -> None:
        """Let all threads go on that stand at a system call of their own, but the one reported.

        One thread is reported at a time.  PT_DETACH leaves SIGTRAP pending in each other
        thread that has stopped, and that kills the child.  Source: sys/kern/kern_sig.c,
        ptracestop(), td_xsig; run on FreeBSD 15.1, with a bhyve that has a disk.
        """
        _ptrace(_PT_SET_EVENT_MASK, self._pid, ctypes.byref(ctypes.c_int(0)), 4)
        _ptrace(_PT_SUSPEND, self._info(self._pid).lwpid, None, 0)
        end = time.monotonic() + _STOPS_S
        while self._has_unreported() and time.monotonic() < end:
            self._go_on(_PT_CONTINUE)
            self._await_stop(end)

    def _has_unreported(self) -> bool:
        """Say whether a thread other than the one reported has stopped."""
        reported = self._info(self._pid).lwpid
        others = (thread for thread in self._threads() if thread != reported)
        return any(self._info(thread).event == _PL_EVENT_SIGNAL for thread in others)

    def _threads(self) -> list[int]:
        count = _ptrace(_PT_GETNUMLWPS, self._pid, None, 0)
        threads = (ctypes.c_int32 * count)()
        count = _ptrace(_PT_GETLWPLIST, self._pid, ctypes.byref(threads), count)
        return threads[:count]

    def _info(self, thread: int) -> LwpInfo:
        """Return what is known of a thread, or of the reported thread of a process."""
        info = LwpInfo()
        _ptrace(_PT_LWPINFO, thread, ctypes.byref(info), ctypes.sizeof(info))
        return info

"""A bhyve that we start, stopped just before it reads its memory file: ptrace(2).

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

The kernel kills a traced process when its tracer dies
(kern.kill_on_debugger_exit, 1 by default).  So if bhyrecv is killed while it
traces bhyve, no bhyve is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable

from bhystream.errors import GuestError

# Source: sys/sys/ptrace.h; sys/sys/syscall.h.
_PT_CONTINUE, _PT_ATTACH, _PT_DETACH, _PT_LWPINFO = 7, 10, 11, 13
_PT_GETNUMLWPS, _PT_GETLWPLIST, _PT_SUSPEND, _PT_TO_SCE, _PT_SET_EVENT_MASK = 14, 15, 18, 20, 26
_PL_EVENT_SIGNAL = 1
_PL_FLAG_SCE = 0x04
_SYS_LSEEK = 478
_WTRAPPED = 32  # Source: sys/sys/wait.h
_NEXT = 1  # for ptrace(2), this address means: continue from the place of the stop
_POLL_S = 0.0002
_STOPS_S = 5.0


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
        end = time.monotonic() + limit_s
        number = 0
        while True:
            try:
                _ptrace(_PT_TO_SCE, self._pid, _NEXT, number)
            except OSError:
                return False
            while (found := self._stopped()) is None:
                if time.monotonic() > end:
                    return False
                time.sleep(_POLL_S)
            if found < 0:
                return False
            # SIGTRAP and SIGSTOP come from the trace; any other signal is passed to the child.
            number = 0 if found in (signal.SIGTRAP, signal.SIGSTOP) else found
            if found == signal.SIGTRAP and self._seeks() and is_ready():
                return True

    def _stopped(self) -> int | None:
        """Return the signal that has stopped the child; None if it runs, -1 if it has ended."""
        found = os.waitid(os.P_PID, self._pid, os.WEXITED | _WTRAPPED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        if found.si_code != os.CLD_TRAPPED:
            self._is_attached = False
            return -1
        os.waitid(os.P_PID, self._pid, _WTRAPPED | os.WNOHANG)
        return found.si_status

    def _seeks(self) -> bool:
        info = self._info(self._pid)
        return bool(info.flags & _PL_FLAG_SCE) and info.syscall_code == _SYS_LSEEK

    def let_go(self) -> None:
        """Stop tracing the child, which runs on.  No error if done twice, or if it has ended."""
        if self._is_attached:
            self._is_attached = False
            with contextlib.suppress(OSError):
                self._take_stops()
                _ptrace(_PT_DETACH, self._pid, _NEXT, 0)

    def _take_stops(self) -> None:
        """Let all threads go on that stand at a system call of their own, but the one reported.

        One thread is reported at a time.  PT_DETACH leaves SIGTRAP pending in each other
        thread that has stopped, and that kills the child.  Source: sys/kern/kern_sig.c,
        ptracestop(), td_xsig; run on FreeBSD 15.1, with a bhyve that has a disk.
        """
        _ptrace(_PT_SET_EVENT_MASK, self._pid, ctypes.byref(ctypes.c_int(0)), 4)
        _ptrace(_PT_SUSPEND, self._info(self._pid).lwpid, None, 0)
        end, number = time.monotonic() + _STOPS_S, 0
        while self._has_unreported() and time.monotonic() < end:
            _ptrace(_PT_CONTINUE, self._pid, _NEXT, number)
            while (found := self._stopped()) is None and time.monotonic() < end:
                time.sleep(_POLL_S)
            number = 0 if found in (None, signal.SIGTRAP, signal.SIGSTOP) else found

    def _has_unreported(self) -> bool:
        """Say whether a thread other than the one reported has stopped."""
        count = _ptrace(_PT_GETNUMLWPS, self._pid, None, 0)
        threads = (ctypes.c_int32 * count)()
        count = _ptrace(_PT_GETLWPLIST, self._pid, ctypes.byref(threads), count)
        reported = self._info(self._pid).lwpid
        others = (thread for thread in threads[:count] if thread != reported)
        return any(self._info(thread).event == _PL_EVENT_SIGNAL for thread in others)

    def _info(self, thread: int) -> LwpInfo:
        """Return what is known of a thread, or of the reported thread of a process."""
        info = LwpInfo()
        _ptrace(_PT_LWPINFO, thread, ctypes.byref(info), ctypes.sizeof(info))
        return info

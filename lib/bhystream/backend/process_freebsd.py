"""Processes on FreeBSD: the half of process.py that Linux's /proc and pidfds are.

Run on FreeBSD 15.1, by moves of guests; not every branch of it.
Confirmed in source: the peer's pid is that of the process which called
listen(2), kept then (sys/kern/uipc_usrreq.c, unp_copy_peercred(), index id
371788122); struct xucred (freebsd/freebsd-src@00036dad sys/sys/ucred.h);
kern.boot_id, 16 random bytes (sys/kern/kern_mib.c, 24203022); ps's lstart in
strftime(3)'s %c (bin/ps/print.c, 1155799689).

A start time is seconds since boot here, and compared with a tolerance: ps(1)
shows whole seconds of the wall clock, to which the kernel adds its boot time,
and a step of the clock moves both (Source: sys/kern/kern_proc.c,
fill_kinfo_proc_only: ki_start = p_start + boottime).  Taken from each other
they stay, to the second.  The boot itself is told apart by kern.boot_id, which
no step of the clock changes, as it does kern.boottime.
"""

from __future__ import annotations

import calendar
import os
import re
import select
import signal
import socket
import struct
import subprocess
import time
from typing import Any

from bhystream.errors import GuestError

TOLERANCE_S = 1
"""How far two readings of one start time may lie apart: two roundings of one second each."""

# struct xucred: version, uid, number of groups, 16 groups, a union of a pointer and the pid.
# Source: sys/sys/ucred.h; the pid is there since FreeBSD 13 (unix(4)).
XUCRED = struct.Struct("<IIh2x64x4xi4x")
SOL_LOCAL = 0  # Source: sys/sys/un.h
LOCAL_PEERCRED = 1  # Source: sys/sys/un.h, unix(4)

_LIMIT_S = 10.0
_BOOTTIME = re.compile(r"\bsec = ([0-9]+)")
_select: Any = select  # kqueue(2) is not in the type stubs' idea of this platform


def _run(*argv: str) -> bytes:
    """Return what a program of the base system printed, b"" where it failed.

    In the C locale and UTC, and without LIBXO_OPTIONS, which would turn ps's
    text into something else.
    """
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LIMIT_S,
            check=False,
            env={"LC_ALL": "C", "TZ": "UTC0"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GuestError(f"cannot run {argv[0]}: {error}") from None
    return done.stdout


def unpack_xucred(raw: bytes) -> int:
    """Return the pid in a struct xucred, 0 where it says none."""
    if len(raw) < XUCRED.size:
        return 0
    version, _, _, pid = XUCRED.unpack_from(raw)
    return pid if version == 0 else 0  # XUCRED_VERSION


def peer_pid(sock: socket.socket) -> int:
    """Return the pid that called listen(2) at the other end, 0 where it is not told."""
    return unpack_xucred(sock.getsockopt(SOL_LOCAL, LOCAL_PEERCRED, XUCRED.size))


def parse_boottime(text: str) -> int:
    """Return the seconds of `sysctl -n kern.boottime`: "{ sec = 1790798684, usec = 1 } Wed ..."."""
    found = _BOOTTIME.search(text)
    if found is None:
        raise GuestError(f"cannot read kern.boottime: {text.strip()!r}")
    return int(found[1])


def parse_ps(text: str) -> tuple[str, int] | None:
    """Return (state letter, start in seconds since the epoch), or None for no process.

    text: of `ps -o state= -o lstart=`, in the C locale and UTC:
    "Ss   Mon Nov 23 15:38:07 2026".  Source: ps(1).  A zombie is none: ps may
    have no start time to show for it.
    """
    words = text.split()
    if not words or words[0].startswith("Z"):
        return None
    try:
        start = time.strptime(" ".join(words[1:]), "%a %b %d %H:%M:%S %Y")
    except ValueError:
        raise GuestError(f"cannot read what ps says: {text.strip()!r}") from None
    return words[0][0], calendar.timegm(start)


def boot_id() -> str:
    """Return the running kernel's boot id.  Source: sys/kern/kern_mib.c, sysctl_bootid."""
    return _run("/sbin/sysctl", "-b", "kern.boot_id").hex()


def _boottime() -> int:
    raw = _run("/sbin/sysctl", "-n", "kern.boottime")
    return parse_boottime(raw.decode("ascii", "replace"))


def stat(pid: int) -> tuple[str, int] | None:
    """Return (state letter, start in seconds since boot), or None for no such process."""
    before = _boottime()
    while True:
        raw = _run("/bin/ps", "-o", "state=", "-o", "lstart=", "-p", str(pid))
        after = _boottime()
        if before == after:  # no step of the clock in between
            break
        before = after
    found = parse_ps(raw.decode("ascii", "replace"))
    return found and (found[0], found[1] - after)


class Ending:
    """The end of one process, to be waited for.  As process.Ending, by kqueue(2)."""

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError if there is no such process."""
        self._pid = pid
        self._queue = _select.kqueue()
        event = _select.kevent(
            pid,
            filter=_select.KQ_FILTER_PROC,
            flags=_select.KQ_EV_ADD,
            fflags=_select.KQ_NOTE_EXIT,
        )
        try:
            self._queue.control([event], 0, 0)
        except BaseException:
            self._queue.close()
            raise

    def fileno(self) -> int:
        """Return a descriptor that is readable once the process has ended."""
        fd: int = self._queue.fileno()
        return fd

    def kill(self, number: signal.Signals) -> None:
        """Send a signal: by pid, for there is no pidfd; the caller has just seen it alive."""
        os.kill(self._pid, number)

    def close(self) -> None:
        self._queue.close()


def parent_command(pid: int) -> str:
    """Return a parent's command line, "" for init's.  Source: ps(1), ppid and args."""
    parent = _run("/bin/ps", "-o", "ppid=", "-p", str(pid)).strip()
    if not (parent.isascii() and parent.isdigit()) or int(parent) <= 1:
        return ""
    command = _run("/bin/ps", "-ww", "-o", "args=", "-p", parent.decode())
    return command.decode(errors="replace").strip()

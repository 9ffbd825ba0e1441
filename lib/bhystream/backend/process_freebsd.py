"""Processes on FreeBSD: the half of process.py for which Linux has /proc and pidfds.

Moves of guests on FreeBSD 15.1 have run this file, but not each of its branches.
Source, as of all paths below: freebsd/freebsd-src: sys/kern/uipc_usrreq.c,
unp_copy_peercred(): the peer's pid is that of the process that called listen(2),
saved then; sys/sys/ucred.h at 00036dad: struct xucred; sys/kern/kern_mib.c:
kern.boot_id is 16 random bytes; bin/ps/print.c: lstart is strftime(3)'s %c.

A start time is in seconds since boot here, and compared with a tolerance: ps(1)
shows whole seconds of the wall clock, because the kernel adds its boot time to
the start time, and a step of the clock moves both.  Their difference stays the
same, to the second.  Source: sys/kern/kern_proc.c, fill_kinfo_proc_only():
ki_start = p_start + boottime.  kern.boot_id identifies the boot, because a step
of the clock changes kern.boottime, but not kern.boot_id.
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
"""How far two readings of one start time may differ: each is rounded to a second."""

# struct xucred: version, uid, number of groups, 16 groups, a union of a pointer and the pid.
# Source: sys/sys/ucred.h; the pid is there since FreeBSD 13 (unix(4)).
XUCRED = struct.Struct("<IIh2x64x4xi4x")
SOL_LOCAL = 0  # Source: sys/sys/un.h
LOCAL_PEERCRED = 1  # Source: sys/sys/un.h; unix(4)

_LIMIT_S = 10.0
_BOOTTIME = re.compile(r"\bsec = ([0-9]+)")
_select: Any = select  # the type stubs have kqueue(2) on BSD only


def _run(*argv: str) -> bytes:
    """Return what a program of the base system printed; b"" if it printed nothing.

    The program runs in the C locale and UTC, and without LIBXO_OPTIONS, which
    could make ps print JSON or XML instead of text.  Raises GuestError if the
    program cannot be run, does not end in _LIMIT_S seconds, or prints only an error.
    """
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LIMIT_S,
            check=False,
            process_group=0,  # no Ctrl-C reaches it
            env={"LC_ALL": "C", "TZ": "UTC0"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GuestError(f"cannot run {argv[0]}: {error}") from None
    if done.stderr and not done.stdout:
        said = done.stderr.decode("ascii", "replace").strip()
        raise GuestError(f"{argv[0]} failed: {said}")
    return done.stdout


def unpack_xucred(raw: bytes) -> int:
    """Return the pid in a struct xucred, 0 if the structure holds none."""
    if len(raw) < XUCRED.size:
        return 0
    version, _, _, pid = XUCRED.unpack_from(raw)
    return pid if version == 0 else 0  # XUCRED_VERSION


def peer_pid(sock: socket.socket) -> int:
    """Return the pid that called listen(2) at the other end, 0 if the kernel does not tell.

    Raises OSError if getsockopt(2) fails.
    """
    return unpack_xucred(sock.getsockopt(SOL_LOCAL, LOCAL_PEERCRED, XUCRED.size))


def parse_boottime(text: str) -> int:
    """Return the seconds of `sysctl -n kern.boottime`: "{ sec = 1790798684, usec = 1 } Wed ...".

    Raises GuestError if the text has another form.
    """
    found = _BOOTTIME.search(text)
    if found is None:
        raise GuestError(f"cannot read kern.boottime: {text.strip()!r}")
    return int(found[1])


def parse_ps(text: str) -> tuple[str, int] | None:
    """Return (state letter, start in seconds since the epoch), or None for no process.

    text: the output of `ps -o state= -o lstart=`, in the C locale and UTC:
    "Ss   Mon Nov 23 15:38:07 2026".  Source: ps(1).  Returns None for a zombie
    too, because ps may have no start time to show for a zombie.  Raises
    GuestError if the text has another form.
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
    """Return the running kernel's boot id, in hex.  Raises GuestError as _run() does.

    Source: sys/kern/kern_mib.c, sysctl_bootid().
    """
    return _run("/sbin/sysctl", "-b", "kern.boot_id").hex()


def _boottime() -> int:
    raw = _run("/sbin/sysctl", "-n", "kern.boottime")
    return parse_boottime(raw.decode("ascii", "replace"))


def stat(pid: int) -> tuple[str, int] | None:
    """Return (state letter, start in seconds since boot), or None.  Raises GuestError."""
    before = _boottime()
    while True:
        raw = _run("/bin/ps", "-o", "state=", "-o", "lstart=", "-p", str(pid))
        after = _boottime()
        if before == after:  # the clock made no step while ps ran
            break
        before = after
    found = parse_ps(raw.decode("ascii", "replace"))
    return found and (found[0], found[1] - after)


class Ending:
    """The end of one process, to wait for: as process.Ending, by kqueue(2)."""

    def __init__(self, pid: int) -> None:
        """Watch the process.

        Raises ProcessLookupError if there is no such process, else OSError.
        """
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
        """Send a signal by pid, for FreeBSD has no pidfd; the caller has just seen it alive.

        Raises ProcessLookupError if the process has ended, else OSError.
        """
        os.kill(self._pid, number)

    def close(self) -> None:
        self._queue.close()


def parent_command(pid: int) -> str:
    """Return the command line of a process's parent, "" for init or if ps(1) shows none.

    Source: ps(1), ppid and args.  Raises GuestError if ps(1) cannot be run.
    """
    parent = _run("/bin/ps", "-o", "ppid=", "-p", str(pid)).strip()
    if not (parent.isascii() and parent.isdigit()) or int(parent) <= 1:
        return ""
    command = _run("/bin/ps", "-ww", "-o", "args=", "-p", parent.decode())
    return command.decode(errors="replace").strip()


def parse_ignored(text: str, number: signal.Signals) -> bool:
    """Say whether a signal is among those of `ps -o sigignore=`: "1848c006", or nothing.

    Source: ps(1): the first 32 signals, in hex.  Raises GuestError if the text has another form.
    """
    try:
        return bool(int(text.strip() or "0", 16) >> (number - 1) & 1)
    except ValueError:
        raise GuestError(f"cannot read what ps says: {text.strip()!r}") from None


def ignores(pid: int, number: signal.Signals) -> bool:
    """Say whether a process ignores a signal; False if there is no such process.

    Raises GuestError as _run() and parse_ignored() do.
    """
    raw = _run("/bin/ps", "-o", "sigignore=", "-p", str(pid))
    return parse_ignored(raw.decode("ascii", "replace"), number)


def thread_states(pid: int) -> set[str]:
    """Return the state letters of a process's threads; none for no process.

    Source: ps(1), -H and state.  Raises GuestError as _run() does.
    """
    raw = _run("/bin/ps", "-H", "-o", "state=", "-p", str(pid))
    return {line[:1] for line in raw.decode("ascii", "replace").split()}

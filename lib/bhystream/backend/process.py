"""The process behind a socket, told apart from its successors.

A guest's identity is its process id and the process's start time: a pid alone
is reused.  The boot id makes it good across reboots of the host.

Linux is here, FreeBSD in process_freebsd.py, both behind the same functions.
`what` is how messages call the process: "QEMU", "bhyve".
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
from dataclasses import dataclass

from bhystream.backend import process_freebsd
from bhystream.errors import GuestError

_UCRED = struct.Struct("=iii")  # struct ucred: pid, uid, gid.  Source: unix(7)
_IS_FREEBSD: bool = sys.platform.startswith("freebsd")


class EndedError(GuestError):
    """There is no such process, or no longer."""


@dataclass(frozen=True)
class Identity:
    """One process: pid, start time since boot, and the boot.

    start_ticks: clock ticks on Linux, seconds on FreeBSD.
    """

    pid: int
    start_ticks: int
    boot_id: str


def peer_pid(sock: socket.socket, what: str) -> int:
    """Return the pid that listens at the other end of a Unix socket.

    Source: unix(7), SO_PEERCRED: the credentials at the time of listen(2);
    QEMU listens after it has daemonized (seen with 7.2).
    """
    if _IS_FREEBSD:
        pid = process_freebsd.peer_pid(sock)
    else:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid = _UCRED.unpack(raw)[0]
    if pid <= 0:
        raise GuestError(f"cannot find the {what} process: it is in another pid namespace")
    return pid


def boot_id() -> str:
    """Return the running kernel's boot id, or "" where there is none."""
    if _IS_FREEBSD:
        return process_freebsd.boot_id()
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int] | None:
    """Return (state letter, start ticks), or None if there is no such process.

    Source: proc_pid_stat(5), fields 3 and 22; field 2 may hold spaces and
    parentheses, so counting begins after its last ")".
    """
    if _IS_FREEBSD:
        return process_freebsd.stat(pid)
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return fields[0].decode("ascii"), int(fields[19])


def identify(pid: int, what: str) -> Identity:
    """Return the identity of a living process.  Raises EndedError if it is gone."""
    found = _stat(pid)
    if found is None:
        raise EndedError(f"cannot find the {what} process {pid}: it has ended")
    return Identity(pid, found[1], boot_id())


def is_same(one: Identity, other: Identity) -> bool:
    """Say whether two identities are one process."""
    tolerance = process_freebsd.TOLERANCE_S if _IS_FREEBSD else 0
    return (
        one.pid == other.pid
        and abs(one.start_ticks - other.start_ticks) <= tolerance
        and one.boot_id == other.boot_id
    )


def is_alive(who: Identity) -> bool:
    """Say whether this very process exists; a zombie does not count.

    On Linux a process whose first thread has ended looks like a zombie while
    its others still hold its descriptors and memory: it lives until the last.
    """
    found = _stat(who.pid)
    return (
        found is not None
        and (found[0] not in "ZX" or _has_threads(who.pid))
        and is_same(who, Identity(who.pid, found[1], boot_id()))
    )


def _has_threads(pid: int) -> bool:
    """Say whether threads are left beside a zombie's first.  Source: proc_pid_task(5)."""
    if _IS_FREEBSD:
        return False
    try:
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


class Ending:
    """The end of one process, to be waited for: on Linux by a pidfd, ours until close()."""

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError if there is no such process, OSError else."""
        self._pidfd = os.pidfd_open(pid)

    def fileno(self) -> int:
        """Return a descriptor that is readable once the process has ended."""
        return self._pidfd

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to this process, never to a successor with its pid."""
        signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        os.close(self._pidfd)


def open_ending(who: Identity) -> Ending | process_freebsd.Ending | None:
    """Return the end of exactly this process, None where it is gone already.

    It is opened before the identity is checked, so that no successor with the
    same pid can be meant.  The caller's to close.
    """
    try:
        ending = process_freebsd.Ending(who.pid) if _IS_FREEBSD else Ending(who.pid)
    except ProcessLookupError:
        return None
    except OSError as error:
        raise GuestError(f"cannot watch process {who.pid}: {error.strerror}") from None
    try:
        alive = is_alive(who)
    except BaseException:
        ending.close()
        raise
    if alive:
        return ending
    ending.close()
    return None


def _wait_end(fd: int, limit_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(limit_s * 1000))


def await_end(who: Identity, limit_s: float) -> bool:
    """Wait until this process has ended, for at most limit_s seconds.  True if it is gone."""
    ending = open_ending(who)
    if ending is None:
        return True
    try:
        return _wait_end(ending.fileno(), limit_s)
    finally:
        ending.close()


def end_process(who: Identity, polite_s: float = 5.0) -> bool:
    """End exactly this process: SIGTERM, then SIGKILL.  True if it is gone."""
    try:
        ending = open_ending(who)
    except GuestError:
        return not is_alive(who)
    if ending is None:
        return True
    try:
        ending.kill(signal.SIGTERM)
        if _wait_end(ending.fileno(), polite_s):
            return True
        ending.kill(signal.SIGKILL)
        return _wait_end(ending.fileno(), 10.0)
    except ProcessLookupError:
        return _wait_end(ending.fileno(), 10.0)
    except PermissionError:
        return False
    finally:
        ending.close()


def kill_process(who: Identity, limit_s: float = 10.0) -> bool:
    """End exactly this process at once (SIGKILL), also a stopped one.  True if it is gone.

    Raises GuestError where it cannot be watched.
    """
    ending = open_ending(who)
    if ending is None:
        return True
    try:
        with contextlib.suppress(ProcessLookupError):
            ending.kill(signal.SIGKILL)
        return _wait_end(ending.fileno(), limit_s)
    except PermissionError:
        return False
    finally:
        ending.close()


def is_stopped(who: Identity) -> bool:
    """Say whether this very process stands stopped (SIGSTOP).

    Source: proc_pid_stat(5) and FreeBSD's ps(1): state T.
    """
    found = _stat(who.pid)
    return found is not None and found[0] == "T" and is_alive(who)

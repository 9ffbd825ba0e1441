"""The process behind a socket, and how to tell it from a later process with its pid.

A guest's identity is the pid and the start time of its process, because the
kernel reuses pids.  The boot id keeps the identity valid across reboots of the host.

The functions here serve Linux, and FreeBSD by process_freebsd.py.  `what`
names the process in messages: "QEMU", "bhyve".
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import socket
import struct
import sys
from typing import NamedTuple

from bhystream.errors import GuestError

_UCRED = struct.Struct("=iii")  # struct ucred: pid, uid, gid.  Source: unix(7)
_IS_FREEBSD: bool = sys.platform.startswith("freebsd")
if _IS_FREEBSD:
    from bhystream.backend import process_freebsd


class EndedError(GuestError):
    """There is no such process, or it has ended."""


class Identity(NamedTuple):
    """One process: pid, start time since boot, and the boot's id.

    start_ticks: in clock ticks on Linux, in seconds on FreeBSD.
    """

    pid: int
    start_ticks: int
    boot_id: str


def peer_pid(sock: socket.socket, what: str) -> int:
    """Return the pid of the process that listens at the other end of a Unix socket.

    The kernel returns the credentials at the time of listen(2); QEMU listens
    after it has daemonized (seen with 7.2).  Source: unix(7), SO_PEERCRED.
    Raises GuestError if the kernel shows no pid.
    """
    if _IS_FREEBSD:
        pid = process_freebsd.peer_pid(sock)
    else:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid = _UCRED.unpack(raw)[0]
    if pid <= 0:
        raise GuestError(f"cannot find the {what} process: it is in another pid namespace")
    return pid


@functools.cache
def boot_id() -> str:
    """Return the running kernel's boot id, or "" if the kernel has none.

    Raises GuestError if the boot id cannot be read.
    """
    if _IS_FREEBSD:
        return process_freebsd.boot_id()
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return file.read().decode("ascii").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise GuestError(f"cannot read the boot id: {error.strerror}") from None


def _stat(pid: int) -> tuple[str, int] | None:
    """Return (state letter, start ticks), or None if there is no such process.

    Source: proc_pid_stat(5), fields 3 and 22; field 2 may hold spaces and
    parentheses, so counting begins after its last ")".  Raises GuestError if the
    process cannot be looked at: it may be alive, and its guest may stand paused.
    """
    if _IS_FREEBSD:
        return process_freebsd.stat(pid)
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError as error:
        raise GuestError(f"cannot look at process {pid}: {error.strerror}") from None
    fields = text[text.rindex(b")") + 2 :].split()
    return fields[0].decode("ascii"), int(fields[19])


def identify(pid: int, what: str) -> Identity:
    """Return the identity of a living process.

    Raises EndedError if the process has ended, GuestError if it cannot be looked at.
    """
    found = _stat(pid)
    if found is None:
        raise EndedError(f"cannot find the {what} process {pid}: it has ended")
    return Identity(pid, found[1], boot_id())


def is_same(one: Identity, other: Identity) -> bool:
    """Say whether two identities name the same process."""
    tolerance = process_freebsd.TOLERANCE_S if _IS_FREEBSD else 0
    return (
        one.pid == other.pid
        and abs(one.start_ticks - other.start_ticks) <= tolerance
        and one.boot_id == other.boot_id
    )


def is_alive(who: Identity) -> bool:
    """Say whether this very process exists; a zombie does not count.

    On Linux a process whose first thread has ended looks like a zombie while its
    other threads still hold its descriptors and memory; such a process counts as
    alive until its last thread ends.  Raises GuestError if the process cannot be
    looked at.
    """
    found = _stat(who.pid)
    return (
        found is not None
        and (found[0] not in "ZX" or _has_threads(who.pid))
        and is_same(who, Identity(who.pid, found[1], boot_id()))
    )


def _has_threads(pid: int) -> bool:
    """Say whether a zombie has threads besides its first.  Source: proc_pid_task(5)."""
    if _IS_FREEBSD:
        return False
    try:
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError as error:
        raise GuestError(f"cannot look at process {pid}: {error.strerror}") from None


class Ending:
    """The end of one process, to wait for: on Linux a pidfd, ours until close()."""

    def __init__(self, pid: int) -> None:
        """Open the pidfd.

        Raises ProcessLookupError if there is no such process, else OSError.
        """
        self._pidfd = os.pidfd_open(pid)

    def fileno(self) -> int:
        """Return a descriptor that is readable once the process has ended."""
        return self._pidfd

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to this process, never to a later process with its pid.

        Raises ProcessLookupError if the process has ended, else OSError.
        """
        signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        os.close(self._pidfd)


def open_ending(who: Identity) -> Ending | process_freebsd.Ending | None:
    """Return the Ending of exactly this process, None if the process has ended.

    The Ending is opened before the identity is checked, so that it cannot belong
    to a later process with the same pid.  The caller closes the Ending.  Raises
    GuestError if the process cannot be watched.
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
    """Wait until this process has ended, for at most limit_s seconds; say whether it has.

    Raises GuestError if the process cannot be watched.
    """
    ending = open_ending(who)
    if ending is None:
        return True
    try:
        return _wait_end(ending.fileno(), limit_s)
    finally:
        ending.close()


def end_process(who: Identity, polite_s: float = 5.0) -> bool:
    """End exactly this process: SIGTERM, then SIGKILL; say whether it has ended.

    polite_s: how long SIGTERM may take.  Returns False also if we may not signal
    the process, or cannot watch it.
    """
    try:
        ending = open_ending(who)
    except GuestError:
        return False
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
    """End exactly this process, even a stopped one, by SIGKILL; say whether it has ended.

    Raises GuestError if the process cannot be watched.
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

    Source: proc_pid_stat(5) and FreeBSD's ps(1): state T.  Raises GuestError if the
    process cannot be looked at.
    """
    found = _stat(who.pid)
    return found is not None and found[0] == "T" and is_alive(who)


def is_all_stopped(pid: int) -> bool:
    """Say whether no thread of a process runs, as after SIGSTOP.

    Source: proc_pid_task(5) and FreeBSD's ps(1), -H: state T of each thread.  Raises
    GuestError if the process cannot be looked at.
    """
    if _IS_FREEBSD:
        return process_freebsd.thread_states(pid) == {"T"}
    states = set()
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
                text = file.read()
            states.add(text[text.rindex(b")") + 2 :][:1])
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError as error:
        raise GuestError(f"cannot look at process {pid}: {error.strerror}") from None
    return states == {b"T"}

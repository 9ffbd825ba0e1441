"""Who listens at a QMP socket: the process, told apart from its successors.

A guest's identity is its process id and the process's start time: a pid alone
is reused.  The boot id makes it good across reboots of the host.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
from dataclasses import dataclass

from bhystream.errors import AccessError, GuestError

_UCRED = struct.Struct("=iii")  # struct ucred: pid, uid, gid.  Source: unix(7)


@dataclass(frozen=True)
class Identity:
    """One process: pid, start time in clock ticks since boot, and the boot."""

    pid: int
    start_ticks: int
    boot_id: str


def peer_pid(sock: socket.socket) -> int:
    """Return the pid that listens at the other end of a Unix socket.

    Source: unix(7), SO_PEERCRED: the credentials at the time of listen(2);
    QEMU listens after it has daemonized (seen with 7.2).
    """
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid: int = _UCRED.unpack(raw)[0]
    if pid <= 0:
        raise GuestError("cannot find the QEMU process: it is in another pid namespace")
    return pid


def boot_id() -> str:
    """Return the running kernel's boot id, or "" where there is none."""
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
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return fields[0].decode("ascii"), int(fields[19])


def identify(pid: int) -> Identity:
    """Return the identity of a living process.  Raises GuestError if it is gone."""
    found = _stat(pid)
    if found is None:
        raise GuestError(f"cannot find the QEMU process {pid}: it has ended")
    return Identity(pid, found[1], boot_id())


def is_alive(who: Identity) -> bool:
    """Say whether this very process exists; a zombie does not count."""
    found = _stat(who.pid)
    return (
        found is not None
        and found[0] not in "ZX"
        and found[1] == who.start_ticks
        and who.boot_id == boot_id()
    )


def read_argv(pid: int) -> list[str]:
    """Return the argument vector of a process, program first."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            raw = file.read()
    except OSError as error:
        kind = AccessError if isinstance(error, PermissionError) else GuestError
        raise kind(f"cannot read the arguments of process {pid}: {error.strerror}") from None
    return [word.decode("utf-8", "surrogateescape") for word in raw.split(b"\0")[:-1]]


def _wait_end(pidfd: int, limit_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(limit_s * 1000))


def end_process(who: Identity, polite_s: float = 5.0) -> bool:
    """End exactly this process: SIGTERM, then SIGKILL.  True if it is gone.

    The pidfd is opened before the identity is checked, so that no successor
    with the same pid can be hit.
    """
    try:
        pidfd = os.pidfd_open(who.pid)
    except OSError:
        return not is_alive(who)
    try:
        if not is_alive(who):
            return True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            if _wait_end(pidfd, polite_s):
                return True
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return _wait_end(pidfd, 10.0)
    except PermissionError:
        return False
    finally:
        os.close(pidfd)

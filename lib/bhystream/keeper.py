"""The keeper: a small process that resumes the guest if bhysend dies.

    bhysend                            keeper (own session, signals ignored)
       | starts it, before the pause      |
       |------- what to keep ------------>|  loads all that it may need
       |<------ ready --------------------|
       | records PAUSED, pauses           |
       | ...                              |  waits
       | records HELD, writes END         |
       |------- done -------------------->|  ends
       X killed: the socket closes ------>|  reads the record, and acts on it

What it does depends on the record alone, which is on disk before anything is
done.  No record, or HELD: nothing; after END may be out only the operator
resumes.  PAUSED: END is not out, the destination cannot start, the guest is
resumed here.

It inherits the guest's lock, so no second bhysend can come between.  It is a
new program, not a fork: bhysend has mappings and an event loop that a child
must not share.  Its connection to the hypervisor is opened only when bhysend's
has closed, as QEMU's QMP socket serves one client.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bhystream.errors import GuestError, as_error
from bhystream.report import Console
from bhystream.state import PAUSED, Lock, Record, Records

_READY = b"ready\n"
_DONE = b"done\n"
_START_SECONDS = 30
_END_SECONDS = 10
_RESUME_SECONDS = 120
_RETRY_SECONDS = 0.2
# What ends or stops a process that does not ask for it, and can be ignored.
_IGNORED = ("SIGINT", "SIGHUP", "SIGTERM", "SIGQUIT", "SIGTSTP", "SIGUSR1", "SIGUSR2", "SIGINFO")


class Keeper:
    """The keeper's parent side, in bhysend."""

    def __init__(self, base: Path, record: Record, lock: Lock) -> None:
        """Start a keeper for the guest of this record and wait until it is ready.

        Nothing is paused or recorded yet.  Raises GuestError if it does not
        get ready, and then none is left.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "bhystream.keeper", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), lock.fd),
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise GuestError(
                f"guest {record.guest}: its keeper does not start: {error.strerror}"
            ) from error
        self._socket = ours
        try:
            ours.settimeout(_START_SECONDS)
            ours.sendall(json.dumps({"base": str(base), "record": asdict(record)}).encode() + b"\n")
            if _receive(ours, len(_READY)) != _READY:
                raise GuestError(f"guest {record.guest}: its keeper does not start")
        except OSError as error:
            self.dismiss()
            raise GuestError(f"guest {record.guest}: its keeper does not start") from error
        except GuestError:
            self.dismiss()
            raise

    def dismiss(self) -> None:
        """End the keeper: the guest runs again, or is held.  Twice is no error."""
        # A keeper that is dead already cannot do anything.
        with contextlib.suppress(OSError):
            self._socket.sendall(_DONE)
        self._socket.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def is_alive(self) -> bool:
        """Say whether it is still there to take over."""
        return self._process.poll() is None


def _receive(peer: socket.socket, size: int) -> bytes:
    """Receive exactly `size` bytes, fewer at the end of the connection."""
    data = b""
    while len(data) < size:
        more = peer.recv(size - len(data))
        if not more:
            break
        data += more
    return data


def main(argv: list[str]) -> int:
    """Keep one guest: argv[1] is the number of the socket to bhysend."""
    for name in _IGNORED:
        if hasattr(signal, name):  # SIGINFO is FreeBSD's
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    with socket.socket(fileno=int(argv[1])) as peer, peer.makefile("rb") as lines:
        order = json.loads(lines.readline())
        record = Record(**order["record"])
        # Loaded now: later the file system may be what fails.
        from bhystream import hypervisors

        hypervisors.preload(record.revive)
        # Only now: a relative PYTHONPATH is of bhysend's directory.
        os.chdir("/")
        peer.sendall(_READY)
        if lines.readline() == _DONE:
            return 0
    console = Console("bhysend")
    records = Records(Path(order["base"]), "source")
    found = records.get(record.id)
    if found is None:
        return 0
    if found.phase != PAUSED:
        console.log(f"guest {record.guest}: bhysend is gone; the guest is {found.phase}")
        return 0
    return _resume(record, records, console)


def _resume(record: Record, records: Records, console: Console) -> int:
    """Resume the guest, trying again while the hypervisor does not answer."""
    from bhystream import hypervisors

    deadline = time.monotonic() + _RESUME_SECONDS
    while True:
        try:
            paused = hypervisors.open_paused(record.revive)
            try:
                if not paused.is_alive():
                    console.log(f"guest {record.guest}: its hypervisor is gone")
                    records.remove(record.id)
                    return 0
                paused.resume()
            finally:
                paused.close()
            records.remove(record.id)
        except Exception as raised:  # whatever it is, the guest stands paused
            error = as_error(raised)
            if time.monotonic() < deadline:
                time.sleep(_RETRY_SECONDS)
                continue
            console.fail(error)
            return error.status
        text = f"guest {record.guest}: bhysend is gone; the guest runs on here"
        console.say(text)
        console.log(text)
        return 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(sys.argv))

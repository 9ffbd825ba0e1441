"""The keeper: a small process that acts for bhysend when it dies.

    bhysend                            keeper (own session, signals ignored)
       | starts it, before the pause      |
       |------- what to keep ------------>|  loads all that it may need
       |<------ ready --------------------|
       | records PAUSED, pauses           |
       | ...                              |  waits
       | the guest runs again, or stands  |
       | held, or is gone: recorded       |
       |------- done -------------------->|  ends
       X killed: the socket closes ------>|  reads the record, and acts on it

What it does depends on the record alone, which is on disk before anything is
done, and stands in handshake.RECORD: a guest that is PAUSED is resumed, one
that has MOVED is ended here; HELD and GO are left as they stand, in their
hypervisor, because only an answer or the operator can tell.  In the command
form the answers come through a pipe that it has too: after GO it goes on
reading them in bhysend's place.  With `bhysend -A` the third stage acts
itself, when it gets the lock.

It inherits the guest's lock, so no second bhysend can come between.  It is a
new program, not a fork: bhysend has mappings and an event loop that a child
must not share.  Its connection to the hypervisor is opened only when bhysend's
has closed, as a hypervisor may serve one client at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bhystream import inherited
from bhystream.backend.base import Paused
from bhystream.backend.process import Identity, identify, is_stopped, kill_process
from bhystream.errors import BhyError, FormatError, GoneError, GuestError, as_error
from bhystream.guest import GO, PAUSED
from bhystream.handover.answers import MAX_LINE_BYTES, unpack
from bhystream.handover.handshake import ANSWER_SECONDS, RECORD, Event
from bhystream.handover.standing import EVENTS, Standing
from bhystream.handover.state import Lock, Record, Records
from bhystream.handover.where import Where, outcome, what_to_type
from bhystream.report import Console
from bhystream.send.rendezvous import path_of
from bhystream.units import duration

_READY = b"ready\n"
_DONE = b"done\n"
_HOOK = b"hook "
_START_SECONDS = 30
_END_SECONDS = 10
_RESUME_SECONDS = 120
_RETRY_SECONDS = 0.2
# On FreeBSD it takes a run of ps(1) to look.
_LOOK_SECONDS = 5.0 if sys.platform.startswith("freebsd") else 1.0
_STOPPED_SECONDS = 10.0
# What ends or stops a process that does not ask for it, and can be ignored.
_IGNORED = ("SIGINT", "SIGHUP", "SIGTERM", "SIGQUIT", "SIGTSTP", "SIGUSR1", "SIGUSR2", "SIGINFO")


class Keeper:
    """The keeper's parent side, in bhysend."""

    def __init__(self, base: Path, record: Record, lock: Lock, answers: int = -1) -> None:
        """Start a keeper for the guest of this record and wait until it is ready.

        answers: the descriptor that a command's answers come from, or -1.
        Nothing is paused or recorded yet.  Raises GuestError if it does not
        get ready, and then none is left.
        """
        kept = [lock.fd] if answers < 0 else [lock.fd, answers]
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*inherited.program("send.keeper"), str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), *kept),
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
            order = {"base": str(base), "record": asdict(record), "answers": answers}
            ours.sendall(json.dumps(order).encode() + b"\n")
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

    def tell_hook(self, group: int) -> None:
        """Say which process group the -p command is, or 0: it is over.  Never raises."""
        with contextlib.suppress(OSError):
            self._socket.sendall(b"hook %d\n" % group)

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self._process.pid

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
    with contextlib.suppress(OSError):
        # The last to be killed when memory runs out; only root may say so.
        Path("/proc/self/oom_score_adj").write_bytes(b"-900")
    with socket.socket(fileno=int(argv[1])) as peer, peer.makefile("rb", buffering=0) as lines:
        line = lines.readline()
        if not line:
            return 0  # killed before it could say what to keep
        order = json.loads(line)
        record = Record(**order["record"])
        # Loaded now: later the file system may be what fails.
        from bhystream import hypervisors

        paused = hypervisors.open_paused(record.revive)
        # Only now: a relative PYTHONPATH is of bhysend's directory.
        os.chdir("/")
        guard = Guard(os.getppid(), Records(Path(order["base"]), "source"), record.id)
        with contextlib.suppress(OSError):  # killed meanwhile
            peer.sendall(_READY)
        hook = 0
        while (line := _listen(peer, lines, guard)).startswith(_HOOK):
            hook = int(line[len(_HOOK) :])
        if line == _DONE:
            return 0
    if hook:
        # What it does belongs to a move that is over.
        with contextlib.suppress(OSError):
            os.killpg(hook, signal.SIGKILL)
    return take_over(order, record, paused)


class Guard:
    """Ends a bhysend that was stopped (SIGSTOP) while its guest is paused.

    Stopped, it would keep the guest paused for ever; left alive, it might go
    on one day and write END.  So it is killed first, and then the guest is
    resumed.
    """

    def __init__(self, pid: int, records: Records, id_: str) -> None:
        """pid: of bhysend, our parent."""
        self._records = records
        self._id = id_
        self._since: float | None = None
        self._who: Identity | None = None
        with contextlib.suppress(GuestError):
            self._who = identify(pid, "bhysend")

    def look(self) -> None:
        """Look once, and act when it has been stopped for too long."""
        if self._who is None or not is_stopped(self._who):
            self._since = None
            return
        self._since = self._since or time.monotonic()
        if time.monotonic() - self._since < _STOPPED_SECONDS:
            return
        with contextlib.suppress(BhyError):
            record = self._records.get(self._id)
            if record is not None and record.phase == PAUSED:
                kill_process(self._who, _END_SECONDS)


def _listen(peer: socket.socket, lines: socket.SocketIO, guard: Guard) -> bytes:
    """Return the next line that bhysend says, nothing when it has died."""
    while not select.select([peer], [], [], _LOOK_SECONDS)[0]:
        guard.look()
    return lines.readline()


def take_over(order: dict[str, Any], record: Record, paused: Paused) -> int:
    """Do what bhysend cannot do any more; return the exit status."""
    console = Console("bhysend")
    base = Path(order["base"])
    records = Records(base, "source")
    with contextlib.suppress(OSError, BhyError):
        os.unlink(path_of(base, record.id))
    found = _read(records, record, console)
    if found is None:
        paused.clear()
        return 0
    command = order["answers"]
    event = Event.ALONE
    if found.phase == GO and command >= 0:
        event = _await_answer(command, found.id)
    standing = Standing(records, found, paused)
    try:
        status = _settle(standing, event, base, console)
    except GoneError as gone:
        console.fail(gone)
        standing.forget()
        return 0
    if status == 0:
        # With `bhysend -A` a third stage finds the way out of doubt.
        _tell(console, found, event, base if command >= 0 else None)
    return status


def _read(records: Records, record: Record, console: Console) -> Record | None:
    """Read the record, trying again: the disk may fail just now, and the guest stands paused.

    Raises BhyError when it stays unreadable.
    """
    deadline = time.monotonic() + _RESUME_SECONDS
    while True:
        try:
            return records.get(record.id)
        except BhyError as error:
            if time.monotonic() > deadline:
                console.fail(error)
                console.say(f"guest {record.guest}: it may stand paused here; see bhysend -l")
                raise
            time.sleep(_RETRY_SECONDS)


def _await_answer(fd: int, id_: str) -> Event:
    """Return the final answer that a command still brings, or ALONE.

    bhysend has read the first part, perhaps within a line, so what is no
    answer of this stream is let pass.
    """
    deadline = time.monotonic() + ANSWER_SECONDS
    rest = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([fd], [], [], left)[0]:
            break
        data = os.read(fd, 65536)
        if not data:
            break
        *lines, rest = (rest + data)[-MAX_LINE_BYTES * 64 :].split(b"\n")
        for line in lines:
            with contextlib.suppress(FormatError):
                answer = unpack(line + b"\n")
                if answer.id == id_ and answer.word in EVENTS:
                    return EVENTS[answer.word]
    return Event.ALONE


def _settle(standing: Standing, event: Event, base: Path, console: Console) -> int:
    """Act on the record, trying again while the hypervisor does not answer.

    Returns the exit status.  Given up, the guest stands paused in its
    hypervisor, where the operator finds it.  Raises GoneError.
    """
    deadline = time.monotonic() + _RESUME_SECONDS
    while True:
        try:
            standing.settle(event)
            return 0
        except GoneError:
            raise
        except Exception as raised:  # whatever it is, the guest stands paused
            if time.monotonic() > deadline:
                error = as_error(raised)
                record = standing.record
                console.fail(error)
                acts = RECORD.get((record.phase, event), ())
                hint = what_to_type(outcome(record.phase, acts, acts), record, base)
                console.say(f"guest {record.guest}: it stands paused here; {hint}")
                return error.status
        time.sleep(_RETRY_SECONDS)


def _tell(console: Console, found: Record, event: Event, base: Path | None) -> None:
    """Say what was done, on bhysend's standard error and to syslog.

    base: the state directory, where it is ours to say what leads out of doubt.
    """
    where = outcome(found.phase, RECORD.get((found.phase, event), ()))
    text = f"guest {found.guest}: bhysend is gone; "
    match where:
        case Where.HERE:
            stood = duration(max(time.time_ns() - found.time_ns, 0))
            text += f"the guest runs on here; it stood for {stood}"
        case Where.THERE:
            text += f"the guest runs on {found.there}, and is gone here"
        case Where.DOUBT:
            text += "the guest is in doubt, paused here"
        case _:
            text += f"the guest is {found.phase}"
    console.say(text)
    console.log(text)
    if where == Where.DOUBT and base is not None:
        for line in what_to_type(where, found, base).splitlines():
            console.say(line)


if __name__ == "__main__":
    inherited.take()
    sys.exit(main(sys.argv))

"""The keeper: a small process that acts for bhysend if bhysend dies.

    bhysend                            keeper (own session, signals ignored)
       | starts the keeper                |
       |------- what to keep ------------>|  loads all that it may need
       |<------ ready --------------------|
       | records PAUSED, pauses           |
       | ...                              |  waits
       | the guest runs again, is held,   |
       | or is gone; the record says so   |
       |------- done -------------------->|  ends
       X killed: the socket closes ------>|  reads the record, and acts on it

The keeper acts on the record alone, which is on disk before bhysend does what the
record speaks of, and follows handshake.RECORD: it resumes a guest that is PAUSED,
and ends a guest that has MOVED.  The keeper leaves a guest in HELD or GO paused in
its hypervisor, because only an answer or the operator can decide.  In the command
form the keeper also has the pipe that the answers come through, and after GO goes
on reading them in bhysend's place.  With `bhysend -A` the third stage acts itself,
when it gets the lock.

The keeper inherits the guest's lock, so no second bhysend can act in between.  The
keeper is a new program, not a fork: bhysend has mappings and an event loop that a
child must not share.  The keeper connects to the hypervisor only after bhysend's
connection has closed, because a hypervisor may serve only one client at a time.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bhystream import inherited
from bhystream.backend.base import Paused
from bhystream.backend.process import Identity, identify, is_stopped, kill_process
from bhystream.errors import BhyError, FormatError, GuestEndedError, GuestError, as_error
from bhystream.guest import GO, PAUSED
from bhystream.handover.answers import MAX_LINE_BYTES, unpack
from bhystream.handover.handshake import ANSWER_SECONDS, RECORD, Event
from bhystream.handover.recorded import EVENTS, RecordedGuest
from bhystream.handover.state import Lock, Record, Records
from bhystream.handover.where import Where, outcome, unfinished, what_to_type
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
# On FreeBSD each look runs ps(1), so the keeper looks less often there.
_LOOK_SECONDS = 5.0 if sys.platform.startswith("freebsd") else 1.0
_STOPPED_SECONDS = 10.0
# The signals that would end or stop the keeper, and that a process can ignore.  Linux has no
# SIGINFO.
_IGNORED = [
    getattr(signal, f"SIG{name}")
    for name in ("INT", "HUP", "TERM", "QUIT", "TSTP", "USR1", "USR2", "INFO")
    if hasattr(signal, f"SIG{name}")
]


class Keeper:
    """The keeper as bhysend sees it: a child process, and a socket to it.

    The caller owns both, and must dismiss() the keeper unless it has to act.
    """

    def __init__(self, base: Path, record: Record, lock: Lock, answers: int = -1) -> None:
        """Start a keeper for the guest of this record, and wait until the keeper is ready.

        answers: the descriptor that a command's answers come from, or -1.  The keeper
        inherits it and the lock; the caller keeps its own.  Nothing is paused or recorded
        yet.  Raises GuestError if the keeper does not get ready; no keeper is left then.
        """
        inherited_fds = [lock.fd] if answers < 0 else [lock.fd, answers]
        failure = f"guest {record.guest}: its keeper does not start"
        try:
            self._socket, theirs = socket.socketpair()
        except OSError as error:
            raise GuestError(f"{failure}: {error.strerror}") from error
        try:
            # Close bhysend's copy of the keeper's end: each side reads EOF if the other dies.
            with theirs, _blocked():
                self._process = subprocess.Popen(
                    [*inherited.program("send.keeper"), str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), *inherited_fds),
                    start_new_session=True,
                )
        except OSError as error:
            self._socket.close()
            raise GuestError(f"{failure}: {error.strerror}") from error
        try:
            self._socket.settimeout(_START_SECONDS)
            order = {"base": str(base), "record": record._asdict(), "answers": answers}
            self._socket.sendall(json.dumps(order).encode() + b"\n")
            if _receive(self._socket, len(_READY)) != _READY:
                raise GuestError(failure)
        except BaseException as raised:
            self.dismiss()
            if isinstance(raised, OSError):
                raise GuestError(failure) from raised
            raise

    def dismiss(self) -> int:
        """End the keeper, because the guest no longer needs it; return its exit status.

        The status is negative for a signal.  May be called twice.
        """
        # If this fails, the keeper is dead already, and cannot act either.
        with contextlib.suppress(OSError):
            self._socket.sendall(_DONE)
        self._socket.close()
        try:
            return self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def tell_hook(self, group: int) -> None:
        """Tell the keeper the -p command's process group, to kill if bhysend dies; 0: none.

        Never raises.
        """
        with contextlib.suppress(OSError):
            self._socket.sendall(b"hook %d\n" % group)

    @property
    def pid(self) -> int:
        """Return the keeper's process id."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Say whether the keeper is still there to take over."""
        return self._process.poll() is None


def _receive(peer: socket.socket, size: int) -> bytes:
    """Receive exactly `size` bytes, or fewer if the connection ends before."""
    data = b""
    while len(data) < size:
        more = peer.recv(size - len(data))
        if not more:
            break
        data += more
    return data


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Keep signals from a keeper that is started in this block until it ignores them.

    The keeper is of our process group until it has its own session, and a key on the terminal
    would end it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore() -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)


def main(argv: list[str]) -> int:
    """Keep one guest, as the keeper's process; return the exit status.

    argv[1]: the number of the descriptor of the socket to bhysend.
    """
    _ignore()
    with contextlib.suppress(OSError):
        # Linux then kills the keeper last when memory runs out; only root may set this.
        Path("/proc/self/oom_score_adj").write_bytes(b"-900")
    with socket.socket(fileno=int(argv[1])) as peer, peer.makefile("rb", buffering=0) as lines:
        line = lines.readline()
        if not line:
            return 0  # bhysend was killed before it could say what to keep
        order = json.loads(line)
        record = Record(**order["record"])
        # Load this now: later the file system may be what has failed.
        from bhystream import hypervisors

        paused = hypervisors.open_paused(record.revive)
        # Only after the imports: a relative PYTHONPATH counts from bhysend's directory.
        os.chdir("/")
        guard = Guard(os.getppid(), Records(Path(order["base"]), "source"), record.id)
        with contextlib.suppress(OSError):  # bhysend may have been killed meanwhile
            peer.sendall(_READY)
        hook = 0
        while (line := _listen(peer, lines, guard)).startswith(_HOOK):
            hook = int(line[len(_HOOK) :])
        if line == _DONE:
            return 0
    if hook:
        # bhysend is dead, and the -p command belongs to a move that is over.
        with contextlib.suppress(OSError):
            os.killpg(hook, signal.SIGKILL)
    return take_over(order, record, paused)


class Guard:
    """The watch on a bhysend that may be stopped (SIGSTOP) while its guest is paused.

    A stopped bhysend would keep the guest paused for ever, and might go on one day
    and write END.  So the guard kills bhysend first; the keeper then resumes the guest.
    """

    def __init__(self, pid: int, records: Records, id_: str) -> None:
        """Watch bhysend, the keeper's parent.  pid: bhysend's process.  id_: the stream's id."""
        self._records = records
        self._id = id_
        self._since: float | None = None
        self._who: Identity | None = None
        with contextlib.suppress(GuestError):
            self._who = identify(pid, "bhysend")

    def look(self) -> None:
        """Look once; kill a bhysend that has been stopped for 10 s while its guest is PAUSED."""
        if self._who is None or not self._sees_stopped(self._who):
            self._since = None
            return
        self._since = self._since or time.monotonic()
        if time.monotonic() - self._since < _STOPPED_SECONDS:
            return
        with contextlib.suppress(BhyError):
            record = self._records.get(self._id)
            if record is not None and record.phase == PAUSED:
                kill_process(self._who, _END_SECONDS)

    @staticmethod
    def _sees_stopped(who: Identity) -> bool:
        """Say whether bhysend is seen to be stopped; one that cannot be looked at is not."""
        with contextlib.suppress(GuestError):
            return is_stopped(who)
        return False


def _listen(peer: socket.socket, lines: socket.SocketIO, guard: Guard) -> bytes:
    """Return the next line that bhysend says, b"" if bhysend has died."""
    while not select.select([peer], [], [], _LOOK_SECONDS)[0]:
        guard.look()
    return lines.readline()


def take_over(order: dict[str, Any], record: Record, paused: Paused) -> int:
    """Do what bhysend can no longer do; return the exit status.

    order: as bhysend sent it.  record: from the order, so its phase may be out of date.
    """
    console = Console("bhysend")
    base = Path(order["base"])
    records = Records(base, "source")
    with contextlib.suppress(OSError, BhyError):
        os.unlink(path_of(base, record.id))
    try:
        found = _read(records, record, console)
    except BhyError as error:
        return error.status
    if found is None:
        # Without a record the guest was never paused, or bhysend has settled the move.
        paused.clear()
        return 0
    command = order["answers"]
    event = Event.ALONE
    if found.phase == GO and command >= 0:
        event = _await_answer(command, found.id)
    recorded = RecordedGuest(records, found, paused)
    try:
        status = _settle(recorded, event, base, console)
    except GuestEndedError as gone:
        console.fail(gone)
        with contextlib.suppress(BhyError):
            recorded.forget()
        return 0
    if status == 0:
        # Without a command, `bhysend -A` itself says what leads out of doubt.
        _tell(console, found, event, base if command >= 0 else None)
    return status


def _read(records: Records, record: Record, console: Console) -> Record | None:
    """Return the record, None if there is none.

    Tries again if the read fails, because the guest may stand paused and the disk may
    recover.  Raises BhyError if the record stays unreadable for _RESUME_SECONDS.
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
    """Return the event of the final answer that a command still brings, or ALONE.

    bhysend has read the first answers, perhaps up to the middle of a line, so a line
    that is no answer of this stream is skipped.
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


def _settle(recorded: RecordedGuest, event: Event, base: Path, console: Console) -> int:
    """Act on the record, and try again while the act fails; return the exit status.

    After _RESUME_SECONDS the keeper gives up: the guest stays as it is, and the record
    leads the operator to the guest.  Raises GuestEndedError if the guest has ended.
    """
    deadline = time.monotonic() + _RESUME_SECONDS
    while True:
        try:
            recorded.settle(event)
            return 0
        except GuestEndedError:
            raise
        except Exception as raised:  # any kind: the guest stands paused
            if time.monotonic() > deadline:
                error, record = as_error(raised), recorded.record
                failed = unfinished(record, recorded.acts, recorded.undone, error, base)
                text = f"guest {record.guest}: {failed.text}"
                console.say(text)
                console.log(text)
                console.say(failed.hint)
                return error.status
        time.sleep(_RETRY_SECONDS)


def _tell(console: Console, found: Record, event: Event, base: Path | None) -> None:
    """Say what the keeper did, on bhysend's standard error and to syslog.

    base: the state directory, if the keeper has to say what leads out of doubt, else None.
    """
    where = outcome(found.phase, RECORD.get((found.phase, event), ()))
    text = f"guest {found.guest}: bhysend is gone; "
    match where:
        case Where.HERE:
            stood = duration(max(time.time_ns() - found.time_ns, 0))
            text += "the guest runs on here; it was "
            text += "throttled" if found.throttled else f"paused for {stood}"
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
    _ignore()  # take() lets through what bhysend has blocked
    inherited.take()
    sys.exit(main(sys.argv))

"""The faults of the matrix: each is a context in which the fault lasts.

All are real: signals, limits of the kernel, a full file system, a tracer that makes read(2) fail,
and what an operator types.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cli import valve
from cli.attempt import THIRD, Attempt
from cli.pipeline import BHYRECV, BHYSEND, Pipeline, report, run
from support.processes import ignores, is_gone, process_state
from support.waiting import until

from .cells import Cell

_VALVES = {"deaf": valve.DEAF, "mute": valve.MUTE, "swallow": valve.SWALLOW}
# The reads that strace(1) lets fail.
_READS = "read,readv,pread64,preadv,preadv2,recvfrom,recvmsg"


@contextmanager
def fault(cell: Cell, attempt: Attempt, full: Path) -> Iterator[None]:
    """Let the fault of a cell happen; what lasts ends after the with block.

    full: a file on the destination's file system, which fills the file system.
    """
    with ExitStack() as stack:
        if cell.who == "operator":
            stack.enter_context(_typed(cell.fault, attempt))
        elif cell.who == "disk":
            stack.enter_context(_filled(full))
        elif cell.fault in _VALVES:
            stack.enter_context(_pretending(attempt.pid(cell.who), _VALVES[cell.fault]))
        elif cell.fault == "EIO":
            stack.enter_context(_failing_reads(attempt.pid(cell.who)))
        elif cell.fault in ("memory", "file-size"):
            _starve(attempt.pid(cell.who), cell.fault)
        elif cell.fault == "SIGSTOP":
            stack.enter_context(_stopped(attempt.pid(cell.who)))
        elif cell.fault == "SIGKILL":
            attempt.kill(cell.who)
        else:
            _terminate(cell.who, attempt)
        yield


def _terminate(who: str, attempt: Attempt) -> None:
    """Send SIGTERM, and wait until it has an effect, if it has one that can be seen."""
    pid = attempt.pid(who)
    is_ignored = ignores(pid, signal.SIGTERM)  # afterwards the process may be gone
    os.kill(pid, signal.SIGTERM)
    if is_ignored or who in ("source", "destination"):
        return
    if who == "third" and attempt.point != "HELLO":
        return  # from the first answer on it says nothing, and goes on
    before = attempt.said_so_far()
    until(lambda: is_gone(pid) or attempt.said_so_far() != before, "an effect of SIGTERM")
    if is_gone(pid):
        attempt.killed.append(who)


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    until(lambda: process_state(pid) == "T", "the stop")
    yield
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@contextmanager
def _pretending(pid: int, what: signal.Signals) -> Iterator[None]:
    """Have a valve pretend, and end it: a connection that is half gone is closed one day."""
    os.kill(pid, what)
    yield
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    until(lambda: is_gone(pid), "the end of the connection")


@contextmanager
def _failing_reads(pid: int) -> Iterator[None]:
    """Let every read of a process fail with EIO, until the with block ends."""
    inject = f"inject={_READS}:error=EIO"
    words = ["strace", "-f", "-o", os.devnull, "-e", f"trace={_READS}", "-e", inject]
    with subprocess.Popen([*words, "-p", str(pid)], stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        assert "attached" in said, said
        try:
            yield
        finally:
            # strace detaches at SIGTERM, and the process goes on without it.
            tracer.terminate()


def _starve(pid: int, what: str) -> None:
    """Let a process get no more memory than it has, or write no byte into a file."""
    number, limit = resource.RLIMIT_FSIZE, 0
    if what == "memory":
        [has] = re.findall(r"^VmSize:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
        number, limit = resource.RLIMIT_AS, int(has) << 10
    _, hard = resource.prlimit(pid, number)
    resource.prlimit(pid, number, (limit, hard))


def relieve(cell: Cell, attempt: Attempt) -> None:
    """Let the destination's hypervisor have memory again: its guest is to move on."""
    if (cell.who, cell.fault) == ("destination", "memory"):
        for pid in attempt.to.hypervisors():
            _, hard = resource.prlimit(pid, resource.RLIMIT_AS)
            resource.prlimit(pid, resource.RLIMIT_AS, (hard, hard))


@contextmanager
def _filled(path: Path) -> Iterator[None]:
    """Fill a file system by one file."""
    with path.open("wb", buffering=0) as file:
        for chunk in (1 << 20, 1 << 12):
            with suppress(OSError):
                while True:
                    file.write(bytes(chunk))
    yield
    path.unlink()


@contextmanager
def _typed(verb: str, attempt: Attempt) -> Iterator[None]:
    """Type a command while the programs are at work; all but the question must be refused."""
    host, name = attempt.host, attempt.guest.name
    id_ = next((row.id for row in host.rows()), "")
    if verb != "query":
        _refused(verb, attempt, id_)
        yield
        return
    with Pipeline([*BHYRECV, "-q", id_], [*THIRD, name], env=host.env) as asked:
        # This bhysend -A ends with bhysend, which waits for its command at the pause.
        if attempt.point != "paused":
            asked.wait()
        yield
        asked.wait()


def _refused(verb: str, attempt: Attempt, id_: str) -> None:
    """Type a command that is refused.  id_: the stream's id, "" if it is not in bhysend -l yet."""
    host, name = attempt.host, attempt.guest.name
    match verb:
        case "send":
            [refused] = run([*attempt.guest.send(), "cat"], env=host.env)
        case "resume" | "discard":
            refused = host.run(*BHYSEND, f"--{verb}", name)
        case _:
            refused = host.run(*BHYRECV, f"--{verb.removesuffix('-there')}", id_)
    assert refused.status in range(64, 78), report(refused)
    assert "Traceback" not in refused.stderr, report(refused)

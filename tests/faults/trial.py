"""One cell of the fault matrix, from a guest that runs to a guest that has moved after all."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from backend.bhyve_rig import small_tmpfs
from cli import valve
from cli.attempt import STAGES, Attempt
from cli.kinds import small
from cli.pipeline import BHYSEND, report
from cli.qemu import QemuPlace
from cli.standin import StandinPlace
from cli.travel import Stable, fifo, limited, new_host
from support.processes import is_gone
from support.waiting import until

from .cells import DOUBT_THERE, GONE, HERE, OFF, THERE, Cell, ends
from .inflict import fault, relieve

# For faults in which nothing moves any more: every limit of the programs is shorter than _LONG_S.
_LONG_S = 8.0
_LIMITS = {
    "handover.handshake.ACCEPT_SECONDS": 3,
    "handover.handshake.READY_SECONDS": 3,
    "handover.handshake.GO_SECONDS": 3,
    "handover.handshake.ANSWER_SECONDS": 5,
    "send.rounds.STALL_SECONDS": 3,
    "send.flush._STALL_S": 2,
}
_LIMITS_OF = {
    "qemu": {"backend.qemu.qmp.GREETING_LIMIT_S": 2, "backend.qemu.qmp.COMMAND_LIMIT_S": 2},
    "bhyve": {"backend.bhyve.paused._SERVED_S": 3, "backend.bhyve.checkpoint._REPLY_S": 2},
}
_SILENT = ("SIGSTOP", "deaf", "mute", "swallow")
_VALVE = (sys.executable, str(Path(valve.__file__)))


def try_cell(cell: Cell, stable: Stable) -> str:
    """Run a cell; return where the guest was in the end.

    Raises AssertionError or TimeoutError, with what the programs said, if anything is wrong: two
    copies, a lost guest, a wrong page or a missing heartbeat, a status that lies, something left
    behind, or a second move that fails.
    """
    with _attempt(cell, stable) as attempt, ExitStack() as disk:
        _prepare(cell, attempt)
        full = attempt.host.directory / "full"
        if cell.who == "disk":
            full = disk.enter_context(_on_a_small_disk(attempt)) / "full"
        with attempt.begin():
            with fault(cell, attempt, full):
                attempt.release("late")
                if cell.is_lingering:
                    _await_the_others(cell, attempt)
            if cell.who == "hook":
                attempt.release("late")
            attempt.wait()
            relieve(cell, attempt)
            end = _judged(cell, attempt)
            if cell.kind != "qemu":
                disk.close()  # QEMU's memory lies there until the guest has moved on
            _finish(cell, attempt, end)
        return end


# How long the last move of each kind took, from the start of its processes.
_move_s: dict[str, float] = {}


def try_moment(cell: Cell, share: float, stable: Stable) -> str:
    """Run a move that nothing holds up, and kill one of its processes on the way.

    cell: with the point "nowhere" and SIGKILL.  share: of the time that a move took before.
    Returns and raises what try_cell() does; returns "too early" or "too late" if there was no
    such process at that moment.
    """
    if cell.kind not in _move_s:
        with _attempt(cell, stable) as attempt:
            _moved(cell, attempt, None)
    with _attempt(cell, stable) as attempt:
        return _moved(cell, attempt, share * _move_s[cell.kind])


def _moved(cell: Cell, attempt: Attempt, kill_s: float | None) -> str:
    """Run a move whose process is killed after kill_s, if ever; return what try_moment() does."""
    missed = ""
    _prepare(cell, attempt)
    start = time.monotonic()
    with attempt.begin():
        if kill_s is not None:
            time.sleep(kill_s)
            attempt.look()
            try:
                attempt.kill(cell.who)
            except (ProcessLookupError, ValueError):
                missed = "too late" if is_gone(attempt.pipeline[0].pid) else "too early"
        attempt.wait()
        end = _judged(cell, attempt)
        if end == THERE:
            _move_s[cell.kind] = time.monotonic() - start
        _finish(cell, attempt, end)
    return missed or end


def _finish(cell: Cell, attempt: Attempt, end: str) -> None:
    """Assert that the guest is where it may be; let it prove itself, and move it again."""
    assert end in ends(cell), f"{end}, not one of {sorted(ends(cell))}\n{attempt.said()}"
    if end == GONE:
        _assert_gone(attempt)
        return
    where = THERE if end in (THERE, DOUBT_THERE) else HERE
    if end == OFF:
        _resume_in_doubt(attempt)
        attempt.guest.run_on(attempt.host, sweeps=1)
    else:
        attempt.settle(where)
    if end == OFF or where == THERE:
        attempt.guest.move(attempt.host, sweeps=1)


@contextmanager
def _attempt(cell: Cell, stable: Stable) -> Iterator[Attempt]:
    with new_host() as host:
        path = host.directory / "gate"
        with fifo(path) as fd:
            gate = (path, fd)
            guest = small(cell.kind, stable)
            attempt = Attempt(cell.form, cell.point, host, guest, gate)
            try:
                yield attempt
            except Exception as error:
                error.add_note(attempt.said())
                raise


def _prepare(cell: Cell, attempt: Attempt) -> None:
    if attempt.there == ["cat"]:
        attempt.there = (*_VALVE, "there")
    if attempt.back == ["cat", "-"]:
        attempt.back = (*_VALVE, "back")
    # Without a read(2) bhysend does not see what it has to remove.
    attempt.is_tidy = (cell.who, cell.fault) != ("bhysend", "EIO")
    if cell.fault in _SILENT:
        hypervisor = "qemu" if cell.kind == "qemu" else "bhyve"
        found = {**_LIMITS, **_LIMITS_OF[hypervisor]}
        settings = [f"{name}={value}" for name, value in found.items()]
        attempt.send = limited(attempt.send, *settings)
        attempt.receive = limited(attempt.receive, *settings)


@contextmanager
def _on_a_small_disk(attempt: Attempt) -> Iterator[Path]:
    """Put what the destination writes on a file system with room for one guest and little more."""
    place = attempt.to
    if isinstance(place, StandinPlace):
        with small_tmpfs(place.staging, "72m") as directory:
            directory.chmod(0o700)
            yield directory
    elif isinstance(place, QemuPlace):
        with small_tmpfs(attempt.host.directory / "disk", "136m") as directory:
            place.ram = directory / "ram"
            attempt.receive = attempt.guest.receive(place, *attempt.guest.named_memory(place))
            yield directory


def _await_the_others(cell: Cell, attempt: Attempt) -> None:
    """Wait for longer than any limit, or until every process has ended that still can."""
    is_silent = cell.fault in _SILENT
    stages = [
        stage
        for who, stage in zip(STAGES, attempt.pipeline.stages, strict=False)
        if not (is_silent and who == cell.who)
    ]
    end = time.monotonic() + (_LONG_S if is_silent else 60.0)
    while time.monotonic() < end:
        if stages and all(is_gone(stage.pid) for stage in stages):
            break
        time.sleep(0.02)


def _judged(cell: Cell, attempt: Attempt) -> str:
    """Return where the guest is, after the printed command if it was in doubt."""
    here, there = attempt.guest.place, attempt.to
    said = attempt.said()
    assert "Traceback" not in said and "internal error" not in said, said
    if cell.who == "source" and cell.fault != "SIGSTOP":
        until(lambda: is_gone(here.pid) or here.runs(), "the end of the source's hypervisor")
    if is_gone(here.pid) and not there.runs():
        return GONE
    end = attempt.end()
    _check_statuses(cell, attempt, end)
    if end != "doubt":
        return end
    is_off = OFF in ends(cell) and not there.hypervisors()
    return OFF if is_off else f"doubt-{attempt.ask()}"


def _check_statuses(cell: Cell, attempt: Attempt, end: str) -> None:
    """Assert that no program says by its status that the guest is where it is not."""
    for name, one in zip(STAGES, attempt.ended, strict=False):
        if name in ("there", "back"):
            continue
        if one.status < 0:
            assert cell.who == name or cell.fault == "SIGKILL", attempt.said()
            continue
        if name == "bhyrecv":
            # 0: it runs there.  81 and what could not be told: the operator asks.
            assert one.status != 0 or end in (THERE, "doubt"), attempt.said()
            continue
        assert one.status != 0 or end == THERE, attempt.said()
        assert one.status not in range(64, 78) or end == HERE, attempt.said()
        assert one.status in (0, 80, 81, *range(64, 78)), attempt.said()


def _assert_gone(attempt: Attempt) -> None:
    """Assert that the guest has ended, that nothing runs there, and that nobody waits for it."""
    assert not attempt.to.runs()
    assert attempt.host.rows() == []
    attempt.guest.close()


def _resume_in_doubt(attempt: Attempt) -> None:
    """Do what an operator does who sees that the guest was switched off at the destination."""
    asked = attempt.host.shell(attempt.way_out())
    assert asked.status == 81, report(asked)
    assert attempt.to.hypervisors() == []
    resumed = attempt.host.run(*BHYSEND, "--resume", "--in-doubt", attempt.guest.name)
    assert resumed.status == 0, report(resumed)

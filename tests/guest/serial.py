"""Read and judge the output of the proving guest.

`SerialLog` is the parsed content of a serial file; `Serial` watches the serial
file of a guest and waits for events in it; `Stamps` records by the host's clock
when each line came, because a guest under TCG cannot see its downtime.

A guest that moves may be stopped in the middle of a line.  The rest of the
line is then printed at the destination, so the two logs are joined and judged as one.

Every wait is for a condition, and has a deadline only to end a broken test.  If
the guest has died, or reports a failed set-up, every wait ends at once, with the
end of the guest's log in the message.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from support.waiting import DEADLINE_S, until

_POLL_S = 0.01  # each look parses the whole log, and the guest needs the processor
_STAMP_POLL_S = 0.001
_TAIL_LINES = 15

_HEARTBEAT = re.compile(
    r"hb (?P<sequence>\d+) sweeps=(?P<sweeps>\d+) bad=(?P<bad>\d+) gen=(?P<gen>\d+)"
    r"(?: disk=(?P<disk>\d+))?"
)
# The kernel prints only fatal messages (loglevel=2).
_DEATH = re.compile(r"^FAIL |Kernel panic|\bBUG: |\bOops\b|reboot: |\bRIP: ")


class GuestDied(AssertionError):
    """The guest cannot go on: a panic, a failed set-up, or QEMU has ended."""


@dataclass(frozen=True)
class Heartbeat:
    """One `hb` line.

    sequence: from 1, without gaps.  sweeps: passes over the whole area.  bad:
    faults found since the start.  generations: pages written.  disk: blocks
    written and read, None for a guest without a disk.
    """

    sequence: int
    sweeps: int
    bad: int
    generations: int
    disk: int | None


class SerialLog:
    """The output of a guest.  If the last line is incomplete, it is not judged.

    raw: the bytes.  lines: complete lines.  heartbeats: in the order printed.
    faults: the BAD lines (the first 64 of a guest).  garbled: lines that begin
    like a heartbeat but are none.  ready: the area is filled.  death: the line
    that says that the guest is lost, or None.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        text = raw.decode("ascii", errors="replace").replace("\r", "")
        self.lines = text.split("\n")[:-1]
        self.heartbeats: list[Heartbeat] = []
        self.garbled: list[str] = []
        for line in self.lines:
            if (beat := _heartbeat(line)) is not None:
                self.heartbeats.append(beat)
            elif line.startswith("hb"):
                self.garbled.append(line)
        self.faults = [line for line in self.lines if line.startswith("BAD ")]
        self.ready = "ready" in self.lines
        self.death = next((line for line in self.lines if _DEATH.search(line)), None)

    @classmethod
    def read(cls, path: Path) -> SerialLog:
        """Parse a serial file; return an empty log if the file does not exist yet."""
        try:
            return cls(path.read_bytes())
        except FileNotFoundError:
            return cls(b"")

    def __add__(self, other: SerialLog) -> SerialLog:
        """Join a source's log and its destination's, and so a line that the move has cut."""
        return SerialLog(self.raw + other.raw)

    @property
    def last(self) -> Heartbeat:
        """Return the newest heartbeat; one of zeros before the first."""
        return self.heartbeats[-1] if self.heartbeats else Heartbeat(0, 0, 0, 0, None)

    def tail(self) -> str:
        """Return the end of the log, for messages."""
        return "\n".join(self.lines[-_TAIL_LINES:])

    def assert_sound(self) -> None:
        """Assert that the guest lives and found no fault in itself."""
        if self.death is not None:
            raise GuestDied(f"the guest died: {self.death}\n{self.tail()}")
        assert not self.faults, "the guest found faults:\n" + "\n".join(self.faults[:10])
        assert self.last.bad == 0, f"the guest counts {self.last.bad} faults"

    def assert_unbroken(self) -> None:
        """Assert soundness, and that no heartbeat is missing, repeated or cut, from the first."""
        self.assert_sound()
        assert not self.garbled, f"garbled heartbeats: {self.garbled[:5]}"
        assert self.heartbeats, "no heartbeat"
        for expected, beat in enumerate(self.heartbeats, start=1):
            assert beat.sequence == expected, (
                f"heartbeat {beat.sequence} came where {expected} was due\n{self.tail()}"
            )


def assert_unbroken(source: SerialLog, destination: SerialLog) -> None:
    """Assert that the guest's heartbeats go on from one log into the other.

    No heartbeat may be missing or repeated over both logs, none may be bad, and each
    log must have at least one.
    """
    assert source.heartbeats, "the source has no heartbeat"
    joined = source + destination
    joined.assert_unbroken()
    assert len(joined.heartbeats) > len(source.heartbeats), (
        f"nothing beats at the destination\n{destination.tail()}"
    )


class Serial:
    """A watcher of one guest's serial file.

    alive: called while waiting; returns why the guest cannot go on, or None.
    """

    def __init__(self, path: Path, alive: Callable[[], str | None] | None = None) -> None:
        self.path = path
        self._alive = alive or (lambda: None)

    def read(self) -> SerialLog:
        """Return what has been printed so far."""
        return SerialLog.read(self.path)

    def wait(
        self,
        condition: Callable[[SerialLog], bool],
        what: str,
        deadline_s: float = DEADLINE_S,
    ) -> SerialLog:
        """Return the first log seen for which the condition holds.

        what: the condition in words.  Raises GuestDied, or TimeoutError at the deadline.
        """
        log = SerialLog(b"")

        def holds() -> bool:
            nonlocal log
            ended = self._alive()  # before the log is read, else its last words are missed
            log = self.read()
            if condition(log):
                return True
            if log.death is not None or ended is not None:
                reason = log.death or ended
                raise GuestDied(f"waiting for {what}: {reason}\n{log.tail()}")
            return False

        until(holds, lambda: f"{what}\n{log.tail()}", deadline_s, poll_s=_POLL_S)
        return log

    def await_ready(self, deadline_s: float = DEADLINE_S) -> SerialLog:
        """Wait until the guest has filled its area."""
        return self.wait(lambda log: log.ready, "ready", deadline_s)

    def await_heartbeats(self, count: int = 1, deadline_s: float = DEADLINE_S) -> SerialLog:
        """Wait until the log has `count` more heartbeats than now."""
        due = len(self.read().heartbeats) + count
        what = f"{count} heartbeats"
        return self.wait(lambda log: len(log.heartbeats) >= due, what, deadline_s)

    def await_sweeps(self, count: int = 1, deadline_s: float = DEADLINE_S) -> SerialLog:
        """Wait for full sweeps that begin after now, and assert that the guest is sound.

        The sweep that is under way does not count: it may have passed the spot already.
        The wait begins with a heartbeat, because a destination's count of sweeps goes on
        from its source's, and a count from 0 would include the source's sweeps.
        """
        start = self.wait(lambda log: bool(log.heartbeats), "a heartbeat", deadline_s).last
        due = start.sweeps + 1 + count
        what = f"{count} sweeps"
        log = self.wait(lambda log: log.last.sweeps >= due or log.last.bad > 0, what, deadline_s)
        log.assert_sound()
        return log

    def await_fault(self, pattern: str, deadline_s: float = DEADLINE_S) -> str:
        """Wait for a BAD line that the regular expression finds, and return it."""
        found = re.compile(pattern)
        log = self.wait(
            lambda log: any(found.search(line) for line in log.faults),
            f"fault {pattern!r}",
            deadline_s,
        )
        return next(line for line in log.faults if found.search(line))


@dataclass(frozen=True)
class Gap:
    """The silence around a move, between two consecutive heartbeats, seen at the serial lines.

    The gap includes the guest's own 100 ms from beat to beat, because the serial
    lines do not show how much of these had passed at the pause: the downtime is
    between gap_ms - 100 and gap_ms.
    """

    gap_ms: float
    last_at_source: int
    first_at_destination: int


class Stamps:
    """Record when each piece of a serial file came, by the host's monotonic clock.

    A thread looks at the file each millisecond, even before the file exists; while
    the main thread works, a stamp may be some five milliseconds late.  Use this as
    a context manager, or call stop().
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pieces: list[tuple[int, bytes]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="serial stamps", daemon=True)
        self._thread.start()

    def __enter__(self) -> Stamps:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the thread; keep what was recorded."""
        self._ended.set()
        self._thread.join()

    @property
    def pieces(self) -> list[tuple[int, bytes]]:
        """Return (time in ns, bytes) for each piece, in the order of the file."""
        return list(self._pieces)

    def beats(self) -> list[tuple[int, Heartbeat]]:
        """Return (time in ns at which the line was complete, heartbeat)."""
        return stamped_beats(self.pieces)

    def _watch(self) -> None:
        while not self.path.exists():
            if self._ended.wait(_STAMP_POLL_S):
                return
        with self.path.open("rb", buffering=0) as file:
            while True:
                ended = self._ended.is_set()  # before the read, so that earlier data is read
                if data := file.read(1 << 16):
                    self._pieces.append((time.monotonic_ns(), data))
                elif ended:
                    return
                else:
                    self._ended.wait(_STAMP_POLL_S)


def stamped_beats(pieces: list[tuple[int, bytes]]) -> list[tuple[int, Heartbeat]]:
    """Return heartbeats with the time in ns of the piece that completed their line."""
    beats = []
    rest = b""
    for when_ns, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            beat = _heartbeat(line.decode("ascii", errors="replace").rstrip("\r"))
            if beat is not None:
                beats.append((when_ns, beat))
    return beats


def handover_gap(source: Stamps, destination: Stamps) -> Gap:
    """Measure the silence between the last beat at the source and the first at the destination.

    Raises ValueError if the source or the destination has no beat.
    """
    before = source.beats()
    after = stamped_beats(source.pieces + destination.pieces)[len(before) :]
    if not before or not after:
        raise ValueError("a move needs heartbeats on both sides")
    (left_ns, left), (right_ns, right) = before[-1], after[0]
    return Gap((right_ns - left_ns) / 1e6, left.sequence, right.sequence)


def _heartbeat(line: str) -> Heartbeat | None:
    match = _HEARTBEAT.fullmatch(line)
    if match is None:
        return None
    sequence, sweeps, bad, generations = (int(match[i]) for i in range(1, 5))
    disk = match["disk"]
    return Heartbeat(sequence, sweeps, bad, generations, None if disk is None else int(disk))

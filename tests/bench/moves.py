"""Live moves of the proof guest: its pause against what no migration can avoid, and as predicted.

The guest moves between QEMUs of this host in the command form: PROOF has 512 MiB, of which about
226 MiB are not zero, and BRIEF is for a quick look.  bhysend's closing line says how long the
guest stood still, from the stop until bhyrecv has said that the guest runs.  Unavoidable are

    the stop of the guest, its device state, its start    what QEMU takes for these alone
    the pages of the last round                           their bytes, at the rate of a bare pipe

QEMU is measured before each move, and the pipe once: write(2) and pwrite(2) of 256 KiB into warm
memory, see streams.py.  What bhysend spends to find these pages, and both sides to verify the
stream, is what makes the ratio.  The limit of the row has one hash of the memory beside the
unavoidable parts, by as many threads as there are CPUs: no program that finds the changed pages
by reading them can do without it.

After each move the guest proves itself: it has compared every page, and misses no heartbeat.
"""

from __future__ import annotations

import mmap
import os
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bhystream.guest import PAGE_BYTES
from bhystream.memory import hole
from bhystream.memory.page import PageHasher
from cli.qemu import QemuTraveller
from guest import Spec

from .closing import Closing, closing
from .qemu_rows import moved, state_alone, travelling
from .rows import Row, ratio_row
from .streams import bare_receiver, bare_sender, memory_file, turn

PROOF = Spec(proof={"work": 128})
BRIEF = Spec("microvm", memory_mib=128, proof={"mib": 64, "work": 48, "sweep": 200})
_RATES = (8, 60, 200)  # MiB/s
_TARGET = 1.3
_WITHIN = 0.2
# The best single prediction has one of the pauses at one end of what is near.
_EDGES = (1 - _WITHIN + 1e-9, 1 + _WITHIN - 1e-9)
_IDLE_TARGET, _BUSY_TARGET = 0.9, 0.7
_CHUNK = 256 << 10
_PIECE_PAGES = 2048


def measure(kind: Spec, turns: int, states: int, pipe_mib: int) -> list[Row]:
    """Return the rows of guests that change their memory at some rates.

    kind: PROOF or BRIEF.  states: how often QEMU's state is measured before each move.
    """
    pipe = pipe_rate(pipe_mib << 20)
    rows = []
    for rate in _RATES:
        spec = replace(kind, proof={**kind.proof, "rate": rate})
        with travelling(spec) as (host, guest):
            floors, limits, moves, written = [], [], [], []
            for _ in range(turns):
                written.append(rewritten(guest))
                state_s = statistics.median(state_alone(guest) for _ in range(states))
                found = closing(moved(host, guest, "-v").stderr)
                guest.prove(1)
                floors.append(state_s + found.last_bytes / pipe)
                limits.append(floors[-1] + hashed_s(guest.memory_file()))
                moves.append(found)
        rows.append(
            ratio_row(
                f"pause at {rate} MiB/s: against state, last pages, start",
                [move.paused_s for move in moves],
                floors,
                _TARGET,
                at_most=True,
                note=_note(moves, floors, written),
            )
        )
        rows.append(ratio_row(f"pause at {rate} MiB/s: its limit", limits, floors, None))
    return rows


def hashed_s(path: Path) -> float:
    """Return how many seconds it takes to hash what a file in memory holds, once it is mapped."""
    hasher = PageHasher(1)
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as memory,
        memoryview(memory) as view,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        extents = hole.data_extents(file.fileno(), 0, len(view), ())
        pieces = [
            (at, min(at + _PIECE_PAGES, end))
            for first, end in extents
            for at in range(first, end, _PIECE_PAGES)
        ]

        def hash_piece(piece: tuple[int, int]) -> None:
            first, end = piece
            pages = view[first * PAGE_BYTES : end * PAGE_BYTES]
            hasher.hash_pages(pages, array("Q", bytes(8 * (end - first))))
            pages.release()

        for _ in range(2):  # the first turn maps the pages
            start = time.perf_counter()
            list(pool.map(hash_piece, pieces))
            taken_s = time.perf_counter() - start
        return taken_s


def _note(moves: list[Closing], floors: list[float], written: list[float]) -> str:
    names = moves[0].parts_s
    parts_ms = [f"{name} {_ms([move.parts_s[name] for move in moves])}" for name in names]
    last_mib = statistics.median(move.last_bytes for move in moves) / 2**20
    return (
        f"{_ms([move.paused_s for move in moves])} of {_ms(floors)} ms: {', '.join(parts_ms)};"
        f" {last_mib:.1f} MiB last; {statistics.median(written):.0f} MiB/s rewritten"
    )


def _ms(values: list[float]) -> str:
    return f"{statistics.median(values) * 1e3:.0f}"


def pipe_rate(size: int) -> float:
    """Return how many bytes a second a bare pipe takes into warm memory."""
    source, target = (memory_file(size, filled=True) for _ in range(2))
    try:
        send, receive = bare_sender(_CHUNK), bare_receiver(_CHUNK, is_mapped=False)
        runs = [turn(source, target, size, send, receive).clock_s for _ in range(4)]
    finally:
        os.close(source)
        os.close(target)
    return size / statistics.median(runs[1:])


def rewritten(guest: QemuTraveller) -> float:
    """Return how many MiB the guest rewrites in each second of its time, seen for a second."""
    first = guest.at.serial.await_heartbeats(1).last
    last = guest.at.serial.await_heartbeats(10).last
    pages = last.generations - first.generations
    return pages / 256 / ((last.sequence - first.sequence) * 0.1)


def predictions(kind: Spec, moves: int) -> list[Row]:
    """Return the rows of the predicted pause: the share of the moves that keep to it."""
    with travelling(replace(kind, proof={**kind.proof, "work": 48})) as (host, guest):

        def measured() -> list[Closing]:
            found = []
            for _ in range(moves):
                guest.at.serial.await_heartbeats(2)
                found.append(closing(moved(host, guest).stderr))
            guest.prove(1)
            return found

        idle = measured()
        with busy():
            loaded = measured()
    return [
        *_kept("pause as predicted, idle host", _IDLE_TARGET, idle),
        *_kept("pause as predicted, a busy loop on each core", _BUSY_TARGET, loaded),
    ]


def _kept(name: str, target: float, moves: list[Closing]) -> list[Row]:
    """Return the rows of the share of the moves whose pause was near the predicted one.

    The limit is the share for the best single prediction of all these pauses, which nobody
    knows before: the rest is what one move takes longer than another of the same guest.
    """

    def row(name: str, target: float | None, runs: list[float], note: str) -> Row:
        return Row(name, _near(runs), target, runs, note=note, is_share=True)

    runs = [move.paused_s / move.predicted_s for move in moves]
    best = max(
        ([move.paused_s / one.paused_s * at for move in moves] for one in moves for at in _EDGES),
        key=_near,
    )
    note = f"the share of {len(moves)} moves within {_WITHIN:.0%}"
    return [row(name, target, runs, note), row(f"{name}: its limit", None, best, note)]


def _near(runs: list[float]) -> float:
    """Return the share of the runs that are near 1."""
    return sum(abs(run - 1) <= _WITHIN for run in runs) / len(runs)


@contextmanager
def busy() -> Iterator[None]:
    """Keep every CPU that this process may use busy."""
    argv = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(argv) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()

"""How long after a Ctrl-C the programs have ended: bench_interrupts.py [times].

For each moment of a move, SIGINT goes to every process of the pipeline, and the time is taken
until bhysend (or bhyrecv, if the line names it) has ended.  Whatever holds the move up stays as it
is meanwhile.  The guest is a small one of the stand-in; the last line is the longest piece of work
that no signal ends, for the pages of one call.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from bhystream.memory.page import PageHasher, PageHashes, mark_changed
from bhystream.send.strides import STRIDE_PAGES, bitmap
from cli import kinds
from cli.attempt import Attempt
from cli.pipeline import BHYRECV, Pipeline, Stage, report
from cli.tap import Tap
from cli.travel import Host, Traveller, fifo, short_directory
from support.waiting import until

Measure = Callable[[Host, Traveller], float]
_LIMIT_S = 60


def _press(stages: list[Stage], watched: Stage) -> float:
    """Send SIGINT to all stages; return the seconds until one of them has ended with status 75."""
    start = time.monotonic()
    for stage in stages:
        with suppress(ProcessLookupError):
            os.killpg(stage.pid, signal.SIGINT)
    ended = watched.await_end(_LIMIT_S)
    took = time.monotonic() - start
    if ended.status != 75:
        raise SystemExit(report(ended))
    return took


def _is_ours(stage: Stage) -> bool:
    """Say whether our first instruction has run: Python itself catches SIGINT, and no SIGTERM."""
    return stage.catches(signal.SIGTERM)


def _answered(form: str, point: str) -> Measure:
    def measure(host: Host, guest: Traveller) -> float:
        path = host.directory / "gate"
        with fifo(path) as fd:
            attempt = Attempt(form, point, host, guest, (path, fd))
            with attempt.begin():
                took = _press(attempt.pipeline.stages, attempt.pipeline[0])
                if form == "command":
                    attempt.release("never")
                attempt.wait()
        path.unlink()
        (host.directory / "paused").unlink(missing_ok=True)
        return took

    return measure


def _plain(point: str, program: str) -> Measure:
    def measure(host: Host, guest: Traveller) -> float:
        to, tap = guest.next(), Tap(point)
        send = guest.send("-f", "-r", "2", "-p", "exec sleep 999")
        with Pipeline(send, tap.argv, guest.receive(to), env=host.env, narrow=True) as pipeline:
            tap.reached()
            until(lambda: _is_ours(pipeline[2]), "the start of bhyrecv")
            stages = [pipeline[0], pipeline[2]]
            took = _press(stages, stages[program == "bhyrecv"])
            tap.close()
            pipeline.wait()
        host.await_unlocked()
        return took

    return measure


def _alone(*options: str) -> Measure:
    """Measure a bhysend that nobody reads, after a part of a second that grows each time."""
    delays_s = iter(step * 0.03 for step in range(1, 1000))

    def measure(host: Host, guest: Traveller) -> float:
        read_end, write_end = os.pipe()
        try:
            with Pipeline(guest.send(*options), env=host.env, stdout=write_end) as pipeline:
                until(lambda: _is_ours(pipeline[0]), "its start")
                time.sleep(next(delays_s))
                took = _press(pipeline.stages, pipeline[0])
        finally:
            os.close(read_end)
            os.close(write_end)
        host.await_unlocked()
        return took

    return measure


def _starting(program: str) -> Measure:
    """Measure a program that imports its modules."""

    def measure(host: Host, guest: Traveller) -> float:
        command = guest.send("-n") if program == "bhysend" else [*BHYRECV, "-n"]
        read_end, write_end = os.pipe()
        try:
            with Pipeline(command, env=host.env, stdin=read_end) as pipeline:
                until(lambda: _is_ours(pipeline[0]), "its start", poll_s=0.0)
                return _press(pipeline.stages, pipeline[0])
        finally:
            os.close(read_end)
            os.close(write_end)

    return measure


POINTS: dict[str, Measure] = {
    "bhysend, imports": _starting("bhysend"),
    "bhyrecv, imports": _starting("bhyrecv"),
    **{
        f"{form}, {point}": _answered(form, point)
        for form in ("command", "three-stages")
        for point in ("HELLO", "ACCEPT", "round-0", "paused", "READY")
    },
    **{
        f"plain, {point}, {program}": _plain(point, program)
        for point in ("CONFIG", "MEMORY", "ROUND_END", "STATE")
        for program in ("bhysend", "bhyrecv")
    },
    "nobody reads, plain": _alone(),
    "nobody reads, -k": _alone("-k"),
    "nobody reads, -B": _alone("-B", "1K"),
    "dry run": _alone("-n"),
}


def longest_piece_s() -> float:
    """Return how long one call of the scan takes, whose memory was never read before."""
    with open("/dev/zero", "rb") as zeros:
        memory = bytearray(STRIDE_PAGES * 4096)
        zeros.readinto(memory)
    for at in range(0, len(memory), 4096):
        memory[at] = 1
    hasher = PageHasher(1)
    touched, bits = bitmap(STRIDE_PAGES), bitmap(STRIDE_PAGES)
    for at in range(len(touched)):
        touched[at] = (1 << 64) - 1
    table = PageHashes(hasher, STRIDE_PAGES)
    start = time.monotonic()
    mark_changed(hasher, memoryview(memory), 0, 0, STRIDE_PAGES, table, touched, bits)
    return time.monotonic() - start


def main(times: int) -> None:
    """Measure and print."""
    guest, directory = kinds.own("g5"), short_directory()
    host = Host(directory)
    try:
        for name, measure in POINTS.items():
            found = [measure(host, guest) * 1000 for _ in range(times)]
            print(f"{name:32} median {statistics.median(found):6.0f} ms, max {max(found):6.0f} ms")
            sys.stdout.flush()
        found = [longest_piece_s() * 1000 for _ in range(times)]
        print(f"{'one piece of a scan':32} median {statistics.median(found):6.0f} ms,", end="")
        print(f" max {max(found):6.0f} ms")
    finally:
        guest.close()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)

"""Measure whether a bhyve guest's pause grows with its size, on the stand-in.

Two guests with the same touched memory and the same working set, of 1 GiB and of 8 GiB, are
suspended in turn, so that a busy neighbour hits both alike.  What a move does in the pause is
timed by its parts:

    suspend   the last check of the room, bhyve's suspend, which with the sink writes no memory,
              and the state read
    scan      the last look at the memory
    copy      what had changed, written
    load      `bhyve -r` from the complete files until its socket answers: the destination's read

All but the last is bhysend's to keep short, and its ratio is what counts: near 1 where the sink
works.  The load is bhyve's own, and reads the whole memory file; the stand-in leaves holes out,
which bhyve does not.  Needs root, or `unshare -Urm` in front.

usage: PYTHONPATH=tests python tests/bench/bench_pause.py [turns]
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import defaultdict

from backend.bhyve_rig import ID, Two, two_hosts
from bhystream import format as fmt
from bhystream.format import Form, Header
from bhystream.transfer import Transfer
from bhystream.writer import Writer
from standin.rig import Spec

SIZES = ("1G", "8G")
OURS = ("suspend", "scan", "copy")
ROUNDS = 3
NS_PER_MS = 1e6


def measure(two: Two, size: str) -> dict[str, float]:
    """Suspend a guest after some live rounds, and start it again; return the parts, ms."""
    spec = Spec(memory=size, touched="64M", working_set="16M", rate="24M")
    guest = two.start(spec)
    guest.console.await_sweeps(1)
    source = two.source()
    source.prepare(ID)
    if source.warnings()[2:]:
        sys.exit("the sink cannot be had here: run this as root")
    with open(os.devnull, "wb") as nowhere:
        writer = Writer(nowhere.fileno(), Header(Form.PLAIN, fmt.Feature(0), bytes(16), 1))
        transfer = Transfer(source, source.head().layout, writer)
        for _ in range(ROUNDS):
            transfer.round()
        start_ns = time.monotonic_ns()
        source.pause()
        paused_ns = time.monotonic_ns()
        source.states()
        last = transfer.round(last=True)
        del transfer
    source.keep()
    load_ns = time.monotonic_ns()
    source.resume()
    end_ns = time.monotonic_ns()
    source.close()
    two.assert_runs_on()
    guest_pid = two.here.pid("g")
    two.here.host.destroy("g")
    assert guest_pid is not None
    os.waitpid(guest_pid, 0)
    two.guests.clear()
    parts = {
        "suspend": paused_ns - start_ns,
        "scan": last.end_ns - last.start_ns - last.write_ns,
        "copy": last.write_ns,
        "load": end_ns - load_ns,
    }
    return {name: value / NS_PER_MS for name, value in parts.items()}


def main(argv: list[str]) -> int:
    """Print the median of each part, and how the whole of ours grows."""
    turns = int(argv[1]) if len(argv) > 1 else 5
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with two_hosts() as two:
        for _ in range(turns):
            for size in SIZES:
                parts = measure(two, size)
                parts["ours"] = sum(value for name, value in parts.items() if name in OURS)
                for name, value in parts.items():
                    found[size, name].append(value)
                text = ", ".join(f"{name} {value:.1f} ms" for name, value in parts.items())
                print(f"{size}: {text}", flush=True)
    median = {key: statistics.median(values) for key, values in found.items()}
    for name in (*OURS, "ours", "load"):
        one, other = (median[size, name] for size in SIZES)
        print(f"{name}: {one:.1f} ms, {other:.1f} ms, ratio {other / one:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

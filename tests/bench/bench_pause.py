"""Measure whether a bhyve guest's pause grows with its size, on the stand-in.

Two guests with the same touched memory and the same working set, of 1 GiB and of 8 GiB, are
moved in turn, so that a busy neighbour hits both alike: by bhysend and bhyrecv, as processes, in
the command form with its answers.  bhysend reports the parts of the pause:

    state        the guest stops in the checkpoint, and its state is read and sent
    last pages   the memory is compared for the last time, and changed pages are sent
    answers      the destination verifies, loads and starts the guest: READY, GO, RUNNING

No part may grow with the guest's size: at the source the memory goes to the null device, and at
the destination the memory is in its VM before the pause.  The stand-in plays bhyve's part of the
pause, so only the ratio counts, which has to be near 1.  Needs root, or `unshare -Urm`.

usage: PYTHONPATH=tests python tests/bench/bench_pause.py [turns]
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict

from backend.bhyve_rig import Two, sink_prefix, two_hosts
from bench.closing import closing
from cli.pipeline import report
from standin.rig import Spec, await_true

SIZES = ("1G", "8G")
PARTS = ("paused", "state", "last pages", "answers")


def parts_ms(said: str) -> dict[str, float]:
    """Return the parts of the pause, in ms, from bhysend's last line."""
    line = closing(said)
    found = {"paused": line.paused_s, **line.parts_s}
    return {name: found[name] * 1e3 for name in PARTS}


def measure(two: Two, size: str, name: str) -> dict[str, float]:
    """Move a guest with live rounds, then end it; return the parts of its pause, in ms."""
    spec = Spec(memory=size, touched="64M", working_set="16M", rate="24M")
    guest = two.start(spec, name)
    guest.console.await_sweeps(1)
    ended = two.move("-r", "2", name=name)
    if ended.status:
        sys.exit(report(ended))
    if "memory file:" in ended.stderr:
        sys.exit("bhysend could not mount the null device: run this as root")
    two.assert_moved(name=name)
    two.there.host.destroy(name)
    await_true(lambda: two.there.pid(name) is None, "end of the guest")
    return parts_ms(ended.stderr)


def main(argv: list[str]) -> int:
    """Print the median of each part for both sizes, and their ratio."""
    turns = int(argv[1]) if len(argv) > 1 else 5
    if sink_prefix() is None:
        sys.exit("bhysend could not mount the null device: run this as root")
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with two_hosts() as two:
        for turn in range(turns):
            for size in SIZES:
                parts = measure(two, size, f"g{turn}-{size}")
                for name, value in parts.items():
                    found[size, name].append(value)
                text = ", ".join(f"{name} {value:.1f} ms" for name, value in parts.items())
                print(f"{size}: {text}", flush=True)
    median = {key: statistics.median(values) for key, values in found.items()}
    for name in PARTS:
        one, other = (median[size, name] for size in SIZES)
        print(f"{name}: {one:.1f} ms, {other:.1f} ms, ratio {other / one:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

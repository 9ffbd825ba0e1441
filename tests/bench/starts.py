"""What bhysend costs before it does anything: a dry run of a small guest of the stand-in.

The dry run waits for a second between its two scans, on purpose, so CPU time is compared, of
whole processes, with that of `python3 -c pass`.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from backend.bhyve_rig import two_hosts

from .rows import Row, pairs, ratio_row

_PROGRAM = Path(__file__).parents[2] / "bhysend"


def cpu_seconds(argv: list[str]) -> Callable[[], float]:
    """Return a function that runs a program, and returns the CPU time that the program took."""

    def run() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return run


def measure(turns: int) -> list[Row]:
    """Return the row of the start."""
    with two_hosts() as two:
        two.start()
        config = two.config()
        argv = [sys.executable, str(_PROGRAM), "-C", str(config), "-nP", "g"]
        found = pairs(
            {
                "dry run": cpu_seconds(argv),
                "pass": cpu_seconds([sys.executable, "-c", "pass"]),
            },
            turns,
        )
    return [
        ratio_row(
            "start: CPU of bhysend -n against python3 -c pass",
            found["dry run"],
            found["pass"],
            3,
            at_most=True,
        )
    ]

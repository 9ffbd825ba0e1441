"""What bhysend costs before it does anything: a dry run of a small guest of the stand-in.

The dry run waits for a second between its two scans, on purpose, so CPU time is compared, of
whole processes, with that of `python3 -c pass`.  The imports of the libraries, and of all
modules, are measured too: they are most of the cost.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from backend.bhyve_rig import two_hosts
from support.dry_run import loaded

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
    """Return the rows of the start: the whole dry run, and what its imports alone cost."""
    with two_hosts() as two:
        two.start()
        config = two.config()
        names = loaded(config, "-nP")
        theirs = [name for name in names if name in sys.stdlib_module_names or name == "xxhash"]
        ours = [name for name in names if name.partition(".")[0] == "bhystream"]
        argv = [sys.executable, str(_PROGRAM), "-C", str(config), "-nP", "g"]
        found = pairs(
            {
                "dry run": cpu_seconds(argv),
                "libraries": cpu_seconds([sys.executable, "-c", f"import {', '.join(theirs)}"]),
                "modules": cpu_seconds([sys.executable, "-c", f"import {', '.join(ours)}"]),
                "pass": cpu_seconds([sys.executable, "-c", "pass"]),
            },
            turns,
        )
    base = found["pass"]
    name = "start: CPU of bhysend -n against python3 -c pass"
    return [
        ratio_row(name, found["dry run"], base, 3, at_most=True),
        ratio_row("start: CPU of importing its libraries", found["libraries"], base, None),
        ratio_row("start: CPU of importing all its modules", found["modules"], base, None),
    ]

"""The command of the fault matrix; see run."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cli.travel import Stable

from .cells import FORMS, KINDS, NOWHERE, PROCESSES, Cell, cells
from .trial import try_cell, try_moment

_ROOT = Path(__file__).resolve().parents[2]


def chosen(patterns: Sequence[str], sample: int | None, seed: int) -> list[Cell]:
    """Return the cells that match any pattern, all if there is none, or some of them."""
    every = [cell for kind in KINDS for form in FORMS for cell in cells(kind, form)]
    found = [
        cell
        for cell in every
        if not patterns or any(fnmatchcase(str(cell), pattern) for pattern in patterns)
    ]
    if sample is not None and sample < len(found):
        some = set(random.Random(seed).sample(range(len(found)), sample))
        found = [cell for at, cell in enumerate(found) if at in some]
    return found


def kills(patterns: Sequence[str], count: int, seed: int) -> list[tuple[Cell, float]]:
    """Return kills of processes of any move, and after which share of a move each is killed."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        kind = rng.choice([kind for kind in KINDS if not patterns or kind in patterns])
        form = rng.choice(FORMS)
        whos = [who for who in PROCESSES if who != "hook" and (who, form) != ("third", "command")]
        cell = Cell(kind, form, NOWHERE, rng.choice(whos), "SIGKILL")
        found.append((cell, rng.random()))
    return found


def main(argv: Sequence[str]) -> int:
    """Try the cells."""
    parser = argparse.ArgumentParser(prog="tests/faults/run")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--kills", type=int, metavar="N")
    parser.add_argument("--sample", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="N")
    parser.add_argument("--part", default="0/1", metavar="I/N")
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    words = parser.parse_args(argv)
    part, parts = map(int, words.part.split("/"))
    # So that the guests end too if the runner is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ["PYTHONPATH"] = os.pathsep.join(str(_ROOT / name) for name in ("lib", "tests"))
    if words.kills:
        some = kills(words.patterns, words.kills, words.seed)[part::parts]
        trials = [
            Trial(f"{cell} at {share:.1%}", partial(try_moment, cell, share))
            for cell, share in some
        ]
    else:
        found = chosen(words.patterns, words.sample, words.seed)[part::parts]
        trials = [Trial(str(cell), partial(try_cell, cell)) for cell in found]
    if words.list:
        print(*(trial.name for trial in trials), sep="\n")
        return 0
    return _try_all(trials, words.seconds)


class Trial(NamedTuple):
    """One move that is harmed.  run: returns where the guest was in the end."""

    name: str
    run: Callable[[Stable], str]


def _try_all(trials: Sequence[Trial], seconds: float) -> int:
    ends: Counter[str] = Counter()
    failed = []
    stop = time.monotonic() + seconds
    stable = Stable()
    try:
        for trial in trials:
            start = time.monotonic()
            if start > stop:
                break
            try:
                end = trial.run(stable)
            except Exception:
                failed.append(trial.name)
                end = "FAILED"
                traceback.print_exc()
                stable.close()
                stable = Stable()
            ends[end] += 1
            print(f"{trial.name}\t{end}\t{time.monotonic() - start:.1f} s", flush=True)
    finally:
        stable.close()
    counts = ", ".join(f"{end} {count}" for end, count in sorted(ends.items()))
    print(f"{sum(ends.values())} of {len(trials)}: {counts}")
    for name in failed:
        print(f"FAILED {name}")
    sys.stdout.flush()
    return 1 if failed or sum(ends.values()) < len(trials) else 0

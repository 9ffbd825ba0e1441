"""The command of the fault matrix; see run."""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from cli.travel import Stable

from .cells import FORMS, KINDS, Cell, cells
from .trial import try_cell

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


def main(argv: Sequence[str]) -> int:
    """Try the cells."""
    parser = argparse.ArgumentParser(prog="tests/faults/run")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--part", default="0/1")
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    words = parser.parse_args(argv)
    part, parts = map(int, words.part.split("/"))
    found = chosen(words.patterns, words.sample, words.seed)[part::parts]
    if words.list:
        print(*found, sep="\n")
        return 0
    os.environ["PYTHONPATH"] = os.pathsep.join(str(_ROOT / name) for name in ("lib", "tests"))
    return _try_all(found, words.seconds)


def _try_all(found: Sequence[Cell], seconds: float) -> int:
    ends: Counter[str] = Counter()
    failed = []
    stop = time.monotonic() + seconds
    stable = Stable()
    try:
        for cell in found:
            start = time.monotonic()
            if start > stop:
                break
            try:
                end = try_cell(cell, stable)
            except Exception:
                failed.append(cell)
                end = "FAILED"
                traceback.print_exc()
                stable.close()
                stable = Stable()
            ends[end] += 1
            print(f"{cell}\t{end}\t{time.monotonic() - start:.1f} s", flush=True)
    finally:
        stable.close()
    counts = ", ".join(f"{end} {count}" for end, count in sorted(ends.items()))
    print(f"{sum(ends.values())} of {len(found)} cells: {counts}")
    for cell in failed:
        print(f"FAILED {cell}")
    sys.stdout.flush()
    return 1 if failed or sum(ends.values()) < len(found) else 0

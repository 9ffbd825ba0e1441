"""What the benches measure: pairs of turns, their ratios, and how a table of them is shown.

A figure is the median of pairwise ratios: in each turn everything runs once, so a busy
neighbour hits both sides of a pair alike.  Absolute speeds say nothing about the program
on a shared machine, and are shown only to be read.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One figure.

    at_most: the target is an upper limit.  note: for people.  is_share: the figure is not the
    median of the runs, but the share of the runs that are good enough.  group: the subject.
    """

    name: str
    ratio: float
    target: float | None
    runs: Sequence[float] = field(default=())
    at_most: bool = False
    note: str = ""
    is_share: bool = False
    group: str = ""

    @property
    def met(self) -> bool | None:
        """Say whether the figure reaches the target, None if there is none."""
        if self.target is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    def target_text(self) -> str:
        """Return the target in words."""
        if self.target is None:
            return ""
        return f"at {'most' if self.at_most else 'least'} {self.target:g}"

    def fields(self) -> dict[str, Any]:
        """Return the row for --json."""
        return {
            "group": self.group,
            "name": self.name,
            "ratio": round(self.ratio, 3),
            "target": self.target,
            "met": self.met,
            "is_share": self.is_share,
            "runs": [round(value, 3) for value in self.runs],
        }


def pairs(
    ways: Mapping[str, Callable[[], T]], turns: int, *, warm_up: bool = True
) -> dict[str, list[T]]:
    """Run every way once a turn, in alternating order; return the results by way.

    The results of a first turn are dropped, if warm_up is set.
    """
    found: dict[str, list[T]] = {name: [] for name in ways}
    for turn in range(turns + warm_up):
        order = list(ways) if turn % 2 else list(ways)[::-1]
        for name in order:
            result = ways[name]()
            if turn or not warm_up:
                found[name].append(result)
    return found


def ratio_row(
    name: str,
    numerators: Sequence[float],
    denominators: Sequence[float],
    target: float | None,
    *,
    at_most: bool = False,
    note: str = "",
) -> Row:
    """Return the row of the pairwise ratios of two lists of seconds."""
    runs = [one / other for one, other in zip(numerators, denominators, strict=True)]
    return Row(name, statistics.median(runs), target, runs, at_most, note)


def grouped(group: str, rows: Sequence[Row]) -> list[Row]:
    """Return the rows as rows of this group."""
    return [replace(row, group=group) for row in rows]


def table(rows: Sequence[Row]) -> str:
    """Return the rows for people, a line each, and a line for each group."""
    width = max(len(row.name) for row in rows) + 2
    lines = [f"{'':{width}}  ratio  (min to max)     target"]
    for group, members in itertools.groupby(rows, key=lambda row: row.group):
        lines += [group, *(_line(row, width) for row in members)]
    return "\n".join(lines)


def _line(row: Row, width: int) -> str:
    spread = f"({min(row.runs):.2f} to {max(row.runs):.2f})" if row.runs else ""
    target = row.target_text() + (": not met" if row.met is False else "")
    note = f"  [{row.note}]" if row.note else ""
    return f"  {row.name:{width - 2}} {row.ratio:6.2f}  {spread:16}  {target}{note}"


def as_json(rows: Sequence[Row]) -> str:
    """Return the rows for programs."""
    return json.dumps({"rows": [row.fields() for row in rows]})

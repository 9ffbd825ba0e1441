"""What the benches measure: pairs of turns, their ratios, and how a table of them is shown.

A figure is the median of pairwise ratios: in each turn everything runs once, so a busy
neighbour hits both sides of a pair alike.  Absolute speeds say nothing about the program
on a shared machine, and are shown only to be read.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from xml.sax.saxutils import escape

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One figure.  at_most: the target is an upper limit.  note: for people."""

    name: str
    ratio: float
    target: float | None
    runs: Sequence[float] = field(default=())
    at_most: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Say whether the figure reaches the target, None if there is none."""
        if self.target is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    def fields(self) -> dict[str, Any]:
        """Return the row for --json."""
        return {
            "name": self.name,
            "ratio": round(self.ratio, 3),
            "target": self.target,
            "met": self.met,
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


def table(rows: Sequence[Row]) -> str:
    """Return the rows for people, a line each."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  ratio  (min to max)     target"]
    for row in rows:
        spread = f"({min(row.runs):.2f} to {max(row.runs):.2f})" if row.runs else ""
        target = ""
        if row.target is not None:
            target = f"{'at most' if row.at_most else 'at least'} {row.target:g}"
            target += "" if row.met else ": not met"
        lines.append(
            f"{row.name:{width}} {row.ratio:6.2f}  {spread:16}  {target}"
            + (f"  [{row.note}]" if row.note else "")
        )
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> str:
    """Return the rows for programs."""
    return json.dumps({"rows": [row.fields() for row in rows]})


_WIDTH, _LINE, _LEFT, _BAR = 960, 26, 430, 380


def picture(rows: Sequence[Row]) -> str:
    """Return an SVG picture: each ratio as a bar, its target as a mark."""
    height = _LINE * (len(rows) + 1)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}"'
        ' font-family="sans-serif" font-size="14">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    for index, row in enumerate(rows):
        y = _LINE * index + 8
        scale = _BAR / max(row.ratio, 2 * (row.target or row.ratio), 1e-9)
        color = {True: "#2a7", False: "#c52", None: "#68a"}[row.met]
        out.append(
            f'<text x="{_LEFT - 10}" y="{y + 14}" text-anchor="end">{escape(row.name)}</text>'
            f'<rect x="{_LEFT}" y="{y}" width="{row.ratio * scale:.0f}" height="18"'
            f' fill="{color}"/>'
            f'<text x="{_LEFT + row.ratio * scale + 6:.0f}" y="{y + 14}">{row.ratio:.2f}</text>'
        )
        if row.target is not None:
            x = _LEFT + row.target * scale
            out.append(f'<path d="M{x:.0f} {y - 3}v24" stroke="black" stroke-width="2"/>')
    out.append(
        f'<text x="{_LEFT}" y="{height - 6}" fill="#555">black mark: the target</text></svg>'
    )
    return "\n".join(out) + "\n"

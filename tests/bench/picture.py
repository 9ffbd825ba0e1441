"""The rows as a picture, SVG: how many times better or worse than its target each figure is.

All rows share one logarithmic scale.  The target is one vertical line; a bar to the right of the
line is better than the target, whether the target is a lower or an upper limit.  A thin line
spans the runs behind a figure.
"""

from __future__ import annotations

import itertools
import math
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from .rows import Row

_WIDTH, _MARGIN, _LINE, _TOP = 1000, 16, 24, 92
_BARS_X, _BARS_WIDTH = 458, 344  # the middle of the bars is the target
_FIGURE_X, _TARGET_X = 868, 884
_MIDDLE = _BARS_X + _BARS_WIDTH // 2
_MAX_DOUBLINGS = 4  # a bar that would be longer ends in an arrow
_BETTER, _WORSE, _INK, _PALE, _RULE = "#1f77a8", "#d9722e", "#1c1c1c", "#666666", "#dddddd"


def draw(rows: Sequence[Row]) -> str:
    """Return the SVG."""
    scale = _Scale(rows)
    body, y = [], _TOP
    for group, members in itertools.groupby(rows, key=lambda row: row.group):
        y += 14
        body.append(_text(_MARGIN, y + 16, group, weight="600"))
        y += _LINE
        for row in members:
            body += _row(row, y, scale)
            y += _LINE
    height = y + 44
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"'
        f' width="{_WIDTH}" height="{height}" font-size="13"'
        ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(_MARGIN, 30, "bhysend and bhyrecv, measured against their targets", size=18),
        _text(
            _MARGIN,
            52,
            "Ratios of two things that were measured in the same run, or CPU seconds per GB; "
            "medians.  Thin lines: all runs.",
            color=_PALE,
        ),
        *scale.axis(y + 8),
        _text(_FIGURE_X, _TOP - 4, "figure", anchor="end", color=_PALE),
        _text(_TARGET_X, _TOP - 4, "target", color=_PALE),
        *body,
        _text(_MARGIN, height - 14, _host(), color=_PALE, size=11),
        "</svg>",
    ]
    return "\n".join(out) + "\n"


def _merit(row: Row, value: float) -> float:
    """Return how many times better than the target a value is, in doublings."""
    if row.target is None:
        return 0.0
    if value <= 0:
        return math.inf if row.at_most else -math.inf
    found = math.log2(value / row.target)
    return -found if row.at_most else found


class _Scale:
    """From doublings to the horizontal place; the target is in the middle."""

    def __init__(self, rows: Sequence[Row]) -> None:
        longest = max((abs(_merit(row, row.ratio)) for row in rows), default=1.0)
        self.doublings = max(1, min(math.ceil(min(longest, _MAX_DOUBLINGS)), _MAX_DOUBLINGS))

    def x(self, merit: float) -> float:
        """Return the place of a merit; of one beyond the scale, the end of the scale."""
        limited = max(-self.doublings, min(merit, self.doublings))
        return _MIDDLE + limited / self.doublings * _BARS_WIDTH / 2

    def axis(self, bottom: int) -> Iterator[str]:
        """Yield the vertical lines with their words."""
        for at in range(-self.doublings, self.doublings + 1):
            x = self.x(at)
            ink = _INK if at == 0 else _RULE
            yield f'<path d="M{x:.1f} {_TOP + 2}V{bottom}" stroke="{ink}" stroke-width="1"/>'
            word = "target" if at == 0 else f"{2 ** abs(at)}×"
            color = _INK if at == 0 else _PALE
            yield _text(x, _TOP - 4, word, anchor="middle", color=color)
        yield _text(_MIDDLE - 34, _TOP - 20, "← worse", anchor="end", color=_WORSE)
        yield _text(_MIDDLE + 34, _TOP - 20, "better →", color=_BETTER)


def _row(row: Row, y: int, scale: _Scale) -> Iterator[str]:
    """Yield a row: its name, its bar, the spread of its runs, its figure and its target."""
    color = {True: _BETTER, False: _WORSE, None: _PALE}[row.met]
    base = y + 16
    yield _text(_MARGIN + 12, base, row.name)
    if row.target is not None:
        merit = _merit(row, row.ratio)
        left, right = sorted((float(_MIDDLE), scale.x(merit)))
        yield (
            f'<rect x="{left:.1f}" y="{y + 5}" width="{right - left:.1f}" height="14"'
            f' fill="{color}"/>'
        )
        if abs(merit) > scale.doublings:
            x, way = scale.x(merit), math.copysign(7, merit)
            yield f'<path d="M{x:.1f} {y + 5}l{way} 7l{-way} 7z" fill="{color}"/>'
        if row.runs and not row.is_share:
            ends = (scale.x(_merit(row, value)) for value in (min(row.runs), max(row.runs)))
            one, other = sorted(ends)
            yield f'<path d="M{one:.1f} {y + 12}H{other:.1f}" stroke="{_INK}" stroke-width="1.5"/>'
    yield _text(_FIGURE_X, base, f"{row.ratio:.3g}", anchor="end", color=color, weight="600")
    yield _text(_TARGET_X, base, row.target_text() or "none", color=_PALE)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    color: str = _INK,
    size: int = 13,
    weight: str = "400",
) -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{color}"'
        f' font-size="{size}" font-weight="{weight}">{escape(text)}</text>'
    )


def _host() -> str:
    """Return what measured: the processor, the system and Python."""
    cpus = Path("/proc/cpuinfo").read_text()
    [model, *_] = re.findall(r"^model name\s*: (.+)$", cpus, re.MULTILINE) or ["unknown CPU"]
    count = len(re.findall(r"^processor\s*:", cpus, re.MULTILINE))
    kernel = platform.release().partition("-")[0]
    return (
        f"{count} × {model}; {platform.system()} {kernel}, Python {platform.python_version()}; "
        "written by tests/bench/run --picture"
    )

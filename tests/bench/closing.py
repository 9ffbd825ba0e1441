"""bhysend's closing line, taken apart.

    ... is gone here; 4 rounds, 229.9 MiB; paused 160 ms (state 7.1 ms, last pages 49 ms,
    answers 102 ms), predicted 164 ms (8.0 ms, 52 ms, 104 ms)

Parts that are not known here are kept by their names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(
    r"^bhysend: .*; \d+ rounds?, (?P<size>[^;]+); paused (?P<pause>[^(\n]+) \((?P<parts>[^)]*)\)"
    r"(, predicted (?P<predicted>[^(\n]+) \(.*\))?$",
    re.MULTILINE,
)
_RECEIVED = re.compile(r"^bhyrecv.*; paused (.+), .+ of it here,", re.MULTILINE)
_SIZE = re.compile(r"([\d.]+) (B|KiB|MiB|GiB|TiB)")
_ROUND = re.compile(r": round \d+: \d+ pages, \d+ zero, ([\d.]+ \w+) in ")
_TIME = re.compile(r"(?:(\d+) m )?([\d.]+) (ms|s)\b")
_SHIFT = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}


@dataclass(frozen=True)
class Closing:
    """What the line says, in seconds and bytes.

    parts_s: by name; they need not add up.  predicted_s: 0 if nothing was predicted.
    sent_bytes: the whole stream.  last_bytes: what is not in the rounds that -v has shown.
    """

    paused_s: float
    predicted_s: float
    parts_s: dict[str, float]
    sent_bytes: int
    last_bytes: int


def closing(said: str) -> Closing:
    """Parse what bhysend has written to standard error.  Raises ValueError if no line fits."""
    found = [*_LINE.finditer(said)]
    if not found:
        raise ValueError(f"bhysend does not say how long the pause was:\n{said}")
    line = found[-1]
    parts = {}
    for part in line["parts"].split(", "):
        if _TIME.search(part):
            parts[_TIME.sub("", part).strip()] = seconds(part)
    predicted = seconds(line["predicted"]) if line["predicted"] else 0.0
    sent = size_bytes(line["size"])
    rounds = sum(size_bytes(text) for text in _ROUND.findall(said))
    return Closing(seconds(line["pause"]), predicted, parts, sent, max(sent - rounds, 0))


def received_s(said: str) -> float:
    """Return the pause in bhyrecv's closing line, which is without the transit of END.

    (END comes behind what fits into a pipe, so the transit is a millisecond or so.)
    """
    found = _RECEIVED.findall(said)
    if not found:
        raise ValueError(f"bhyrecv does not say how long the pause was:\n{said}")
    return seconds(found[-1])


def seconds(text: str) -> float:
    """Return the first time in a text, such as "43 ms" or "2 m 05 s"."""
    match = _TIME.search(text)
    if not match:
        raise ValueError(f"not a time: {text}")
    minutes, number, unit = match.groups()
    return 60 * int(minutes or 0) + float(number) * (1e-3 if unit == "ms" else 1)


def size_bytes(text: str) -> int:
    """Return a size such as "8.3 MiB" in bytes, as exactly as it was printed."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"not a size: {text}")
    return round(float(match[1]) * (1 << _SHIFT[match[2]]))

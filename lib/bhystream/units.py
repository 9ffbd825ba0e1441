"""Parse and show times, sizes and rates."""

from __future__ import annotations

import re

from bhystream.errors import UsageError

NS = 1_000_000_000
_TIME_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_SIZE = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BITS = {"kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9}
# A number of at most so many digits does not overflow a float, whatever its unit.
_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"


def time_ns(text: str, option: str) -> int:
    """Parse "300ms" into ns.  Units: ns us ms s m h.

    Raises UsageError for anything else, also for a number without a unit.
    """
    match = re.fullmatch(rf"({_NUMBER})([a-z]+)", text)
    if not match or match[2] not in _TIME_NS:
        raise UsageError(f"{option} {text}: not a time with its unit, such as 300ms or 10m")
    return round(float(match[1]) * _TIME_NS[match[2]])


def rate_bytes(text: str, option: str) -> int:
    """Parse "100M" (bytes a second, powers of 1024) or "10Gbit" into bytes a second.

    Raises UsageError for anything else, and for less than one byte a second.
    """
    match = re.fullmatch(rf"({_NUMBER})([A-Za-z]*)", text)
    value = 0.0
    if match and match[2] in _SIZE:
        value = float(match[1]) * _SIZE[match[2]]
    elif match and match[2] in _BITS:
        value = float(match[1]) * _BITS[match[2]] / 8
    if value < 1:
        raise UsageError(f"{option} {text}: not a rate, such as 100M or 10Gbit")
    return int(value)


def size_bytes(text: str, option: str) -> int:
    """Parse "8G" into bytes.  Units: K M G T, powers of 1024.

    Raises UsageError for anything else, and for less than one byte.
    """
    match = re.fullmatch(rf"({_NUMBER})([A-Z]?)", text)
    value = float(match[1]) * _SIZE[match[2]] if match and match[2] in _SIZE else 0.0
    if value < 1:
        raise UsageError(f"{option} {text}: not a size, such as 8G")
    return int(value)


def size(count: float) -> str:
    """Show a number of bytes with a unit, a power of 1024: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(ns: float) -> str:
    """Show a time: "43 ms", "1.52 s", "2 m 05 s"."""
    if ns < NS:
        return f"{ns / 1e6:.0f} ms" if ns >= 10e6 else f"{ns / 1e6:.1f} ms"
    if ns < 120 * NS:
        return f"{ns / NS:.2f} s"
    return f"{int(ns / NS) // 60} m {int(ns / NS) % 60:02d} s"


def counted(count: int, noun: str) -> str:
    """Show a number of things: "1 round", "2 rounds"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

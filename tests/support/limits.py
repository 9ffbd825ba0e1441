"""The numbers of bhystream(5), LIMITS, as the page has them."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "man" / "bhystream.5"
_ROW = re.compile(r"^\.It (?!Em )(.+) Ta ([\d ]+)$", re.MULTILINE)


def of_page() -> dict[str, int]:
    """Return each number of the section by the words before it."""
    text = PAGE.read_text().split(".Sh LIMITS\n")[1].split("\n.Sh ")[0]
    return {what: int(number.replace(" ", "")) for what, number in _ROW.findall(text)}


def memory_bytes() -> int:
    """Return the private memory that bhyrecv takes without states."""
    found = re.search(r"takes at most (\d+) MiB of private memory", PAGE.read_text())
    assert found
    return int(found[1]) << 20

"""The manual pages as tests read them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def section(page: str, name: str) -> str:
    """Return the source of one section of a page."""
    text = (ROOT / "man" / page).read_text()
    return text.split(f".Sh {name}\n")[1].split("\n.Sh ")[0]


def examples(page: str) -> list[str]:
    """Return the examples of a page as lines for a shell; blocks that show output are left out."""
    text = (ROOT / "man" / page).read_text()
    found = [f"{line}\n" for line in re.findall(r"^\.Dl (.* ?# .*)$", text, re.M)]
    found += re.findall(r"^\.Bd -literal[^\n]*\n(.*?)^\.Ed$", text, re.M | re.S)
    commands: list[str] = []
    for block in found:
        plain = block.replace("\\e", "\\").replace("\\&", "")
        if plain.startswith(("#!/bin/sh", "qemu-system")):
            commands.append(plain)
        else:
            commands += re.split(r"^(?:hv\d)?# ", plain, flags=re.M)[1:]
    return commands

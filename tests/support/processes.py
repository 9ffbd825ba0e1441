"""Look from outside at processes that a test has started or found."""

from __future__ import annotations

import time
from pathlib import Path


def is_gone(pid: int, seconds: float) -> bool:
    """Return True once a process has ended, False if it does not end in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.005)
    return False

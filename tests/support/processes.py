"""Look from outside at processes that a test has started or found."""

from __future__ import annotations

import os
import re
import select
import signal
from pathlib import Path


def process_state(pid: int) -> str:
    """Return the state of a process as proc_pid_stat(5) has it, X if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "X"
    return text[text.rindex(")") + 2]


def ignores(pid: int, number: signal.Signals) -> bool:
    """Say whether a process ignores a signal.  Source: proc_pid_status(5), SigIgn."""
    text = Path(f"/proc/{pid}/status").read_text()
    [mask] = re.findall(r"^SigIgn:\s+([0-9a-f]+)$", text, re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


def blocked(thread_id: int | None) -> set[int]:
    """Return the signals that a thread of this process blocks.  Source: proc_pid_status(5)."""
    text = Path(f"/proc/self/task/{thread_id}/status").read_text()
    bits = int(next(line.split()[1] for line in text.splitlines() if line.startswith("SigBlk")), 16)
    return {number for number in range(1, 65) if bits >> (number - 1) & 1}


def is_gone(pid: int, seconds: float = 0.0) -> bool:
    """Say whether a process has ended with all of its threads, even if its parent has not waited.

    A process whose first thread ended may look like a zombie before.  pid: 0 for no process.
    seconds: how long to wait for the end.
    """
    if not pid:
        return True
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], seconds)[0])
    finally:
        os.close(pidfd)

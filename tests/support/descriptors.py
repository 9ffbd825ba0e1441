"""What this process has open."""

from __future__ import annotations

import gc
import os


def descriptors() -> list[str]:
    """Return the open descriptors; not those that earlier tests have left to the collector."""
    gc.collect()
    return sorted(os.listdir("/dev/fd"))

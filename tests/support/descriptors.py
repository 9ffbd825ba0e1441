"""The descriptors that this process has open."""

from __future__ import annotations

import gc
import os


def descriptors() -> list[str]:
    """Return the open descriptors, except those that earlier tests left to the collector."""
    gc.collect()
    return sorted(os.listdir("/dev/fd"))

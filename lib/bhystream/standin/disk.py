"""What a disk's backing is like on a stand-in's host: a file's, or what host.json says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bhystream.backend.bhyve.host import Disk

from .settings import read_settings

_SECTOR_BYTES = 512


def probe(directory: Path, path: str) -> Disk | None:
    """Return what a path's backing is like; None where it cannot be opened.

    directory: the stand-in's.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    if not os.access(path, os.R_OK):
        return None
    disk = Disk(
        size_bytes=found.st_size,
        sector_bytes=_SECTOR_BYTES,
        can_delete=True,
        is_writable=os.access(path, os.W_OK),
        identity=f"{found.st_dev}:{found.st_ino}",
    )
    said: Mapping[str, Any] = read_settings(directory).disks.get(path, {})
    return replace(disk, **said)

"""What must be there after a crash: files written whole or not at all, and synced."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file whole or not at all, and see it on the disk.  Raises OSError."""
    temporary = path.with_suffix(f".{os.getpid()}.new")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync(path: Path) -> None:
    """See a file on the disk, or what was done to a directory's names.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

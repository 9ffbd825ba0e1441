"""What must be there after a power cut, and what is made of what is there then.

A file is written under another name, synced, renamed, and its directory synced:
after a cut there is the old one, or the new one whole.  A directory is synced
in the one that holds it before anything is put into it, and a name that goes
is gone for good before anybody relies on that.

What says that a guest may run is written so before anything is done, so it is
never missing for one that ran.  Where it is there and cannot be read, empty or
torn by a disk that lied, it says the same: read() raises BrokenError, which
whoever asks takes for "it may have run", and never for "there is nothing".
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bhystream.errors import BrokenError, from_oserror

_T = TypeVar("_T")


def write(path: Path, data: str | bytes, mode: int = 0o600) -> None:
    """Write a file whole or not at all, and see it on the disk.  Raises OSError."""
    temporary = path.with_suffix(f".{os.getpid()}.new")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        raw = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
        with os.fdopen(fd, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read(path: Path, make: Callable[[Any], _T]) -> _T | None:
    """Return what `make` makes of a file's JSON, None where there is no such file.

    make: raises ValueError, TypeError, KeyError or AttributeError for what it
    cannot use.  Raises BrokenError then, and for a file that is empty or no
    JSON; AccessError, PipeError for one that cannot be read.
    """
    try:
        return make(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_oserror(error, f"read {path}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenError(
            f"the record {path} is broken: {error}; what it speaks of may have run",
            f"if no such guest runs, or stands paused, anywhere: rm {path}",
        ) from error


def remove(path: Path) -> None:
    """Remove a file for good; one that is not there is no error.  Raises OSError."""
    path.unlink(missing_ok=True)
    sync(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory, mode 0700, and those above it that are not there.  Raises OSError."""
    if path.is_dir():
        return
    if not path.parent.is_dir():
        make_directory(path.parent)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise
    sync(path.parent)


def sync(path: Path) -> None:
    """See a file on the disk, or what was done to a directory's names.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

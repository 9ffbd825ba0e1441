"""Files that must survive a power cut, and how they are read afterwards.

A file is written under another name, synced and renamed, and its directory is
synced: after a power cut either the old file is there, or the whole new one.  A
new directory's name is synced before anything is put into the directory, and
the removal of a name is synced before anybody relies on the removal.

A record that says that a guest may run is written in this way before the guest
may run, so no guest that ran lacks its record.  A record that cannot be read,
because a lying disk left the file empty or torn, counts as that record: read()
raises RecordError, which every caller takes for "the guest may have run", and
never for "there is no record".

No link is followed and no FIFO is waited for, whatever stands in a file's place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from bhystream.errors import RecordError, from_oserror
from bhystream.strict_json import loads

_T = TypeVar("_T")


def write(path: Path, data: str | bytes, mode: int = 0o600) -> None:
    """Write a file whole or not at all, and sync it to the disk.  Raises OSError."""
    temporary = path.with_suffix(f".{os.getpid()}.new")
    try:
        fd = create(temporary, mode)
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


def create(path: Path, mode: int = 0o600) -> int:
    """Make a new file in the place of an old one; return a descriptor for writing, the caller's.

    Whatever the old one was, a link or a FIFO, it is removed, and not written to.
    Raises OSError, also if another process makes a file there at the same time.
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)


def read_file(path: Path) -> bytes:
    """Return the contents of a regular file.  Raises OSError for a link, a FIFO, a directory."""
    # Without O_NONBLOCK, the open(2) of a FIFO would wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        require_regular(fd, path)
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


def require_regular(fd: int, path: Path) -> None:
    """Raise OSError if an open file is no regular file.  path: for the message."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "It is not a regular file", str(path))


def read(path: Path, make: Callable[[Any], _T]) -> _T | None:
    """Return what `make` makes of a file's JSON, None if there is no such file.

    make: raises ValueError, TypeError, LookupError or AttributeError for JSON that
    it cannot use.  Raises RecordError if `make` does so, or if the file is empty
    or not JSON; AccessError, InputOutputError if the file cannot be read.
    """
    try:
        return make(loads(read_file(path)))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_oserror(error, f"read {path}") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise RecordError(
            f"the record {path} is broken: {error}; its guest may have run",
            f"if no such guest runs, or stands paused, anywhere: rm {path}",
        ) from error


def typed(made: _T) -> _T:
    """Return an object that was made of JSON, if its annotated fields are of their types.

    Raises TypeError for the first field that is not of the type in its annotation.
    """
    for name, kind in get_type_hints(type(made)).items():
        value = getattr(made, name)
        if not is_of(value, kind):
            raise TypeError(f"{name} is {str(value)[:40]!r}")
    return made


def is_of(value: object, kind: Any) -> bool:
    """Say whether a value is of a type, its items included: str, dict[str, int | bool].

    Unlike isinstance(), this takes no truth value for an integer.
    """
    items = get_args(kind)
    match get_origin(kind):
        case None:
            return kind is Any or type(value) is kind
        case origin if origin is UnionType:
            return any(is_of(value, each) for each in items)
        case origin if origin is dict and type(value) is dict:
            pairs = value.items()
            return all(is_of(key, items[0]) and is_of(each, items[1]) for key, each in pairs)
        case origin if origin is tuple and type(value) is tuple:
            return all(is_of(each, items[0]) for each in value)
    return False


def remove(path: Path) -> None:
    """Remove a file for good; a missing file is no error.  Raises OSError."""
    path.unlink(missing_ok=True)
    sync(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory with mode 0700, and its missing parents.  Raises OSError."""
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
    """Sync a file, or the names in a directory, to the disk.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

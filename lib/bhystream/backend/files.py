"""The identity of the file that a path leads to: files are compared, not paths.

A hard link, a symbolic link, a second mount and an alias of a device are other
paths to the same file, and a disk that is open for writing twice is lost.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from bhystream.beneath import is_trusted


def identity(status: os.stat_result) -> str:
    """Return a text that tells a file from all other files of this host.

    A device is identified by its number, because several nodes in several
    places may lead to it.  A loop device of Linux is identified by the file behind it.
    """
    if stat.S_ISBLK(status.st_mode):
        return _behind(status.st_rdev) or f"block:{status.st_rdev}"
    if stat.S_ISCHR(status.st_mode):
        return f"character:{status.st_rdev}"
    return f"{status.st_dev}:{status.st_ino}"


def _behind(number: int) -> str:
    """Return the identity of the file behind a loop device, "" for any other device.

    Source: Linux, drivers/block/loop.c, loop_attr_backing_file_show().
    """
    path = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/loop/backing_file"
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return identity(os.stat(file.read().removesuffix("\n")))
    except OSError:
        return ""


def is_ours_alone(status: os.stat_result) -> bool:
    """Say whether a file belongs to us or to root, and no other user may open it."""
    return is_trusted(status) and not status.st_mode & 0o077


def identity_of(path: str) -> str:
    """Return the identity of the file at a path, or the path's real path if no file is there."""
    try:
        return identity(os.stat(path))
    except OSError:
        return os.path.realpath(path)
    except ValueError:  # a NUL or a lone surrogate: no file can have such a name
        return path


_NULL = identity_of(os.devnull)


class Lent:
    """The identities of all files lent so far: finds a file that is lent twice."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, bool]] = {}

    def again(self, word: str, identities: Iterable[str], *, is_written: bool = True) -> str:
        """Note that the files are lent as `word`; return an earlier word for one of them, or "".

        word: names the loan in messages.  Two words may share a file that both
        only read, and any number of words may share the null device.
        """
        for one in identities:
            if one == _NULL:
                continue
            before, was_written = self._seen.setdefault(one, (word, is_written))
            if before != word and (is_written or was_written):
                return before
        return ""

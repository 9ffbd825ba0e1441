"""Which file a path is: files are compared, not texts.

A hard link, a symbolic link, a second mount and an alias of a device are other
texts for one file, and one disk that is open for writing twice is lost.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable


def identity(status: os.stat_result) -> str:
    """Return what tells a file from all others of this host.

    A device is told by its number: its nodes may be many, and lie in many places.
    Linux's loop device is the file behind it.
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


def identity_of(path: str) -> str:
    """Return the identity of the file at a path; of one that is not there, its place and name."""
    try:
        return identity(os.stat(path))
    except OSError:
        return os.path.realpath(path)


_NULL = identity_of(os.devnull)


class Lent:
    """What was lent so far, by identity: finds what is lent twice."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, bool]] = {}

    def again(self, word: str, identities: Iterable[str], *, is_written: bool = True) -> str:
        """Note what is lent as `word`; return the word that has lent it before, "" for none.

        Two that only read may share, and nothing is told apart in the null device.
        """
        for one in identities:
            if one == _NULL:
                continue
            before, was_written = self._seen.setdefault(one, (word, is_written))
            if before != word and (is_written or was_written):
                return before
        return ""

"""Whose word a path is: what it leads to now, and who could make it lead elsewhere.

A program of root that opens a path twice, or checks a path and lets a hypervisor
open it, can be led elsewhere in between by anybody who may write to a directory
on the way.  Two questions have answers that stay true:

    exchangeable()    could another user exchange what a path leads to?  Links are
                      followed, and each is judged as the directories are
    fault_below()     does a path lead to a file below a given directory, without a
                      link, a second name, or a directory that another user may write to?

Another user is anybody but us, root, and the owner of the root directory, who is
root under another name in a user namespace.  A group may write if it is root's
or our own.  Only the mode is read: an access control list may allow more.
sshd(8) judges the files of its StrictModes in the same way.

The walk goes down from the root directory, and each directory is judged before
the names in it are looked at.  So what was judged is what is used later, as long
as neither root nor our own user changes it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

# Enough to look a name up below a descriptor.  FreeBSD has O_SEARCH for that.
_LOOK = os.O_CLOEXEC | os.O_DIRECTORY | getattr(os, "O_PATH", getattr(os, "O_SEARCH", 0))
_MAX_LINKS = 40  # as many as Linux follows.  Source: path_resolution(7)


def is_trusted(status: os.stat_result) -> bool:
    """Say whether a file belongs to us, to root, or to the owner of the root directory."""
    return status.st_uid in (0, os.geteuid(), os.stat("/").st_uid)


def is_written_by_others(status: os.stat_result) -> bool:
    """Say whether a file's mode lets another user write to it, besides its owner."""
    by_group = status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.getegid())
    return bool(by_group or status.st_mode & stat.S_IWOTH)


def exchangeable(path: str | os.PathLike[str]) -> str:
    """Return why another user could exchange what a path leads to; "" if no one could.

    path: absolute.  If there is nothing at the path, or at a part of it, the
    answer is that of what comes before: mkdir(2) and O_EXCL then make it safely.
    Raises OSError if a part cannot be looked at.
    """
    at, links = "/", 0
    left = _parts(os.fspath(path))
    while left:
        name = left.pop(0)
        if name == "..":
            at = os.path.dirname(at)
            continue
        if why := _own_fault(at, os.stat(at, follow_symlinks=False)):
            return why
        here = os.path.join(at, name)
        try:
            found = os.stat(here, follow_symlinks=False)
        except FileNotFoundError:
            found = None
        if why := _name_fault(at, here, found):
            return why
        if found is None:
            return ""
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _MAX_LINKS:
                return f"{path} leads through too many links"
            target = os.readlink(here)
            left = _parts(target) + left
            at = "/" if target.startswith("/") else at
        else:
            at = here
    return ""


def _own_fault(at: str, found: os.stat_result) -> str:
    return "" if is_trusted(found) else f"{at} belongs to the user {found.st_uid}"


def _name_fault(at: str, here: str, found: os.stat_result | None) -> str:
    """Return why another user could exchange a name in a directory.

    found: of the name, None if there is none.  In a sticky directory only the
    owner of a file, or of the directory, may rename or remove the file.
    """
    directory = os.stat(at)
    if not is_written_by_others(directory):
        return ""
    if not directory.st_mode & stat.S_ISVTX:
        return f"others may write to {at}"
    if found is not None and not is_trusted(found):
        return f"{here} belongs to the user {found.st_uid}"
    return ""


def fault_below(path: str, roots: Sequence[str]) -> str:
    """Return why a path does not lead to a disk below one of the directories; "" if it does.

    path, roots: absolute.  Below the directory no link is followed, no other
    user may write to a directory, and the file is a regular file of one name, or
    a device.  Links that lead to the directory itself are the administrator's,
    and are judged by exchangeable().
    """
    found = [(root, parts) for root in roots if (parts := _below(path, root))]
    if not found:
        return f"it does not lie below {' or '.join(roots)}"
    root, parts = found[0]
    try:
        if why := exchangeable(root):
            return why
        fd = os.open(root, _LOOK)
        try:
            return _walk(fd, root, parts)
        finally:
            os.close(fd)
    except OSError as error:
        return f"{error.filename or path}: {error.strerror}"


def _walk(top: int, root: str, parts: Sequence[str]) -> str:
    """Judge each part of a path below a directory.  top: the directory, which stays open."""
    at, fd = root, os.dup(top)
    try:
        for name in parts[:-1]:
            if why := _directory_fault(at, os.fstat(fd)):
                return why
            at = os.path.join(at, name)
            try:
                below = os.open(name, _LOOK | os.O_NOFOLLOW, dir_fd=fd)
            except NotADirectoryError:
                return f"{at} is a link, or no directory"
            os.close(fd)
            fd = below
        if why := _directory_fault(at, os.fstat(fd)):
            return why
        return _file_fault(os.stat(parts[-1], dir_fd=fd, follow_symlinks=False))
    finally:
        os.close(fd)


def _directory_fault(at: str, found: os.stat_result) -> str:
    if is_written_by_others(found):
        return f"others may write to {at}"
    return _own_fault(at, found)


def _file_fault(found: os.stat_result) -> str:
    mode = found.st_mode
    if stat.S_ISLNK(mode):
        return "it is a link"
    if stat.S_ISREG(mode):
        # A user may be allowed to link a file of another user into a directory of his own.
        return "" if found.st_nlink == 1 else "it has another name too (a hard link)"
    return "" if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else "it is no file and no device"


def _below(path: str, root: str) -> list[str]:
    """Return the parts of a path below a directory; [] if it does not lie there by its text."""
    parts, above = _parts(path), _parts(root)
    if ".." in parts or parts[: len(above)] != above:
        return []
    return parts[len(above) :]


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]

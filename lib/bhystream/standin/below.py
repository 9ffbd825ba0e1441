"""Open a file below a directory as a process in capability mode does.

In capability mode openat(2) refuses absolute paths, absolute symlinks and a
".." that leaves the directory; it follows a relative symlink that stays below
the directory, and crosses mount points.  Source: FreeBSD
sys/kern/vfs_lookup.c, nameicap_check_dotdot(), NI_LCF_STRICTREL.
"""

from __future__ import annotations

import errno
import os

# MAXSYMLINKS of sys/param.h.
_LINKS_LIMIT = 32
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_below(directory_fd: int, path: str, flags: int, mode: int) -> int:
    """Open a path relative to a directory and return the descriptor.

    flags, mode: as for open(2).  Raises OSError if the open fails; EPERM
    stands for FreeBSD's ENOTCAPABLE.
    """
    walk = [os.dup(directory_fd)]
    parts = _split(path)
    links = 0
    try:
        while parts:
            part = parts.pop(0)
            if part == "..":
                if len(walk) == 1:
                    raise PermissionError(errno.EPERM, "not capable: leaves the directory", path)
                os.close(walk.pop())
                continue
            target = _link(walk[-1], part)
            if target is not None:
                links += 1
                if links > _LINKS_LIMIT:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                parts[:0] = _split(target)
            elif parts:
                walk.append(os.open(part, _DIRECTORY, dir_fd=walk[-1]))
            else:
                return os.open(part, flags | os.O_NOFOLLOW, mode, dir_fd=walk[-1])
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    finally:
        for fd in walk:
            os.close(fd)


def _split(path: str) -> list[str]:
    if path.startswith("/"):
        raise PermissionError(errno.EPERM, "not capable: an absolute path", path)
    return [part for part in path.split("/") if part not in ("", ".")]


def _link(directory_fd: int, name: str) -> str | None:
    """Return a symlink's target, or None if the name is no symlink or does not exist."""
    try:
        return os.readlink(name, dir_fd=directory_fd)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return None
        raise

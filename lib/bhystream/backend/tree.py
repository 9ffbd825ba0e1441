"""Remove a directory in which another user may have planted something."""

from __future__ import annotations

import contextlib
import os
import shutil

from bhystream.beneath import is_trusted


def remove_tree(path: str | os.PathLike[str]) -> None:
    """Remove a directory of ours and all in it.  Never raises; leaves whatever else is there.

    shutil.rmtree() alone would open(2) a FIFO in the place of the directory, and
    wait for a writer; another user can make one in a sticky directory.
    """
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not is_trusted(os.fstat(fd)):
                return
            shutil.rmtree(".", ignore_errors=True, dir_fd=fd)
        finally:
            os.close(fd)
        os.rmdir(path)

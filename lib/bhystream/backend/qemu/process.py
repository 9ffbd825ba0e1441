"""The arguments and the working directory of a QEMU process."""

from __future__ import annotations

import os

from bhystream.errors import AccessError, GuestError


def read_argv(pid: int) -> list[str]:
    """Return the argv of a process, program first.  Raises AccessError or GuestError."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            raw = file.read()
    except OSError as error:
        kind = AccessError if isinstance(error, PermissionError) else GuestError
        raise kind(f"cannot read the arguments of process {pid}: {error.strerror}") from None
    return [word.decode("utf-8", "surrogateescape") for word in raw.split(b"\0")[:-1]]


def working_directory(pid: int) -> str:
    """Return a process's working directory, as the process itself sees the path.

    Raises AccessError or GuestError.
    """
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError as error:
        kind = AccessError if isinstance(error, PermissionError) else GuestError
        raise kind(f"cannot read the directory of process {pid}: {error.strerror}") from None

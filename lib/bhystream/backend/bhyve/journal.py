"""What is to be put back into a held guest, in a file, while its FPU is stored.

We may be killed with a vCPU of the guest's in the stub, and its registers are
then nowhere but here: so the file is there, whole, before the first of them is
changed, and goes when all has been put back and was compared.  Whoever finds it
puts all back (lent.py, put_back()) before the guest is let go.

    head     magic, version, phase
    kept     the vCPU, its registers, their hidden parts, twelve pages (kept.py)

It is made under another name and renamed.  It need not outlive the host, on
which the guest ends too, so nothing waits for a disk.  The phase is one byte,
written in its place: a SIGKILL leaves the old one or the new one.
"""

from __future__ import annotations

import contextlib
import os
import struct
from enum import IntEnum
from pathlib import Path

from bhystream.backend.bhyve.kept import PACKED_BYTES, Kept
from bhystream.errors import GuestError

_HEAD = struct.Struct("<8sIB3x")
_MAGIC = b"bhylent\n"
_VERSION = 1
_PHASE_AT = 12


class Phase(IntEnum):
    """How far it has come.

    SET: registers and memory are being made the stub's; nothing has run.
    RUNS: the vCPU may be anywhere in the stub, at a CPL that is not its own.
    BACK: it is not in the stub any more; BACK_NMI: and the stub has swallowed
    an NMI of its.
    """

    SET = 0
    RUNS = 1
    BACK = 2
    BACK_NMI = 3


class Journal:
    """The file.  It holds one vCPU's at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_name(f"{path.name}.new")

    def exists(self) -> bool:
        """Say whether something is to be put back."""
        return self._path.exists()

    def write(self, kept: Kept) -> None:
        """Note what is to be put back.  Raises GuestError: then there is no journal."""
        data = _HEAD.pack(_MAGIC, _VERSION, Phase.SET) + kept.pack()
        try:
            fd = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                if os.write(fd, data) != len(data):
                    raise OSError(0, "no room")
            finally:
                os.close(fd)
            self._new.rename(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._new.unlink()
            raise self._error(error, "write") from None

    def mark(self, phase: Phase) -> None:
        """Note how far it has come.  Raises GuestError."""
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(fd, bytes((phase,)), _PHASE_AT)
            finally:
                os.close(fd)
        except OSError as error:
            raise self._error(error, "write") from None

    def read(self) -> tuple[Kept, Phase]:
        """Return what is to be put back.  Raises GuestError for a file that is none of ours."""
        try:
            with self._path.open("rb") as file:
                data = file.read(_HEAD.size + PACKED_BYTES + 1)
            magic, version, phase = _HEAD.unpack_from(data)
            if magic != _MAGIC or version != _VERSION or any(data[_PHASE_AT + 1 : _HEAD.size]):
                raise ValueError(f"version {version}")
            return Kept.unpack(data[_HEAD.size :]), Phase(phase)
        except OSError as error:
            raise self._error(error, "read") from None
        except (ValueError, struct.error) as error:
            raise GuestError(f"cannot read {self._path}: {error}") from None

    def remove(self) -> None:
        """Note that all has been put back; twice is no error.  Raises GuestError."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise self._error(error, "remove") from None

    def _error(self, error: OSError, doing: str) -> GuestError:
        return GuestError(f"cannot {doing} {self._path}: {error.strerror or error}")

"""The file of what must be put back into a paused guest after its FPU registers were saved.

bhysend may be killed while a vCPU of the guest runs the stub.  The vCPU's own
registers are then in this file and nowhere else.  So bhysend completes the file
before it changes the first register, and removes the file after it has put all
back and compared it.  A bhysend that finds the file puts all back (lent.py,
put_back()) before it lets the guest run.

    head     magic, version, phase
    saved    the vCPU, its registers, their hidden parts, twelve pages (savedvcpu.py)

The file is written under another name and renamed.  The file need not outlive
the host, because the guest ends with the host, so nothing is synced to a disk.
The phase is one byte, overwritten in place: a SIGKILL leaves the old phase or
the new one.
"""

from __future__ import annotations

import contextlib
import os
import struct
from enum import IntEnum
from pathlib import Path

from bhystream.backend.bhyve.savedvcpu import PACKED_BYTES, SavedVcpu
from bhystream.errors import GuestError

_HEAD = struct.Struct("<8sIB3x")
_MAGIC = b"bhylent\n"
_VERSION = 1
_PHASE_AT = 12


class Phase(IntEnum):
    """How far the vCPU's run of the stub has come.

    SET: the stub's registers and memory are being set; the vCPU has not run.
    RUNS: the vCPU may be anywhere in the stub, at a CPL that is not its own.
    BACK: the vCPU has left the stub.  BACK_NMI: the vCPU has left the stub, and
    the stub has swallowed an NMI that was meant for the guest.
    """

    SET = 0
    RUNS = 1
    BACK = 2
    BACK_NMI = 3


class Journal:
    """The file.  It describes one vCPU at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_name(f"{path.name}.new")

    def exists(self) -> bool:
        """Say whether the file exists, so that a vCPU must be put back."""
        return self._path.exists()

    def write(self, saved: SavedVcpu) -> None:
        """Write what must be put back.  Raises GuestError if it cannot; then no file is left."""
        data = _HEAD.pack(_MAGIC, _VERSION, Phase.SET) + saved.pack()
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
        """Write the phase into the file.  Raises GuestError if it cannot be written."""
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(fd, bytes((phase,)), _PHASE_AT)
            finally:
                os.close(fd)
        except OSError as error:
            raise self._error(error, "write") from None

    def read(self) -> tuple[SavedVcpu, Phase]:
        """Return what must be put back, and the phase.

        Raises GuestError if the file cannot be read, or if write() did not make it.
        """
        try:
            with self._path.open("rb") as file:
                data = file.read(_HEAD.size + PACKED_BYTES + 1)
            magic, version, phase = _HEAD.unpack_from(data)
            if magic != _MAGIC or version != _VERSION or any(data[_PHASE_AT + 1 : _HEAD.size]):
                raise ValueError(f"version {version}")
            return SavedVcpu.unpack(data[_HEAD.size :]), Phase(phase)
        except OSError as error:
            raise self._error(error, "read") from None
        except (ValueError, struct.error) as error:
            raise GuestError(f"cannot read {self._path}: {error}") from None

    def remove(self) -> None:
        """Remove the file, if it exists: all was put back.  Raises GuestError if it cannot."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise self._error(error, "remove") from None

    def _error(self, error: OSError, doing: str) -> GuestError:
        return GuestError(f"cannot {doing} {self._path}: {error.strerror or error}")

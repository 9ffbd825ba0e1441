"""bhyve's snapshot files on the disk: their paths, and how they are read.

snapshot.py describes their contents.
"""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bhystream.backend.bhyve.snapshot import MAX_META_BYTES, META, Meta, fpu_states, parse
from bhystream.errors import AccessError, FormatError, GuestError, UsageError
from bhystream.guest import MAX_OPTIONAL_STATE_BYTES, State
from bhystream.strict_json import unpack_json

_MAX_FPU_TEXT_BYTES = 2 * MAX_OPTIONAL_STATE_BYTES  # base64 makes 4 bytes of 3
_MAX_COMPONENT_BYTES = 255  # NAME_MAX


@dataclass(frozen=True)
class Files:
    """The paths of a snapshot's files.  name: FILE's name, without its directory."""

    directory: Path
    name: str

    def __post_init__(self) -> None:
        """Raise UsageError if the name is no file name, or is too long with ".kern"."""
        if self.name in ("", ".", "..") or "/" in self.name or "\0" in self.name:
            raise UsageError(f"{self.name!r}: not the name of a snapshot file")
        if len(os.fsencode(self.kern.name)) > _MAX_COMPONENT_BYTES:
            raise UsageError(f"{self.name}: too long for the name of a snapshot file")

    @property
    def memory(self) -> Path:
        """Return FILE."""
        return self.directory / self.name

    @property
    def kern(self) -> Path:
        """Return FILE.kern."""
        return self.directory / f"{self.name}.kern"

    @property
    def meta(self) -> Path:
        """Return FILE.meta."""
        return self.directory / f"{self.name}.meta"

    @property
    def fpu(self) -> Path:
        """Return FILE.fpu, which need not exist."""
        return self.directory / f"{self.name}.fpu"


def pack_fpu(states: Sequence[State]) -> bytes:
    """Return the text of FILE.fpu."""
    texts = {state.name: base64.b64encode(state.data).decode() for state in states}
    return json.dumps(texts).encode() + b"\n"


def read_fpu(files: Files) -> list[State]:
    """Read FILE.fpu; return [] if there is none.

    Raises GuestError if the file is incomplete or not ours, AccessError if it cannot be read.
    """
    if not os.path.lexists(files.fpu):
        return []
    text = _read_text(files.fpu, _MAX_FPU_TEXT_BYTES)
    try:
        found = unpack_json(text)
        states = [
            State(name, base64.b64decode(data, validate=True), is_optional=True)
            for name, data in found.items()
        ]
    except (FormatError, ValueError, TypeError, AttributeError) as error:
        raise GuestError(f"{files.fpu} is not complete, or not ours: {error}") from None
    if len(fpu_states(states)) != len(states):
        raise GuestError(f"{files.fpu}: a name in it is no vCPU's")
    return states


def open_file(path: Path) -> tuple[int, int]:
    """Open one file of a snapshot for reading; return (descriptor, size in bytes).

    The descriptor is the caller's.  Raises GuestError if the file does not
    exist, is no regular file, or is empty, and AccessError if it may not be read.
    """
    try:
        # Without O_NONBLOCK, the open(2) of a FIFO would wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise AccessError(f"cannot open {path}: {error.strerror}") from None
    except OSError as error:
        raise GuestError(f"cannot open {path}: {error.strerror}") from None
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
        os.close(fd)
        why = "is empty" if stat.S_ISREG(found.st_mode) else "is not a regular file"
        raise GuestError(f"{path} {why}")
    return fd, found.st_size


def read_meta(files: Files) -> tuple[Meta, bytes]:
    """Read FILE.meta; return it parsed, and its text.

    Raises GuestError if the file is incomplete or not bhyve's, and what open_file() raises.
    """
    text = _read_text(files.meta, MAX_META_BYTES)
    try:
        return parse(text), text
    except FormatError as error:
        raise GuestError(f"{files.meta} is not complete, or not bhyve's: {error}") from None


def read_states(files: Files, memory_bytes: int) -> tuple[Meta, list[State]]:
    """Read FILE.kern and FILE.meta, as states.  memory_bytes: size of the guest's memory.

    FILE itself is not read: it need not contain the memory.  Raises GuestError,
    which names the file, if the two are not complete and consistent, and
    AccessError if one may not be read.
    """
    meta, text = read_meta(files)
    if meta.memory_bytes != memory_bytes:
        raise GuestError(
            f"{files.meta} is of another guest: {meta.memory_bytes} bytes of memory, "
            f"not {memory_bytes}"
        )
    fd, size = open_file(files.kern)
    try:
        check_size(files.kern, size, meta.kern_bytes, files.meta)
        states = [State(META, text)]
        for item in meta.items:
            data = _read(fd, item.size_bytes, item.offset_bytes, files.kern)
            states.append(State(item.state_name, data))
    finally:
        os.close(fd)
    return meta, states


def check_size(path: Path, size_bytes: int, wanted_bytes: int, meta: Path) -> None:
    """Raise GuestError if a file has another size than FILE.meta says."""
    if size_bytes != wanted_bytes:
        why = "it is truncated" if size_bytes < wanted_bytes else "it is too long"
        raise GuestError(
            f"{path} has {size_bytes} bytes where {meta.name} says {wanted_bytes}: "
            f"{why}, or of another snapshot"
        )


def _read_text(path: Path, limit_bytes: int) -> bytes:
    """Return the contents of one file of a snapshot, at most limit_bytes bytes."""
    fd, size = open_file(path)
    try:
        if size > limit_bytes:
            raise GuestError(f"{path}: {size} bytes are more than {limit_bytes}")
        return _read(fd, size, 0, path)
    finally:
        os.close(fd)


def _read(fd: int, size: int, offset: int, path: Path) -> bytes:
    """Read `size` bytes at an offset with one pread(2), which a regular file serves completely."""
    try:
        data = os.pread(fd, size, offset)
    except OSError as error:
        raise GuestError(f"cannot read {path}: {error.strerror}") from None
    if len(data) != size:
        raise GuestError(f"{path} became shorter while it was read")
    return data

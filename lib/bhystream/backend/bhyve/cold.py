"""A guest that does not run: snapshot files as base.Snapshot, and as base.Sink.

    FILE FILE.kern FILE.meta --SnapshotSource--> stream --FilesSink--> the same three files

The files arrive byte for byte: bhyve at the destination reads the same file that
bhyve made at the source, and holes stay holes.  FILE.fpu goes with the files if
the stream was one of a running guest, because bhyve's own files do not have the
FPU.  Nothing here needs a bhyve, a vmm(4) or root, so a snapshot can be packed
and unpacked on any host.

FilesSink makes the files in a hidden directory beside their final place.  The
files get their names when all are complete and on the disk, FILE.meta last, by
link(2), which never overwrites a file that has appeared in the meantime.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from bhystream import durable
from bhystream.backend.bhyve import snapshot, snapshotfiles
from bhystream.backend.bhyve.layout import layout_of, memory_spans
from bhystream.backend.bhyve.snapshot import Meta
from bhystream.backend.bhyve.snapshotfiles import Files
from bhystream.errors import GuestError, IncompatibleError, InternalError, Reason, from_oserror
from bhystream.guest import BHYVE, GUEST_NAME, Head, Json, State
from bhystream.memory import hole
from bhystream.memory.mapping import unmap
from bhystream.memory.target import FileTarget

# The errors of a file system that does not know its holes.  Source: lseek(2).
_NO_HOLES = (errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP)


class SnapshotSource:
    """Snapshot files that are to be sent.  The files are only read."""

    def __init__(self, path: Path, config: Json | None, host_section: Json) -> None:
        """Open the snapshot and check all that can be checked without reading the memory.

        path: FILE's.  config: the CONFIG section, or None to make one from
        FILE.meta.  host_section: the HOST section.  Raises GuestError, which
        names the file that is missing, truncated, or does not fit the others;
        AccessError if a file may not be read; UsageError if FILE's name cannot
        be that of a snapshot file.
        """
        self.files = Files(path.parent, path.name)
        self._host = host_section
        self._opened = contextlib.ExitStack()
        self._views: list[memoryview] = []
        self._stamps = self._look()
        self._fd, size = snapshotfiles.open_file(self.files.memory)
        self._opened.callback(os.close, self._fd)
        try:
            self._meta, _ = snapshotfiles.read_meta(self.files)
            self._check_sizes(size)
            self._config = config if config is not None else _minimal(self._meta)
            self._check_config()
        except BaseException:
            self.close()
            raise

    def _check_sizes(self, memory_size: int) -> None:
        files, meta = self.files, self._meta
        snapshotfiles.check_size(files.memory, memory_size, meta.memory_bytes, files.meta)
        fd, size = snapshotfiles.open_file(files.kern)
        os.close(fd)
        snapshotfiles.check_size(files.kern, size, meta.kern_bytes, files.meta)

    def _check_config(self) -> None:
        name = self._config.get("name")
        if not isinstance(name, str) or not GUEST_NAME.fullmatch(name):
            raise GuestError(f"{self.files.meta}: {ascii(name)[:80]} is not a guest's name")
        differences = _differences(self._config, self._meta)
        if differences:
            raise GuestError(f"{self.files.meta} is not of this configuration: {differences[0]}")

    def _look(self) -> list[tuple[int, ...]]:
        """Return stamps that differ if one of the files has been written to or replaced."""
        stamps: list[tuple[int, ...]] = []
        for path in (self.files.memory, self.files.kern, self.files.meta, self.files.fpu):
            with contextlib.suppress(OSError):  # the open of the file reports the error
                found = path.stat()
                stamps.append((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
        return stamps

    @property
    def name(self) -> str:
        """Return the guest's name: the configuration's, or FILE.meta's if none is given."""
        return str(self._config["name"])

    @property
    def lock_name(self) -> str:
        """Return a name that only FILE has on this host, the same for every path to FILE."""
        found = os.fstat(self._fd)
        return f"snapshot-{found.st_dev}-{found.st_ino}"

    def head(self) -> Head:
        """Return what goes into the head sections."""
        layout = layout_of(self._meta.memory_bytes)
        return Head(self._host, layout, self._config, self._meta.devices)

    def resources(self) -> Sequence[str]:
        """Return the -o words of the configuration's host resources."""
        return [f"{word}=" for word in self._config.get("resources", {})]

    def warnings(self) -> Sequence[Reason]:
        """Return a warning if the stream will not tell how to start the guest."""
        if set(self._config.get("keys", {})) <= {"cpus", "memory.size"}:
            return [
                Reason(
                    "no configuration goes with the snapshot: the destination's operator has to"
                    " know the guest's (-C)"
                )
            ]
        return []

    def fixed(self) -> None:
        """Return None: snapshot files have no pause."""

    def memory(self) -> Sequence[memoryview]:
        """Return the mapped memory, read-only, by segment."""
        if not self._views:
            size = self._meta.memory_bytes
            mapping = mmap.mmap(self._fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
            self._opened.callback(self._views.clear)
            self._opened.callback(unmap, self._views, [mapping])
            with memoryview(mapping) as whole:
                for _, offset, length in memory_spans(size):
                    self._views.append(whole[offset : offset + length])
        return self._views

    def touched(self) -> Iterator[tuple[int, int]]:
        """Yield the page extents [first, end) of FILE that are no holes.  Raises GuestError."""
        size = self._meta.memory_bytes
        for base, (_, offset, length) in zip(
            layout_of(size).starts, memory_spans(size), strict=True
        ):
            for first, end in data_extents(self._fd, offset, length):
                yield base + first, base + end

    def changed(self) -> None:
        """Return None: the files do not change, and the engine asks only once."""

    def states(self) -> Sequence[State]:
        """Read FILE.kern and FILE.meta, and FILE.fpu if there is one.

        Called after the memory was sent.  Raises GuestError if a file is not
        sound, or if any file has changed since the snapshot was opened;
        AccessError if a file may not be read.
        """
        _, states = snapshotfiles.read_states(self.files, self._meta.memory_bytes)
        states += snapshotfiles.read_fpu(self.files)
        if self._look() != self._stamps:
            raise GuestError(f"{self.files.memory}: the snapshot was written to while it was sent")
        return states

    def close(self) -> None:
        """Give up the mapping and the descriptor.  Twice is no error.

        A view that the engine still refers to keeps the mapping until the
        engine drops the view.
        """
        self._opened.close()


@dataclass(frozen=True)
class _Checked:
    """The files can be made here: check() has found no reason against them."""

    MISSING: ClassVar[str] = "check() was not called, or refused the guest"
    memory_bytes: int


@dataclass(frozen=True)
class _Made(_Checked):
    """The files are in a hidden directory.  fd: FILE's descriptor."""

    MISSING = "open() was not called"
    files: Files
    fd: int


@dataclass(frozen=True)
class _Complete(_Made):
    """All of the files are complete and on the disk."""

    MISSING = "load() was not called"
    has_fpu: bool


_Stage = TypeVar("_Stage", bound=_Checked)


class FilesSink:
    """Snapshot files that are made from a stream (bhyrecv -S).  No guest ever runs."""

    may_have_run = False
    notices: Sequence[str] = ()

    def __init__(self, directory: Path, name: str, *, force: bool = False) -> None:
        """Prepare; touch nothing on the host.

        name: the name of FILE.  force: skip the check for free space, which counts
        holes in the memory as data.  Raises
        UsageError if the name cannot be that of a snapshot file.
        """
        self.on_wait: Callable[[], None] = lambda: None
        self._files = Files(directory, name)
        self._force = force
        self._stage: _Checked | None = None
        # What abort() undoes: the hidden directory, and the names that start() has given
        # to some of the files.
        self._hidden = contextlib.ExitStack()
        self._placed = contextlib.ExitStack()

    def _at(self, stage: type[_Stage]) -> _Stage:
        """Return the stage that was reached.  Raises InternalError if `stage` was not."""
        if not isinstance(self._stage, stage):
            raise InternalError(f"FilesSink: {stage.MISSING}")
        return self._stage

    def check(self, head: Head) -> list[str]:
        """Return the reasons why the files cannot be made here; remember the head."""
        kind = head.host.get("hypervisor")
        if kind not in BHYVE:
            return [f"hypervisor: the guest runs under {ascii(kind)[:40]}, not bhyve"]
        size = head.layout.size_bytes
        reasons = self._reasons_of_place(size)
        if not reasons:
            self._stage = _Checked(size)
        return reasons

    def late_reasons(self) -> list[str]:
        """Return no reason: files that can be made need no plan."""
        return []

    def description(self, head: Head) -> Sequence[str]:
        """Return (): no manager is known that could have it."""
        return ()

    def disks(self) -> Mapping[str, str]:
        """Return no disk: files are no guest yet."""
        return {}

    def _reasons_of_place(self, size: int) -> list[str]:
        """Return what is wrong with the directory, with the names in it, or with its space."""
        files = self._files
        if not files.directory.is_dir() or not os.access(files.directory, os.W_OK | os.X_OK):
            return [f"-S: {files.directory} is not a directory that can be written to"]
        paths = (files.memory, files.kern, files.meta, files.fpu)
        reasons = [f"-S: {path} exists" for path in paths if os.path.lexists(path)]
        found = os.statvfs(files.directory)
        free = found.f_bavail * found.f_frsize
        if free < size and not self._force:
            reasons.append(f"-S: {size} bytes do not fit {files.directory}: {free} are free")
        return reasons

    def open(self, plan: bytes) -> Sequence[FileTarget]:
        """Make the memory file, one hole, in a hidden directory.  plan: not used.

        Raises AccessError, InputOutputError if the system refuses; InternalError
        if check() was not called, or refused the guest.
        """
        files, size = self._files, self._at(_Checked).memory_bytes
        try:
            prefix = f".{files.name}.partial-"
            work = tempfile.mkdtemp(prefix=prefix, dir=files.directory)
            self._hidden.callback(shutil.rmtree, work, ignore_errors=True)
            made = Files(Path(work), files.name)
            fd = _create(made.memory)
            self._hidden.callback(os.close, fd)
            os.ftruncate(fd, size)
        except OSError as error:
            raise from_oserror(error, f"make {files.memory}") from None
        self._stage = _Made(size, made, fd)
        return [FileTarget(fd, offset) for _, offset, _ in memory_spans(size)]

    def require_alive(self) -> None:
        """Do nothing: no hypervisor was started."""

    def load(self, states: Sequence[State]) -> None:
        """Write the other files, and flush all of the files to the disk.

        The flush is here because start() has to be quick.  Raises FormatError
        if the states are not those of a snapshot; AccessError,
        InputOutputError; InternalError if open() was not called.
        """
        made = self._at(_Made)
        _, text, kern = snapshot.join(states)
        fpu = snapshot.fpu_states(states)
        try:
            for path, pieces in ((made.files.kern, kern), (made.files.meta, [text])):
                _write(path, pieces)
            if fpu:
                _write(made.files.fpu, [snapshotfiles.pack_fpu(fpu)])
            os.fsync(made.fd)
        except OSError as error:
            raise from_oserror(error, f"write {self._files.memory}") from None
        self._stage = _Complete(made.memory_bytes, made.files, made.fd, bool(fpu))

    def advance_clocks(self, ns: int) -> int:
        """Return 0: no guest is started."""
        return 0

    def start(self) -> None:
        """Give the files their names, FILE.meta last, after the other names are on the disk.

        Raises IncompatibleError if a name is in use by now; AccessError,
        InputOutputError; InternalError if load() was not called.
        """
        complete, files = self._at(_Complete), self._files
        made = complete.files
        try:
            if complete.has_fpu:
                self._place(made.fpu, files.fpu)
            self._place(made.kern, files.kern)
            self._place(made.memory, files.memory)
            durable.sync(files.directory)
            self._place(made.meta, files.meta)
            durable.sync(files.directory)
        except OSError as error:
            raise from_oserror(error, f"make {files.memory}") from None
        self._placed.pop_all()
        self._hidden.close()

    def settle(self) -> None:
        """Do nothing."""

    def leave_paused(self) -> None:
        """Do as start(), and raise what start() raises: a guest in files does not run."""
        self.start()

    def _place(self, made: Path, path: Path) -> None:
        try:
            os.link(made, path)
        except FileExistsError:
            raise IncompatibleError(f"{path} exists now: it is not overwritten") from None
        self._placed.callback(_unlink, path)

    def record(self) -> Json:
        """Return an empty record: there is no guest to find again."""
        return {}

    def abort(self) -> None:
        """Remove all files that were made."""
        self._placed.close()
        self._hidden.close()


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _minimal(meta: Meta) -> Json:
    """Return the configuration that can be made from FILE.meta alone."""
    keys = {"cpus": str(meta.ncpus), "memory.size": str(meta.memory_bytes)}
    return {"name": meta.vmname, "keys": keys, "resources": {}}


def _differences(config: Json, meta: Meta) -> list[str]:
    """Return one line for each key that a configuration and FILE.meta say differently."""
    said, found = config["keys"], {"memory.size": meta.memory_bytes, "cpus": meta.ncpus}
    return [
        f"{key} is {said.get(key)} in the configuration, {count} in meta"
        for key, count in found.items()
        if said.get(key) != str(count)
    ]


def data_extents(fd: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield the page extents [first, end) of a piece of a file that are no holes.

    offset, length: the piece, in bytes.  Pages are counted from the start of
    the piece.  If the file system does not know its holes, the whole piece is
    one extent.  Raises GuestError if the file cannot be walked.
    """
    try:
        yield from hole.data_extents(fd, offset, length, _NO_HOLES)
    except OSError as error:
        raise GuestError(f"cannot walk the memory file: {error.strerror}") from None


def _create(path: Path) -> int:
    """Create a file, mode 0600; return a descriptor, which the caller closes.  Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _write(path: Path, pieces: Sequence[bytes]) -> None:
    """Make a file of these pieces and flush it to the disk.  Raises OSError."""
    with open(_create(path), "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())

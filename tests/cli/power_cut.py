"""The contents of a disk after a power cut, for each moment of a program's life.

    ended = run(recorded(command, disk, log), env=env)
    for cut in cuts(log):
        cut.put_back()                       # makes the directory as the cut has left it
        run(after_a_boot(command), env=env)

A recorded program runs as always; after each call that changes the disk, the recorder notes what
the disk would contain after a power cut.  A directory has the names, and a file the bytes, that it
had when it was last synced.  Beyond that a cut leaves NOTHING, which is all that is promised; or
all NAMES of the moment, and so empty files, as a file system does that writes names first; or
EVERYTHING, as after a kill.  Marks say which important steps the program has done: see _MARKS.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from cli.travel import program_at

NOTHING, NAMES, EVERYTHING = "nothing", "names", "everything"
KINDS = (NOTHING, NAMES, EVERYTHING)
_CALLS = (
    *("rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir"),
    *("symlink", "truncate", "ftruncate"),
)
# These directories need not survive a power cut.
_OF_THE_MOMENT = ("held", "lock", "log", "run")
# The programs make these files anew, or never read them: cuts that differ only in them are one.
_MADE_ANEW = re.compile(r"(^|/)((held|lock|log|run|source)|[^/]*\.new|start\.(conf|kern))$")

Tree = dict[int, dict[str, int]]


class Moment(NamedTuple):
    """One moment: the names in each directory, and the copy that has each file's bytes.

    tree, bytes_: at this moment.  synced_tree, synced_bytes: at the last sync.
    """

    what: str
    marks: frozenset[str]
    tree: Tree
    bytes_: dict[int, int]
    synced_tree: Tree
    synced_bytes: dict[int, int]


@dataclass(frozen=True)
class Cut:
    """The files that one cut leaves.  files: by path; None for a directory, else (file, copy)."""

    disk: Path
    copies: Path
    what: str
    kind: str
    marks: frozenset[str]
    files: dict[str, tuple[int, int] | None]

    def put_back(self) -> None:
        """Replace the directory's contents by what the cut has left."""
        shutil.rmtree(self.disk)
        self.disk.mkdir(mode=0o700)
        made: dict[int, Path] = {}
        for name, found in sorted(self.files.items()):
            path = self.disk / name
            if found is None:
                path.mkdir(mode=0o700)
            elif found[0] in made:
                os.link(made[found[0]], path)
            else:
                made[found[0]] = path
                path.touch(mode=0o600)
                if found[1]:
                    _copy(self.copies / str(found[1]), path)


def _copy(source: Path, path: Path) -> None:
    subprocess.run(["cp", "--sparse=always", source, path], check=True)


def cuts(log: Path) -> Iterator[Cut]:
    """Yield every cut that is possible in a recorded life, each only once."""
    disk, root, moments = pickle.loads((log / "moments").read_bytes())
    seen = set()
    for moment in (Moment(*each) for each in moments):
        for kind in KINDS:
            tree = moment.synced_tree if kind == NOTHING else moment.tree
            held = moment.bytes_ if kind == EVERYTHING else moment.synced_bytes
            files = dict(_walk(tree, held, root, ""))
            told = {item for item in files.items() if not _MADE_ANEW.search(item[0])}
            key = (moment.marks, frozenset(told))
            if key not in seen:
                seen.add(key)
                yield Cut(disk, log, moment.what, kind, moment.marks, files)


def _walk(
    tree: Tree, held: dict[int, int], at: int, before: str
) -> Iterator[tuple[str, tuple[int, int] | None]]:
    for name, inode in tree.get(at, {}).items():
        is_directory = held.get(inode, 0) < 0
        yield f"{before}{name}", None if is_directory else (inode, held.get(inode, 0))
        if is_directory and name not in _OF_THE_MOMENT:
            yield from _walk(tree, held, inode, f"{before}{name}/")


def recorded(command: Sequence[str | Path], disk: Path, log: Path) -> list[str]:
    """Return the command that records one of our programs.  disk: a directory; log: a new one."""
    return _through(command, "record", str(disk), str(log))


def after_a_boot(command: Sequence[str | Path]) -> list[str]:
    """Return the command that runs one of our programs on a host that has been booted again."""
    return _through(command, "after")


def _through(command: Sequence[str | Path], *ours: str) -> list[str]:
    words = [str(word) for word in command]
    at = program_at(words) + 1
    return [*words[:at], __file__, *ours, "--", *words[at:]]


@dataclass
class Disk:
    """The recorder, which runs in the program's own process."""

    root: Path
    log: Path
    moments: list[tuple[Any, ...]] = field(default_factory=list)
    marks: set[str] = field(default_factory=set)
    # The kernel gives an inode's number to no other file while the file is open.
    _open: dict[int, int] = field(default_factory=dict)
    _copied: dict[tuple[int, int, int], int] = field(default_factory=dict)
    _synced_tree: Tree = field(default_factory=dict)
    _synced_bytes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._synced_tree, self._synced_bytes = self._look()

    def note(self, what: str) -> None:
        """Note this moment."""
        tree, held = self._look()
        # A directory is a directory, whether or not its name was synced.
        synced = {**self._synced_bytes, **dict.fromkeys(tree, -1)}
        marks = frozenset(self.marks)
        # Moments are tuples, because another process reads them.
        self.moments.append((what, marks, tree, held, self._synced_tree, synced))

    def synced(self, fd: int) -> None:
        """Note that a file or a directory was synced."""
        tree, held = self._look()
        inode = os.fstat(fd).st_ino
        if inode in tree:
            self._synced_tree = {**self._synced_tree, inode: tree[inode]}
        elif inode in held:
            self._synced_bytes = {**self._synced_bytes, inode: held[inode]}

    def save(self) -> None:
        (self.log / "moments").write_bytes(
            pickle.dumps((self.root, os.stat(self.root).st_ino, self.moments))
        )

    def _look(self) -> tuple[Tree, dict[int, int]]:
        """Return the names in each directory, and the copy that has each file's bytes.

        -1 stands for a directory, 0 for an empty file.
        """
        tree: Tree = {}
        held: dict[int, int] = {}
        self._look_at(self.root, tree, held)
        return tree, held

    def _look_at(self, directory: Path, tree: Tree, held: dict[int, int]) -> None:
        names: dict[str, int] = {}
        for entry in os.scandir(directory):
            inode = entry.inode()
            if inode not in self._open:
                self._open[inode] = os.open(entry.path, os.O_PATH | os.O_NOFOLLOW)
            if entry.is_dir(follow_symlinks=False):
                held[inode] = -1
                if entry.name not in _OF_THE_MOMENT:
                    self._look_at(Path(entry.path), tree, held)
                else:
                    tree[inode] = {}
            elif entry.is_file(follow_symlinks=False):
                held[inode] = self._copy(entry)
            else:
                continue
            names[entry.name] = inode
        tree[os.stat(directory).st_ino] = names

    def _copy(self, entry: os.DirEntry[str]) -> int:
        found = entry.stat()
        if not found.st_size:
            return 0
        key = (found.st_ino, found.st_size, found.st_mtime_ns)
        if key not in self._copied:
            self._copied[key] = len(self._copied) + 1
            _copy(Path(entry.path), self.log / str(self._copied[key]))
        return self._copied[key]


def _record(root: Path, log: Path) -> Disk:
    """Record this process from now on."""
    busy = False
    log.mkdir()
    disk = Disk(root, log)

    def noting(
        name: str, call: Callable[..., Any], does: Callable[..., bool]
    ) -> Callable[..., Any]:
        @wraps(call)
        def called(*args: Any, **options: Any) -> Any:
            nonlocal busy
            found = call(*args, **options)
            if not busy and does(*args, **options):
                busy = True
                try:
                    if name == "fsync":
                        disk.synced(*args)
                    disk.note(f"{name}{args[:2]}")
                finally:
                    busy = False
            return found

        return called

    def creates(path: object, flags: int, *_: object, **__: object) -> bool:
        return bool(flags & (os.O_CREAT | os.O_TRUNC))

    def writes(path: object, mode: str = "r", *_: object, **__: object) -> bool:
        return "w" in mode and isinstance(path, str | Path)

    for name in _CALLS:
        setattr(os, name, noting(name, getattr(os, name), lambda *_, **__: True))
    os.fsync = noting("fsync", os.fsync, lambda *_: True)
    os.open = noting("open", os.open, creates)
    io.open = noting("open", io.open, writes)
    _mark(disk)
    return disk


def _mark(disk: Disk) -> None:
    """Note each important step of the program before the program takes it.

    RUN: the guest may run from here on.  READY, END, GO: the message is on its
    way.  OVER: the destination has said that the guest runs.
    """

    from bhystream.backend.bhyve.lastpage import LastPage
    from bhystream.backend.qemu.sink import QemuSink
    from bhystream.handover.handshake import Event
    from bhystream.recv.reply import Reply
    from bhystream.send.custody import Custody
    from bhystream.stream.format import Type
    from bhystream.stream.writer import Writer

    def marking(owner: type, name: str, mark: Callable[..., str]) -> None:
        call = getattr(owner, name)

        @wraps(call)
        def called(self: Any, *args: Any, **options: Any) -> Any:
            if found := mark(*args):
                disk.marks.add(found)
                disk.note(found)
            return call(self, *args, **options)

        setattr(owner, name, called)

    marking(LastPage, "give", lambda *_: "RUN")
    marking(QemuSink, "start", lambda *_: "RUN")
    marking(Reply, "say", lambda word, *_: word if word == "READY" else "")
    marking(Writer, "end", lambda *_: "END")
    marking(Writer, "section", lambda type_, *_: "GO" if type_ == Type.GO else "")
    marking(Custody, "settle", lambda event, _: "OVER" if event == Event.RUNNING else "")


def _main(argv: list[str]) -> None:
    at = argv.index("--")
    ours, sys.argv = argv[1:at], argv[at + 1 :]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    disk = None
    if ours[0] == "record":
        disk = _record(Path(ours[1]), Path(ours[2]))
    else:
        from bhystream.backend import process

        vars(process)["boot_id"] = lambda: "another boot"
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        if disk and ended.code == 0:
            disk.marks.add("DONE")
        raise
    finally:
        if disk:
            with suppress(OSError):
                disk.note("the end")
            disk.save()


if __name__ == "__main__":
    _main(sys.argv)

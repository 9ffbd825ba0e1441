"""run.lock of a guest that leaves: what keeps it, and what lets it go."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.bhyve.locks import HELD, Locks

HOST = "hv1"


class Flags:
    """chflags(2) and st_flags of FreeBSD, for one file system; a file keeps its flags by inode.

    has: the flags that the file system has.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *has: int) -> None:
        self._has = has
        self._of: dict[int, int] = {}
        self._stat, self._unlink, self._rename = Path.lstat, Path.unlink, Path.rename
        monkeypatch.setattr(sys, "platform", "freebsd15")
        for name, flag in (("UF_NOUNLINK", 0x10), ("SF_NOUNLINK", 0x100000)):
            monkeypatch.setattr(stat, name, flag, raising=False)
        monkeypatch.setattr(os, "chflags", self.change, raising=False)
        monkeypatch.setattr(Path, "lstat", lambda path: _Status(self.get(path)))
        monkeypatch.setattr(Path, "unlink", lambda path, **how: self._try_unlink(path, **how))
        monkeypatch.setattr(Path, "rename", lambda path, to: self._try_rename(path, to))

    def get(self, path: Path) -> int:
        return self._of.get(self._stat(path).st_ino, 0)

    def change(self, path: Path, flags: int, *, follow_symlinks: bool) -> None:
        assert not follow_symlinks
        if flags and flags not in self._has:
            raise OSError(45, "Operation not supported")
        self._of[self._stat(path).st_ino] = flags

    def _try_unlink(self, path: Path, **options: Any) -> None:
        if path.exists() and self.get(path):
            raise PermissionError(1, "Operation not permitted")
        self._unlink(path, **options)

    def _try_rename(self, path: Path, to: Path) -> None:
        if to.exists() and self.get(to):
            raise PermissionError(1, "Operation not permitted")
        self._rename(path, to)


class _Status:
    def __init__(self, flags: int) -> None:
        self.st_flags = flags


@pytest.fixture
def locks(tmp_path: Path) -> Locks:
    (tmp_path / "run.lock").write_text(f"{HOST}\n")
    return Locks("g", tmp_path, HOST)


def lock_of(locks: Locks) -> Path:
    return locks.directory / "run.lock"


UFS, ZFS = 0x10, 0x100000


@pytest.mark.parametrize(
    ("has", "is_secured", "kept"),
    [
        ((UFS, ZFS), True, UFS),
        ((UFS, ZFS), False, UFS),
        ((ZFS,), False, ZFS),
        ((ZFS,), True, 0),
        ((), False, 0),
    ],
)
def test_the_supervisor_cannot_remove_the_lock_of_a_guest_that_leaves(
    locks: Locks, monkeypatch: pytest.MonkeyPatch, has: tuple[int, ...], is_secured: bool, kept: int
) -> None:
    flags = Flags(monkeypatch, *has)
    locks.leaves(is_secured=is_secured)
    assert flags.get(lock_of(locks)) == kept
    assert locks.holder() == HELD
    if kept:
        with pytest.raises(PermissionError):
            lock_of(locks).unlink()


@pytest.mark.parametrize("flag", [UFS, ZFS])
def test_each_of_our_own_acts_lets_it_go(
    locks: Locks, monkeypatch: pytest.MonkeyPatch, flag: int
) -> None:
    flags = Flags(monkeypatch, flag)
    locks.leaves(is_secured=False)
    locks.take_back()
    assert (locks.holder(), flags.get(lock_of(locks))) == (HOST, 0)
    locks.leaves(is_secured=False)
    locks.before_kill()
    lock_of(locks).unlink()  # the supervisor
    locks.gone_to("hv2")
    assert locks.holder() == "hv2"


def test_the_lock_of_a_guest_that_has_ended_is_removed(
    locks: Locks, monkeypatch: pytest.MonkeyPatch
) -> None:
    Flags(monkeypatch, UFS)
    locks.leaves()
    locks.ended()
    assert locks.holder() is None


@pytest.mark.parametrize("text", [HOST, f"{HOST}\nbhysend", "hv2\nmoved by bhysend"])
def test_no_other_lock_is_removed(locks: Locks, text: str) -> None:
    lock_of(locks).write_text(f"{text}\n")
    locks.ended()
    assert lock_of(locks).read_text() == f"{text}\n"

"""The directory of a guest that is to be paused: its sink, and how a request is withdrawn."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.backend.bhyve.layout import clamped
from bhystream.backend.bhyve.snapshotdir import SnapshotDir
from standin.rig import Rig

from .bhyve_rig import require_sink, without_sink


@pytest.fixture
def host() -> Iterator[Rig]:
    with Rig() as made:
        yield made


@pytest.fixture
def directory(host: Rig) -> SnapshotDir:
    made = SnapshotDir(host.directory / "held" / "0123")
    made.make()
    return made


def begin(directory: SnapshotDir) -> None:
    """Open FILE.kern, which bhyve does first in a checkpoint."""
    fd = directory.open()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        os.close(os.open(directory.files.kern.name, flags, 0o700, dir_fd=fd))
    finally:
        os.close(fd)


def test_it_is_ours_alone(directory: SnapshotDir) -> None:
    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert directory.path.parent.stat().st_mode & 0o777 == 0o700


def test_a_request_that_was_taken_back_begins_nothing(directory: SnapshotDir) -> None:
    assert directory.withdraw() and directory.withdraw()
    with pytest.raises(IsADirectoryError):
        begin(directory)


def test_one_that_has_begun_is_not_taken_back(directory: SnapshotDir) -> None:
    begin(directory)
    assert not directory.withdraw() and not directory.withdraw()
    directory.drop_files()
    assert directory.withdraw()


def test_one_that_comes_when_the_directory_is_gone_begins_nothing(
    host: Rig, directory: SnapshotDir
) -> None:
    fd = directory.open()
    directory.remove(host.host)
    directory.remove(host.host)
    with pytest.raises(FileNotFoundError):
        os.open("ckp.kern", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
    os.close(fd)
    assert directory.withdraw()


def test_where_no_name_can_be_made_nothing_is_called_taken_back(
    tmp_path: Path, directory: SnapshotDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    assert not directory.withdraw()


def test_the_memory_file_is_the_null_device(host: Rig, directory: SnapshotDir) -> None:
    if require_sink():
        pytest.skip("in this process only root has the sink")
    assert directory.make_sink(host.host) == ""
    assert directory.has_sink()
    assert os.readlink(directory.files.memory) == "dev/null"
    directory.drop_files()
    assert directory.has_sink()
    directory.drop_sink(host.host)
    directory.drop_sink(host.host)
    assert list(directory.path.iterdir()) == []


def test_without_a_device_there_is_a_reason_and_nothing_is_left(
    host: Rig, directory: SnapshotDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_sink(monkeypatch)
    assert directory.make_sink(host.host) == "Operation not permitted"
    assert not directory.has_sink() and list(directory.path.iterdir()) == []


def test_what_is_mounted_elsewhere_is_no_sink(
    host: Rig, directory: SnapshotDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """make_sink() checks what mount_null() has made."""
    monkeypatch.setattr(type(host.host), "mount_null", lambda self, at: (at / "null").touch())
    assert directory.make_sink(host.host) == "the memory file is no null device"
    assert not directory.files.memory.exists()


@pytest.mark.parametrize(
    ("value", "size", "is_clamped"),
    [
        ("1", 2 << 30, True),
        ("1", (2 << 30) - 4096, False),
        ("0", 8 << 30, False),
        ("1", (3 << 30) + 4096, True),
    ],
)
def test_a_device_takes_int_max_bytes_at_once(
    host: Rig, value: str, size: int, is_clamped: bool
) -> None:
    host.settings(sysctl={"debug.devfs_iosize_max_clamp": value})
    assert bool(clamped(host.host, size)) == is_clamped


def test_a_mount_that_was_left_goes_with_the_directory(host: Rig, directory: SnapshotDir) -> None:
    if require_sink():
        pytest.skip("in this process only root has the sink")
    directory.make_sink(host.host)
    directory.files.memory.unlink()
    directory.remove(host.host)
    assert not directory.path.exists()
    assert (
        str(directory.path)
        not in subprocess.run(
            ["cat", "/proc/mounts"], capture_output=True, text=True, check=True
        ).stdout
    )


def test_files_that_a_late_request_makes_are_removed_with_the_directory(
    host: Rig, directory: SnapshotDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bhyve makes one after the other, each after the directory was emptied."""
    fd = directory.open()
    late = ["ckp.meta", "ckp.kern", "ckp"]
    real = shutil.rmtree

    def rmtree(path: Path, *, ignore_errors: bool) -> None:
        if not late:
            return real(path, ignore_errors=ignore_errors)
        # As rmtree() does if a file comes between its last unlink(2) and its rmdir(2).
        for entry in path.iterdir():
            entry.unlink() if entry.is_file() else entry.rmdir()
        os.close(os.open(late.pop(), os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=fd))
        return None

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    directory.remove(host.host)
    os.close(fd)
    assert not late and not directory.path.exists()

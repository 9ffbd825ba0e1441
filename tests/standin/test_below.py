"""What a process in capability mode may and may not open below a directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.standin.below import open_below
from support.descriptors import descriptors


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """Make d/ with files in it and files beside it; yield d's descriptor."""
    (tmp_path / "outside").write_text("outside")
    below = tmp_path / "d"
    (below / "sub").mkdir(parents=True)
    (below / "sub" / "file").write_text("inside")
    fd = os.open(below, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def read(directory: int, path: str) -> str:
    with open(open_below(directory, path, os.O_RDONLY, 0), encoding="ascii") as file:
        return file.read()


def link(directory: int, target: str, name: str = "link") -> None:
    os.symlink(target, name, dir_fd=directory)


@pytest.mark.parametrize("path", ["sub/file", "./sub//file", "sub/../sub/file"])
def test_what_stays_below_is_opened(directory: int, path: str) -> None:
    assert read(directory, path) == "inside"


@pytest.mark.parametrize("target", ["sub/file", "sub/../sub/file", "./sub/file"])
def test_a_relative_symlink_that_stays_below_is_followed(directory: int, target: str) -> None:
    link(directory, target)
    assert read(directory, "link") == "inside"


def test_a_symlink_to_a_directory_is_followed(directory: int) -> None:
    link(directory, "sub")
    assert read(directory, "link/file") == "inside"


def test_a_symlink_below_may_go_up_as_far_as_the_directory(directory: int) -> None:
    os.symlink("../sub/file", "sub/up", dir_fd=directory)
    assert read(directory, "sub/up") == "inside"


def test_a_file_is_made_where_a_symlink_points(directory: int) -> None:
    link(directory, "sub/new")
    os.close(open_below(directory, "link", os.O_WRONLY | os.O_CREAT, 0o700))
    assert "new" in os.listdir(os.open("sub", os.O_RDONLY, dir_fd=directory))


@pytest.mark.parametrize("path", ["../outside", "sub/../../outside", "/etc/passwd", ".."])
def test_a_path_that_leaves_is_refused(directory: int, path: str) -> None:
    with pytest.raises(PermissionError) as caught:
        read(directory, path)
    assert caught.value.errno == errno.EPERM


@pytest.mark.parametrize("target", ["../outside", "/dev/null", "sub/../../outside"])
def test_a_symlink_that_leaves_is_refused(directory: int, target: str) -> None:
    link(directory, target)
    with pytest.raises(PermissionError):
        read(directory, "link")


def test_a_circle_of_symlinks_is_refused(directory: int) -> None:
    link(directory, "link")
    with pytest.raises(OSError) as caught:
        read(directory, "link")
    assert caught.value.errno == errno.ELOOP


def test_no_descriptor_is_left_behind(directory: int) -> None:
    before = descriptors()
    with pytest.raises(PermissionError):
        read(directory, "sub/../../outside")
    assert read(directory, "sub/file") == "inside"
    assert descriptors() == before

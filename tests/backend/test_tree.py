"""A directory of ours is removed, and nothing that another user has put in its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bhystream.backend.tree import remove_tree

pytestmark = pytest.mark.usefixtures("in_time")


def test_a_directory_goes_with_all_in_it(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "a/b").mkdir(parents=True)
    (top / "a/file").touch()
    os.mkfifo(top / "a/fifo")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").touch()
    (top / "link").symlink_to(tmp_path / "outside")
    remove_tree(top)
    assert not top.exists()
    assert (tmp_path / "outside/file").exists()
    remove_tree(top)  # twice is no error


@pytest.mark.parametrize("kind", ["fifo", "link", "file"])
def test_what_is_no_directory_stays(tmp_path: Path, kind: str) -> None:
    top = tmp_path / "top"
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").touch()
    if kind == "fifo":
        os.mkfifo(top)
    elif kind == "link":
        top.symlink_to(tmp_path / "outside")
    else:
        top.touch()
    remove_tree(top)
    assert os.path.lexists(top)
    assert (tmp_path / "outside/file").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_directory_of_another_user_stays(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    (tmp_path / "top/file").touch()
    os.chown(tmp_path / "top", 65534, 65534)
    remove_tree(tmp_path / "top")
    assert (tmp_path / "top/file").exists()

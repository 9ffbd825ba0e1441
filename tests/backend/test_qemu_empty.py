"""The files of an empty QEMU."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bhystream.backend.qemu import empty

GONE = 2**22 + 1  # more than any pid


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    old = time.time() - empty._LEFT_S - 60
    for name in (
        f"bhyrecv-web1-{GONE}",
        f"bhyrecv-web1-{os.getpid()}",
        f"bhyrecv-web1-2-{GONE}",
        f"bhyrecv-web2-{GONE}",
        "bhyrecv-web1-",
        "bhyrecv-web1-x",
        f"other-{GONE}",
    ):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (old, old))
    (tmp_path / f"bhyrecv-web1-{GONE + 1}").touch()
    (tmp_path / f"bhyrecv-web1-{GONE + 2}").mkdir()
    return tmp_path


def test_only_an_old_memory_file_of_this_guest_whose_bhyrecv_is_gone_is_removed(
    directory: Path,
) -> None:
    before = set(os.listdir(directory))
    empty._remove_left(str(directory), "bhyrecv-web1-")
    assert before - set(os.listdir(directory)) == {f"bhyrecv-web1-{GONE}"}


def test_a_directory_that_cannot_be_listed_is_left_to_the_next_step(tmp_path: Path) -> None:
    empty._remove_left(str(tmp_path / "none"), "bhyrecv-web1-")

"""The source distribution is the repository."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from .contents import PACKAGES

pytestmark = PACKAGES

# What setuptools adds.
ADDED = {"PKG-INFO", "setup.cfg"}


def test_it_has_every_file_of_the_repository_and_no_other(
    sdist: Path, checkout: Path, paths: list[str]
) -> None:
    with tarfile.open(sdist) as archive:
        found = {each.name.partition("/")[2]: each for each in archive if each.isfile()}
        assert set(found) - ADDED == set(paths)
        assert set(found) >= ADDED
        for path in paths:
            file = archive.extractfile(found[path])
            assert file and file.read() == (checkout / path).read_bytes(), path
    programs = {path for path in paths if os.access(checkout / path, os.X_OK)}
    assert {path for path, each in found.items() if each.mode & 0o111} == programs

"""The wheel: built from the source distribution, and installed where nothing else is."""

from __future__ import annotations

import csv
import email
import os
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest

import bhystream

from .contents import PACKAGES, ROOT, contents

pytestmark = PACKAGES


@pytest.fixture
def metadata(installed: Path) -> Path:
    """The directory of the package's metadata."""
    [found] = installed.glob("lib/python*/site-packages/bhystream-*.dist-info")
    return found


def test_it_installs_what_the_repository_has_and_no_other_file(
    installed: Path, metadata: Path, paths: list[str]
) -> None:
    with (metadata / "RECORD").open(encoding="utf-8") as record:
        listed = {(metadata.parent / row[0]).resolve() for row in csv.reader(record)}
    assert [path for path in listed if not path.is_file()] == []
    expected = contents(paths, sysconfig.get_config_var("EXT_SUFFIX"))
    assert {path for path in listed if path.parent != metadata} == {
        *(metadata.parent / module for module in expected.modules),
        *(installed / "bin" / program for program in expected.programs),
        *(installed / "share/man" / page for page in expected.pages),
        metadata / "licenses/LICENSE",
    }


def test_the_man_pages_are_those_of_the_repository(installed: Path) -> None:
    for page in (ROOT / "man").iterdir():
        copy = installed / "share/man" / f"man{page.suffix[1:]}" / page.name
        assert copy.read_bytes() == page.read_bytes()


def test_it_says_what_it_is_and_what_it_needs(metadata: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = email.message_from_string((metadata / "METADATA").read_text())
    assert said["Version"] == bhystream.__version__
    assert said["License"] == "BSD-2-Clause"
    needed = [line for line in said.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert needed == project["dependencies"]


def run(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the virtual environment with only this in its environment."""
    return subprocess.run(
        [installed / "bin" / words[0], *words[1:]],
        env={"PATH": os.defpath, "BHYSEND_STATE_DIR": str(installed / "state")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_programs_run(installed: Path) -> None:
    done = run(installed, "bhyrecv", "-l")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run(installed, "bhysend")
    assert done.returncode == 64
    assert "usage: bhysend " in done.stderr


def test_a_guest_moves(installed: Path) -> None:
    done = run(installed, "python", "-P", "-m", "bhystream.demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed in " in done.stdout

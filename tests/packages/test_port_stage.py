"""What the FreeBSD port makes of the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import bhystream

from .contents import PACKAGES, contents
from .port import VERSION, make, needs_make

pytestmark = [*PACKAGES, needs_make]

SITE = f"lib/python{VERSION}/site-packages"


@pytest.fixture(scope="module")
def work(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of the port after "make stage"."""
    directory = tmp_path_factory.mktemp("work")
    make("stage", WRKDIR=directory, WHEEL=wheel, PYTHON_CMD=sys.executable)
    return directory


def staged(work: Path) -> list[str]:
    """Return the staged files, relative to the prefix."""
    found = [path for path in (work / "stage").rglob("*") if not path.is_dir()]
    return sorted(os.path.relpath(path, work / "stage/usr/local") for path in found)


def listed(work: Path) -> list[str]:
    """Return the lines of the package's list."""
    return (work / ".PLIST.mktmp").read_text().splitlines()


def test_the_list_names_every_staged_file_and_no_other(work: Path) -> None:
    assert sorted(line for line in listed(work) if not line.startswith("@")) == staged(work)


def test_it_installs_what_the_repository_has_and_no_other_file(
    work: Path, paths: list[str]
) -> None:
    expected = contents(paths, sysconfig.get_config_var("EXT_SUFFIX"))
    own = f"{SITE}/bhystream-{bhystream.__version__}.dist-info/"
    assert {x for x in staged(work) if not x.startswith(own) and not x.endswith(".pyc")} == {
        *(f"{SITE}/{module}" for module in expected.modules),
        *(f"sbin/{program}" for program in expected.programs),
        *(f"share/man/{page}.gz" for page in expected.pages),
    }


def test_it_has_a_state_directory_for_root_alone(work: Path) -> None:
    """A directory on the list has to be in the stage."""
    directories = [line for line in listed(work) if line.startswith("@dir")]
    assert directories == ["@dir(root,wheel,0700) /var/db/bhysend"]
    assert (work / "stage/var/db/bhysend").is_dir()


def test_the_loops_are_stripped(work: Path) -> None:
    loops = list((work / "stage/usr/local" / SITE / "bhystream/memory").glob("*.so"))
    assert loops
    for loop in loops:
        sections = subprocess.run(["readelf", "-SW", loop], capture_output=True, check=True)
        assert b" .symtab " not in sections.stdout

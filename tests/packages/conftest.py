"""The source distribution and the wheel, made once for all tests that need them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .contents import ROOT, tracked

# What tests/install.sh has downloaded, so that no test needs a network.
WHEELS = Path(sys.prefix, "wheels")


def python(*words: str | Path) -> None:
    """Run a module of this Python, with packages from WHEELS and nowhere else."""
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(WHEELS)}
    # An isolated build must not see the packages of this Python, nor this checkout.
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="session")
def paths() -> list[str]:
    """The path of every file in the repository."""
    return tracked()


@pytest.fixture(scope="session")
def checkout(paths: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, with what builds and runs leave in one."""
    directory = tmp_path_factory.mktemp("checkout")
    for path in paths:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, directory / path)
    for left in (
        "lib/bhystream/memory/page.cpython-39-x86_64-linux-gnu.so",
        "lib/bhystream/__pycache__/units.cpython-39.pyc",
        "lib/bhystream.egg-info/top_level.txt",
        "tests/__pycache__/test_units.cpython-39.pyc",
        "build/cython/lib/bhystream/memory/gone.c",
        "dist/bhystream-0.0.9.tar.gz",
        ".venv/pyvenv.cfg",
    ):
        (directory / left).parent.mkdir(parents=True, exist_ok=True)
        (directory / left).write_text("left\n")
    # The build of the Debian package runs as somebody else.
    subprocess.run(["chmod", "-R", "a+rX", directory], check=True)
    return directory


@pytest.fixture(scope="session")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from the copy."""
    directory = tmp_path_factory.mktemp("sdist")
    python("build", "--sdist", "--outdir", directory, checkout)
    [made] = directory.iterdir()
    return made


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution where only the build's requirements are."""
    directory = tmp_path_factory.mktemp("wheel")
    python("pip", "wheel", "--no-deps", "--wheel-dir", directory, sdist)
    [made] = directory.iterdir()
    return made


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that has the wheel and what the wheel requires."""
    directory = tmp_path_factory.mktemp("installed")
    python("venv", "--without-pip", directory)
    words = ("--python", str(directory / "bin/python"), "install", "--no-compile")
    python("pip", *words, wheel)
    return directory

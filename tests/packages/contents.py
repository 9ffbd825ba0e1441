"""What a package has to install, computed from the files of the repository."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The marks of a test that builds: compilers take minutes on a busy machine.
PACKAGES = [pytest.mark.packages, pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Contents:
    """The files that a package installs.

    modules: relative to the directory where Python looks.  programs: their names.
    pages: as man8/bhysend.8.
    """

    modules: frozenset[str]
    programs: frozenset[str]
    pages: frozenset[str]


def tracked() -> list[str]:
    """Return the path of every file in the repository; where there is none, skip the test.

    In CI the test fails then.
    """
    done = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if done.returncode:
        assert os.environ.get("CI") != "true", done.stderr
        pytest.skip(f"this is not a repository: {done.stderr.strip()}")
    return sorted(filter(None, done.stdout.split("\0")))


def contents(paths: Iterable[str], suffix: str) -> Contents:
    """Return what these files of the repository become.

    suffix: of an extension module, as .cpython-311-x86_64-linux-gnu.so.
    """
    modules, programs, pages = set[str](), set[str](), set[str]()
    for path in map(Path, paths):
        if path.parts[0] == "lib":
            module = path.relative_to("lib")
            if path.suffix == ".pyx":
                modules.add(str(module.with_suffix(suffix)))
            elif path.suffix != ".pxd":  # only a loop that is compiled needs it
                modules.add(str(module))
        elif path.parts[0] == "man":
            pages.add(f"man{path.suffix[1:]}/{path.name}")
        elif len(path.parts) == 1 and (ROOT / path).read_bytes().startswith(b"#!"):
            programs.add(path.name)
    return Contents(frozenset(modules), frozenset(programs), frozenset(pages))

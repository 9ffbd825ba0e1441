"""Plants one bug in a copy of the checkout, and runs there the tests that have to catch it.

A bug is caught if each of its tests fails, by what the test asserts: a module that cannot be
imported, a fixture that fails or a test that hangs shows nothing.  Without the bug the same
tests have to pass, and a test that is skipped catches nothing either.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from planted.bug import FOUND, PACKAGE, ROOT, Bug
from planted.outcomes import VARIABLE

_LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", ".*_cache", ".hypothesis"
)
# Compiled as setup.py does it, but quickly.
_CYTHONIZE = ("cythonize", "-q", "-i", "-3", "-X", "boundscheck=False", "-X", "wraparound=False")
_MODULES = ("batch", "page", "scatter", "splice")


class Outcome(NamedTuple):
    """How one test has ended.  kinds, text: of its exception, empty without one."""

    test: str
    when: str
    outcome: str
    kinds: list[str]
    text: str

    @property
    def shown(self) -> str:
        """Return what a message says of it."""
        return f"{self.outcome} in {self.when}: {''.join(self.kinds[:1])}: {self.text}"


class PlantingError(Exception):
    """The bug could not be planted, or its tests could not be run: nothing was shown."""


@contextmanager
def copied() -> Iterator[Path]:
    """Copy the checkout to a temporary directory."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        copy = Path(made, "copy")
        shutil.copytree(ROOT, copy, ignore=_LEFT_OUT)
        yield copy


def plant(bug: Bug, copy: Path) -> None:
    """Plant a bug in a copy, and build what has to be built.  Raises PlantingError."""
    path = copy / PACKAGE / bug.file
    try:
        path.write_text(bug.planted(path.read_text()))
    except ValueError as error:
        raise PlantingError(str(error)) from None
    if bug.is_compiled:
        names = _MODULES if path.suffix == ".pxd" else (path.stem,)
        sources = [f"{PACKAGE}/memory/{name}.pyx" for name in names]
        # The compiler is where the interpreter's own programs are.
        program = str(Path(sys.executable).parent / _CYTHONIZE[0])
        built = subprocess.run(
            [program, *_CYTHONIZE[1:], *sources],
            cwd=copy,
            env={**os.environ, "CFLAGS": "-O1 -w"},
            capture_output=True,
            text=True,
        )
        if built.returncode:
            raise PlantingError(f"{bug.name}: it does not compile:\n{built.stderr}")


def outcomes(copy: Path, tests: Iterable[str]) -> list[Outcome]:
    """Run tests of a copy; return how each has ended.  Raises PlantingError if none could run.

    tests: node ids below tests/.  Their cases that boot a guest of QEMU are left out.
    """
    lines = copy.parent / "outcomes"
    lines.unlink(missing_ok=True)
    paths = os.pathsep.join([str(copy / "lib"), str(copy / "tests")])
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not guest"]
    ran = subprocess.run(
        [*words, "-p", "planted.outcomes", *(f"tests/{test}" for test in tests)],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": paths, VARIABLE: str(lines)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if ran.returncode not in (0, 1) or not lines.exists():
        raise PlantingError(f"the tests did not run:\n{ran.stdout}{ran.stderr}")
    found = [Outcome(*json.loads(line)) for line in lines.read_text().splitlines()]
    return [one._replace(test=one.test.removeprefix("tests/")) for one in found]


def not_sound(found: Iterable[Outcome], tests: Iterable[str]) -> list[str]:
    """Return what is wrong with these tests without any bug: each has to run, and to pass."""
    wrong = [f"{one.test}: {one.shown}" for one in found if one.outcome != "passed"]
    return wrong + [f"{test}: it was not run" for test in tests if not _of(found, test)]


def missed(bug: Bug, found: Iterable[Outcome]) -> list[str]:
    """Return why a bug counts as not caught, a line for each of its tests that shows nothing."""
    lines = []
    for test in bug.tests:
        ends = [one for one in _of(found, test) if one.outcome != "passed"]
        if not ends:
            lines.append(f"{test}: it passes")
        for one in ends:
            is_right = not {*FOUND, *bug.also}.isdisjoint(one.kinds)
            is_right = is_right and not one.text.startswith("Timeout")
            if one.when != "call" or one.outcome != "failed" or not is_right:
                lines.append(f"{one.test}: {one.shown}")
    return lines


def _of(found: Iterable[Outcome], test: str) -> list[Outcome]:
    """Return the outcomes of a test, with all its parameters if the node id names none."""
    return [one for one in found if test in (one.test, one.test.partition("[")[0])]


def look(bug: Bug) -> list[str]:
    """Plant a bug in a copy of its own, and run its tests; return what missed() returns.

    Raises PlantingError.
    """
    with copied() as copy:
        plant(bug, copy)
        return missed(bug, outcomes(copy, bug.tests))

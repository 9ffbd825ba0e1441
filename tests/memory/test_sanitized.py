"""The loops under AddressSanitizer and UBSan: no byte beside a buffer, no undefined arithmetic.

The loops are compiled again, into a copy of the package in a temporary directory, and the tests of
this directory run with them in a process of their own.  Python's own allocator is off in that
process: it would put many objects into one allocation, where a byte too far stays unnoticed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import bhystream

HERE = Path(__file__).parent
LOOPS = ("batch", "page", "scatter", "splice")
TESTS = [HERE / f"test_{name}.py" for name in (*LOOPS, "hole", "place_spliced")]
# The same as in setup.py.
DIRECTIVES = ["-3", "-X", "boundscheck=False", "-X", "wraparound=False"]
GCC = ["gcc", "-shared", "-fPIC", "-g", "-O0", "-fsanitize=address,undefined"]
GCC += ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def libasan() -> str:
    found = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def build(directory: Path) -> None:
    """Make a sanitized copy of the package."""
    package = directory / "bhystream"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(bhystream.__file__).parent, package, ignore=ignored)
    include = sysconfig.get_path("include")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: _compile(package / f"memory/{name}.pyx", include), LOOPS))


def _compile(source: Path, include: str) -> None:
    c = source.with_suffix(".c")
    made = source.with_suffix(EXTENSION_SUFFIXES[0])
    for words in (
        [sys.executable, "-m", "cython", *DIRECTIVES, str(source), "-o", str(c)],
        [*GCC, f"-I{include}", str(c), "-o", str(made)],
    ):
        done = subprocess.run(
            words, cwd=source.parents[2], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def run(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a sanitized copy of the package."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(directory), str(HERE.parent)]),
        "LD_PRELOAD": libasan(),
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sanitized")
    build(directory)
    return directory


def test_the_loops_stay_within_their_buffers(sanitized: Path) -> None:
    for name in LOOPS:
        found = run(sanitized, "-c", f"import bhystream.memory.{name} as it; print(it.__file__)")
        assert found.stdout.startswith(str(sanitized)), found.stderr
    done = run(sanitized, "-m", "pytest", "-qs", "-p", "no:cacheprovider", *map(str, TESTS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout

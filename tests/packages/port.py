"""The FreeBSD port, run by a make(1) of the BSDs.

FreeBSD's ports are not here: ports/bsd.port.mk plays the part of them that comes after the wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .contents import ROOT

PORT = ROOT / ".packages/freebsd"
VERSION = "{}.{}".format(*sys.version_info)

needs_make = pytest.mark.skipif(shutil.which("bmake") is None, reason="bmake is not here")


def make(*words: str, **variables: str | Path) -> str:
    """Run make(1), which must succeed and complain of nothing; return what it prints."""
    done = subprocess.run(
        [
            *("bmake", "-r", "-m", ROOT / "tests/packages/ports", "-C", PORT),
            *(f"{name}={value}" for name, value in variables.items()),
            *(f"PYTHON_VER={VERSION}", *words),
        ],
        env={"PATH": os.defpath},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def value(name: str) -> str:
    """Return the value of a variable of the port, expanded."""
    return make("-V", f"${{{name}}}").strip()

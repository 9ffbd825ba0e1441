"""Every package says the same version."""

from __future__ import annotations

import re
import tomllib

import bhystream

from .contents import ROOT


def only(pattern: str, path: str) -> str:
    """Return what the one match of a pattern says, at the start of a line of a file."""
    [found] = re.findall(f"^{pattern}$", (ROOT / path).read_text(), re.MULTILINE)
    return str(found)


def test_the_packages_have_the_version_of_the_modules() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == bhystream.__version__
    debian = only(r"bhystream \((.+)-\d+\) .*", ".packages/debian/changelog")
    assert debian == bhystream.__version__
    assert only(r"DISTVERSION=\t(.+)", ".packages/freebsd/Makefile") == bhystream.__version__

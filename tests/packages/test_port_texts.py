"""The texts of the FreeBSD port."""

from __future__ import annotations

import re
import tomllib

import pytest

from .contents import ROOT
from .port import PORT, VERSION, needs_make, value

MESSAGE = (PORT / "pkg-message").read_text()


@needs_make
def test_it_requires_what_the_wheel_requires() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    # USE_PYTHON=cython requires Cython, in the version that the ports have.
    build = [each for each in project["build-system"]["requires"] if "cython" not in each]
    run = project["project"]["dependencies"]
    category = {"setuptools": "devel", "xxhash": "devel", "zstandard": "archivers"}
    tag = f"py{VERSION.replace('.', '')}"
    for name, requirements in (("BUILD_DEPENDS", build), ("RUN_DEPENDS", run)):
        said = set(value(name).split())
        for requirement in requirements:
            module = requirement.partition(">=")[0]
            assert f"{tag}-{requirement}:{category[module]}/py-{module}@{tag}" in said
    assert value("USES") == f"python:{project['project']['requires-python'][2:]}+"
    assert set(value("USE_PYTHON").split()) == {"autoplist", "cython", "noflavors", "pep517"}


def test_the_message_has_the_form_that_pkg_reads() -> None:
    """pkg(8) shows it at the first installation only.  Source: Porter's Handbook, 9.1.1."""
    form = r"\[\n\{ type: install\n  message: <<EOM\n.+\nEOM\n\}\n\]\n"
    assert re.fullmatch(form, MESSAGE, re.DOTALL)


def test_the_message_says_what_the_manual_says() -> None:
    """Each command, and both sysctls with their values."""
    manual = (ROOT / "man/bhysend-bhyve.7").read_text()
    commands = re.findall(r"^  (?:# |    |  )(\S.*)$", MESSAGE, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert command in manual
    sysctls = re.findall(r"^  ([a-z_.]+)=(\d) ", MESSAGE, re.MULTILINE)
    assert len(sysctls) == 2
    for name, number in sysctls:
        assert f".It Va {name} Ns = Ns {number}\n" in manual


@pytest.mark.parametrize("name", ["pkg-descr", "pkg-message"])
def test_the_lines_fit_a_terminal(name: str) -> None:
    assert [line for line in (PORT / name).read_text().splitlines() if len(line) > 79] == []

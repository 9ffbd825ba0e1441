"""The Debian package: built and installed on a private copy of this machine, and removed.

The build runs as a user who may change nothing else, and nothing here has a network.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import bhystream

from .contents import PACKAGES, ROOT, contents
from .private_machine import CHECKOUT, PrivateMachine, private_machine

pytestmark = [
    *PACKAGES,
    pytest.mark.skipif(shutil.which("dpkg-buildpackage") is None, reason="this is not Debian"),
]

BUILT = "/tmp/built"
PACKAGE = f"{BUILT}/bhystream_{bhystream.__version__}-1_amd64.deb"
DOCUMENTS = ("README.md.gz", "changelog.Debian.gz", "copyright")
MODULES = "/usr/lib/python3/dist-packages"

# What only an upload to Debian needs: an address, and the number of a bug.
NO_UPLOAD = "bogus-mail-host,bogus-mail-host-in-debian-changelog,initial-upload-closes-no-bugs"


@pytest.fixture(scope="module")
def machine(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateMachine]:
    """A machine on which the package is installed."""
    with private_machine(tmp_path_factory.mktemp("machine"), checkout) as made:
        script = f"{CHECKOUT}/.packages/build-debian"
        done = made.run("sh", script, BUILT, as_nobody=True)
        assert done.returncode == 0, done.stdout
        assert "passed in " in done.stdout  # the demonstration, on the modules that were built
        install(made)
        yield made


def install(machine: PrivateMachine) -> None:
    done = machine.run("dpkg", "--install", PACKAGE)
    assert done.returncode == 0, done.stdout


def printed(machine: PrivateMachine, *words: str) -> str:
    """Return what a command prints that must succeed."""
    done = machine.run(*words)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_it_installs_what_the_repository_has_and_no_other_file(
    machine: PrivateMachine, paths: list[str]
) -> None:
    ask = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
    expected = contents(paths, printed(machine, "/usr/bin/python3", "-c", ask).strip())
    script = 'dpkg -L bhystream | while read -r f; do [ -d "$f" ] || echo "$f"; done'
    listed = set(printed(machine, "sh", "-c", script).splitlines())
    own = f"{MODULES}/bhystream-{bhystream.__version__}.dist-info/"
    assert {path for path in listed if not path.startswith(own)} == {
        *(f"{MODULES}/{module}" for module in expected.modules),
        *(f"/usr/sbin/{program}" for program in expected.programs),
        *(f"/usr/share/man/{page}.gz" for page in expected.pages),
        *(f"/usr/share/doc/bhystream/{name}" for name in DOCUMENTS),
        "/usr/share/lintian/overrides/bhystream",
    }
    assert f"{own}METADATA" in listed


def test_the_man_pages_are_those_of_the_repository(machine: PrivateMachine) -> None:
    for page in (ROOT / "man").iterdir():
        path = f"/usr/share/man/man{page.suffix[1:]}/{page.name}.gz"
        assert printed(machine, "zcat", path) == page.read_text(), path


def test_it_requires_what_the_wheel_requires(machine: PrivateMachine) -> None:
    """dpkg has compared these versions with those that are installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    depends = printed(machine, "dpkg-query", "--show", "--showformat=${Depends}", "bhystream")
    said = {re.sub(r" \((\S+) ", r" (\1", each) for each in depends.split(", ")}
    for requirement in project["dependencies"]:
        name, _, version = requirement.partition(">=")
        assert f"python3-{name} (>={version})" in said
    assert "python3 (>=3.11~)" in said


def test_the_programs_run_with_debians_python(machine: PrivateMachine) -> None:
    assert printed(machine, "head", "-n1", "/usr/sbin/bhysend") == "#!/usr/bin/python3\n"
    assert printed(machine, "bhyrecv", "-l") == ""
    done = machine.run("bhysend")
    assert done.returncode == 64
    assert "usage: bhysend " in done.stdout


def test_a_guest_moves(machine: PrivateMachine) -> None:
    assert "passed in " in printed(machine, "/usr/bin/python3", "-m", "bhystream.demo")
    ask = "from bhystream.demo import program; print(*program('bhysend'), *program('bhyrecv'))"
    programs = printed(machine, "/usr/bin/python3", "-c", ask)
    assert programs == "/usr/sbin/bhysend /usr/sbin/bhyrecv\n"


@pytest.mark.parametrize("kind", ["dsc", "deb"])
def test_lintian_finds_no_fault(machine: PrivateMachine, kind: str) -> None:
    words = ("lintian", "--fail-on", "error,warning", "--suppress-tags", NO_UPLOAD)
    done = machine.run("sh", "-c", f"{' '.join(words)} {BUILT}/*.{kind}", as_nobody=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_goes_without_a_trace(machine: PrivateMachine) -> None:
    printed(machine, "bhyrecv", "-l")  # Python would keep what it compiles
    printed(machine, "dpkg", "--purge", "bhystream")
    try:
        for place in ("usr", "etc"):
            assert machine.changed(f"-path */changed/{place}/* -name *bhy* -not -type c") == []
    finally:
        install(machine)

"""The configuration that bhyrecv keeps of a guest that no manager knows."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from bhystream.backend.bhyve import ownconf, supervisors
from bhystream.backend.bhyve.config import parse
from bhystream.backend.process import Identity
from bhystream.errors import BhyError, IncompatibleError

WHO = Identity(4321, -5, "boot-1")
TEXT = "bootrom=/rom\ncpus=2\n"


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "g.conf"
    ownconf.write(path, TEXT, WHO)
    found = ownconf.read(path)
    assert found and found.process == WHO
    assert parse(found.config) == {"bootrom": "/rom", "cpus": "2"}
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_file_without_a_process_is_of_none(tmp_path: Path) -> None:
    ownconf.write(tmp_path / "g.conf", TEXT, None)
    found = ownconf.read(tmp_path / "g.conf")
    assert found == ownconf.OwnConf(TEXT, None)


@pytest.mark.parametrize("text", [None, ""])
def test_no_file_says_nothing(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "g.conf"
    if text is not None:
        path.write_text(text)
    assert ownconf.read(path) is None


def test_a_file_that_is_too_long_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "g.conf"
    path.write_text("x" * (ownconf.MAX_CONF_BYTES + 1))
    with pytest.raises(IncompatibleError, match="is longer than"):
        ownconf.read(path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    ownconf.write(tmp_path / "other", TEXT, WHO)
    (tmp_path / "g.conf").symlink_to("other")
    with pytest.raises(BhyError):
        ownconf.read(tmp_path / "g.conf")


def noticed(path: Path, keys: dict[str, str], name: str = "web1") -> list[str]:
    ownconf.write(path, TEXT, WHO)
    return ownconf.notices(path, name, keys, WHO)


@pytest.mark.parametrize("rom", ["bootrom", "lpc.bootrom"])
def test_the_line_that_starts_it_again_is_a_line_of_a_shell(tmp_path: Path, rom: str) -> None:
    path = tmp_path / "it's here" / "web1.conf"
    path.parent.mkdir()
    told, line = noticed(path, {rom: "/rom"})
    assert str(path) in told and "reboots" in told
    *before, script = shlex.split(line)
    assert before == ["daemon", "-f", "lockf", "-st", "0", f"{path}.lock", "sh", "-c"]
    words = shlex.split(script)
    assert words[words.index("bhyve") :][:4] == ["bhyve", "-k", str(path), "web1;"]


def run(script: str, programs: Path, **bodies: str) -> list[str]:
    """Run the script with other programs; return the calls of those, in order."""
    calls = programs / "calls"
    for name in ("pgrep", "pwait", "bhyvectl", "bhyve"):
        body = bodies.get(name, ":")
        path = programs / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{calls}\n{body}\n')
        path.chmod(0o755)
    env = {"PATH": f"{programs}:/usr/bin:/bin"}
    subprocess.run(["sh", "-c", script], env=env, check=False, timeout=60)
    return calls.read_text().splitlines()


RUNS = "echo 4321"
REBOOTED = "echo 4321: exited with status 0."
TWICE = "test -e $0.once || { touch $0.once; exit 0; }; exit 1"


@pytest.fixture
def script(tmp_path: Path) -> str:
    _, line = noticed(tmp_path / "web1.conf", {"bootrom": "/rom"})
    return shlex.split(line)[-1]


def test_it_is_started_again_until_it_is_powered_off(tmp_path: Path, script: str) -> None:
    calls = run(script, tmp_path, pgrep=RUNS, pwait=REBOOTED, bhyve=TWICE)
    start = ["bhyvectl --destroy --vm=web1", f"bhyve -k {tmp_path}/web1.conf web1"]
    assert calls == ["pgrep -fx bhyve: web1", "pwait -v 4321", *start, *start]


@pytest.mark.parametrize(
    "bodies",
    [
        {"pgrep": "exit 1"},
        {"pgrep": "echo 99"},
        {"pgrep": RUNS, "pwait": "echo 4321: exited with status 1."},
        {"pgrep": RUNS, "pwait": "echo 4321: killed by signal 9."},
        # No VM is left of a guest that was saved into files.
        {"pgrep": RUNS, "pwait": REBOOTED, "bhyvectl": "exit 1"},
    ],
)
def test_it_is_not_started_again(tmp_path: Path, script: str, bodies: dict[str, str]) -> None:
    calls = run(script, tmp_path, **bodies)
    assert not [call for call in calls if call.startswith("bhyve -k")]


def test_its_own_line_is_told_from_every_other(tmp_path: Path, script: str) -> None:
    command = f"sh -c {script}"
    assert ownconf.restarted_by(command) == str(tmp_path / "web1.conf")
    assert supervisors.reasons(command, None, True) == ([], [])
    for other in (
        f"{command}; reboot",
        command.replace("&& bhyve", "; bhyve"),
        command.replace("status 0", "status"),
        command.replace("pwait -v 4321", "pwait -v 4322"),
        command.replace("bhyve -k", "bhyve -r x -k"),
        "sh -c pwait",
        "",
    ):
        assert ownconf.restarted_by(other) is None
    assert supervisors.reasons(f"{command}; reboot", None, True)[1]


def test_a_guest_of_a_loader_gets_no_line_that_would_not_boot_it(tmp_path: Path) -> None:
    [told] = noticed(tmp_path / "g.conf", {"cpus": "1"}, "g")
    assert "its loader has to load it again first" in told


@pytest.mark.parametrize("left", [None, Identity(4321, -6, "boot-1")])
def test_a_file_that_was_not_written_is_not_named(tmp_path: Path, left: Identity | None) -> None:
    """A file of an earlier start may name other disks."""
    path = tmp_path / "web1.conf"
    if left:
        ownconf.write(path, TEXT, left)
    [told] = ownconf.notices(path, "web1", {"bootrom": "/rom"}, WHO)
    assert "its configuration was not kept here" in told

"""The configuration that bhyrecv keeps of a guest that no manager knows."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

import pytest

from bhystream.backend.bhyve import ownconf
from bhystream.backend.bhyve.config import parse
from bhystream.backend.process import Identity

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


@pytest.mark.parametrize("rom", ["bootrom", "lpc.bootrom"])
def test_the_line_that_starts_it_again_is_a_line_of_a_shell(rom: str) -> None:
    path = Path("/var/db/it's here/conf/web1.conf")
    told, line = ownconf.notices(path, "web1", {rom: "/rom"}, WHO)
    assert str(path) in told and "reboots" in told
    daemon, f, sh, c, script = shlex.split(line)
    assert (daemon, f, sh, c) == ("daemon", "-f", "sh", "-c")
    assert "pwait -v 4321 " in script
    words = shlex.split(script)
    assert words[words.index("bhyve") :][:4] == ["bhyve", "-k", str(path), "web1;"]
    assert "--vm=web1;" in words


def test_a_guest_of_a_loader_gets_no_line_that_would_not_boot_it() -> None:
    [told] = ownconf.notices(Path("/c/g.conf"), "g", {"cpus": "1"}, WHO)
    assert "its loader has to load it again first" in told

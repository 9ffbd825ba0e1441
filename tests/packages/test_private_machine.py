"""What is done on a private machine is not done to this one."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from .contents import PACKAGES, ROOT
from .private_machine import CHECKOUT, private_machine

pytestmark = PACKAGES


def test_changes_stay_in_the_copy(tmp_path: Path) -> None:
    name = f"proof-{uuid.uuid4().hex}"
    with private_machine(tmp_path, ROOT) as machine:
        assert machine.run("touch", f"/usr/{name}", f"/dev/shm/{name}").returncode == 0
        assert machine.run("test", "-e", f"/usr/{name}").returncode == 0
        assert [Path(path).name for path in machine.changed(f"-name {name}")] == [name]
        for path in ("/usr", "/dev/shm"):
            assert not Path(path, name).exists()


@pytest.mark.parametrize("as_nobody", [False, True])
def test_the_checkout_can_only_be_read(tmp_path: Path, checkout: Path, as_nobody: bool) -> None:
    with private_machine(tmp_path, checkout) as machine:
        assert machine.run("cat", f"{CHECKOUT}/setup.py", as_nobody=as_nobody).returncode == 0
        done = machine.run("touch", f"{CHECKOUT}/new", as_nobody=as_nobody)
        assert "Read-only file system" in done.stdout


def test_there_is_no_network(tmp_path: Path) -> None:
    with private_machine(tmp_path, ROOT) as machine:
        done = machine.run("cat", "/proc/thread-self/net/route")
        assert done.returncode == 0
        assert done.stdout.splitlines()[1:] == []  # the first line, if any, is the heading

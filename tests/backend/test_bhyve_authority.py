"""A bhyve guest at the destination: its disks below a directory, its files and its node ours alone.

The stand-in plays bhyve.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bhystream.backend.bhyve.resources import Resolved
from bhystream.backend.bhyve.snapshotdir import SnapshotDir
from bhystream.backend.files import is_ours_alone
from bhystream.errors import AccessError, BhyError
from bhystream.standin import node
from support.odd_files import fifo, listener

from .arriving import Arriving, arriving

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def guest() -> Iterator[Arriving]:
    with arriving() as made:
        yield made


def modes(*roots: Path) -> dict[str, str]:
    """Return the modes of all files and directories below some directories, but of links."""
    found = {}
    for root in roots:
        for path in (root, *root.rglob("*")):
            if not path.is_symlink():
                mode = path.stat().st_mode
                found[str(path)] = stat.filemode(mode)
    return found


# --below


def test_disks_below_the_directory_are_taken(guest: Arriving) -> None:
    assert guest.sink(below=[str(guest.there.directory)]).check(guest.head) == []


def test_a_disk_elsewhere_is_refused_whatever_leads_to_it(guest: Arriving) -> None:
    outside = guest.directory / "outside"
    outside.touch()
    for name, make in (
        ("soft", lambda path: path.symlink_to(outside)),
        ("hard", lambda path: os.link(outside, path)),
    ):
        make(guest.there.directory / name)
    for path, why in {
        str(outside): f"it does not lie below {guest.there.directory}",
        f"{guest.there.directory}/soft": "it is a link",
        f"{guest.there.directory}/hard": "it has another name too (a hard link)",
    }.items():
        guest.resources["disk0"] = path
        sink = guest.sink(below=[str(guest.there.directory)])
        assert f"disk0: {path}: {why}" in sink.check(guest.head)
        sink = guest.sink(below=[str(guest.there.directory)], force=True)
        assert f"disk0: {path}: {why}" in sink.check(guest.head)  # -f does not overrule it
        assert guest.sink().check(guest.head) == []


def test_a_disk_by_its_key_is_judged_too(guest: Arriving) -> None:
    outside = guest.directory / "outside"
    outside.touch()
    key = guest.head.config["resources"]["disk0"]
    del guest.resources["disk0"]
    guest.resources[key] = str(outside)
    [reason] = guest.sink(below=[str(guest.there.directory)]).check(guest.head)
    assert reason.startswith("disk0: ") and "does not lie below" in reason


def test_the_file_of_boot_variables_is_judged_too(guest: Arriving) -> None:
    section = {"resources": {"bootvars": "lpc.bootvars", "com1": "lpc.com1.path"}}
    resolved = Resolved(section, {"lpc.bootvars": "/etc/vars", "lpc.com1.path": "/dev/x"}, ())
    found = guest.sink(below=["/vm"])._wanted._place_reasons(resolved)
    assert found == ["bootvars: /etc/vars: it does not lie below /vm"]


# The staging directory.


def test_a_staging_directory_that_others_could_exchange_is_refused(guest: Arriving) -> None:
    root = guest.staging_root
    root.chmod(0o777)
    [reason] = guest.sink().check(guest.head)
    assert "another user could exchange" in reason and f"others may write to {root}" in reason
    root.chmod(0o1777)
    assert guest.sink().check(guest.head) == []


@needs_root
def test_a_staging_directory_of_another_user_is_refused(guest: Arriving) -> None:
    os.chown(guest.staging_root, NOBODY, NOBODY)
    [reason] = guest.sink().check(guest.head)
    assert f"belongs to the user {NOBODY}" in reason


def link(path: Path) -> None:
    (path.parents[1] / "victim").mkdir()
    path.symlink_to(path.parents[1] / "victim")


def dangling(path: Path) -> None:
    path.symlink_to(path.parents[1] / "victim")


def a_file(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize("trick", [link, dangling, a_file, fifo, listener])
def test_what_stands_in_the_place_of_the_staging_directory_is_not_used(
    guest: Arriving, trick: Callable[[Path], None]
) -> None:
    """Its name can be foreseen by a user who knows the stream's id."""
    sink = guest.sink()
    assert sink.check(guest.head) == []
    staging = Path(sink._checked.guest.staging)
    trick(staging)
    with pytest.raises(BhyError, match="cannot make the staging directory"):
        sink.open(guest.plan)
    sink.abort()
    assert os.path.lexists(staging)  # it is not ours, so it stays
    victim = guest.directory / "victim"
    assert not victim.exists() or list(victim.iterdir()) == []
    assert guest.processes() == []


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_all_that_holds_a_guest_is_ours_alone_whatever_the_umask_is(
    guest: Arriving, late: bool
) -> None:
    """Even if inherited.take() had not set the umask."""
    before = os.umask(0)
    try:
        sink = guest.sink()
        guest.build(sink, late=late)
        found = modes(guest.staging_root, guest.base / "log", guest.base / "loaded")
        nodes = [path.stat() for path in (guest.there.directory / "vmm").iterdir()]
        sink.abort()
    finally:
        os.umask(before)
    assert len(found) > 6
    bad = {path: mode for path, mode in found.items() if mode[4:] != "------"}
    assert bad == {} and {mode[3] for mode in found.values()} <= {"-", "x"}
    assert nodes and all(is_ours_alone(status) for status in nodes)


def test_a_guest_that_is_left_loaded_is_ours_alone_whatever_the_umask_is(guest: Arriving) -> None:
    before = os.umask(0)
    try:
        sink = guest.sink(unstarted=True)
        guest.build(sink, late=True)
        sink.leave_paused()
    finally:
        os.umask(before)
    found = modes(guest.base / "loaded")
    assert len(found) > 4
    assert {path: mode for path, mode in found.items() if mode[4:] != "------"} == {}


# The node.


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_node_that_others_may_open_gets_no_memory(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """As by a rule of devfs, for every VM that is made."""
    real = node.create

    def create(directory: Path, name: str) -> None:
        real(directory, name)
        node.node_path(directory, name).chmod(mode)

    monkeypatch.setattr(node, "create", create)
    sink = guest.sink()
    assert sink.check(guest.head) == []
    with pytest.raises(AccessError, match="other users may open the VM's node"):
        sink.open(guest.plan)
    sink.abort()
    assert list((guest.there.directory / "vmm").iterdir()) == []
    assert guest.left() == [] and guest.processes() == []


@needs_root
def test_a_node_of_another_user_gets_no_memory(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = node.create

    def create(directory: Path, name: str) -> None:
        real(directory, name)
        os.chown(node.node_path(directory, name), NOBODY, NOBODY)

    monkeypatch.setattr(node, "create", create)
    sink = guest.sink()
    assert sink.check(guest.head) == []
    with pytest.raises(AccessError, match="other users may open the VM's node"):
        sink.open(guest.plan)
    sink.abort()


# The directory of a paused guest, at the source.


def test_the_directory_of_the_fifo_is_ours_alone_and_new(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = SnapshotDir(tmp_path / "held/0123")
        made.make()
    finally:
        os.umask(before)
    assert modes(tmp_path / "held") == dict.fromkeys(
        [f"{tmp_path}/held", f"{tmp_path}/held/0123"], "drwx------"
    )
    with pytest.raises(BhyError, match="File exists"):
        made.make()
    (tmp_path / "victim").mkdir()
    (tmp_path / "held/4567").symlink_to(tmp_path / "victim")
    with pytest.raises(BhyError, match="File exists"):
        SnapshotDir(tmp_path / "held/4567").make()

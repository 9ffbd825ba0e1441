"""The state directory against links, other kinds of files, and directories of others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bhystream import durable
from bhystream.errors import BhyError, IncompatibleError, InputOutputError
from bhystream.guest import PAUSED
from bhystream.handover import state
from bhystream.handover.state import Lock, Record, Records, Told
from support.odd_files import fifo, listener

ID = "0123456789abcdef0123456789abcdef"
RECORD = Record(ID, "web1", "qemu:/run/web1.qmp", "lock", PAUSED, {})
NOBODY = 65534
pytestmark = pytest.mark.usefixtures("in_time")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a state directory in a directory that is ours alone; its victim is beside it."""
    tmp_path.chmod(0o755)
    monkeypatch.setenv("BHYSEND_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "victim").write_text("untouched")
    return state.directory()


# Whose the directory is.


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_one_that_others_may_enter_is_refused(base: Path, mode: int) -> None:
    base.chmod(mode)
    with pytest.raises(IncompatibleError, match="not ours alone"):
        state.directory()


@needs_root
def test_one_of_another_user_is_refused(base: Path) -> None:
    os.chown(base, NOBODY, NOBODY)
    with pytest.raises(IncompatibleError, match="not ours alone"):
        state.directory()


def test_one_that_another_user_could_exchange_is_refused(base: Path) -> None:
    base.parent.chmod(0o777)
    with pytest.raises(IncompatibleError, match=f"could exchange it: .* write to {base.parent}"):
        state.directory()
    base.parent.chmod(0o1777)
    assert state.directory() == base


@needs_root
def test_one_behind_a_link_of_another_user_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.parent.chmod(0o1777)
    (base.parent / "link").symlink_to(base)
    monkeypatch.setenv("BHYSEND_STATE_DIR", str(base.parent / "link"))
    assert state.directory() == base.parent / "link"  # our own link is ours to make
    os.lchown(base.parent / "link", NOBODY, NOBODY)
    # Linux with fs.protected_symlinks does not even follow such a link.
    with pytest.raises(BhyError, match=r"link belongs to the user|Permission denied"):
        state.directory()


@pytest.mark.parametrize("name", ["lock", "run", "source", "destination", "log", "told"])
def test_a_link_in_the_place_of_a_directory_in_it_is_refused(base: Path, name: str) -> None:
    (base / name).rmdir()
    (base.parent / "elsewhere").mkdir()
    (base / name).symlink_to(base.parent / "elsewhere")
    with pytest.raises(IncompatibleError, match=f"{name} is a link"):
        state.directory()


# What stands in the place of a file.


def link(path: Path) -> None:
    path.symlink_to(path.parents[2] / "victim")


def dangling(path: Path) -> None:
    path.symlink_to(path.parents[2] / "new")


def directory(path: Path) -> None:
    path.mkdir()


KINDS = [link, dangling, fifo, listener, directory]
Trick = Callable[[Path], None]


@pytest.fixture(params=KINDS)
def trick(request: pytest.FixtureRequest) -> Trick:
    made: Trick = request.param
    return made


@pytest.fixture(autouse=True)
def untouched(base: Path) -> Iterator[None]:
    """Assert that nothing outside the state directory was written, or made."""
    yield
    assert (base.parent / "victim").read_text() == "untouched"
    assert not (base.parent / "new").exists()


def test_a_lock_is_a_file(base: Path, trick: Trick) -> None:
    trick(base / "lock/web1")
    with pytest.raises(InputOutputError, match=r"cannot open .*lock/web1"):
        Lock(base, "web1", "guest web1")


def test_a_record_is_a_file(base: Path, trick: Trick) -> None:
    trick(base / f"destination/{ID}.json")
    records = Records(base, "destination")
    for look in (records.get, records.phase, records.find):
        with pytest.raises(BhyError):
            look(ID)
    assert records.all() == [] and len(records.broken()) == 1


def test_a_record_takes_the_place_of_a_link(base: Path) -> None:
    for trick in (link, dangling, fifo, listener):
        path = base / f"destination/{ID}.json"
        trick(path)
        Records(base, "destination").write(RECORD)
        assert Records(base, "destination").get(ID) == RECORD
        assert not path.is_symlink() and path.stat().st_mode & 0o7777 == 0o600
        path.unlink()


def test_the_streams_that_are_over_are_in_a_file(base: Path, trick: Trick) -> None:
    trick(base / "destination/over")
    with pytest.raises(BhyError):
        Records(base, "destination").phase(ID)


def test_the_name_beside_a_record_is_made_anew(base: Path) -> None:
    """The file that becomes the record has a name that can be foreseen."""
    for trick in (link, dangling, fifo, listener):
        path = base / f"source/{ID}.{os.getpid()}.new"
        trick(path)
        Records(base, "source").write(RECORD)
        assert Records(base, "source").get(ID) == RECORD
        assert not os.path.lexists(path)


def test_the_host_id_is_in_a_file(base: Path, trick: Trick) -> None:
    trick(base / "run/made")  # a link, which is relative to nothing, may be moved
    (base / "run/made").rename(base / "host-id")
    with pytest.raises(InputOutputError, match="host-id"):
        state.host_id(base)


def test_what_was_told_is_in_a_file(base: Path, trick: Trick) -> None:
    trick(base / "told/web1")
    assert Told(base, "web1").new(["a"]) == ["a"]


def test_a_new_file_takes_the_place_of_anything_but_a_directory(base: Path) -> None:
    path = base / "log/web1.log"
    for trick in (link, dangling, fifo, listener):
        trick(path)
        os.write(fd := durable.create(path), b"said")
        os.close(fd)
        assert not path.is_symlink() and path.read_bytes() == b"said"
        assert path.stat().st_mode & 0o7777 == 0o600
        path.unlink()
    directory(path)
    with pytest.raises(OSError):
        durable.create(path)


def test_a_new_file_loses_to_one_that_is_made_at_the_same_time(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process puts a link there after the old file was removed, and before the open."""
    path, real = base / "log/web1.log", os.open

    def open_(name: str | Path, flags: int, mode: int = 0o777) -> int:
        if Path(name) == path:
            link(path)
        return real(name, flags, mode)

    monkeypatch.setattr(os, "open", open_)
    with pytest.raises(FileExistsError):
        durable.create(path)

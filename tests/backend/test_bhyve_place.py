"""What is recorded of a guest, and where its snapshot is staged."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from bhystream.backend.bhyve import place as places
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.place import Place, staging_root
from bhystream.backend.process import Identity
from bhystream.errors import GuestError, PipeError, UsageError
from bhystream.standin.below import open_below
from bhystream.standin.kernel import StandinHost
from standin.rig import Rig

from .bhyve_rig import require_sink

CLAMP = "debug.devfs_iosize_max_clamp"
GIB = 1 << 30


class StubHost:
    """A host that clamps what a device takes at once, and has the null device elsewhere."""

    def __init__(self, clamp: str | None) -> None:
        self._clamp = clamp

    def sysctl(self, name: str) -> str | None:
        return self._clamp if name == CLAMP else None

    def mount_null(self, directory: Path) -> None:
        (directory / "null").symlink_to("/dev/null")

    def unmount_null(self, directory: Path) -> None:
        pass


def place(base: Path, memory_bytes: int = GIB) -> Place:
    return Place(
        kind="bhyve",
        vmm_dir="",
        name="web1",
        process=None,
        staging=str(base / "staging"),
        kept=str(base / "held/1"),
        keys={},
        memory_bytes=memory_bytes,
        bridges={},
        manager="",
    )


def why_no_sink(base: Path, memory_bytes: int, clamp: str | None) -> str:
    made = place(base, memory_bytes)
    made.make_staging()
    why = made.make_sink(cast(Host, StubHost(clamp)))
    assert made.has_sink() is not bool(why)
    return why


@pytest.mark.parametrize(
    ("memory_bytes", "longest"),
    [(2 * GIB, 2 * GIB), (4 * GIB, 3 * GIB), (6 * GIB, 3 * GIB), (8 * GIB, 5 * GIB)],
)
def test_a_device_is_no_sink_for_what_bhyve_writes_at_once(
    tmp_path: Path, memory_bytes: int, longest: int
) -> None:
    assert why_no_sink(tmp_path, memory_bytes, "1") == (
        f"{CLAMP}: it is 1 here, so no device takes the {longest} bytes that bhyve writes at"
        f" once; sysctl {CLAMP}=0 lets the null device take them"
    )
    assert os.listdir(tmp_path / "staging") == []


@pytest.mark.parametrize(
    ("memory_bytes", "clamp"),
    [(2 * GIB - 4096, "1"), (8 * GIB, "0"), (8 * GIB, "0\n"), (8 * GIB, None)],
)
def test_a_device_is_a_sink_for_what_it_takes(
    tmp_path: Path, memory_bytes: int, clamp: str | None
) -> None:
    assert why_no_sink(tmp_path, memory_bytes, clamp) == ""


def test_a_staging_directory_may_be_as_long_as_bhyve_takes(tmp_path: Path) -> None:
    base = tmp_path / ("d" * (250 - len(f"{tmp_path}//staging/ckp")))
    base.mkdir()
    place(base).make_staging()
    assert (base / "staging").is_dir()


def test_a_staging_directory_too_long_for_bhyve_is_refused_before_it_is_made(
    tmp_path: Path,
) -> None:
    base = tmp_path / ("d" * (251 - len(f"{tmp_path}//staging/ckp")))
    base.mkdir()
    with pytest.raises(UsageError, match="takes no path longer than 250 bytes"):
        place(base).make_staging()
    assert os.listdir(base) == []


def test_a_record_that_lacks_a_field_is_refused(tmp_path: Path) -> None:
    record = dict(place(tmp_path).to_json())
    assert Place.from_json(record) == place(tmp_path)
    del record["keys"]
    with pytest.raises(GuestError, match="cannot read the record"):
        Place.from_json(record)


# On the stand-in.


@pytest.fixture
def host() -> Iterator[Rig]:
    with Rig() as made:
        yield made


@pytest.fixture
def staged(host: Rig, tmp_path: Path) -> Iterator[Place]:
    """A staging directory with the sink."""
    if require_sink():
        pytest.skip("in this process only root has the sink")
    made = replace(place(tmp_path), kind="standin", vmm_dir=str(host.directory))
    made.make_staging()
    assert made.make_sink(host.host) == ""
    yield made
    made.drop_sink(host.host)


def test_a_record_has_all_of_a_place_and_its_process(tmp_path: Path) -> None:
    made = replace(place(tmp_path), process=Identity(1, 2, "b"), bridges={"tap0": None})
    record = json.loads(json.dumps(made.to_json()))
    assert Place.from_json(record) == made
    del record["is_copied"]  # of an earlier version
    assert Place.from_json(record) == made
    with pytest.raises(GuestError, match="cannot read the record"):
        Place.from_json({**record, "more": 1})


def test_the_sink_is_the_null_device_and_goes_without_a_trace(host: Rig, staged: Place) -> None:
    assert staged.has_sink()
    with staged.staged.memory.open("wb") as sink:
        assert sink.write(b"x" * 8192) == 8192
    for _ in range(2):
        staged.drop_sink(host.host)
        assert not staged.has_sink()
        assert os.listdir(staged.staging) == []
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_memory_file_that_is_no_device_is_not_believed(host: Rig, staged: Place) -> None:
    """It would be a snapshot without the guest's memory, taken for one that needs none."""
    target = Path(staged.staging, "dev", "null")
    host.host.unmount_null(target.parent)
    assert not staged.has_sink()
    target.write_bytes(b"")
    assert not staged.has_sink()
    subprocess.run(["mount", "--bind", "/dev/zero", target], check=True)
    assert not staged.has_sink()


@pytest.mark.parametrize("what", ["nothing", "file"])
def test_a_host_whose_null_is_no_device_has_no_sink(tmp_path: Path, what: str) -> None:
    class Odd(StubHost):
        def mount_null(self, directory: Path) -> None:
            if what == "file":
                (directory / "null").touch()

    made = place(tmp_path)
    made.make_staging()
    assert made.make_sink(cast(Host, Odd(None))) == "the memory file is no null device"
    assert os.listdir(made.staging) == []


def test_a_request_that_has_not_begun_is_withdrawn_for_good(host: Rig, staged: Place) -> None:
    """The directory's descriptor is with bhyve already."""
    fd = os.open(staged.staging, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(2):
            assert staged.withdraw(host.host)
        with pytest.raises(FileNotFoundError):
            open_below(fd, "ckp.kern", os.O_WRONLY | os.O_CREAT, 0o600)
    finally:
        os.close(fd)
    os.mkdir(staged.staging)  # another's, of the same name, is not the one that it holds


def test_a_request_that_has_begun_is_not_withdrawn(host: Rig, staged: Place) -> None:
    staged.staged.kern.touch()
    assert not staged.withdraw(host.host)
    assert staged.has_sink()
    staged.drop_files()
    assert staged.withdraw(host.host)


def test_a_request_that_begins_meanwhile_is_not_withdrawn(
    host: Rig, staged: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = StandinHost.unmount_null

    def unmount(self: StandinHost, directory: Path) -> None:
        real(self, directory)
        staged.staged.kern.touch()

    monkeypatch.setattr(StandinHost, "unmount_null", unmount)
    assert not staged.withdraw(host.host)
    assert os.path.isdir(staged.staging)


def test_everything_is_removed_and_twice_is_no_error(host: Rig, staged: Place) -> None:
    source = replace(staged, process=Identity(os.getpid(), 0, ""))
    os.makedirs(source.kept)
    (Path(source.kept) / "ckp").touch()
    lock = source.lock_started()
    assert source.is_started()
    for _ in range(2):
        source.remove(host.host)
        assert not os.path.exists(source.staging)
        assert os.listdir(Path(source.kept).parent) == []
        assert not source.is_started()
    os.close(lock)


def test_a_destination_remembers_what_it_has_started(host: Rig, staged: Place) -> None:
    os.makedirs(staged.kept)
    lock = staged.lock_started()
    staged.remove(host.host)
    assert staged.is_started()
    os.close(lock)
    assert not staged.is_started()


def test_what_was_started_lives_as_long_as_it_holds_its_lock(tmp_path: Path) -> None:
    made = place(tmp_path)
    Path(made.kept).parent.mkdir()
    assert not made.is_started()
    lock = made.lock_started()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[lock]) as heir:
        os.close(lock)
        assert made.is_started()
        with pytest.raises(GuestError, match="bhyve -r was started already"):
            made.lock_started()
        os.close(replace(made, name="copy").lock_started())  # of one kept stream
        assert heir.stdin is not None
        heir.stdin.close()
        heir.wait()
        assert not made.is_started()
    os.close(made.lock_started())


def test_a_start_that_made_its_socket_may_have_run(tmp_path: Path) -> None:
    made = place(tmp_path)
    Path(made.kept).parent.mkdir()
    assert not made.may_have_run(tmp_path)
    lock = made.lock_started()
    assert not made.may_have_run(tmp_path)
    (tmp_path / made.name).touch()
    assert made.may_have_run(tmp_path)
    made.forget_started()
    assert made.may_have_run(tmp_path)  # it lives
    os.close(lock)
    made.forget_started()
    assert not made.may_have_run(tmp_path)


def test_of_a_start_before_a_reboot_nobody_knows_whether_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = place(tmp_path)
    Path(made.kept).parent.mkdir()
    os.close(made.lock_started())
    monkeypatch.setattr(places, "boot_id", lambda: "another")
    assert made.may_have_run(tmp_path)


def test_a_lock_that_cannot_be_looked_at_is_not_taken_for_none(tmp_path: Path) -> None:
    made = place(tmp_path)
    with pytest.raises(PipeError, match="cannot make"):
        made.lock_started()
    Path(made.kept).parent.mkdir()
    made.started_path.symlink_to(made.started_path)
    with pytest.raises(PipeError, match="cannot look at"):
        made.is_started()


def test_staging_is_where_the_environment_says_else_in_memory(host: Rig, tmp_path: Path) -> None:
    root = staging_root(host.host, "source", tmp_path, {"BHYSEND_STAGING": "/a/b"})
    assert root == Path("/a/b")
    other = {"BHYRECV_STAGING": "/a/b"}
    assert staging_root(host.host, "destination", tmp_path, other) == Path("/a/b")
    assert staging_root(host.host, "source", tmp_path, other) != Path("/a/b")
    assert host.host.is_memory(staging_root(host.host, "source", tmp_path, {}))


def test_staging_without_memory_is_in_the_state_directory(
    host: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandinHost, "is_memory", lambda self, directory: False)
    for _ in range(2):
        root = staging_root(host.host, "source", tmp_path, {})
        assert root == tmp_path / "staging"
        assert root.stat().st_mode & 0o777 == 0o700
    root.rmdir()
    root.write_text("in the way")
    with pytest.raises(PipeError, match="cannot make"):
        staging_root(host.host, "source", tmp_path, {})

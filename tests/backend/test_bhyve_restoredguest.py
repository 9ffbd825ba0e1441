"""The record of a guest at the destination, and the guest that a killed bhyrecv left."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bhystream.backend.bhyve import restoredguest
from bhystream.backend.bhyve.restoredguest import (
    RestoredGuest,
    Started,
    find_leftover,
    last_directory,
    loaded_directory,
    note_directory,
    staging_of,
    staging_root,
    stream_of,
)
from bhystream.backend.process import Identity, boot_id, identify
from bhystream.errors import GuestError, InputOutputError
from bhystream.guest import DEAD
from bhystream.standin.kernel import StandinHost
from standin.rig import Rig

GIB = 1 << 30
ID = "0123456789abcdef" * 2
OTHER = "f" * 32


def restored(base: Path, name: str = "web1", id_: str = ID) -> RestoredGuest:
    return RestoredGuest(
        kind="bhyve",
        vmm_dir="",
        name=name,
        staging=str(staging_of(base / "staging", id_, name)),
        kept=str(loaded_directory(base, id_, name)),
        keys={"cpus": "2"},
        memory_bytes=GIB,
        manager="",
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("staging", "loaded", "destination", "lock"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ignores SIGTERM."""
    words = ["/bin/sh", "-c", "trap '' TERM; echo; read -r _"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as made:
        assert made.stdout is not None
        made.stdout.readline()
        yield made
        made.kill()


@pytest.fixture
def host() -> Iterator[Rig]:
    with Rig() as made:
        yield made


def started_of(child: subprocess.Popen[bytes], node: str = "") -> Started:
    return Started(identify(child.pid, "bhyve"), node)


def test_a_staging_directory_may_be_as_long_as_bhyve_takes(tmp_path: Path) -> None:
    made = replace(restored(tmp_path), staging=f"{tmp_path}/" + "d" * (245 - len(f"{tmp_path}/")))
    assert len(str(made.files.memory)) == 249
    longer = replace(made, staging=made.staging + "dd")
    [reason] = longer.staging_reasons()
    assert "takes no path longer than 250 bytes" in reason
    assert made.staging_reasons() == [] and os.listdir(tmp_path) == []
    made.make_staging()
    assert os.stat(made.staging).st_mode & 0o777 == 0o700


def test_a_record_has_all_of_a_guest_and_its_process(base: Path) -> None:
    made = restored(base)
    record = json.loads(json.dumps(made.to_json()))
    assert (record["hypervisor"], record["role"], record["process"]) == (
        "bhyve", "destination", None,
    )  # fmt: skip
    assert RestoredGuest.from_json(record) == made
    started = Started(Identity(1, 2, "b"), "7:8")
    record = json.loads(json.dumps(made.to_json(started)))
    assert RestoredGuest.from_json(record).started() == started


@pytest.mark.parametrize("key", ["keys", "role", "process", "hypervisor"])
def test_a_record_that_lacks_a_field_is_refused(base: Path, key: str) -> None:
    record = dict(restored(base).to_json())
    del record[key]
    with pytest.raises(GuestError, match="cannot read the record"):
        RestoredGuest.from_json(record)


def test_a_record_of_another_kind_is_refused(base: Path) -> None:
    record = dict(restored(base).to_json())
    process = {"pid": "1", "start_ticks": 2, "boot_id": "b"}
    for changed in (
        *({"role": "source"}, {"more": 1}, {"process": {"pid": 1}}, {"process": process}),
        *(
            {"process": 7},
            {"keys": ["a"]},
            {"keys": {"a": 1}},
            {"memory_bytes": "1"},
            {"name": None},
        ),
    ):
        with pytest.raises(GuestError, match="cannot read the record"):
            RestoredGuest.from_json({**record, **changed})


# The bhyve that was started.


def test_what_was_started_is_found_by_another_process(base: Path) -> None:
    made = restored(base)
    assert made.started() is None
    started = Started(Identity(1, 2, "b"), "7:8")
    made.write_started(started)
    assert made.started() == started
    assert replace(made, name="web2", kept=made.kept + "2").started() is None
    made.remove()
    assert made.started() == started
    made.forget_started()
    made.forget_started()
    assert made.started() is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"process": 1, "node": ""}', '{"node": ""}'])
def test_what_cannot_be_read_may_have_run(base: Path, text: str) -> None:
    restored(base).started_path.write_text(text)
    found = restored(base).started()
    assert found is not None and not found.is_known
    assert found.may_have_run(base, "web1") and not found.is_alive()


def test_one_that_cannot_be_read_is_not_ours_to_end(base: Path) -> None:
    made = restored(base)
    made.make_staging()
    made.started_path.touch()
    assert find_leftover(base, Path(made.staging), "web1") is None


def test_what_cannot_be_written_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputOutputError, match="cannot write"):
        restored(tmp_path).write_started(Started(Identity(1, 2, "b"), ""))


def test_one_that_made_its_socket_may_have_run(tmp_path: Path) -> None:
    here = Started(Identity(1, 2, boot_id()), "")
    assert not here.may_have_run(tmp_path, "web1")
    (tmp_path / "web1").touch()
    assert here.may_have_run(tmp_path, "web1")


def test_one_whose_socket_cannot_be_looked_for_may_have_run(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("run")
    assert Started(Identity(1, 2, boot_id()), "").may_have_run(tmp_path / "run", "web1")


def test_of_one_before_a_reboot_nobody_knows_whether_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Started(Identity(1, 2, boot_id()), "")
    monkeypatch.setattr(restoredguest, "boot_id", lambda: "another")
    assert here.may_have_run(tmp_path, "web1")


def test_a_bhyve_is_killed_with_its_vm_and_no_other(
    host: Rig, child: subprocess.Popen[bytes]
) -> None:
    host.host.create("web1")
    started = started_of(child, host.host.node_id("web1"))
    assert started.process is not None
    other = Started(started.process._replace(start_ticks=1), "another")
    other.end(host.host, "web1")
    assert child.poll() is None and host.host.exists("web1")
    started.end(host.host, "web1")
    assert child.wait() == -9
    assert not host.host.exists("web1")
    started.end(host.host, "web1")


def test_a_bhyve_that_does_not_end_is_said(
    host: Rig, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoredguest, "kill_process", lambda who, limit_s: False)
    with pytest.raises(GuestError, match=f"process {child.pid}, does not end"):
        started_of(child).end(host.host, "web1")


# What a killed bhyrecv left.


def test_what_is_left_is_ended_and_removed(
    host: Rig, base: Path, child: subprocess.Popen[bytes]
) -> None:
    made = restored(base)
    host.host.create("web1")
    made.make_staging()
    made.files.memory.touch()
    made.write_started(started_of(child, host.host.node_id("web1")))
    found = find_leftover(base, Path(made.staging), "web1")
    assert found is not None
    assert found.has_vm(host.host)
    found.remove(host.host)
    assert child.wait() == -9
    assert not host.host.exists("web1")
    assert os.listdir(base / "staging") == os.listdir(base / "loaded") == []
    assert find_leftover(base, Path(made.staging), "web1") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"phase": "ready", "revive": {}}'])
def test_one_of_which_a_record_speaks_is_not_ours_to_end(
    base: Path, child: subprocess.Popen[bytes], text: str
) -> None:
    """Such a guest may run, because the record is written before a guest may run."""
    made = restored(base)
    made.make_staging()
    made.write_started(started_of(child))
    (base / "destination" / f"{ID}.json").write_text(text)
    assert find_leftover(base, Path(made.staging), "web1") is None


def test_one_whose_record_says_that_it_never_ran_is_ours_to_end(base: Path) -> None:
    made = restored(base)
    made.make_staging()
    text = json.dumps({"phase": DEAD, "revive": {}})
    (base / "destination" / f"{ID}.json").write_text(text)
    assert find_leftover(base, Path(made.staging), "web1") is not None


def test_a_vm_leads_to_the_stream_whose_record_names_it(base: Path) -> None:
    started = Started(Identity(1, 2, "b"), "7:8")
    text = json.dumps({"phase": "started", "revive": dict(restored(base).to_json(started))})
    (base / "destination" / f"{ID}.json").write_text(text)
    (base / "destination" / f"{OTHER}.json").write_text("{")
    assert stream_of(base, "7:8") == ID
    assert stream_of(base, "7:9") == stream_of(base, "") == ""


def test_a_vm_whose_process_is_not_known_yet_is_ended(host: Rig, base: Path) -> None:
    made = restored(base)
    host.host.create("web1")
    made.write_started(Started(None, host.host.node_id("web1")))
    started = made.started()
    assert started is not None and not started.is_alive()
    assert not started.may_have_run(base, "web1")
    started.end(host.host, "web1")
    assert not host.host.exists("web1")


def test_a_guest_of_another_name_or_stream_is_not_ours_to_end(
    host: Rig, base: Path, child: subprocess.Popen[bytes]
) -> None:
    made = restored(base)
    made.make_staging()
    for other in (restored(base, "web2"), restored(base, "a.web1"), restored(base, id_=OTHER)):
        other.write_started(started_of(child))
    found = find_leftover(base, Path(made.staging), "web1")
    assert found is not None and found.started == {}
    found.remove(host.host)
    assert child.poll() is None
    assert len(os.listdir(base / "loaded")) == 3


@pytest.mark.parametrize(
    "name",
    ["", "web1", "bhyrecv-", "bhyrecv-.web1", f"bhyrecv-{ID[:8]}.web1", f"bhyrecv-{ID[:16]}.web2",
     f"bhyrecv-{ID[:15]}*.web1", f"bhyrecv-{ID[:16]}.web1.more", f"{ID}.web1"],
)  # fmt: skip
def test_a_directory_that_is_not_so_named_is_not_ours(base: Path, name: str) -> None:
    directory = base / "staging" / name if name else base / "staging"
    directory.mkdir(exist_ok=True)
    assert find_leftover(base, directory, "web1") is None


def test_files_of_a_guest_that_was_to_be_left_loaded_are_left_too(base: Path) -> None:
    kept = loaded_directory(base, ID, "web1")
    kept.mkdir()
    found = find_leftover(base, kept, "web1")
    assert found is not None and found.directory == kept


def test_a_lock_file_names_the_directory_that_was_made_last(base: Path) -> None:
    lock = base / "lock" / "to-web1"
    assert last_directory(lock) is None
    note_directory(lock, "/a/b")
    assert last_directory(lock) == Path("/a/b")
    for text in (b"", b"a", b"\xff/a"):
        lock.write_bytes(text)
        assert last_directory(lock) is None


def test_staging_is_where_the_environment_says_else_in_memory(host: Rig, tmp_path: Path) -> None:
    assert staging_root(host.host, tmp_path, {"BHYRECV_STAGING": "/a/b"}) == Path("/a/b")
    assert host.host.is_memory(staging_root(host.host, tmp_path, {"BHYSEND_STAGING": "/a/b"}))


def test_staging_without_memory_is_in_the_state_directory(
    host: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandinHost, "is_memory", lambda self, directory: False)
    for _ in range(2):
        root = staging_root(host.host, tmp_path, {})
        assert root == tmp_path / "staging"
        assert root.stat().st_mode & 0o777 == 0o700
    root.rmdir()
    root.write_text("in the way")
    with pytest.raises(InputOutputError, match="cannot make"):
        staging_root(host.host, tmp_path, {})

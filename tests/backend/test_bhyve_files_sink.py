"""Snapshot files that are being made: what is refused, and what is left after a failure."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bhystream import durable
from bhystream.backend.bhyve import snapshot
from bhystream.backend.bhyve.cold import FilesSink
from bhystream.errors import BhyError, FormatError, IncompatibleError, InternalError
from bhystream.guest import PAGE_BYTES, Head, Layout, Segment, State

from .snapshot_files import CONFIG, DEVICES, HOST, MEMORY, made, names, text_of


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """An empty directory of the destination."""
    (tmp_path / "there").mkdir()
    return tmp_path / "there"


def head(**changes: Any) -> Head:
    found = {
        "host": HOST,
        "layout": Layout((Segment("lowmem", 0, MEMORY // PAGE_BYTES),)),
        "config": CONFIG,
        "devices": DEVICES,
    }
    return Head(**{**found, **changes})


def states_of() -> list[State]:
    meta, kern = made()
    return snapshot.cut(text_of(meta), kern)


@pytest.mark.parametrize(
    ("head_", "message"),
    [
        (head(host={"hypervisor": "qemu"}), "hypervisor: the guest runs under 'qemu', not bhyve"),
        (head(host={}), "hypervisor: the guest runs under None"),
    ],
)
def test_a_guest_that_is_not_bhyves_is_refused(there: Path, head_: Head, message: str) -> None:
    assert FilesSink(there, "web1").check(head_)[0].startswith(message)


@pytest.mark.parametrize("kind", ["bhyve", "standin"])
def test_a_guest_of_bhyves_is_taken(there: Path, kind: str) -> None:
    assert FilesSink(there, "web1").check(head(host={"hypervisor": kind})) == []
    assert names(there) == []


@pytest.mark.parametrize("suffix", ["", ".kern", ".meta", ".fpu"])
def test_no_file_is_overwritten(there: Path, suffix: str) -> None:
    (there / f"web1{suffix}").symlink_to("nowhere")
    assert FilesSink(there, "web1").check(head()) == [f"-S: {there}/web1{suffix} exists"]


@pytest.mark.parametrize("suffix", ["", ".kern", ".meta", ".fpu"])
def test_no_file_is_overwritten_that_came_later(there: Path, suffix: str) -> None:
    sink = FilesSink(there, "web1")
    assert sink.check(head()) == []
    sink.open(b"")
    sink.load([*states_of(), State("fpu/0", b"x", is_optional=True)])
    (there / f"web1{suffix}").write_text("mine")
    with pytest.raises(IncompatibleError, match=f"web1{suffix} exists now"):
        sink.start()
    sink.abort()
    assert names(there) == [f"web1{suffix}"]
    assert (there / f"web1{suffix}").read_text() == "mine"


def test_a_directory_that_is_none_is_refused(there: Path) -> None:
    (there / "file").touch()
    for wrong in (there / "nowhere", there / "file"):
        reasons = FilesSink(wrong, "web1").check(head())
        assert reasons == [f"-S: {wrong} is not a directory that can be written to"]


def test_a_guest_that_has_no_room_is_refused_unless_forced(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(f_bavail=(MEMORY - 1) // 512, f_frsize=512)
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    assert FilesSink(there, "web1").check(head()) == [
        f"-S: {MEMORY} bytes do not fit {there}: {MEMORY - 512} are free"
    ]
    assert FilesSink(there, "web1", force=True).check(head()) == []


def test_until_it_is_complete_nothing_has_its_name(there: Path) -> None:
    sink = FilesSink(there, "web1")
    sink.check(head())
    places = sink.open(b"")
    assert os.fstat(places[0].fd).st_size == MEMORY
    assert os.fstat(places[0].fd).st_blocks == 0
    sink.load(states_of())
    (hidden,) = names(there)
    assert hidden.startswith(".web1.partial-")
    assert stat.S_IMODE((there / hidden).stat().st_mode) == 0o700
    sink.abort()
    sink.abort()
    assert names(there) == []


def test_the_meta_gets_its_name_when_the_others_are_on_the_disk(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    link, fsync = os.link, os.fsync

    def note_link(made: Path, path: Path) -> None:
        done.append(path.name)
        link(made, path)

    def note_fsync(fd: int) -> None:
        mode = os.fstat(fd).st_mode
        done.append("directory" if stat.S_ISDIR(mode) else "file")
        fsync(fd)

    sink = FilesSink(there, "web1")
    sink.check(head())
    sink.open(b"")
    monkeypatch.setattr(os, "link", note_link)
    monkeypatch.setattr(os, "fsync", note_fsync)
    sink.load(states_of())
    sink.leave_paused()
    assert done == [
        *["file"] * 3, "web1.kern", "web1", "directory", "web1.meta", "directory",
    ]  # fmt: skip


@pytest.mark.parametrize("step", ["open", "load", "start"])
def test_a_step_without_the_one_before_is_our_fault(there: Path, step: str) -> None:
    sink = FilesSink(there, "web1")
    calls: dict[str, Callable[[], object]] = {
        "open": lambda: sink.open(b""),
        "load": lambda: sink.load(states_of()),
        "start": sink.start,
    }
    with pytest.raises(InternalError):
        calls[step]()
    sink.check(head())
    sink.open(b"")
    with pytest.raises(InternalError):
        sink.start()
    sink.abort()


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (states_of()[1:], "state meta is missing"),
        (states_of()[:-1], "state dev/atkbdc is missing"),
        ([State("qemu", b"x")], "state meta is missing"),
    ],
    ids=["no-meta", "missing", "qemu"],
)
def test_states_that_are_no_snapshot_leave_no_file(
    there: Path, states: list[State], message: str
) -> None:
    sink = FilesSink(there, "web1")
    sink.check(head())
    sink.open(b"")
    with pytest.raises(FormatError, match=message):
        sink.load(states)
    sink.abort()
    assert names(there) == []


def test_a_disk_that_fails_leaves_no_file(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sink = FilesSink(there, "web1")
    sink.check(head())
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(BhyError, match=r"cannot make .*web1: No space left"):
            sink.open(b"")
    sink.abort()
    assert names(there) == []
    sink.open(b"")
    sink.load(states_of())
    monkeypatch.setattr(durable, "sync", fail)
    with pytest.raises(BhyError, match=r"cannot make .*web1: No space left"):
        sink.start()
    sink.abort()
    assert names(there) == []

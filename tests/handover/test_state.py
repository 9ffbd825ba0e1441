"""The state directory, its locks and its records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bhystream import durable
from bhystream.errors import (
    AccessError,
    GuestError,
    IncompatibleError,
    InputOutputError,
    RecordError,
)
from bhystream.guest import HELD, PAUSED
from bhystream.handover import state
from bhystream.handover.state import Lock, Record, Records
from support.descriptors import descriptors

ID = "0123456789abcdef0123456789abcdef"
RECORD = Record(ID, "web1", "qemu:/run/web1.qmp", "qemu-1-2", PAUSED, {"pid": 1, "x": [None]}, 5)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


# The directory.


def test_it_is_made_for_us_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BHYSEND_STATE_DIR", str(tmp_path / "a/b"))
    before = os.umask(0)
    try:
        made = state.directory()
    finally:
        os.umask(before)
    assert made == tmp_path / "a/b"
    assert sorted(path.name for path in made.iterdir()) == [
        "conf",
        "destination",
        "lock",
        "log",
        "run",
        "source",
        "told",
    ]
    assert {mode(path) for path in (made, *made.iterdir())} == {0o700}
    assert state.directory() == made  # a second call is no error


def test_a_relative_name_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The keeper and QEMU get the path, and run in other directories.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BHYSEND_STATE_DIR", "here")
    assert state.directory() == tmp_path / "here"


@pytest.mark.parametrize(
    ("uid", "environment", "expected"),
    [
        (0, {"BHYSEND_STATE_DIR": "{tmp}/named", "XDG_STATE_HOME": "{tmp}/xdg"}, "named"),
        (7, {"BHYSEND_STATE_DIR": "{tmp}/named", "XDG_STATE_HOME": "{tmp}/xdg"}, "named"),
        (7, {"XDG_STATE_HOME": "{tmp}/xdg"}, "xdg/bhysend"),
        (7, {"XDG_STATE_HOME": ""}, "home/.local/state/bhysend"),
        (7, {}, "home/.local/state/bhysend"),
        (7, {"BHYSEND_STATE_DIR": ""}, "home/.local/state/bhysend"),
    ],
)
def test_where_the_directory_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uid: int,
    environment: dict[str, str],
    expected: str,
) -> None:
    for name in ("BHYSEND_STATE_DIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    made: list[Path] = []
    monkeypatch.setattr(durable, "make_directory", made.append)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    with pytest.raises(InputOutputError, match="cannot use the state directory"):
        state.directory()  # it was not really made
    assert made == [tmp_path / expected]


@pytest.mark.parametrize(
    ("system", "expected"), [("Linux", "/var/lib/bhysend"), ("FreeBSD", "/var/db/bhysend")]
)
def test_root_has_its_directory_where_the_system_keeps_such(
    monkeypatch: pytest.MonkeyPatch, system: str, expected: str
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(sysname=system))
    monkeypatch.delenv("BHYSEND_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/elsewhere")
    made: list[Path] = []

    def refuse(path: Path) -> None:
        made.append(path)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(durable, "make_directory", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(AccessError, match=f"state directory {expected}: Permission denied"):
        state.directory()
    assert made == [Path(expected)]


@pytest.mark.parametrize("bits", [0o755, 0o770, 0o701, 0o710, 0o704])
def test_a_loose_directory_is_refused_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    monkeypatch.setenv("BHYSEND_STATE_DIR", str(tmp_path / "loose"))
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose").chmod(bits)
    with pytest.raises(IncompatibleError, match=r"loose: not ours alone \(mode 0700\)"):
        state.directory()
    assert list((tmp_path / "loose").iterdir()) == []


def test_a_foreign_directory_is_refused_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign").mkdir(mode=0o700)
    monkeypatch.setenv("BHYSEND_STATE_DIR", str(tmp_path / "foreign"))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(IncompatibleError, match="foreign: not ours alone"):
        state.directory()
    assert list((tmp_path / "foreign").iterdir()) == []


def test_a_file_in_its_place_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BHYSEND_STATE_DIR", str(tmp_path / "file"))
    with pytest.raises(
        InputOutputError, match=r"cannot use the state directory .*/file: File exists"
    ):
        state.directory()


# Locks.

TRY = """
import sys
from pathlib import Path
from bhystream.errors import GuestError
from bhystream.handover.state import Lock
try:
    lock = Lock(Path(sys.argv[1]), sys.argv[2], "guest web1")
except GuestError as error:
    sys.exit(str(error))
"""


def try_elsewhere(base: Path, name: str) -> str:
    """Take a lock in another process, for a moment; return its error, "" if it got the lock."""
    argv = [sys.executable, "-c", TRY, str(base), name]
    return subprocess.run(argv, stderr=subprocess.PIPE, text=True, timeout=60).stderr.strip()


TAKEN = "guest web1: another bhysend or bhyrecv works on it"


def test_a_lock_is_exclusive_across_processes(base: Path) -> None:
    lock = Lock(base, "a", "guest web1")
    assert try_elsewhere(base, "a") == TAKEN
    assert try_elsewhere(base, "b") == ""
    lock.release()
    assert try_elsewhere(base, "a") == ""


def test_a_lock_is_exclusive_within_a_process(base: Path) -> None:
    lock = Lock(base, "a", "guest web1")
    with pytest.raises(GuestError, match=TAKEN):
        Lock(base, "a", "guest web1")
    lock.release()
    Lock(base, "a", "guest web1").release()


def test_a_refused_lock_leaves_no_descriptor(base: Path) -> None:
    lock = Lock(base, "a", "guest web1")
    before = descriptors()
    with pytest.raises(GuestError):
        Lock(base, "a", "guest web1")
    assert descriptors() == before
    lock.release()


def test_a_released_lock_may_be_released_again(base: Path) -> None:
    lock = Lock(base, "a", "guest web1")
    number = lock.fd
    lock.release()
    other = os.open(os.devnull, os.O_RDONLY)  # takes the number
    assert other == number
    lock.release()
    os.close(other)


def test_a_child_that_inherits_a_lock_holds_it(base: Path) -> None:
    lock = Lock(base, "a", "guest web1")
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=(lock.fd,)) as child:
        lock.release()
        assert try_elsewhere(base, "a") == TAKEN
        assert child.stdin
        child.stdin.close()
        assert child.wait(timeout=60) == 0
    assert try_elsewhere(base, "a") == ""


def test_another_child_does_not_inherit_it(base: Path) -> None:
    lock = Lock(base, "a", "guest web1")
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False):
        lock.release()
        assert try_elsewhere(base, "a") == ""


@pytest.mark.parametrize("name", ["qemu:/run/a b.qmp", "../../escape", "a/b", "\u00fc"])
def test_the_name_of_a_lock_stays_in_its_directory(base: Path, name: str) -> None:
    lock = Lock(base, name, "guest web1")
    assert os.path.dirname(os.readlink(f"/proc/self/fd/{lock.fd}")) == str(base / "lock")
    assert try_elsewhere(base, name) == TAKEN
    lock.release()


def test_the_file_of_a_lock_is_ours_alone_and_stays(base: Path) -> None:
    Lock(base, "a", "guest web1").release()
    assert mode(base / "lock/a") == 0o600


# Records.


def test_a_record_comes_back_as_it_was(records: Records) -> None:
    records.write(RECORD)
    assert records.get(ID) == RECORD
    assert records.all() == [RECORD]


def test_the_record_of_another_role_is_another(base: Path, records: Records) -> None:
    records.write(RECORD)
    other = Records(base, "destination")
    assert other.get(ID) is None
    assert other.all() == []
    other.remove(ID)
    assert records.get(ID) == RECORD


def test_a_record_is_replaced_and_removed(records: Records) -> None:
    records.write(RECORD)
    held = RECORD.with_phase(HELD)
    assert held._replace(phase=PAUSED, time_ns=5) == RECORD
    assert held.time_ns > 5
    records.write(held)
    assert records.all() == [held]
    records.remove(ID)
    assert records.get(ID) is None
    assert records.all() == []
    records.remove(ID)  # a second call is no error


def test_records_are_found_by_id_name_and_operand(records: Records) -> None:
    other = RECORD._replace(id="f" * 32, operand="qemu:/b", time_ns=3)
    third = RECORD._replace(id="e" * 32, guest="web2", operand="qemu:/c", time_ns=4)
    for record in (RECORD, other, third):
        records.write(record)
    assert records.all() == [other, third, RECORD]  # oldest first
    assert records.find(ID) == [RECORD]
    assert records.find("web1") == [other, RECORD]
    assert records.find("qemu:/c") == [third]
    for operand in ("web", "", ID[:8], "qemu-1-2", PAUSED):
        assert records.find(operand) == []


def test_a_record_is_ours_alone(base: Path, records: Records) -> None:
    before = os.umask(0)
    try:
        records.write(RECORD)
    finally:
        os.umask(before)
    assert mode(base / f"source/{ID}.json") == 0o600


class Disk:
    """Looks at the directory each time that a file or directory is synced."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = base / "source"
        self.seen: list[tuple[str, dict[str, str]]] = []
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._look)

    def _look(self, fd: int) -> None:
        name = os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), self.directory)
        files = {path.name: path.read_text() for path in self.directory.iterdir()}
        self.seen.append((name, files))
        self._fsync(fd)


def test_a_record_is_synced_then_renamed_then_its_directory_synced(
    base: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.write(RECORD)
    old = (base / "source" / f"{ID}.json").read_text()
    held = RECORD.with_phase(HELD)
    new = old.replace(json.dumps(PAUSED), json.dumps(HELD)).replace(
        f'"time_ns": {RECORD.time_ns}', f'"time_ns": {held.time_ns}'
    )
    disk = Disk(base, monkeypatch)
    records.write(held)
    assert disk.seen == [
        (f"{ID}.{os.getpid()}.new", {f"{ID}.json": old, f"{ID}.{os.getpid()}.new": new}),
        (".", {f"{ID}.json": new}),
    ]


def test_a_removal_is_synced(base: Path, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    records.write(RECORD)
    disk = Disk(base, monkeypatch)
    records.remove(ID)
    assert disk.seen == [(".", {})]


def test_a_record_that_cannot_be_synced_is_not_in_place(
    base: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.write(RECORD)

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        InputOutputError, match=rf"cannot record the guest in .*{ID}\.json: Input/output"
    ):
        records.write(RECORD.with_phase(HELD))
    assert records.get(ID) == RECORD
    assert [path.name for path in (base / "source").iterdir()] == [f"{ID}.json"]


def test_what_a_crash_left_behind_is_no_record(base: Path, records: Records) -> None:
    (base / f"source/{ID}.new").write_text('{"id": "' + "x" * 1000)
    assert records.all() == []
    assert records.get(ID) is None
    records.write(RECORD)
    assert records.all() == [RECORD]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        '{"id": "x"}',
        json.dumps({**RECORD._asdict(), "more": 1}),
        json.dumps({**RECORD._asdict(), "phase": "gone"}),
        json.dumps({**RECORD._asdict(), "lock": 1}),
        json.dumps({**RECORD._asdict(), "time_ns": "1"}),
        json.dumps({**RECORD._asdict(), "time_ns": 1 << 63}),
        json.dumps({**RECORD._asdict(), "time_ns": -1}),
        json.dumps({**RECORD._asdict(), "keeper": True}),
        json.dumps({**RECORD._asdict(), "keeper": -1}),
        json.dumps({**RECORD._asdict(), "revive": []}),
        json.dumps({**RECORD._asdict(), "ask": ["ssh", 1]}),
        json.dumps({**RECORD._asdict(), "host": None}),
        "[" * 100_000,
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
)
def test_a_broken_record_is_named(base: Path, records: Records, text: str | bytes) -> None:
    path = base / f"source/{ID}.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for ask in (lambda: records.get(ID), lambda: records.find("web1")):
        with pytest.raises(RecordError) as caught:
            ask()
        assert str(caught.value).startswith(f"the record {path} is broken: ")
        assert caught.value.hint.endswith(f"anywhere: rm {path}")


def test_a_record_has_the_id_of_its_file(base: Path, records: Records) -> None:
    """A record is written, and removed, under its id."""
    records.write(RECORD)
    (base / f"source/{ID}.json").rename(base / f"source/{'f' * 32}.json")
    with pytest.raises(RecordError, match=f"its id is '{ID}'"):
        records.get("f" * 32)


def test_a_broken_record_hides_no_other(base: Path, records: Records) -> None:
    records.write(RECORD)
    path = base / "source/0.json"
    path.write_text("{")
    assert records.all() == records.find("web1") == [RECORD]
    assert [str(error) for error in records.broken()] == [
        f"the record {path} is broken: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1); its guest may have run"
    ]
    with pytest.raises(GuestError, match="is broken"):
        records.find("another")


def test_a_record_that_cannot_be_read_is_named(base: Path, records: Records) -> None:
    path = base / f"source/{ID}.json"
    path.mkdir()
    with pytest.raises(InputOutputError, match=f"cannot read {path}: Is a directory"):
        records.get(ID)


def test_a_record_that_vanishes_meanwhile_is_none(
    base: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.write(RECORD)
    glob = list((base / "source").glob("*.json"))
    monkeypatch.setattr(Path, "glob", lambda *_: glob)
    records.remove(ID)
    assert records.all() == []


# The warnings that were printed.


def test_a_warning_is_told_once_for_a_guest(base: Path) -> None:
    told = state.Told(base, "qemu:/web1")
    assert told.new(["a", "b"]) == ["a", "b"]
    again = state.Told(base, "qemu:/web1")
    assert again.new(["a", "b"]) == []
    assert again.new(["a", "c"]) == ["c"]
    assert again.new(["b"]) == ["b"]  # the call before did not have it any more
    assert again.new(["b"], everything=True) == ["b"]
    assert state.Told(base, "qemu:/web2").new(["a"]) == ["a"]


def test_what_cannot_be_remembered_is_told_again(base: Path) -> None:
    (base / "told/web1").mkdir()
    for _ in range(2):
        assert state.Told(base, "web1").new(["a"]) == ["a"]


def test_only_a_throttled_guest_s_record_has_what_an_older_program_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BHYSEND_STATE_DIR", str(tmp_path / "state"))
    records = Records(state.directory(), "source")
    for throttled in (True, False):
        written = RECORD._replace(throttled=throttled)
        records.write(written)
        assert records.all() == [written]
        [path] = (tmp_path / "state/source").iterdir()
        assert ("throttled" in json.loads(path.read_bytes())) == throttled

"""What processes share: a record that several want to change, the host's name, whole files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from bhystream import durable
from bhystream.errors import GuestError, InputOutputError
from bhystream.guest import DEAD, HELD, LOADED, PAUSED, READY, STARTED
from bhystream.handover import state
from bhystream.handover.state import Lock, Record, Records
from bhystream.report import host_name

ID = "0123456789abcdef" * 2
RECORD = Record(ID, "web1", "qemu:/web1", "lock-1", PAUSED, {"pid": 1}, 5)


# Changes at the same time, of which one wins.


def test_a_phase_is_changed_from_the_one_that_is_named(records: Records) -> None:
    records.write(RECORD._replace(phase=READY))
    assert records.change(ID, READY, DEAD)
    found = records.get(ID)
    assert found is not None and found._replace(time_ns=5, phase=PAUSED) == RECORD
    assert found.phase == DEAD
    assert found.time_ns > 5


@pytest.mark.parametrize("phase", [STARTED, DEAD, PAUSED, LOADED])
def test_another_phase_is_left(records: Records, phase: str) -> None:
    record = RECORD._replace(phase=phase)
    records.write(record)
    assert not records.change(ID, READY, STARTED)
    assert records.all() == [record]


def test_what_is_not_recorded_is_not_changed(records: Records) -> None:
    assert not records.change(ID, READY, STARTED)
    assert records.all() == []


def test_the_records_are_locked_from_the_look_to_the_change(
    base: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.write(RECORD.with_phase(READY))
    tried: list[str] = []

    def note(what: str) -> None:
        with pytest.raises(GuestError):
            Lock(base, "record-source", "the records")
        tried.append(what)

    get, write = Records.get, Records.write

    def get_noted(self: Records, id_: str) -> Record | None:
        note("get")
        return get(self, id_)

    def write_noted(self: Records, record: Record) -> None:
        note("write")
        write(self, record)
        note("written")

    monkeypatch.setattr(Records, "get", get_noted)
    monkeypatch.setattr(Records, "write", write_noted)
    assert records.change(ID, READY, DEAD)
    assert tried == ["get", "write", "written"]
    Lock(base, "record-source", "the records").release()


def test_a_change_that_fails_gives_up_the_lock(base: Path, records: Records) -> None:
    (base / f"source/{ID}.json").write_text("{")
    with pytest.raises(GuestError, match="is broken"):
        records.change(ID, READY, DEAD)
    Lock(base, "record-source", "the records").release()


def test_the_roles_do_not_wait_for_each_other(base: Path, records: Records) -> None:
    records.write(RECORD.with_phase(READY))
    with Lock(base, "record-destination", "the records"):
        assert records.change(ID, READY, DEAD)


def test_a_lock_may_be_waited_for(base: Path) -> None:
    lock = Lock(base, "a", "guest web1")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: Lock(base, "a", "guest web1", wait=True))
        lock.release()
        waiting.result(60).release()


def race(tries: list[Callable[[], bool]]) -> list[bool]:
    """Let all processes try at the same time; return the result of each."""
    barrier = threading.Barrier(len(tries))

    def run(attempt: Callable[[], bool]) -> bool:
        barrier.wait(60)
        return attempt()

    with ThreadPoolExecutor(len(tries)) as pool:
        return list(pool.map(run, tries))


def test_of_many_threads_one_changes_it(records: Records) -> None:
    phases = [STARTED, DEAD, LOADED, HELD] * 4
    for _ in range(20):
        records.write(RECORD.with_phase(READY))
        won = race([partial(records.change, ID, READY, phase) for phase in phases])
        found = records.get(ID)
        assert found is not None
        assert [phase for phase, one in zip(phases, won, strict=True) if one] == [found.phase]


CHANGE = """
import sys
from bhystream.handover import state
from bhystream.handover.state import Records

base = state.directory()
print("ready", flush=True)
sys.stdin.readline()
for id_ in sys.argv[2:]:
    print(int(Records(base, "source").change(id_, "ready", sys.argv[1])), state.host_id(base))
"""


def test_of_many_processes_one_changes_it_and_all_have_one_name(
    base: Path, records: Records
) -> None:
    ids = [f"{at:032x}" for at in range(50)]
    for id_ in ids:
        records.write(RECORD._replace(id=id_, phase=READY))
    phases = [STARTED, DEAD, LOADED, HELD]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHANGE, phase, *ids],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for phase in phases
    ]
    for child in children:
        assert child.stdout and child.stdout.readline() == "ready\n"
    found = [child.communicate("go\n", timeout=60)[0].splitlines() for child in children]
    for at, id_ in enumerate(ids):
        won = [phase for phase, lines in zip(phases, found, strict=True) if lines[at][0] == "1"]
        record = records.get(id_)
        assert record is not None and won == [record.phase]
    assert {line[2:] for lines in found for line in lines} == {state.host_id(base)}


# The host's name.


def test_a_host_id_is_made_once(base: Path) -> None:
    first = state.host_id(base)
    assert re.fullmatch(re.escape(host_name()) + "/[0-9a-f]{16}", first)
    assert state.host_id(base) == first
    assert (base / "host-id").stat().st_mode & 0o7777 == 0o600
    assert first.endswith("/" + (base / "host-id").read_text())


def test_another_directory_has_another_host_id(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BHYSEND_STATE_DIR", str(tmp_path / "other"))
    assert state.host_id(state.directory()) != state.host_id(base)


def test_threads_agree_on_the_host_id(base: Path) -> None:
    names: list[str] = []

    def take() -> bool:
        names.append(state.host_id(base))
        return True

    race([take] * 8)
    assert len(names) == 8
    assert set(names) == {state.host_id(base)}


def test_a_host_id_that_cannot_be_read_is_an_error(base: Path) -> None:
    (base / "host-id").mkdir()
    with pytest.raises(InputOutputError, match=f"cannot read {base}/host-id: Is a directory"):
        state.host_id(base)


# Files, whole or not at all.


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("\u00fc" * 10000, "", "short"):
        durable.write(path, text)
        assert path.read_text() == text
        assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    assert path.stat().st_mode & 0o7777 == 0o600


@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_a_file_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "a.json"
    durable.write(path, "old")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(*((os, "fsync", fail) if name == "fsync" else (Path, "rename", fail)))
    with pytest.raises(OSError, match="Input/output error"):
        durable.write(path, "new")
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_a_file_in_no_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        durable.write(tmp_path / "none/a.json", "new")

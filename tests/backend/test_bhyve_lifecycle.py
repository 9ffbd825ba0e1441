"""A bhyve guest through what may happen to its keepers, its files and its host.

Each test asks the same three things of a fault: is the guest still there, is
there one of it, and do the words say so?
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bhystream import format as fmt
from bhystream import handshake, hold, keeper
from bhystream.backend import process
from bhystream.backend.bhyve import paused, snapshot
from bhystream.backend.bhyve.paused import BhyvePaused
from bhystream.backend.bhyve.place import Place
from bhystream.errors import BhyError, GoneError, GuestError, PipeError
from bhystream.handshake import Event
from bhystream.keeper import Patience
from bhystream.report import Console
from bhystream.standing import Standing
from bhystream.state import Record, Records
from standin.rig import Console as Port
from standin.rig import assert_unbroken, await_true

from .bhyve_rig import ID, UUID, Two, small_tmpfs, two_hosts, without_sink


@pytest.fixture
def two() -> Iterator[Two]:
    with two_hosts() as made:
        yield made


def suspended(two: Two) -> tuple[Place, BhyvePaused]:
    """Suspend the guest, with a bhysend that is gone and a keeper that has hold of it."""
    source = two.source()
    source.prepare(ID)
    held = two.paused(Place.from_json(source.revive()))
    held.hold()
    source.pause()
    source.close()
    return held.place, held


def recorded(two: Two, place: Place, phase: str) -> Records:
    records = Records(two.base, "source")
    records.write(Record(ID, place.name, place.name, "lock", phase, dict(place.to_json())))
    return records


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_RESUME_SECONDS", -1.0)
    monkeypatch.setattr(keeper, "_LONG_SECONDS", 0.01)


class Enough(Exception):
    """The keeper has not given up."""


def tried(two: Two, held: BhyvePaused, times: int = 3) -> int:
    """Let a keeper resume the guest, which fails; return its status, or raise Enough."""
    records = recorded(two, held.place, handshake.PAUSED)
    record = records.get(ID)
    assert record is not None
    console = Console("bhysend")

    class Patient(Patience):
        waits = 0

        def wait(self, error: BhyError, *, tell: bool) -> None:
            super().wait(error, tell=tell)
            self.waits += 1
            if self.waits == times:
                raise Enough from error

    patience = Patient(held, held.place.name, console)
    return keeper._settle(Standing(records, record, held), Event.ALONE, patience, console)


# The keeper's patience.


def test_a_full_disk_ends_no_guest_that_cannot_be_brought_back(two: Two, impatient: None) -> None:
    two.start()
    place, held = suspended(two)
    with small_tmpfs(Path(place.kept).parent, "1m"), pytest.raises(Enough):
        tried(two, held)
    assert not held.outlives_us()
    held.resume()
    held.close()
    two.assert_runs_on()


def test_the_keeper_goes_where_bhyve_itself_has_written_the_memory(
    two: Two, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_sink(monkeypatch)
    two.start()
    place, held = suspended(two)
    two.here.settings(fail=["restore"])
    assert tried(two, held) == 69
    held.close()
    two.here.settings(fail=[])
    two.paused(place).resume()
    two.assert_runs_on()


def test_a_request_that_is_under_way_keeps_the_keeper(two: Two) -> None:
    guest = two.start()
    source = two.source()
    source.prepare(ID)
    held = two.paused(Place.from_json(source.revive()))
    held.place.staged.kern.touch()  # as bhyve does first
    assert not held.outlives_us()
    held.place.staged.kern.unlink()
    assert held.outlives_us()
    source.close()
    assert guest.process.poll() is None
    two.assert_runs_on()


# The host's crash.


def after_a_crash(two: Two, place: Place, monkeypatch: pytest.MonkeyPatch) -> BhyvePaused:
    """Return the guest after the host has booted anew: what was in memory is gone."""
    shutil.rmtree(place.staging, ignore_errors=True)
    monkeypatch.setattr(paused, "boot_id", lambda: "another")
    monkeypatch.setattr(process, "boot_id", lambda: "another")
    return two.paused(place)


def test_a_snapshot_that_was_not_synced_is_none_after_a_crash(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.start()
    place, held = suspended(two)
    held._gather()
    assert held._is_complete()
    held.close()
    found = after_a_crash(two, place, monkeypatch)
    assert not found.is_alive()
    with pytest.raises(GuestError):
        found.resume()
    assert two.here.pid("g") is None


def test_a_guest_that_was_booted_anew_after_a_crash_is_not_the_recorded_one(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.start()
    place, held = suspended(two)
    held.close()
    records = recorded(two, place, handshake.PAUSED)
    found = after_a_crash(two, place, monkeypatch)
    again = two.here.start("g")
    assert not found.runs()
    assert not found.is_alive()
    with pytest.raises(GoneError):
        found.resume()
    hold.refuse_held(two.base, "g")  # it may be sent
    assert records.all() == []
    assert again.process.poll() is None
    again.console.await_sweeps(1)


def test_a_guest_that_was_kept_is_there_after_a_crash(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.start()
    place, held = suspended(two)
    held.keep()
    held.close()
    found = after_a_crash(two, place, monkeypatch)
    assert found.is_alive()
    found.resume()
    two.assert_runs_on()


def test_a_loaded_guest_that_was_not_synced_is_written_again(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_sink(monkeypatch)
    guest = two.start()
    place, held = suspended(two)
    held.close()
    loaded = two.paused(replace(place, process=None))
    loaded._gather()
    Path(place.kept, "ckp").write_bytes(b"half of it")  # as a crash of bhyrecv leaves it
    loaded.keep()
    two.paused(replace(place, process=None)).resume()
    again = Port(guest.console.path)
    again.await_sweeps(1)
    assert_unbroken(again)


# A guest that ends by itself.


def test_a_guest_that_powers_off_during_the_rounds_is_not_called_held(two: Two) -> None:
    guest = two.start()
    # What it changes takes longer than this, so the rounds go on while it runs.
    words = [*two.send("-v", "-B", "4M", "-d", "1ms", "-r", "1000"), *two.receive()]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, env=two.here.environment, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "bhysend: guest g: round 1:" in line:
            break
    guest.power_off()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 69
    assert "its bhyve has ended" in said
    assert "it runs here" not in said
    assert two.left() == []


def test_a_bhyve_that_dies_in_its_suspend_is_not_called_held(two: Two) -> None:
    two.here.settings(fail=["die"])
    two.start()
    ended = two.move()
    assert ended.status == 69
    assert "its bhyve has ended, and left nothing to go on from" in ended.stderr
    assert "it runs here" not in ended.stderr
    assert two.left() == []


@pytest.mark.parametrize("generation", [4, 5])
def test_a_guest_that_ends_in_a_checkpoint_is_said_to_have_ended(two: Two, generation: int) -> None:
    two.here.settings(generation=generation)
    guest = two.start()
    source = two.source(keep=True)
    source.prepare(ID)
    guest.power_off()
    with pytest.raises(GoneError, match="its bhyve has ended meanwhile"):
        source.pause()
    source.resume()
    source.close()
    assert two.here.pid("g") is None
    assert list(two.staging.iterdir()) == []


def test_a_guest_that_was_started_anew_is_not_suspended_with_the_memory_of_the_old(
    two: Two,
) -> None:
    guest = two.start()
    source = two.source()
    source.prepare(ID)
    before = source._checkpoint
    assert before is not None
    guest.power_off()
    again = two.here.start("g")
    with pytest.raises(GoneError, match="another guest has its name now"):
        source._reconnect(before)
    source.close()
    assert again.process.poll() is None


# What we cannot read ourselves.


def test_a_state_that_only_bhyve_understands_is_still_restored(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.start()
    _, held = suspended(two)

    def refuse(*_: object) -> None:
        raise GuestError("ckp.meta is not complete, or not bhyve's")

    monkeypatch.setattr(snapshot, "read_states", refuse)
    assert held.is_alive()
    held.resume()
    held.close()
    two.assert_runs_on()


def test_a_state_that_cannot_be_looked_at_is_not_taken_for_none(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.start()
    place, held = suspended(two)
    real = os.stat

    def fails(path: Any, *args: Any, **keys: Any) -> os.stat_result:
        if str(path) == str(place.staged.meta):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **keys)

    with monkeypatch.context() as broken:
        broken.setattr(os, "stat", fails)
        with pytest.raises(PipeError):
            held.is_alive()
    held.resume()
    held.close()
    two.assert_runs_on()


# A bhyrecv that is killed.


def kept_stream(two: Two) -> bytes:
    """Return a stream of -k."""
    path = two.directory / "stream"
    with path.open("wb") as file:
        [ended] = two.run_into(file, two.send("-k"))
    assert ended.status == 0, ended.stderr
    return path.read_bytes()


def killed_in_the_stream(two: Two, stream: bytes) -> None:
    """Give bhyrecv half a stream, and kill it."""
    words, environment = two.receive(), two.here.environment
    with subprocess.Popen(words, stdin=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        process.stdin.write(stream[: len(stream) // 2])
        process.stdin.flush()
        await_true(lambda: any(two.staging_there.glob("*/ckp")), "the memory file")
        process.kill()


def test_what_a_killed_bhyrecv_left_does_not_stop_the_next(two: Two) -> None:
    two.start()
    stream = kept_stream(two)
    killed_in_the_stream(two, stream)
    with (two.directory / "stream").open("rb") as file:
        [ended] = two.run_from(file, two.receive())
    assert ended.status == 0, ended.stderr
    two.arrived().await_sweeps(1)
    assert list(two.staging_there.iterdir()) == []


def test_what_a_bhyve_still_reads_is_not_removed_by_the_next(two: Two) -> None:
    two.start()
    stream = kept_stream(two)
    killed_in_the_stream(two, stream)
    id_ = stream_id(stream)
    [memory] = two.staging_there.glob("*/ckp")
    lock = loaded(two, id_, memory.parent).lock_started()
    try:
        with (two.directory / "stream").open("rb") as file:
            [ended] = two.run_from(file, two.receive())
    finally:
        os.close(lock)
    assert ended.status == 76
    assert "a bhyve starts, or runs, from this stream" in ended.stderr
    assert [path.name for path in two.staging_there.iterdir()] == [f"bhyrecv-{id_[:16]}"]


def loaded(two: Two, id_: str, staging: Path) -> Place:
    """Return the place of a stream at the destination."""
    return Place(
        kind="standin",
        vmm_dir=str(two.there.directory),
        name="g",
        process=None,
        staging=str(staging),
        kept=str(two.base_there / "loaded" / id_),
        keys={},
        memory_bytes=0,
        bridges={},
        manager="",
    )


def stream_id(stream: bytes) -> str:
    return bytes(fmt.HEADER.unpack_from(stream)[5]).hex()


def test_what_a_start_that_died_has_left_is_discarded_by_its_id(two: Two) -> None:
    two.start()
    two.there.settings(fail=["restore-late"])
    assert two.move().status == 81
    assert list(two.staging_there.iterdir()) != []
    [record] = Records(two.base_there, "destination").all()
    [ended] = two.run(two.receive("--discard", name=record.id))
    assert ended.status == 0, ended.stderr
    assert "the files of its start are removed" in ended.stderr
    assert list(two.staging_there.iterdir()) == []
    [asked] = two.run(two.receive("-q", name=record.id))
    assert f"stream {record.id}: RAN" in asked.stderr


def test_a_guest_that_runs_runs_though_its_directory_is_full(two: Two) -> None:
    two.start()
    store = two.there.directory / "vm" / "g"
    store.parent.mkdir(exist_ok=True)
    with small_tmpfs(store, "4k"):
        (store / "g.conf").write_text(f"uuid={UUID}\n")
        ended = two.move()
        assert ended.status == 0, ended.stderr
        two.arrived().await_sweeps(1)


# A supervisor that takes the suspend for a reboot.


@pytest.mark.parametrize("form", ["answered", "plain"])
def test_a_guest_that_its_supervisor_starts_anew_starts_nowhere_else(two: Two, form: str) -> None:
    two.here.settings(suspend_status=0)
    two.start()
    paused_, gate = two.directory / "paused", two.directory / "gate"
    hook = f"touch {paused_}; while [ ! -e {gate} ]; do sleep 0.01; done"
    words = two.send("-p", hook)
    into = shlex.join(two.receive())
    words = [*words, "sh", "-c", into] if form == "answered" else words
    line = shlex.join(words) if form == "answered" else f"{shlex.join(words)} | {into}; false"
    with (two.directory / "said").open("w") as said:
        move = subprocess.Popen(["bash", "-c", line], stderr=said, env=two.here.environment)
    await_true(paused_.exists, "the pause")
    again = two.here.start("g")
    gate.touch()
    move.wait(60)
    await_true(lambda: bool(two.held()), "what the keeper keeps")
    await_true(lambda: not list(two.staging.iterdir()), "the end of the keeper")
    text = (two.directory / "said").read_text()
    assert "it was started anew here" in text or "another guest of that name runs here" in text
    assert not two.there.host.exists("g")
    assert again.process.poll() is None  # nobody has ended it, or resumes what it has outrun
    again.console.await_sweeps(1)
    [record] = Records(two.base, "source").all()
    assert record.phase == handshake.PAUSED
    [refused] = two.run(two.send("--resume"))
    assert refused.status == 69
    assert f"another guest of that name runs here, process {again.pid}" in refused.stderr
    [ended] = two.run(two.send("--discard"))
    assert ended.status == 0, ended.stderr
    assert again.process.poll() is None
    assert two.held() == []
    [moved] = two.run([*two.send(), *two.receive()])
    assert moved.status == 0, moved.stderr

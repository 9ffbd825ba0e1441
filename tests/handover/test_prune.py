"""What is kept of streams that are over: by age and number, but always what protects a guest."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from bhystream import durable
from bhystream.errors import GuestError, IncompatibleError, RecordError
from bhystream.guest import DEAD, LOADED, READY, STARTED
from bhystream.handover import prune
from bhystream.handover.prune import MAX_AGE_SECONDS, MAX_RECORDS
from bhystream.handover.state import Lock, Records
from bhystream.recv import query
from bhystream.recv.options import Options
from bhystream.recv.receiving import require_startable
from bhystream.report import Console
from bhystream.stream.format import Form
from bhystream.stream.verify import Walk
from support.recorded import A, B, Host

OLD_NS = (time.time_ns() // 10**9 - MAX_AGE_SECONDS - 60) * 10**9


@pytest.fixture
def host(host: Host) -> Host:
    host.guest.alive = False
    (host.base / "loaded").mkdir()
    return host


def records(host: Host) -> Records:
    return host.roles["destination"]


def pruned(host: Host) -> Records:
    prune.prune(host.base, records(host))
    return records(host)


@pytest.mark.parametrize("phase", [STARTED, DEAD])
def test_an_old_record_goes_and_what_it_says_stays(host: Host, phase: str) -> None:
    record = host.record(phase, time_ns=OLD_NS)
    started = host.base / f"loaded/{A}.web1.started"
    started.touch()
    other = host.base / f"loaded/{B}.web1.started"
    other.touch()
    found = pruned(host)
    assert found.get(A) is None and found.phase(A) == phase
    assert not started.exists() and other.exists()
    assert (host.base / "destination/over").read_text() == f"{record.id} {phase}\n"


def test_a_young_record_stays(host: Host) -> None:
    record = host.record(STARTED, time_ns=time.time_ns())
    assert pruned(host).all() == [record]


def test_of_many_the_newest_stay(host: Host) -> None:
    now = time.time_ns()
    for at in range(MAX_RECORDS + 3):
        host.record(STARTED, f"{at:032x}", time_ns=now + at)
    host.record(LOADED, A, time_ns=1)
    left = {record.id for record in pruned(host).all()}
    assert left == {A} | {f"{at:032x}" for at in range(3, MAX_RECORDS + 3)}
    assert pruned(host).phase(f"{0:032x}") == STARTED


@pytest.mark.parametrize("phase", [LOADED, READY])
def test_what_somebody_has_to_decide_about_stays(host: Host, phase: str) -> None:
    record = host.record(phase, time_ns=OLD_NS)
    assert pruned(host).all() == [record]


@pytest.mark.parametrize("how", ["alive", "unknown"])
def test_a_guest_that_may_be_here_keeps_its_record(host: Host, how: str) -> None:
    record = host.record(STARTED, time_ns=OLD_NS)
    host.guest.alive = how == "alive"
    host.error = GuestError("it cannot be looked at") if how == "unknown" else None
    assert pruned(host).all() == [record]


def test_a_record_that_cannot_be_read_stays(host: Host) -> None:
    path = host.base / f"destination/{A}.json"
    path.touch()
    os.utime(path, (1, 1))
    assert [str(path) in str(error) for error in pruned(host).broken()] == [True]


def test_what_a_record_said_is_noted_before_it_goes(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.record(STARTED, time_ns=OLD_NS)
    (host.base / f"loaded/{A}.web1.started").touch()
    gone: list[tuple[str, str | None]] = []
    real = durable.remove

    def remove(path: Path) -> None:
        gone.append((path.suffix, records(host)._over().get(A)))
        real(path)

    monkeypatch.setattr(durable, "remove", remove)
    assert pruned(host).phase(A) == STARTED
    # The .started file goes first: without its record it would look like a leftover.
    assert gone == [(".started", STARTED), (".json", STARTED)]


def test_a_note_that_cannot_be_written_leaves_the_record(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = host.record(STARTED, time_ns=OLD_NS)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write", full)
    assert pruned(host).all() == [record]


def test_a_record_that_changes_meanwhile_stays(host: Host) -> None:
    record = host.record(STARTED, time_ns=OLD_NS)
    records(host).write(record.with_phase(DEAD))
    assert records(host).archive([record]) == []
    assert records(host).phase(A) == DEAD


def test_what_a_cut_has_left_of_a_file_goes(host: Host) -> None:
    directory = host.base / "destination"
    for name in ("a.1.new", "b.2.new"):
        (directory / name).touch()
    os.utime(directory / "a.1.new", (1, 1))
    pruned(host)
    assert [path.name for path in directory.iterdir()] == ["b.2.new"]


# Questions to the notes in destination/over.


def ask(host: Host, form: Form, *, again: bool) -> None:
    """Ask whether the stream A, of which only the form is known, may be started."""
    header = SimpleNamespace(form=form, stream_id=bytes.fromhex(A))
    walk = cast(Walk, SimpleNamespace(header=header))
    require_startable(Options(again=again), walk, records(host))


@pytest.mark.parametrize("phase", [STARTED, DEAD])
def test_a_stream_whose_record_is_gone_is_not_started_again(host: Host, phase: str) -> None:
    host.record(phase, time_ns=OLD_NS)
    pruned(host)
    said = f"^stream {A} was {phase} on this host before$"
    for form, again in ((Form.PLAIN, False), (Form.ANSWERED, False), (Form.ANSWERED, True)):
        with pytest.raises(IncompatibleError, match=said):
            ask(host, form, again=again)
    ask(host, Form.PLAIN, again=True)


@pytest.mark.parametrize(("phase", "word"), [(STARTED, "RAN"), (DEAD, "FAILED")])
def test_the_source_is_answered_by_the_note(
    host: Host, phase: str, word: str, capfd: pytest.CaptureFixture[str]
) -> None:
    host.record(phase, time_ns=OLD_NS)
    pruned(host)
    assert query.run(A, Console("bhyrecv")) == 0
    assert f" {word}" in capfd.readouterr().out


@pytest.mark.parametrize("text", ["x", f"{A}\n", f"{A} gone\n", "\0" * 40])
def test_notes_that_are_broken_let_nothing_start(host: Host, text: str) -> None:
    path = host.base / "destination/over"
    path.write_text(text)
    with pytest.raises(RecordError, match=f"{path} is broken"):
        records(host).phase(B)
    record = host.record(STARTED, time_ns=OLD_NS)
    assert pruned(host).all() == [record]


# Locks.


def locks(host: Host) -> list[str]:
    return sorted(path.name for path in (host.base / "lock").iterdir())


def test_old_locks_of_streams_and_processes_go(host: Host) -> None:
    held = Lock(host.base, "stream-held", "x")
    for name in ("stream-a", "qemu-1-2", "to-web1", "bhyve-web1", "stream-young"):
        Lock(host.base, name, "x").release()
    for path in (host.base / "lock").iterdir():
        if path.name != "stream-young":
            os.utime(path, (1, 1))
    prune.prune_locks(host.base)
    assert locks(host) == ["bhyve-web1", "stream-held", "stream-young", "to-web1"]
    held.release()


def test_a_lock_for_once_leaves_no_file(host: Host) -> None:
    with Lock(host.base, "stream-a", "x", once=True):
        with pytest.raises(GuestError, match="another bhysend or bhyrecv"):
            Lock(host.base, "stream-a", "x", once=True)
        assert locks(host) == ["stream-a"]
    assert locks(host) == []


def test_a_lock_whose_file_was_removed_is_another(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process opens the file, the holder removes it, and a third makes it again."""
    first = Lock(host.base, "stream-a", "x", once=True)
    real = os.open
    opened: list[int] = []

    def open_(path: Path, flags: int, mode: int = 0o777) -> int:
        fd = real(path, flags, mode)
        if not opened:
            opened.append(fd)
            first.release()
            opened.append(real(path, flags, mode))
        return fd

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_)
        second = Lock(host.base, "stream-a", "x", once=True)
    assert os.path.samestat(os.fstat(second.fd), os.stat(host.base / "lock/stream-a"))
    second.release()
    os.close(opened[1])
    assert locks(host) == []

"""-l, --discard and --resume, over records whose guests are stand-ins."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bhystream import hold, hypervisors, state
from bhystream.errors import OK, GuestError
from bhystream.handshake import HELD, LOADED, PAUSED, STARTED
from bhystream.hold import Verb, refuse_held
from bhystream.report import Console
from bhystream.state import Lock, Record, Records, Role

A, B = "a" * 32, "b" * 32


@dataclass
class Guest:
    """What a record's guest is asked, with the record's phase at that time."""

    records: Records
    alive: bool = True
    fails: bool = False
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def note(self, what: str) -> None:
        record = self.records.get(A)
        self.asked.append((what, record.phase if record else None))

    def resume(self) -> None:
        self.note("resume")
        if self.fails:
            raise GuestError("it does not answer")

    def discard(self) -> None:
        self.note("discard")
        if self.fails:
            raise GuestError("it does not answer")

    def is_alive(self) -> bool:
        return self.alive

    def close(self) -> None:
        self.note("close")


class Host:
    """A state directory, and the one guest that open_paused() finds."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.roles: dict[str, Records] = {
            "source": Records(base, "source"),
            "destination": Records(base, "destination"),
        }
        self.guest = Guest(self.roles["source"])
        self.opened: list[Mapping[str, Any]] = []

        def open_paused(revive: Mapping[str, Any]) -> Guest:
            self.opened.append(revive)
            return self.guest

        monkeypatch.setattr(hypervisors, "open_paused", open_paused)

    def record(
        self,
        phase: str,
        id_: str = A,
        *,
        guest: str = "web1",
        operand: str = "qemu:/web1",
        lock: str = "lock-1",
        time_ns: int = 1,
    ) -> Record:
        """Write a record of the role that has such a phase."""
        made = Record(id_, guest, operand, lock, phase, {"id": id_}, time_ns)
        role = "destination" if phase in (LOADED, STARTED) else "source"
        self.guest.records = self.roles[role]
        self.roles[role].write(made)
        return made

    def run(self, name: str, guest: str | None = "web1", role: Role = "source") -> int:
        return hold.run(Verb(name, guest), role, Console("bhysend"))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setenv("BHYSEND_STATE_DIR", str(tmp_path / "state"))
    return Host(state.directory(), monkeypatch)


# -l


def listed(host: Host, capfd: pytest.CaptureFixture[str], *args: Any) -> list[list[str]]:
    assert host.run("-l", *args) == OK
    return [line.split("\t") for line in capfd.readouterr().out.splitlines()]


def test_nothing_is_listed_where_nothing_stands(
    host: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    assert listed(host, capfd, None) == []
    assert listed(host, capfd, "web1") == []


def test_held_guests_are_listed_oldest_first(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    host.record(HELD, A, time_ns=2 * 10**18)
    host.record(PAUSED, B, guest="web2", operand="qemu:/web2", time_ns=10**18)
    rows = listed(host, capfd, None)
    assert [(row[0], row[1], *row[3:]) for row in rows] == [
        ("web2", "paused", B, "qemu:/web2", "-"),
        ("web1", "held", A, "qemu:/web1", "-"),
    ]
    assert [row[2][:10] for row in rows] == ["2001-09-09", "2033-05-18"]
    assert listed(host, capfd, "web2") == rows[:1]
    assert listed(host, capfd, A) == rows[1:]
    assert host.opened == []


def test_what_was_started_is_listed_by_name_only(
    host: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    host.record(STARTED, A)
    host.record(LOADED, B, guest="web2")
    assert [row[0] for row in listed(host, capfd, None, "destination")] == ["web2"]
    assert [row[1] for row in listed(host, capfd, "web1", "destination")] == ["started"]
    assert listed(host, capfd, None, "source") == []


def test_a_field_does_not_break_the_line(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    host.record(HELD, operand="qemu:/a\tb\nc")
    assert listed(host, capfd, None)[0][4] == "qemu:/a\\x09b\\x0ac"


# --discard


@pytest.mark.parametrize(("phase", "role"), [(HELD, "source"), (LOADED, "destination")])
def test_discard_ends_the_guest_and_then_its_record(host: Host, phase: str, role: Role) -> None:
    record = host.record(phase)
    assert host.run("--discard", role=role) == OK
    assert host.opened == [record.revive]
    assert host.guest.asked == [("discard", phase), ("close", phase)]
    assert host.roles[role].all() == []


def test_discard_of_a_guest_that_is_gone_removes_its_record(host: Host) -> None:
    host.record(HELD)
    host.guest.alive = False
    assert host.run("--discard") == OK
    assert host.guest.asked == [("close", HELD)]
    assert host.roles["source"].all() == []


def test_a_guest_whose_stream_is_not_complete_is_not_discarded(host: Host) -> None:
    record = host.record(PAUSED)
    with pytest.raises(GuestError, match="its stream is not complete") as caught:
        host.run("--discard")
    assert caught.value.hint == f"let it run on: bhysend --resume {A}"
    assert ("discard", PAUSED) not in host.guest.asked
    assert host.roles["source"].all() == [record]


def test_a_paused_guest_that_is_gone_can_be_forgotten(host: Host) -> None:
    # --resume says so, and says how.
    host.record(PAUSED)
    host.guest.alive = False
    with pytest.raises(GuestError, match="it is gone") as caught:
        host.run("--resume")
    assert caught.value.hint == f"forget it: --discard {A}"
    assert host.run("--discard", A) == OK
    assert host.roles["source"].all() == []


# --resume


@pytest.mark.parametrize("phase", [PAUSED, HELD])
def test_resume_at_the_source_removes_the_record_when_the_guest_runs(
    host: Host, phase: str, capfd: pytest.CaptureFixture[str]
) -> None:
    host.record(phase)
    assert host.run("--resume") == OK
    # From before it is done: a record that says held could have it discarded.
    assert host.guest.asked == [("resume", PAUSED), ("close", PAUSED)]
    assert host.roles["source"].all() == []
    warned = "the destination must not have started it" in capfd.readouterr().err
    assert warned == (phase == HELD)


def test_resume_at_the_destination_records_the_start_before_it(host: Host) -> None:
    host.record(LOADED)
    assert host.run("--resume", role="destination") == OK
    assert host.guest.asked == [("resume", STARTED), ("close", STARTED)]
    # The stream was started here: it is not started again.
    assert [record.phase for record in host.roles["destination"].all()] == [STARTED]


@pytest.mark.parametrize("verb", ["--resume", "--discard"])
@pytest.mark.parametrize(("phase", "role"), [(HELD, "source"), (LOADED, "destination")])
def test_a_verb_that_fails_may_be_typed_again(
    host: Host, verb: str, phase: str, role: Role
) -> None:
    # EXIT STATUS: "If --discard or --resume fails, the guest is held as before."
    host.record(phase)
    host.guest.fails = True
    with pytest.raises(GuestError, match="it does not answer"):
        host.run(verb, role=role)
    host.guest.fails = False
    assert host.run(verb, role=role) == OK


def test_resume_of_a_guest_that_is_gone_keeps_the_record(host: Host) -> None:
    record = host.record(HELD)
    host.guest.alive = False
    with pytest.raises(GuestError, match="it is gone, so it cannot be resumed"):
        host.run("--resume")
    assert host.roles["source"].all() == [record]


# Which guest.


@pytest.mark.parametrize("verb", ["--resume", "--discard"])
def test_a_guest_that_is_not_held_is_refused(host: Host, verb: str) -> None:
    with pytest.raises(GuestError, match=f"none of that name is held on {os.uname().nodename}"):
        host.run(verb)


@pytest.mark.parametrize("verb", ["--resume", "--discard"])
def test_a_started_guest_is_the_hypervisors(host: Host, verb: str) -> None:
    host.record(STARTED)
    with pytest.raises(GuestError, match="it was started here"):
        host.run(verb, role="destination")
    assert host.guest.asked == []


@pytest.mark.parametrize("verb", ["--resume", "--discard"])
def test_several_guests_of_a_name_are_told_apart_by_id(host: Host, verb: str) -> None:
    host.record(HELD, A)
    second = host.record(HELD, B, lock="lock-2", time_ns=2)
    with pytest.raises(GuestError, match="several are held; name one by its stream id") as caught:
        host.run(verb)
    assert caught.value.hint.split() == [A, "(held,", "qemu:/web1)", B, "(held,", "qemu:/web1)"]
    assert host.guest.asked == []
    assert host.run(verb, A) == OK
    assert host.roles["source"].all() == [second]


@pytest.mark.parametrize("verb", ["--resume", "--discard"])
def test_a_guest_that_something_works_on_is_left_alone(host: Host, verb: str) -> None:
    host.record(HELD)
    lock = Lock(host.base, "lock-1", "guest web1")
    with pytest.raises(GuestError, match="another bhysend or bhyrecv works on it"):
        host.run(verb)
    lock.release()
    assert host.guest.asked == []
    assert host.run(verb) == OK
    Lock(host.base, "lock-1", "guest web1").release()  # and it was released


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let another process act just before the lock is had."""

    def take(*args: Any) -> Lock:
        act()
        return Lock(*args)

    monkeypatch.setattr(hold, "Lock", take)


@pytest.mark.parametrize("verb", ["--resume", "--discard"])
def test_a_guest_that_the_keeper_resumed_meanwhile_is_left_alone(
    host: Host, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.record(HELD)
    meanwhile(monkeypatch, lambda: host.roles["source"].remove(A))
    with pytest.raises(GuestError, match="it is not held any more"):
        host.run(verb)
    assert host.guest.asked == []


def test_a_guest_that_was_started_meanwhile_is_not_discarded(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.record(LOADED)
    meanwhile(monkeypatch, lambda: host.record(STARTED))
    with pytest.raises(GuestError):
        host.run("--discard", role="destination")
    assert host.guest.asked == []


# What a new move asks.


def test_a_held_guest_is_not_sent_again(host: Host) -> None:
    for phase in (PAUSED, HELD):
        record = host.record(phase)
        with pytest.raises(GuestError, match=f"{phase} here since an earlier stream") as caught:
            refuse_held(host.base, "qemu:/web1")
        assert f"bhysend --discard {A}" in caught.value.hint
        assert f"bhysend --resume {A}" in caught.value.hint
        assert host.roles["source"].all() == [record]
    assert {what for what, _ in host.guest.asked} == {"close"}


def test_another_guest_is_sent(host: Host) -> None:
    record = host.record(HELD)
    refuse_held(host.base, "qemu:/web2")
    assert host.roles["source"].all() == [record]
    assert host.opened == []


def test_the_record_of_a_guest_that_is_gone_is_no_obstacle(host: Host) -> None:
    host.record(HELD)
    host.guest.alive = False
    refuse_held(host.base, "qemu:/web1")
    assert host.roles["source"].all() == []

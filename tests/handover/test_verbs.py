"""-l, --discard and --resume, over records whose guests are stand-ins."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bhystream import hypervisors
from bhystream.commandline import Verb
from bhystream.errors import EXIT_OK, GuestError, RecordError, UsageError
from bhystream.guest import DEAD, GO, HELD, LOADED, MOVED, PAUSED, READY, STARTED
from bhystream.handover import verbs
from bhystream.handover.prune import prune
from bhystream.handover.state import Lock, Records, Role
from bhystream.handover.where import in_doubt
from bhystream.report import Console
from support import recorded
from support.recorded import A, B


class Host(recorded.Host):
    """A host on which the verbs are typed."""

    def run(
        self,
        name: str,
        guest: str | None = "web1",
        role: Role = "source",
        *,
        in_doubt: bool = False,
    ) -> int:
        return verbs.run(Verb(name, guest, in_doubt), role, Console("bhysend"))


@pytest.fixture
def host(base: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(base, monkeypatch)


# -l


def listed(host: Host, capfd: pytest.CaptureFixture[str], *args: Any) -> list[list[str]]:
    assert host.run("-l", *args) == EXIT_OK
    return [line.split("\t") for line in capfd.readouterr().out.splitlines()]


def test_nothing_is_listed_where_nothing_stands(
    host: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    assert listed(host, capfd, None) == []


@pytest.mark.parametrize("role", ["source", "destination"])
@pytest.mark.parametrize("name", ["web1", A])
def test_a_guest_that_is_not_known_is_refused_with_the_place_of_the_look(
    host: Host, role: Role, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another user, or another state directory, must not look like a guest that never ran."""
    other: Role = "source" if role == "destination" else "destination"
    host.record(STARTED if other == "destination" else HELD)
    with pytest.raises(GuestError, match=f"{name}: no such guest or stream is recorded") as caught:
        host.run("-l", name, role)
    user = pwd.getpwuid(os.geteuid()).pw_name
    assert caught.value.status == 69
    assert f"looked on {os.uname().nodename}, as user {user}, " in caught.value.hint
    assert f"in the state directory {host.base};" in caught.value.hint
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("phase", [STARTED, DEAD])
def test_a_stream_whose_record_was_removed_is_listed_by_its_id(
    host: Host, phase: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A guest that ran here months ago must not be taken for one that never ran."""
    host.record(phase)
    host.guest.alive = False
    prune(host.base, host.roles["destination"])
    assert host.roles["destination"].all() == []
    assert listed(host, capfd, A, "destination") == [["-", phase, "-", A, "-", "-"]]
    assert listed(host, capfd, None, "destination") == []
    for name in ("web1", A[:-1], B):
        with pytest.raises(GuestError, match="no such guest or stream"):
            host.run("-l", name, "destination")
    # A guest whose name is that id hides nothing.
    host.record(LOADED, B, guest=A)
    assert [row[1] for row in listed(host, capfd, A, "destination")] == ["loaded", phase]


def test_a_list_of_streams_that_are_over_that_is_broken_is_no_answer(host: Host) -> None:
    (host.base / "destination/over").write_text(f"{A} started\n{B}\n")
    with pytest.raises(RecordError, match="any stream may have run here before"):
        host.run("-l", A, "destination")


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


def test_what_was_told_to_run_and_lies_in_files_is_listed_and_may_be_resumed(
    host: Host, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A --resume was cut short; the backend knows whether the guest ran."""
    host.record(STARTED)
    monkeypatch.setattr(hypervisors, "lies_in_files", lambda revive: True)
    assert [row[1] for row in listed(host, capfd, None, "destination")] == ["started"]
    assert host.run("--resume", role="destination") == EXIT_OK
    assert host.guest.asked == [("resume", STARTED), ("close", STARTED)]
    assert host.phases("destination") == [STARTED]
    host.guest.fails = True
    with pytest.raises(GuestError, match="it does not answer"):
        host.run("--resume", role="destination")
    assert host.phases("destination") == [STARTED]


def test_a_field_does_not_break_the_line(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    host.record(HELD, operand="qemu:/a\tb\nc")
    assert listed(host, capfd, None)[0][4] == "qemu:/a\\x09b\\x0ac"


# --discard


@pytest.mark.parametrize(("phase", "role"), [(HELD, "source"), (LOADED, "destination")])
def test_discard_ends_the_guest_and_then_its_record(host: Host, phase: str, role: Role) -> None:
    record = host.record(phase)
    assert host.run("--discard", role=role) == EXIT_OK
    assert host.opened == [record.revive] * 2
    assert host.guest.asked == [("close", phase), ("discard", phase), ("close", phase)]
    assert host.roles[role].all() == []


def test_discard_of_a_guest_that_is_gone_removes_its_record(host: Host) -> None:
    host.record(HELD)
    host.guest.alive = False
    assert host.run("--discard") == EXIT_OK
    # The rest of the guest is removed, too.
    assert host.guest.asked == [("close", HELD), ("discard", HELD), ("close", HELD)]
    assert host.roles["source"].all() == []


def test_a_guest_whose_stream_is_not_complete_is_not_discarded(host: Host) -> None:
    record = host.record(PAUSED)
    with pytest.raises(GuestError, match="its stream is not complete") as caught:
        host.run("--discard")
    assert caught.value.hint == f"let it run on: bhysend --resume {A}"
    assert ("discard", PAUSED) not in host.guest.asked
    assert host.roles["source"].all() == [record]


def test_a_paused_guest_that_is_gone_can_be_forgotten(host: Host) -> None:
    # --resume says that the guest is gone, and how to forget it.
    host.record(PAUSED)
    host.guest.alive = False
    with pytest.raises(GuestError, match="it is gone") as caught:
        host.run("--resume")
    assert caught.value.hint == f"forget it: --discard {A}"
    assert host.run("--discard", A) == EXIT_OK
    assert host.roles["source"].all() == []


# --resume


@pytest.mark.parametrize("phase", [PAUSED, HELD])
def test_resume_at_the_source_removes_the_record_when_the_guest_runs(
    host: Host, phase: str, capfd: pytest.CaptureFixture[str]
) -> None:
    host.record(phase)
    assert host.run("--resume") == EXIT_OK
    # PAUSED is recorded before the resume: a record that says held could get the guest discarded.
    assert host.guest.asked == [("resume", PAUSED), ("close", PAUSED)]
    assert host.roles["source"].all() == []
    warned = "the destination must not have started it" in capfd.readouterr().err
    assert warned == (phase == HELD)


def test_resume_at_the_destination_records_the_start_before_it(host: Host) -> None:
    host.record(LOADED)
    assert host.run("--resume", role="destination") == EXIT_OK
    assert host.guest.asked == [("resume", STARTED), ("close", STARTED)]
    # The record stays, so that the stream is not started here again.
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
    assert host.run(verb, role=role) == EXIT_OK


def test_resume_of_a_guest_that_is_gone_keeps_the_record(host: Host) -> None:
    record = host.record(HELD)
    host.guest.alive = False
    with pytest.raises(GuestError, match="it is gone, so it cannot be resumed"):
        host.run("--resume")
    assert host.roles["source"].all() == [record]


# Guests that may run elsewhere, or must not run here.


ROLES: dict[str, Role] = {READY: "destination", LOADED: "destination"}
PEER = ("hv2/a1", "/d")


def test_a_guest_in_doubt_is_resumed_only_in_so_many_words(
    host: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    record = host.record(GO, peer=PEER)
    with pytest.raises(GuestError, match="guest web1: it may run on hv2") as caught:
        host.run("--resume")
    assert caught.value.hint == in_doubt(record, host.base)
    assert host.opened == []
    assert host.roles["source"].all() == [record]
    assert host.run("--resume", in_doubt=True) == EXIT_OK
    assert host.guest.asked == [("resume", PAUSED), ("close", PAUSED)]
    assert host.phases("source") == []
    assert "the destination must not have started it" in capfd.readouterr().err


@pytest.mark.parametrize("phase", [PAUSED, HELD, LOADED])
def test_a_guest_that_is_not_in_doubt_is_not_resumed_in_these_words(host: Host, phase: str) -> None:
    host.record(phase)
    with pytest.raises(UsageError, match=f"guest web1 is {phase}, not in doubt"):
        host.run("--resume", role=ROLES.get(phase, "source"), in_doubt=True)
    assert host.opened == []
    assert host.phases(ROLES.get(phase, "source")) == [phase]


@pytest.mark.parametrize("doubt", [False, True])
def test_a_guest_that_has_moved_is_never_resumed(host: Host, doubt: bool) -> None:
    host.record(MOVED, peer=PEER)
    with pytest.raises(GuestError, match=r"guest web1: it runs on hv2$") as caught:
        host.run("--resume", in_doubt=doubt)
    assert caught.value.hint == f"end what is left here: bhysend --discard {A}"
    assert host.opened == []
    assert host.phases("source") == [MOVED]


@pytest.mark.parametrize("doubt", [False, True])
def test_a_guest_that_waits_for_go_is_never_resumed(host: Host, doubt: bool) -> None:
    host.record(READY)
    with pytest.raises(GuestError, match=r"only its source can let it run \(GO\)"):
        host.run("--resume", role="destination", in_doubt=doubt)
    assert host.opened == []
    assert host.phases("destination") == [READY]


def test_a_guest_in_doubt_that_cannot_be_resumed_is_in_doubt_as_before(host: Host) -> None:
    record = host.record(GO, peer=PEER)
    host.guest.fails = True
    with pytest.raises(GuestError, match="it does not answer"):
        host.run("--resume", in_doubt=True)
    assert host.roles["source"].all() == [record]


@pytest.mark.parametrize("phase", [GO, MOVED])
def test_what_runs_elsewhere_may_be_discarded(host: Host, phase: str) -> None:
    host.record(phase, peer=PEER)
    assert host.run("--discard") == EXIT_OK
    where = {GO: "discard", MOVED: "discard hv2"}[phase]
    assert host.guest.asked == [("close", phase), (where, phase), ("close", phase)]
    assert host.phases("source") == []


@pytest.mark.parametrize("alive", [True, False])
def test_a_guest_that_waits_for_go_is_buried_before_it_is_discarded(
    host: Host, alive: bool
) -> None:
    """A GO for the guest may still be on the way, so the tombstone (DEAD) stays."""
    host.record(READY)
    host.guest.alive = alive
    assert host.run("--discard", role="destination") == EXIT_OK
    assert host.guest.asked == [("close", READY), ("discard", DEAD), ("close", DEAD)]
    assert host.phases("destination") == [DEAD]
    with pytest.raises(GuestError, match="no such guest is held"):
        host.run("--discard", role="destination")


def test_what_is_left_of_one_that_never_ran_is_discarded_by_its_id(host: Host) -> None:
    """The guest's bhyrecv died after recording DEAD, and before ending the guest."""
    record = host.record(DEAD)
    for _ in range(2):
        assert host.run("--discard", A, role="destination") == EXIT_OK
    assert host.guest.asked == [("discard", DEAD), ("close", DEAD)] * 2
    assert host.roles["destination"].all() == [record]
    with pytest.raises(GuestError, match="no such guest is held"):
        host.run("--resume", A, role="destination")


def test_one_that_its_bhyrecv_ends_just_now_is_left_to_it(host: Host) -> None:
    host.record(DEAD)
    with Lock(host.base, f"stream-{A}", "x"), pytest.raises(GuestError, match="works on it"):
        host.run("--discard", A, role="destination")
    assert host.guest.asked == []


def test_a_guest_that_was_started_just_now_is_not_discarded(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.record(READY)
    monkeypatch.setattr(Records, "change", lambda *_: False)
    with pytest.raises(GuestError, match="it was started just now"):
        host.run("--discard", role="destination")
    assert "discard" not in [what for what, _ in host.guest.asked]


def test_what_stands_in_the_way_of_go_is_listed(
    host: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    host.record(READY, A)
    host.record(DEAD, B)
    assert [row[1] for row in listed(host, capfd, None, "destination")] == ["ready"]
    assert [row[1] for row in listed(host, capfd, B, "destination")] == ["dead"]
    host.record(GO, A)
    host.record(MOVED, B, time_ns=2)
    assert [row[1] for row in listed(host, capfd, None)] == ["in-doubt", "moved"]


# The guest that an operand names.


@pytest.mark.parametrize("verb", ["--resume", "--discard"])
def test_a_guest_that_is_not_held_is_refused(host: Host, verb: str) -> None:
    with pytest.raises(GuestError, match=f"no such guest is held on {os.uname().nodename}"):
        host.run(verb)


@pytest.mark.parametrize("verb", ["--resume", "--discard"])
def test_a_started_guest_is_the_hypervisors(host: Host, verb: str) -> None:
    host.record(STARTED)
    with pytest.raises(GuestError, match="it was started here"):
        host.run(verb, role="destination")
    assert host.guest.asked == []


def test_what_a_start_has_left_is_discarded_by_its_id_and_not_its_record(host: Host) -> None:
    record = host.record(STARTED)
    host.guest.alive = False
    assert host.run("--discard", A, role="destination") == EXIT_OK
    assert host.guest.asked == [("clear", STARTED), ("close", STARTED)]
    assert host.roles["destination"].all() == [record]


def test_a_started_guest_that_runs_is_not_cleared(host: Host) -> None:
    host.record(STARTED)
    host.guest.running = True
    with pytest.raises(GuestError, match="it was started here, and runs"):
        host.run("--discard", A, role="destination")
    assert host.guest.asked == [("close", STARTED)]


@pytest.mark.parametrize("verb", ["--resume", "--discard"])
def test_several_guests_of_a_name_are_told_apart_by_id(host: Host, verb: str) -> None:
    host.record(HELD, A)
    second = host.record(HELD, B, lock="lock-2", time_ns=2)
    with pytest.raises(GuestError, match="several are held; name one by its stream id") as caught:
        host.run(verb)
    assert caught.value.hint.split() == [A, "(held,", "qemu:/web1)", B, "(held,", "qemu:/web1)"]
    assert host.guest.asked == []
    assert host.run(verb, A) == EXIT_OK
    assert host.roles["source"].all() == [second]


@pytest.mark.parametrize("verb", ["--resume", "--discard"])
def test_a_guest_that_something_works_on_is_left_alone(host: Host, verb: str) -> None:
    host.record(HELD)
    lock = Lock(host.base, "lock-1", "guest web1")
    with pytest.raises(GuestError, match="another bhysend or bhyrecv works on it"):
        host.run(verb)
    lock.release()
    assert host.guest.asked == []
    assert host.run(verb) == EXIT_OK
    Lock(host.base, "lock-1", "guest web1").release()  # the verb has released the lock


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let another process act just before the verb gets the lock."""

    def take(*args: Any) -> Lock:
        act()
        return Lock(*args)

    monkeypatch.setattr(verbs, "Lock", take)


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

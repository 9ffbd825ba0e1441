"""bhyrecv -q: what it answers for each record, and what it does before it answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bhystream import hypervisors
from bhystream.errors import (
    EXIT_OK,
    GuestError,
    InDoubtError,
    InputOutputError,
    RecordError,
    UsageError,
)
from bhystream.guest import DEAD, LOADED, READY, STARTED
from bhystream.handover.answers import Answer, unpack
from bhystream.handover.state import Lock, Records, host_id
from bhystream.recv import query
from bhystream.recv.reply import Reply
from bhystream.report import Console
from bhystream.units import NS
from support.clock import Clock
from support.recorded import A, B, Host

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def host(base: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(base, monkeypatch)
    made.guest.records = made.roles["destination"]
    return made


class Said(list[tuple[str, str | None]]):
    """The words that -q has answered, with the phase of record A at that time."""

    def __init__(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []

        def say(reply: Reply, word: str, *args: str) -> None:
            try:
                record = host.roles["destination"].get(A)
            except RecordError:
                self.append((word, "broken"))
                return
            self.append((word, record.phase if record else None))
            self.texts += args

        monkeypatch.setattr(Reply, "say", say)


@pytest.fixture
def said(host: Host, monkeypatch: pytest.MonkeyPatch) -> Said:
    return Said(host, monkeypatch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(query, "time", made)
    return made


def ask(id_: str = A) -> int:
    return query.run(id_, Console("bhyrecv"))


def test_a_stream_that_was_never_ready_is_unknown(host: Host, said: Said) -> None:
    host.record(READY, B)
    with pytest.raises(GuestError, match=f"no stream {A} was ever ready on {os.uname().nodename}"):
        ask()
    assert said == [("HELLO", None), ("UNKNOWN", None)]
    assert host.phases("destination") == [READY]


def test_a_guest_that_waits_for_go_is_dead_before_it_is_said(host: Host, said: Said) -> None:
    host.record(READY)
    assert ask() == EXIT_OK
    assert said == [("HELLO", READY), ("FAILED", DEAD)]
    assert said.texts[-1] == "it was not started there, and will not be"
    assert host.guest.asked == [("discard", DEAD), ("close", DEAD)]
    assert host.phases("destination") == [DEAD]


def test_a_guest_whose_record_cannot_be_read_may_have_run(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(records: Records, id_: str) -> None:
        raise InputOutputError("Input/output error")

    words = []
    host.record(STARTED)
    monkeypatch.setattr(Records, "get", fail)
    monkeypatch.setattr(Reply, "say", lambda reply, word, *args: words.append(word))
    with pytest.raises(InDoubtError, match="Input/output error"):
        ask()
    assert words[-1] == "RAN"


@pytest.mark.parametrize("text", ["", "{", '{"phase": "dead"}'])
def test_a_guest_whose_record_is_broken_may_have_run(host: Host, said: Said, text: str) -> None:
    (host.base / f"destination/{A}.json").write_text(text)
    with pytest.raises(InDoubtError, match="its guest may have run"):
        ask()
    assert said == [("HELLO", "broken"), ("RAN", "broken")]


def test_a_dead_guest_failed_however_often_it_is_asked(host: Host, said: Said) -> None:
    record = host.record(DEAD)
    host.guest.alive = False
    for _ in range(3):
        assert ask() == EXIT_OK
    assert said == [("HELLO", DEAD), ("FAILED", DEAD)] * 3
    assert host.roles["destination"].all() == [record]


def test_what_a_killed_bhyrecv_left_of_a_dead_guest_is_ended(host: Host, said: Said) -> None:
    host.record(DEAD)
    assert ask() == EXIT_OK
    assert host.guest.asked == [("discard", DEAD), ("close", DEAD)]


def test_a_bhyrecv_that_lives_ends_its_guest_itself(host: Host, said: Said) -> None:
    host.record(READY)
    with Lock(host.base, f"stream-{A}", "the stream"):
        assert ask() == EXIT_OK
    assert said[-1] == ("FAILED", DEAD)
    assert host.guest.asked == []


@pytest.mark.parametrize("broken", ["open", "discard", "gone"])
def test_a_guest_that_cannot_be_ended_has_failed_all_the_same(
    host: Host, said: Said, broken: str
) -> None:
    host.record(READY)
    host.error = GuestError("it is another guest") if broken == "open" else None
    host.guest.fails = broken == "discard"
    host.guest.alive = broken != "gone"
    assert ask() == EXIT_OK
    assert said[-1] == ("FAILED", DEAD)


@pytest.mark.parametrize(
    ("alive", "running", "word"),
    [(True, True, "RUNNING"), (True, False, "RAN"), (False, False, "RAN")],
)
def test_a_guest_that_was_started(
    host: Host, said: Said, alive: bool, running: bool, word: str
) -> None:
    record = host.record(STARTED)
    host.guest.alive, host.guest.running = alive, running
    assert ask() == EXIT_OK
    assert said == [("HELLO", STARTED), (word, STARTED)]
    # The files that a killed bhyrecv has left of a running guest's start are removed.
    tidied = [("clear", STARTED), ("close", STARTED)] if word == "RUNNING" else []
    assert host.guest.asked == [("close", STARTED), *tidied]
    assert host.roles["destination"].all() == [record]


def test_a_started_guest_that_cannot_be_looked_at_may_have_run(
    host: Host, said: Said, capfd: pytest.CaptureFixture[str]
) -> None:
    """The hypervisor may have another client; -q answers even so."""
    host.record(STARTED)
    host.error = GuestError("it has another client")
    assert ask() == EXIT_OK
    assert said[-1] == ("RAN", STARTED)
    assert "it has another client" in capfd.readouterr().err


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_guest_that_nobody_can_release_any_more_has_failed(
    host: Host, said: Said, monkeypatch: pytest.MonkeyPatch, is_alone: bool
) -> None:
    """bhyrecv was killed between record and release: -q records DEAD before it answers."""
    host.record(STARTED)
    monkeypatch.setattr(hypervisors, "was_never_released", lambda revive: is_alone)
    assert ask() == EXIT_OK
    if is_alone:
        assert said[-1] == ("FAILED", DEAD)
        assert host.guest.asked[-2:] == [("discard", DEAD), ("close", DEAD)]
    else:
        assert said[-1] == ("RAN", STARTED)


def test_a_loaded_guest_may_have_run(host: Host, said: Said) -> None:
    host.record(LOADED)
    assert ask() == EXIT_OK
    assert said == [("HELLO", LOADED), ("RAN", LOADED)]
    assert host.opened == []


def test_another_stream_is_left_alone(host: Host, said: Said) -> None:
    host.record(READY, B)
    host.record(DEAD, A)
    ask()
    assert host.opened == [{"id": A}]
    assert sorted(host.phases("destination")) == [DEAD, READY]


# While the guest is being started.


def test_a_start_is_waited_for(host: Host, said: Said, clock: Clock) -> None:
    host.record(STARTED)
    lock = Lock(host.base, f"stream-{A}", "the stream")

    def started() -> None:
        assert host.opened == []
        host.guest.running = True
        lock.release()

    clock.on_sleep = started
    assert ask() == EXIT_OK
    assert said[-1] == ("RUNNING", STARTED)
    Lock(host.base, f"stream-{A}", "the stream").release()


def test_a_start_that_goes_on_for_long_may_have_been_one(
    host: Host, said: Said, clock: Clock
) -> None:
    host.record(STARTED)
    host.guest.running = True

    def pass_on() -> None:
        clock.now_ns += 15 * NS

    clock.on_sleep = pass_on
    with Lock(host.base, f"stream-{A}", "the stream"):
        assert ask() == EXIT_OK
    assert said[-1] == ("RAN", STARTED)
    assert host.opened == []


def test_a_start_that_failed_meanwhile_has_failed(host: Host, said: Said, clock: Clock) -> None:
    host.record(STARTED)
    lock = Lock(host.base, f"stream-{A}", "the stream")

    def failed() -> None:
        host.record(DEAD)
        lock.release()

    clock.on_sleep = failed
    assert ask() == EXIT_OK
    assert said[-1] == ("FAILED", DEAD)


def test_a_guest_that_is_started_just_now_is_not_dead(
    host: Host, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GO came after -q had read the record, and before -q could change it."""
    host.record(READY)
    host.guest.running = True
    change = Records.change

    def late(records: Records, id_: str, before: str, after: str) -> bool:
        host.record(STARTED)
        return change(records, id_, before, after)

    monkeypatch.setattr(Records, "change", late)
    assert ask() == EXIT_OK
    assert said == [("HELLO", READY), ("RUNNING", STARTED)]
    assert "discard" not in [what for what, _ in host.guest.asked]


# The command line.


@pytest.mark.parametrize(
    "id_",
    [
        "",
        "web1",
        A[1:],
        A + "a",
        A + "\n",
        "A" * 32,
        "g" * 32,
        "../" + A[3:],
        " " + A,
        "\u0661" * 32,
    ],
)
def test_what_is_no_stream_id_is_refused_before_anything_is_said(
    host: Host, said: Said, id_: str
) -> None:
    with pytest.raises(UsageError, match="not a stream id, 32 hexadecimal digits"):
        ask(id_)
    assert said == []


def test_the_answers_go_to_standard_output_and_the_rest_does_not(host: Host) -> None:
    host.record(LOADED)
    argv = [sys.executable, str(ROOT / "bhyrecv"), "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    answers = {}
    for id_ in (A, B):
        done = subprocess.run([*argv, id_], capture_output=True, env=environment, timeout=60)
        found = [unpack(line) for line in done.stdout.splitlines(keepends=True)]
        assert found[0] == Answer(id_, "HELLO", (host_id(host.base), str(host.base)))
        answers[id_] = (done.returncode, [answer.word for answer in found])
    assert answers == {A: (0, ["HELLO", "RAN"]), B: (69, ["HELLO", "UNKNOWN"])}

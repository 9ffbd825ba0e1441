"""A recorded guest, and what is done to it when bhysend is gone, also by a second process."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from bhystream.errors import BhyError, GuestEndedError, GuestError, InputOutputError
from bhystream.guest import GO, HELD, MOVED, PAUSED
from bhystream.handover.answers import Answer
from bhystream.handover.handshake import RECORD, Act, Event
from bhystream.handover.recorded import RecordedGuest, asking, event_of, with_peer
from bhystream.handover.state import Record, Records
from bhystream.handover.where import in_doubt
from support.recorded import A, B, Host

HELLO = Answer(A, "HELLO", ("hv2/a1", "/d"))
PEER = ("hv2/a1", "/d")
RECORDED = Record(A, "web1", "qemu:/web1", "lock-1", GO, {}, host="hv2/a1", directory="/d")
ROWS = sorted(RECORD, key=str)
CUTS = [(*row, acts) for row in ROWS for acts in range(len(RECORD[row]))]
OTHERS = [
    (phase, event)
    for phase in (PAUSED, HELD, GO, MOVED)
    for event in Event
    if (phase, event) not in RECORD
]


def settle(host: Host, record: Record, event: Event) -> None:
    RecordedGuest(host.roles["source"], record).settle(event)


def ended(host: Host) -> list[str]:
    """Return what the guest was asked to do."""
    return [what for what, _ in host.guest.asked if what != "close"]


# The acts of a row.

# What the guest is asked, the record's phase at that time, and the records that are left.
EXPECTED: dict[tuple[str, Event], tuple[tuple[str, str], list[str]]] = {
    (PAUSED, Event.ALONE): (("resume", PAUSED), []),
    (PAUSED, Event.FAILED): (("resume", PAUSED), []),
    (GO, Event.RUNNING): (("discard hv2", MOVED), []),
    (GO, Event.FAILED): (("resume", PAUSED), []),
    (MOVED, Event.ALONE): (("discard hv2", MOVED), []),
    (MOVED, Event.RUNNING): (("discard hv2", MOVED), []),
}


def test_every_row_is_tested() -> None:
    assert set(EXPECTED) == set(RECORD)


@pytest.mark.parametrize(("phase", "event"), ROWS)
def test_a_row_is_done_with_its_record_first(host: Host, phase: str, event: Event) -> None:
    asked, left = EXPECTED[phase, event]
    record = host.record(phase, peer=PEER)
    settle(host, record, event)
    assert host.guest.asked == [asked, ("close", asked[1])]
    assert host.phases("source") == left


@pytest.mark.parametrize(("phase", "event"), ROWS)
def test_a_row_may_be_done_twice(host: Host, phase: str, event: Event) -> None:
    """The second process found the record before the first had acted."""
    asked, left = EXPECTED[phase, event]
    record = host.record(phase, peer=PEER)
    for _ in range(2):
        settle(host, record, event)
        assert host.phases("source") == left
        host.guest.alive = host.guest.alive and "discard hv2" not in ended(host)
    assert set(ended(host)) == {asked[0]}


class Killed(BaseException):
    """Ends a process between two acts."""


class Mortal(RecordedGuest):
    """A process that is killed after so many acts."""

    def __init__(self, records: Records, record: Record, acts: int) -> None:
        super().__init__(records, record)
        self.left = acts

    def _do(self, act: Act) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1
        super()._do(act)


@pytest.mark.parametrize(("phase", "event", "acts"), CUTS)
def test_one_who_finds_the_record_of_a_killed_one_ends_it(
    host: Host, phase: str, event: Event, acts: int
) -> None:
    """The record that it finds leads to the same end, also without the answer."""
    asked, left = EXPECTED[phase, event]
    with pytest.raises(Killed):
        Mortal(host.roles["source"], host.record(phase, peer=PEER), acts).settle(event)
    host.guest.alive = "discard hv2" not in ended(host)
    found = host.roles["source"].get(A)
    assert found is not None
    settle(host, found, event if acts == 0 else Event.ALONE)
    assert host.phases("source") == left
    assert set(ended(host)) == {asked[0]}


@pytest.mark.parametrize(("phase", "event"), OTHERS)
def test_what_is_in_no_row_is_left_as_it_stands(host: Host, phase: str, event: Event) -> None:
    record = host.record(phase, peer=PEER)
    settle(host, record, event)
    assert host.opened == []
    assert host.roles["source"].all() == [record]


@pytest.mark.parametrize(("phase", "event"), ROWS)
def test_a_guest_that_is_gone(host: Host, phase: str, event: Event) -> None:
    """Such a guest cannot be resumed, and need not be ended."""
    asked, left = EXPECTED[phase, event]
    host.guest.alive = False
    record = host.record(phase, peer=PEER)
    if asked[0] == "resume":
        with pytest.raises(GuestEndedError, match="guest web1: its hypervisor is gone"):
            settle(host, record, event)
        assert host.phases("source") == [PAUSED]
    else:
        settle(host, record, event)
        assert host.phases("source") == left
    # The rest of the guest is removed.
    gone = {"resume": ["clear"], "discard hv2": ["discard hv2"]}
    assert ended(host) == gone[asked[0]]


@pytest.mark.parametrize(("phase", "event"), ROWS)
def test_a_guest_that_does_not_answer_is_tried_again(host: Host, phase: str, event: Event) -> None:
    asked, left = EXPECTED[phase, event]
    recorded = RecordedGuest(host.roles["source"], host.record(phase))
    host.guest.fails = True
    with pytest.raises(GuestError, match="it does not answer"):
        recorded.settle(event)
    assert host.guest.asked[-1][0] == "close"
    assert host.phases("source") == [asked[1]]
    host.guest.fails = False
    recorded.settle(event if asked[1] == phase else Event.ALONE)
    assert host.phases("source") == left


def test_a_record_is_forgotten(host: Host) -> None:
    RecordedGuest(host.roles["source"], host.record(PAUSED)).forget()
    assert host.phases("source") == []


# The answers that came back.


@pytest.mark.parametrize(
    ("word", "event"),
    [
        ("RUNNING", Event.RUNNING),
        ("FAILED", Event.FAILED),
        ("RAN", Event.ALONE),
        ("UNKNOWN", Event.ALONE),
        ("REFUSED", Event.ALONE),
        ("READY", Event.ALONE),
    ],
)
def test_what_an_answer_is(word: str, event: Event) -> None:
    assert event_of(RECORDED, HELLO, Answer(A, word)) == event


@pytest.mark.parametrize(
    "hello",
    [
        None,
        Answer(B, "HELLO", HELLO.args),
        Answer(A, "HELLO", ("hv2/a2", "/d")),
        Answer(A, "HELLO", ("hv3/a1", "/d")),
        Answer(A, "HELLO", ("hv2/a1", "/e")),
    ],
)
@pytest.mark.parametrize("word", ["RUNNING", "FAILED"])
def test_an_answer_of_another_says_nothing(hello: Answer | None, word: str) -> None:
    assert event_of(RECORDED, hello, Answer(A, word)) == Event.ALONE


def test_no_answer_says_nothing() -> None:
    assert event_of(RECORDED, HELLO, None) == Event.ALONE


def test_before_go_any_host_may_have_failed() -> None:
    before = RECORDED._replace(host="", directory="")
    assert event_of(before, HELLO, Answer(A, "FAILED")) == Event.FAILED


def test_a_record_takes_the_destination_of_hello() -> None:
    assert with_peer(RECORDED._replace(host="", directory=""), HELLO) == RECORDED


# The way out of doubt.


def remote_shell(words: list[str]) -> tuple[str, list[str]]:
    """Return the host, and what its shell makes of the words after it, as with ssh(1)."""
    at = words.index("hv2")
    return words[at], shlex.split(" ".join(words[at + 1 :]))


def pipeline(line: str) -> list[list[str]]:
    """Return the words of each command of a line, as a shell reads it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>()")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if word == "|":
            found.append([])
        else:
            found[-1].append(word)
    return found


@pytest.fixture(params=["/s", "/a b", "/it's", '/"$HOME";x|y', "/\u00fc"])
def directory(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def test_the_destination_is_asked_there_and_answers_here(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BHYSEND_STATE_DIR", "relative")
    lines = in_doubt(RECORDED._replace(directory=directory), Path(directory)).splitlines()
    there, here = pipeline(lines[1])
    host, words = remote_shell(there)
    name = f"BHYSEND_STATE_DIR={directory}"
    assert (there[0], host) == ("ssh", "hv2")
    assert words == ["env", name, "bhyrecv", "-q", A]
    assert here == ["env", name, "bhysend", "-A"]
    assert pipeline(lines[3]) == [["env", name, "bhysend", "--resume", "--in-doubt", A]]


@pytest.mark.parametrize(
    ("system", "directory"), [("Linux", "/var/lib/bhysend"), ("FreeBSD", "/var/db/bhysend")]
)
def test_directories_of_their_own_need_no_words(
    monkeypatch: pytest.MonkeyPatch, system: str, directory: str
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(sysname=system))
    monkeypatch.delenv("BHYSEND_STATE_DIR", raising=False)
    record = RECORDED._replace(directory=directory)
    lines = in_doubt(record, Path("/root/.local/state/bhysend")).splitlines()
    assert lines == [
        "it stands paused here until hv2 has answered; ask it:",
        f"  ssh hv2 bhyrecv -q {A} | bhysend -A",
        "if hv2 is lost, and the guest surely does not run there:",
        f"  bhysend --resume --in-doubt {A}",
    ]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["ssh", "hv2", "bhyrecv", "web1"], ["ssh", "hv2", "bhyrecv"]),
        (["ssh", "-p", "22", "hv2", "/opt/bhyrecv"], ["ssh", "-p", "22", "hv2", "/opt/bhyrecv"]),
        (["bhyrecv"], ["bhyrecv"]),
        (["jexec", "a b", "bhyrecv", "-v"], ["jexec", "a b", "bhyrecv"]),
        (["ssh", "hv2", "zstd -d | bhyrecv"], []),
        (["sh", "-c", "bhyrecv -v"], []),
        (["sh", "-c", "zstd | ssh hv2 /opt/bhyrecv"], []),
        (["ssh", "hv2", "zstd -d | /opt/bhyrecv"], []),
        ([], []),
    ],
)
def test_a_command_is_asked_by_its_own_words(command: list[str], words: list[str]) -> None:
    assert asking(command) == words


def test_the_words_of_a_command_come_back(directory: str) -> None:
    name = f"BHYSEND_STATE_DIR={directory}"
    record = RECORDED._replace(directory=directory)
    far = record._replace(ask=("/usr/bin/ssh", "-p", "22", "hv2", "/opt/bhyrecv"))
    there = pipeline(in_doubt(far, Path("/s")).splitlines()[1])[0]
    assert there[:3] == ["/usr/bin/ssh", "-p", "22"]
    assert remote_shell(there)[1] == ["env", name, "/opt/bhyrecv", "-q", A]
    near = record._replace(ask=("jexec", "a b", "bhyrecv"))
    there = pipeline(in_doubt(near, Path("/s")).splitlines()[1])[0]
    assert there == ["env", name, "jexec", "a b", "bhyrecv", "-q", A]


def test_a_gone_guest_is_an_error_of_the_guest() -> None:
    assert issubclass(GuestEndedError, GuestError) and issubclass(GuestError, BhyError)
    assert GuestEndedError("x").status == 69


@pytest.mark.parametrize(
    ("phase", "event", "first"),
    [(GO, Event.FAILED, Act.RECORD_PAUSED), (GO, Event.RUNNING, Act.RECORD_MOVED)],
)
def test_a_record_that_could_not_be_written_is_written_by_the_second_try(
    host: Host, phase: str, event: Event, first: Act, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest is not touched before, whatever the object remembers of the first try."""
    asked, left = EXPECTED[phase, event]
    record = host.record(phase, peer=PEER)
    recorded = RecordedGuest(host.roles["source"], record)

    def write(*_: object) -> None:
        raise InputOutputError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Records, "write", write)
        for _ in range(2):
            with pytest.raises(InputOutputError):
                recorded.settle(event)
            assert recorded.record == record
            assert list(recorded.undone) == list(RECORD[phase, event])
            assert recorded.undone[0] == first
    assert ended(host) == []
    recorded.settle(event)
    assert host.guest.asked == [asked, ("close", asked[1])]  # asked at that phase on disk
    assert host.phases("source") == left and not recorded.undone


def test_what_is_left_after_the_guest_was_resumed_is_its_record(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = RecordedGuest(host.roles["source"], host.record(PAUSED))

    def remove(*_: object) -> None:
        raise InputOutputError("Input/output error")

    with monkeypatch.context() as patch, pytest.raises(InputOutputError):
        patch.setattr(Records, "remove", remove)
        recorded.settle(Event.ALONE)
    assert list(recorded.undone) == [Act.FORGET]
    recorded.settle(Event.ALONE)
    assert ended(host) == ["resume"]
    assert host.phases("source") == []

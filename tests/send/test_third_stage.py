"""bhysend -A with a bhysend: bhysend -A hands on answers, and ends with bhysend's status."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.guest import GO
from bhystream.handover.answers import Answer
from bhystream.handover.state import Records
from bhystream.send.third_stage import Bhysend
from support.bhysend import Brief, Source
from support.third_stage import (
    FAILED,
    HELLO,
    ID,
    LIMIT_S,
    NAMES,
    OTHER,
    READY,
    RECORD,
    RUNNING,
    ended,
    feed,
    hang_up,
    line,
    start,
)

# With a bhysend.


@pytest.fixture
def source(base: Path) -> Iterator[Source]:
    made = Source(base).listen()
    yield made
    made.rendezvous.close(70)


@pytest.mark.parametrize("names", [(), ("web1",), ("qemu:/web1",)])
@pytest.mark.parametrize("status", [0, 76, 81])
def test_it_ends_with_the_status_that_it_is_told(
    source: Source, names: tuple[str, ...], status: int
) -> None:
    third = start(*names)
    feed(third, HELLO + RUNNING)
    assert source.final() == "RUNNING"
    source.rendezvous.close(status)
    assert ended(third) == (status, [], "")


def test_every_answer_is_handed_on_and_noise_is_shown(source: Source) -> None:
    third = start()
    feed(third, b"Last login: Mon\n" + HELLO + line("SEEN", "4") + line("ACCEPT") + READY)
    assert source.inbox.wait(lambda: source.inbox.nonce is not None, LIMIT_S)
    assert (source.inbox.seen, source.inbox.accepted, source.inbox.nonce) == (4, True, bytes(16))
    assert source.inbox.hello == Answer(ID, "HELLO", ("hv2/a1", "/d"))
    source.rendezvous.close(0)
    assert ended(third) == (0, [], "bhysend: Last login: Mon\n")
    assert source.noise == []


def test_the_end_of_its_input_is_handed_on_and_the_status_waited_for(source: Source) -> None:
    third = start()
    feed(third, HELLO)
    hang_up(third)
    assert source.final() == ""
    assert source.inbox.lost == "the way back was closed"
    source.rendezvous.close(69)
    assert ended(third) == (69, [], "")


def test_an_interrupt_is_bhysends_to_decide(source: Source) -> None:
    third = start()
    feed(third, HELLO)
    assert source.said_hello()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP):
        third.send_signal(number)
    feed(third, RUNNING)
    assert source.final() == "RUNNING"
    source.rendezvous.close(0)
    assert ended(third) == (0, [], "")


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_ends_the_wait_for_the_end_of_the_input(source: Source, when: str) -> None:
    """before, after: the status was told."""
    third = start(guest="patient")
    feed(third, HELLO + RUNNING)
    assert source.final() == "RUNNING"
    if when == "before":
        third.send_signal(signal.SIGINT)
        # A later answer proves that the signal was taken.
        feed(third, HELLO)
    source.rendezvous.close(0)
    while when == "after" and third.poll() is None:
        third.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert third.wait(LIMIT_S) == 0
    assert ended(third) == (0, [], "")


@pytest.mark.parametrize("phase", [None, GO])
def test_an_interrupt_before_any_answer_says_whether_a_guest_is_in_doubt(
    base: Path, phase: str | None
) -> None:
    if phase:
        Records(base, "source").write(RECORD.with_phase(phase))
    third = start()
    feed(third, b"Last login: Mon\n")
    assert third.stderr
    assert third.stderr.readline() == b"bhysend: Last login: Mon\n"
    third.send_signal(signal.SIGINT)
    assert third.wait(LIMIT_S) == (81 if phase else 69)
    said = third.stderr.read().decode()
    assert said.startswith("bhysend: interrupted by SIGINT\nbhysend: no answer came")
    assert ("in doubt, and paused here: web1" in said) == bool(phase)


def test_what_still_comes_when_it_was_told_is_read(source: Source) -> None:
    """If not, the process before bhysend -A in the pipeline would end with a broken pipe."""
    third = start()
    feed(third, HELLO + FAILED)
    assert source.final() == "FAILED"
    source.rendezvous.close(69)
    for _ in range(100):
        feed(third, line("SEEN", "1") * 1000)
    assert ended(third) == (69, [], "")


def test_an_input_that_does_not_end_is_left_when_it_was_told(source: Source) -> None:
    third = start(guest="impatient")
    feed(third, HELLO + RUNNING)
    assert source.final() == "RUNNING"
    source.rendezvous.close(0)
    assert third.wait(LIMIT_S) == 0
    assert ended(third) == (0, [], "")


def test_another_guests_stream_is_not_handed_on(source: Source) -> None:
    third = start("web2")
    feed(third, HELLO + RUNNING)
    assert source.final() == ""
    assert source.inbox.hello is None
    source.rendezvous.close(69)
    status, acts, err = ended(third)
    assert (status, acts) == (69, [])
    assert err == f"bhysend: stream {ID} is of guest web1, not web2\n"


def test_garbage_is_not_handed_on_and_the_rest_is_read(source: Source) -> None:
    """bhysend then says where the guest is, and bhysend's status counts."""
    third = start()
    feed(third, HELLO + b"garbage\n" + RUNNING + b"x" * (1 << 20))
    assert source.final() == ""
    assert source.inbox.lost
    source.rendezvous.close(81)
    assert ended(third) == (81, [], "bhysend: not an answer\n")


def test_the_answers_of_another_stream_find_no_bhysend(source: Source) -> None:
    status, _, err = ended(start(), line("HELLO", "hv2/a1", "/d", id_=OTHER))
    assert status == 69
    assert f"neither a bhysend nor a guest of stream {OTHER} is here" in err
    assert source.inbox.hello is None


def test_a_status_that_was_told_is_heard_when_it_hangs_up() -> None:
    """bhysend has told the status and ended before the next answer is handed on."""
    ours, theirs = socket.socketpair()
    theirs.sendall(b"status 76\n")
    theirs.close()
    bhysend = Bhysend(ours)
    bhysend.tell(Answer(ID, "SEEN", ("1",)))
    assert bhysend.status == 76
    assert not bhysend.is_there


@pytest.mark.parametrize("verdict", [b"", b"status", b"status 8", b"other 8\n"])
def test_what_is_no_status_is_none(verdict: bytes) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(verdict)
    theirs.close()
    bhysend = Bhysend(ours)
    while bhysend.is_there:
        bhysend.hear()
    assert bhysend.status is None


# With a bhysend that is killed.


def killed(base: Path) -> None:
    """Start a bhysend that is killed when the destination has said READY."""
    Brief(base, json.dumps(NAMES).encode() + b"\n", b"READY")


@pytest.mark.parametrize(
    ("answers", "status", "says"),
    [
        (HELLO + READY, 69, "bhysend is gone; the guest runs on here"),
        (HELLO + READY + FAILED, 69, "bhysend is gone; the guest runs on here"),
        (HELLO + READY + RUNNING, 0, ""),
    ],
)
def test_without_a_record_a_killed_bhysend_had_settled_it(
    base: Path, answers: bytes, status: int, says: str
) -> None:
    killed(base)
    found, acts, err = ended(start(), answers)
    assert (found, acts) == (status, [])
    assert says in err


@pytest.mark.parametrize(
    ("final", "status", "acts", "left"),
    [
        (RUNNING, 0, ["discard", "close"], []),
        (FAILED, 69, ["resume", "close"], []),
        (b"", 81, [], [GO]),
    ],
)
def test_the_record_of_a_killed_bhysend_is_acted_on(
    base: Path, records: Records, final: bytes, status: int, acts: list[str], left: list[str]
) -> None:
    records.write(RECORD.with_phase(GO))
    killed(base)
    found, done, _ = ended(start(), HELLO + READY + final)
    assert (found, done) == (status, acts)
    assert [record.phase for record in records.all()] == left

"""bhysend -A if no bhysend lives: bhysend -A acts on answers from a pipe, by the record."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bhystream import hypervisors
from bhystream.errors import BhyError, GuestError, HeldError, InDoubtError, InputOutputError
from bhystream.guest import GO, HELD, MOVED, PAUSED
from bhystream.handover.answers import Answer
from bhystream.handover.state import Lock, Records
from bhystream.handover.where import in_doubt
from bhystream.report import Console
from bhystream.send.recovery import Recovery
from bhystream.signals import Interrupts
from support.paused import Paused
from support.third_stage import (
    FAILED,
    HELLO,
    ID,
    LIMIT_S,
    OTHER,
    RAN,
    READY,
    RECORD,
    REFUSED,
    ROOT,
    RUNNING,
    UNKNOWN,
    ended,
    feed,
    hang_up,
    line,
    start,
)

# No bhysend, but a record.

ELSEWHERE = line("HELLO", "hv3/b2", "/d")
ELSEWHERE_TOO = line("HELLO", "hv2/a1", "/e")
IN_DOUBT = "in doubt: "
RESUME, DISCARD = f"bhysend --resume {ID}", f"bhysend --discard {ID}"
WENT = IN_DOUBT + "the stream went to hv2/a1 (/d)"


@pytest.mark.parametrize(
    ("phase", "answers", "status", "acts", "left", "says"),
    [
        (PAUSED, HELLO, 69, "resume close", None, "hv2: it was not started there"),
        (PAUSED, HELLO + FAILED, 69, "resume close", None, "hv2: no disk"),
        (PAUSED, HELLO + UNKNOWN, 69, "resume close", None, "guest web1: it runs here"),
        (GO, HELLO + RUNNING, 0, "discard close", None, "web1: it runs on hv2, and is gone here"),
        (GO, HELLO + FAILED, 69, "resume close", None, "hv2: no disk"),
        (GO, HELLO + RAN, 81, "", GO, IN_DOUBT + "hv2 cannot say whether the guest ran there"),
        (GO, HELLO + UNKNOWN, 81, "", GO, IN_DOUBT + "hv2 does not know the stream"),
        (GO, HELLO, 81, "", GO, IN_DOUBT + "no answer came from hv2"),
        (GO, HELLO + READY, 81, "", GO, IN_DOUBT + "no answer came from hv2"),
        (GO, HELLO + REFUSED, 81, "", GO, IN_DOUBT + "no answer came from hv2"),
        (GO, ELSEWHERE + RUNNING, 81, "", GO, WENT + ", not to hv3"),
        (GO, ELSEWHERE + FAILED, 81, "", GO, WENT + ", not to hv3"),
        (GO, ELSEWHERE_TOO + FAILED, 81, "", GO, WENT + ", not to hv2"),
        (MOVED, HELLO + RUNNING, 0, "discard close", None, "it runs on hv2, and is gone here"),
        (MOVED, HELLO, 0, "discard close", None, "it runs on hv2, and is gone here"),
        (MOVED, ELSEWHERE + UNKNOWN, 0, "discard close", None, "it runs on hv2, and is gone here"),
        (HELD, HELLO + FAILED, 80, "", HELD, f"hv2 says that it never ran there: {RESUME}"),
        (HELD, HELLO + RUNNING, 80, "", HELD, f"hv2 says that it runs there: {DISCARD}"),
        (HELD, HELLO + RAN, 80, "", HELD, "guest web1: held here"),
        (PAUSED, HELLO + RUNNING, 80, "", PAUSED, "paused here; hv2 says that it started the"),
        (PAUSED, HELLO + RAN, 80, "", PAUSED, "paused here; hv2 says that it started the guest"),
    ],
)  # fmt: skip
def test_what_a_record_and_the_answers_come_to(
    records: Records,
    phase: str,
    answers: bytes,
    status: int,
    acts: str,
    left: str | None,
    says: str,
) -> None:
    records.write(RECORD.with_phase(phase))
    found, done, err = ended(start(), answers)
    assert (found, done) == (status, acts.split())
    assert [record.phase for record in records.all()] == ([left] if left else [])
    assert says in err


def test_a_record_that_names_no_host_takes_the_answer_of_any(records: Records) -> None:
    # The guest was paused, and GO was never recorded: no answering host has run the guest.
    records.write(RECORD._replace(host="", directory=""))
    status, acts, err = ended(start(), ELSEWHERE + FAILED)
    assert (status, acts) == (69, ["resume", "close"])
    assert err.startswith("bhysend: hv3: no disk\n")


@pytest.mark.parametrize("answers", [b"", HELLO, HELLO + FAILED, HELLO + RUNNING])
def test_a_guest_whose_record_is_broken_is_in_doubt(base: Path, answers: bytes) -> None:
    path = base / f"source/{ID}.json"
    path.touch()
    status, acts, err = ended(start(), answers)
    assert (status, acts) == (81, [])
    assert f"the record {path} is broken" in err
    assert path.exists()


def test_doubt_comes_with_the_way_out(base: Path, records: Records) -> None:
    records.write(RECORD.with_phase(GO))
    _, _, err = ended(start(), HELLO)
    assert in_doubt(RECORD, base).splitlines() == [
        line.removeprefix("bhysend: ") for line in err.splitlines()[1:]
    ]


@pytest.mark.parametrize(
    ("phase", "final", "status", "done", "says"),
    [
        (PAUSED, FAILED, 81, "clear", "its hypervisor here is gone: the guest runs nowhere"),
        (GO, FAILED, 81, "clear", "its hypervisor here is gone: the guest runs nowhere"),
        (GO, RUNNING, 0, "discard", "guest web1: it runs on hv2, and is gone here"),
        (MOVED, b"", 0, "discard", "guest web1: it runs on hv2, and is gone here"),
    ],
)
def test_a_guest_that_is_gone_is_forgotten(
    records: Records, phase: str, final: bytes, status: int, done: str, says: str
) -> None:
    records.write(RECORD.with_phase(phase))
    found, acts, err = ended(start(guest="gone"), HELLO + final)
    assert (found, acts) == (status, [done, "close"])
    assert says in err
    assert records.all() == []


@pytest.mark.parametrize("name", ["web1", "qemu:/web1"])
def test_the_guest_may_be_named(records: Records, name: str) -> None:
    records.write(RECORD.with_phase(GO))
    assert ended(start(name), HELLO + RUNNING)[:2] == (0, ["discard", "close"])


def test_another_guests_record_is_left_alone(records: Records) -> None:
    records.write(RECORD.with_phase(GO))
    status, acts, err = ended(start("web2"), HELLO + RUNNING)
    assert (status, acts) == (64, [])
    assert f"stream {ID} is of guest web1, not web2" in err
    assert [record.phase for record in records.all()] == [GO]


@pytest.mark.parametrize(
    "after",
    [b"garbage\n", ELSEWHERE, line("RUNNING", id_=OTHER), b"x" * 600, FAILED[:-1] + b" x\n"],
)
def test_answers_with_garbage_change_nothing(records: Records, after: bytes) -> None:
    """Answers before the garbage change nothing either: their sender cannot be believed."""
    record = RECORD.with_phase(GO)
    records.write(record)
    for answers in (HELLO + RUNNING + after, HELLO + after + FAILED):
        status, acts, err = ended(start(), answers)
        assert (status, acts) == (81, [])
        assert "in doubt: the answers cannot be believed" in err
        assert f"bhyrecv -q {ID} | " in err
    assert records.all() == [record]


def test_garbage_of_a_stream_that_is_not_here_is_a_usage_error(base: Path) -> None:
    status, acts, err = ended(start(), HELLO + b"garbage\n")
    assert (status, acts) == (64, [])
    assert "the answers were not handed on" in err


@pytest.mark.parametrize("answers", [b"", b"ssh: no route to host\n", HELLO[:-1]])
def test_no_answer_changes_nothing(records: Records, answers: bytes) -> None:
    record = RECORD.with_phase(GO)
    records.write(record)
    status, acts, err = ended(start(), answers)
    assert (status, acts) == (81, [])
    assert "no answer came; in doubt, and paused here: web1" in err
    assert f"ssh hv2 env BHYSEND_STATE_DIR=/d bhyrecv -q {ID} | " in err
    assert f"bhysend --resume --in-doubt {ID}" in err
    assert records.all() == [record]
    status, acts, err = ended(start("another"), answers)
    assert (status, acts) == (69, [])
    assert "no answer came, and no guest is in doubt here" in err


@pytest.mark.parametrize("phase", [PAUSED, HELD])
def test_no_answer_puts_no_other_guest_in_doubt(records: Records, phase: str) -> None:
    records.write(RECORD.with_phase(phase))
    assert ended(start(), b"")[:2] == (69, [])


# Neither a bhysend nor a record.


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        (HELLO, 69),
        (HELLO + REFUSED, 69),
        (HELLO + FAILED, 69),
        (HELLO + UNKNOWN, 69),
        (HELLO + READY + FAILED, 81),
        (HELLO + READY, 81),
        (HELLO + RUNNING, 81),
        (HELLO + RAN, 81),
    ],
)
def test_answers_to_nobody(base: Path, answers: bytes, status: int) -> None:
    found, acts, err = ended(start(), answers)
    assert (found, acts) == (status, [])
    assert f"neither a bhysend nor a guest of stream {ID} is here" in err
    assert f", {base})" in err
    hint = "record is another user's" if status == 81 else "nothing was started at the destination"
    assert hint in err


# The keeper's lock.


def waiting(data: bytes) -> subprocess.Popen[bytes]:
    """Start a third stage with these answers; return when the third stage waits for the lock."""
    third = start()
    feed(third, data)
    hang_up(third)
    assert third.stdout and third.stdout.readline() == b"waits\n"
    return third


def test_it_waits_for_the_keeper_and_finds_what_that_did(base: Path, records: Records) -> None:
    records.write(RECORD)
    with Lock(base, RECORD.lock, "guest web1"):
        third = waiting(HELLO + READY)
        records.remove(ID)
    status, acts, _ = ended(third)
    assert (status, set(acts) - {"waits"}) == (81, set())


def test_it_acts_on_the_record_as_it_is_under_the_lock(base: Path, records: Records) -> None:
    records.write(RECORD)
    with Lock(base, RECORD.lock, "guest web1"):
        third = waiting(HELLO + RUNNING)
        records.write(RECORD.with_phase(GO))
    status, acts, _ = ended(third)
    assert (status, [act for act in acts if act != "waits"]) == (0, ["discard", "close"])


def test_a_lock_that_is_never_given_up_is_an_error(base: Path, records: Records) -> None:
    records.write(RECORD)
    lock = Lock(base, RECORD.lock, "guest web1")
    status, _, err = ended(start(guest="impatient"), HELLO)
    assert status == 80
    assert "another bhysend or bhyrecv works on it" in err
    assert records.all() == [RECORD]
    doubtful = RECORD.with_phase(GO)
    records.write(doubtful)
    status, _, err = ended(start(guest="impatient"), HELLO + RUNNING)
    assert status == 81
    assert f"bhyrecv -q {ID} | " in err
    assert records.all() == [doubtful]
    lock.release()


def test_the_lock_is_given_up(base: Path, records: Records) -> None:
    records.write(RECORD)
    assert ended(start(), HELLO)[0] == 69
    Lock(base, RECORD.lock, "guest web1").release()


def test_standard_output_is_not_written(base: Path) -> None:
    argv = [sys.executable, str(ROOT / "bhysend"), "-A"]
    done = subprocess.run(
        argv, input=HELLO + RUNNING, capture_output=True, env=os.environ, timeout=LIMIT_S
    )
    assert (done.returncode, done.stdout) == (81, b"")


# An act that fails.


class Stubborn(Paused):
    """A guest whose acts may fail; done: the acts that did not."""

    def __init__(self) -> None:
        self.fails: dict[str, Exception] = {}
        self.done: list[str] = []

    def do(self, act: str, there: str = "") -> None:
        if act in self.fails:
            raise self.fails[act]
        if act != "close":
            self.done.append(act)


def acted(
    base: Path, monkeypatch: pytest.MonkeyPatch, guest: Stubborn, *answers: str, fails: str = ""
) -> BhyError:
    """Let Recovery act on such a guest; fails: the method of Records that fails."""
    words = {word: Answer(ID, word, ("no disk",) if word == "FAILED" else ()) for word in answers}

    def fail(*_: object) -> None:
        raise InputOutputError("Input/output error")

    monkeypatch.setattr(hypervisors, "open_paused", lambda revive: guest)
    if fails:
        monkeypatch.setattr(Records, fails, fail)
    recovery = Recovery(base, Console("bhysend"), None, words, Interrupts())
    with pytest.raises(BhyError) as caught:
        recovery.act(Answer(ID, "HELLO", ("hv2/a1", "/d")), met=False)
    return caught.value


class Early(Interrupts):
    """Gets a signal before anything waits for the lock, or after."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def obey(self) -> None:
        super().obey()
        if getattr(self, "when", "") == "before":
            signal.raise_signal(signal.SIGTERM)

    def ignore(self, tell: Callable[[str], None]) -> None:
        if self.when == "after":
            self.when = ""
            signal.raise_signal(signal.SIGTERM)
        super().ignore(tell)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_about_the_lock_promises_nothing_of_a_guest_in_doubt(
    base: Path, records: Records, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(hypervisors, "open_paused", lambda revive: Stubborn())
    records.write(RECORD.with_phase(GO))
    words = {"RUNNING": Answer(ID, "RUNNING", ())}
    recovery = Recovery(base, Console("bhysend"), None, words, Early(when))
    with pytest.raises(BhyError, match="SIGTERM") as caught:
        recovery.act(Answer(ID, "HELLO", ("hv2/a1", "/d")), met=False)
    assert caught.value.status == 81


@pytest.mark.parametrize("error", [GuestError("busy"), OSError(5, "Input/output error")])
def test_a_guest_that_cannot_be_resumed_is_held_whatever_fails(
    base: Path, records: Records, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    records.write(RECORD.with_phase(PAUSED))
    guest = Stubborn()
    guest.fails["resume"] = error
    told = acted(base, monkeypatch, guest, "FAILED")
    assert isinstance(told, HeldError)
    assert "it stands paused here, and cannot be resumed" in str(told)
    assert told.hint == f"let it run on: {RESUME}"


@pytest.mark.parametrize("answer", ["RUNNING", "FAILED", "RAN"])
def test_a_guest_whose_record_cannot_be_read_is_in_doubt(
    base: Path, records: Records, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    records.write(RECORD.with_phase(GO))
    guest = Stubborn()
    told = acted(base, monkeypatch, guest, answer, fails="get")
    assert isinstance(told, InDoubtError) and str(told) == "Input/output error"
    assert guest.done == []


def test_a_guest_that_was_resumed_is_not_called_paused_for_its_record(
    base: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.write(RECORD.with_phase(PAUSED))
    guest = Stubborn()
    told = acted(base, monkeypatch, guest, "FAILED", fails="remove")
    assert guest.done == ["resume"]
    assert type(told) is GuestError and str(told) == "hv2: no disk"
    assert "guest web1: it runs here; its record stays: Input/output error" in told.hint


def test_a_guest_that_was_ended_is_not_called_left_for_its_record(
    base: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.write(RECORD.with_phase(GO))
    guest = Stubborn()
    told = acted(base, monkeypatch, guest, "RUNNING", fails="remove")
    assert guest.done == ["discard"]
    assert isinstance(told, HeldError)
    assert "it runs on hv2, and is gone here; its record stays" in str(told)


def test_the_verb_that_is_named_is_one_that_the_record_allows(
    base: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RECORD_PAUSED could not be written, so the disk still says GO."""
    records.write(RECORD.with_phase(GO))
    guest = Stubborn()
    told = acted(base, monkeypatch, guest, "FAILED", fails="write")
    assert guest.done == []
    assert isinstance(told, HeldError)
    assert told.hint == f"let it run on: bhysend --resume --in-doubt {ID}"


def test_a_guest_that_is_gone_is_in_doubt_even_if_its_record_stays(
    base: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.write(RECORD.with_phase(PAUSED))
    guest = Stubborn()
    guest.alive = False
    told = acted(base, monkeypatch, guest, "FAILED", fails="remove")
    assert isinstance(told, InDoubtError) and "the guest runs nowhere" in str(told)

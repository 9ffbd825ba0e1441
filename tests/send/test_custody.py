"""A guest in bhysend's custody: what bhysend says if the last act on the guest fails."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from bhystream import hypervisors
from bhystream.errors import (
    BhyError,
    GuestEndedError,
    GuestError,
    HeldError,
    InDoubtError,
    InputOutputError,
    InternalError,
    StaleError,
)
from bhystream.guest import GO, HELD, PAUSED
from bhystream.handover.answers import Answer
from bhystream.handover.handshake import Event
from bhystream.handover.state import Lock, Record, Records
from bhystream.report import Console
from bhystream.send import custody
from bhystream.send.conversation import Conversation, Ready
from bhystream.send.custody import Custody
from bhystream.send.job import Begun, SendJob
from bhystream.send.options import SendOptions
from bhystream.send.precopy import Limits
from bhystream.send.stopwatch import Stopwatch
from bhystream.signals import Signals
from bhystream.stream.format import Feature, Form, Header
from bhystream.stream.writer import Writer
from support.paused import Paused

ID = "00112233445566778899aabbccddeeff"
HELLO = Answer(ID, "HELLO", ("hv2/a1", "/d"))


KEEPERS: list[Keeper] = []


class Keeper:
    """A keeper without a process."""

    pid = 1

    def __init__(self, *_: object) -> None:
        self.dismissed = 0
        self.alive = True
        KEEPERS.append(self)

    def is_alive(self) -> bool:
        return self.alive

    def dismiss(self) -> int:
        self.dismissed += 1
        return 0


class Guest(Paused):
    """A source and its paused guest; each act on it can be made to fail."""

    name = "web1"

    def __init__(self) -> None:
        self.done: list[str] = []
        self.fails: dict[str, BaseException] = {}
        self.closed = 0
        self.preparing: Callable[[], None] = lambda: None
        self.pausing: Callable[[], None] = lambda: None

    def do(self, act: str, there: str = "") -> None:
        if act in self.fails:
            raise self.fails[act]
        self.done.append(act)

    def require_described(self) -> None:
        pass

    def pause(self, stopping: Callable[[], None] = lambda: None) -> Guest:
        self.preparing()
        stopping()
        self.pausing()
        self.do("pause")
        return self

    def require_paused(self) -> None:
        if "require_paused" in self.fails:
            raise self.fails["require_paused"]

    def close(self) -> None:
        self.closed += 1


class Talk:
    host = "hv2"

    class route:
        answer_fd = -1


class Case:
    """One custody, and the objects that it works on."""

    def __init__(self, base: Path) -> None:
        self.guest, self.base = Guest(), base
        self.fd = os.open(os.devnull, os.O_WRONLY)
        self.writer = Writer(self.fd, Header(Form.ANSWERED, Feature(0), bytes.fromhex(ID), 1))
        self.lock = Lock(base, "bhyve-web1", "guest web1")
        opts = SendOptions(guest="web1", limits=Limits(), answered=True)
        job = SendJob(opts, base, Console("bhysend"), Signals(), cast(Any, self.guest), self.lock)
        record = Record(ID, "web1", "web1", "bhyve-web1", PAUSED, {})
        begun = Begun(self.writer, cast(Conversation, Talk()))
        self.watch = Stopwatch()
        self.custody = Custody(job, begun, record, self.watch)

    @property
    def keeper(self) -> Keeper:
        """Return the keeper that was started last."""
        return KEEPERS[-1]

    def commit(self) -> None:
        """Bring the guest to where GO is out."""
        self.custody.pause()
        self.custody.offer()
        self.custody.go(Ready(HELLO, b"n" * 32))


@pytest.fixture
def case(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.setattr(custody, "Keeper", Keeper)
    made = Case(base)
    yield made
    made.lock.release()
    os.close(made.fd)


def recovered(case: Case, act: Callable[[], None]) -> tuple[BhyError | None, str]:
    """Let an act fail; return the error that is reported instead, and where the guest is."""
    with pytest.raises(BhyError) as caught:
        act()
    found = case.custody.recover(caught.value)
    return found.instead, found.where


def test_a_guest_that_runs_there_is_not_said_to_be_resumed(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.commit()

    def remove(*_: object) -> None:
        raise InputOutputError("cannot remove the record: Input/output error")

    monkeypatch.setattr(Records, "remove", remove)
    told, _ = recovered(case, lambda: case.custody.settle(Event.RUNNING, "hv2: it runs"))
    assert isinstance(told, HeldError)
    assert "it runs on hv2, and is gone here; its record stays" in str(told)
    assert "resumed" not in str(told) + told.hint
    assert case.guest.done == ["pause", "discard"]


def test_a_guest_that_cannot_be_ended_here_is_named_with_its_verb(case: Case) -> None:
    case.commit()
    case.guest.fails["discard"] = GuestError("no")
    told, _ = recovered(case, lambda: case.custody.settle(Event.RUNNING, "hv2: it runs"))
    assert isinstance(told, HeldError)
    assert "it runs on hv2, and cannot be ended here: no" in str(told)
    assert told.hint == f"end what is left here: bhysend --discard {ID}"
    assert case.keeper.dismissed == 0  # it goes on trying when bhysend has ended


def test_a_failure_after_go_leaves_the_guest_paused(case: Case) -> None:
    """Whatever fails: only an answer of the destination lets the guest run here again."""
    case.commit()
    told = case.custody.recover(InternalError("the answers cannot be read")).instead
    assert isinstance(told, InDoubtError) and "the answers cannot be read" in str(told)
    assert f"bhysend --resume --in-doubt {ID}" in told.hint
    assert [record.phase for record in Records(case.base, "source").all()] == [GO]
    assert case.guest.done == ["pause"]


@pytest.mark.parametrize("end", [Custody.hold, Custody.release])
def test_a_guest_that_another_program_let_run_is_neither_held_nor_kept(
    case: Case, end: Callable[[Custody], None]
) -> None:
    case.custody.pause()
    case.guest.fails["require_paused"] = StaleError("another program let the guest run")
    told, where = recovered(case, lambda: end(case.custody))
    assert told is None and where.startswith("guest web1: it runs here")
    assert not case.writer.ended
    assert Records(case.base, "source").all() == []


def test_a_guest_whose_hypervisor_is_gone_is_not_left_to_the_keeper(case: Case) -> None:
    case.commit()
    case.guest.fails["resume"] = GuestEndedError("guest web1: its bhyve has ended")
    told, where = recovered(case, lambda: case.custody.settle(Event.FAILED, "hv2: no disk"))
    assert (told, where) == (None, "")
    assert Records(case.base, "source").all() == []


@pytest.mark.parametrize("error", [GuestError("no"), OSError(5, "Input/output error")])
def test_a_guest_that_cannot_be_resumed_is_left_to_the_keeper(case: Case, error: Exception) -> None:
    """This holds for any exception that the hypervisor's side raises."""
    case.custody.pause()
    case.guest.fails["resume"] = error
    told = case.custody.recover(GuestError("the -p command failed")).instead
    assert isinstance(told, HeldError)
    assert str(told).startswith("the -p command failed; and the guest cannot be resumed")
    assert told.hint == "guest web1: its keeper goes on trying; see bhysend -l"
    assert [record.phase for record in Records(case.base, "source").all()] == [PAUSED]


def test_a_guest_that_was_brought_back_is_said_to_have_stood(case: Case) -> None:
    case.custody.pause()
    where = case.custody.recover(GuestError("the -p command failed")).where
    assert where.startswith("guest web1: it runs here; it was paused for ")
    assert Records(case.base, "source").all() == []


def test_what_comes_before_the_stop_is_not_the_pause(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    case.guest.preparing = lambda: now.__setitem__(0, 1000)
    case.guest.pausing = lambda: now.__setitem__(0, 1010)
    case.custody.pause()
    assert case.watch.measured.state_ns == case.watch.elapsed_ns() == 10


def test_a_pause_that_fails_before_the_stop_is_short(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise GuestError("no")

    monkeypatch.setattr(hypervisors, "open_paused", lambda _: case.guest)
    case.guest.preparing = fail
    told, where = recovered(case, case.custody.pause)
    assert told is None
    assert where.endswith(" ms")


def test_a_throttled_guest_is_on_record_and_runs_after_a_failure(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hypervisors, "open_paused", lambda revive: case.guest)
    case.custody.throttle()
    [record] = Records(case.base, "source").all()
    assert (record.phase, record.throttled) == (PAUSED, True)
    assert case.guest.done == []
    found = case.custody.recover(GuestError("the link broke"))
    assert (found.instead, found.where) == (None, "guest web1: it runs here")
    assert "resume" in case.guest.done
    assert Records(case.base, "source").all() == []


def test_a_throttled_guest_that_is_paused_is_no_longer_throttled(case: Case) -> None:
    case.custody.throttle()
    case.custody.pause()
    [record] = Records(case.base, "source").all()
    assert (record.phase, record.throttled) == (PAUSED, False)
    where = case.custody.recover(GuestError("the -p command failed")).where
    assert "it was paused for " in where


def test_ctrl_z_does_not_stop_a_throttled_guest(case: Case) -> None:
    """The guest would stand until the keeper has ended bhysend, and the move with it."""
    signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    case.custody.throttle()
    assert signal.getsignal(signal.SIGTSTP) == signal.SIG_IGN


def test_a_throttle_needs_a_keeper(case: Case) -> None:
    dead = case.keeper
    dead.alive = False
    case.custody.throttle()
    assert case.keeper is not dead and dead.dismissed == 1


def test_a_pause_that_could_not_be_recorded_is_none(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bhysend has asked the hypervisor for nothing: the guest was never paused."""

    def write(*_: object) -> None:
        raise InputOutputError("cannot record the guest: No space left on device")

    monkeypatch.setattr(Records, "write", write)
    monkeypatch.setattr(hypervisors, "open_paused", lambda revive: case.guest)
    told, where = recovered(case, case.custody.pause)
    assert (told, where) == (None, "guest web1: it runs here")
    assert "pause" not in case.guest.done


def test_a_destination_that_failed_is_quoted_if_the_guest_cannot_be_resumed(case: Case) -> None:
    case.commit()
    case.guest.fails["resume"] = GuestError("busy")
    told, _ = recovered(case, lambda: case.custody.settle(Event.FAILED, "hv2: no disk"))
    assert isinstance(told, HeldError)
    assert str(told) == "hv2: no disk; and the guest cannot be resumed: busy"


def test_an_end_that_cannot_be_synced_leaves_the_guest_held_with_what_to_type(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.custody.pause()

    def sync(_: Writer) -> None:
        raise InputOutputError("cannot write the stream: Input/output error")

    monkeypatch.setattr(Writer, "sync", sync)
    told, _ = recovered(case, case.custody.hold)
    assert isinstance(told, HeldError) and "cannot write the stream" in str(told)
    assert "held here" in told.hint
    assert f"bhysend --discard {ID}" in told.hint and f"bhysend --resume {ID}" in told.hint
    assert [record.phase for record in Records(case.base, "source").all()] == [HELD]
    assert case.guest.done == ["pause"]
    assert case.keeper.dismissed == 1  # the guest is the operator's now


@pytest.mark.parametrize("is_offered", [False, True])
def test_a_pipe_that_takes_nothing_is_found_while_the_guest_can_be_resumed(
    case: Case, is_offered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.custody.pause()
    if is_offered:
        case.custody.offer()

    def await_room(_: Writer, seconds: int) -> None:
        raise InputOutputError(f"nothing was taken from the stream for {seconds} s")

    monkeypatch.setattr(Writer, "await_room", await_room)
    told, where = recovered(case, case.custody.await_room)
    assert told is None and where.startswith("guest web1: it runs here; it was paused for ")
    assert case.guest.done == ["pause", "resume"]
    assert Records(case.base, "source").all() == []


def test_the_keeper_is_not_promised_for_a_record_that_it_leaves_alone(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After FAILED neither the record can be written nor the guest be resumed."""
    case.commit()
    case.guest.fails["resume"] = GuestError("busy")

    def write(*_: object) -> None:
        raise InputOutputError("cannot record the guest: No space left on device")

    monkeypatch.setattr(Records, "write", write)
    told, _ = recovered(case, lambda: case.custody.settle(Event.FAILED, "hv2: no disk"))
    assert isinstance(told, HeldError)
    assert str(told) == "hv2: no disk; and the guest cannot be resumed: busy"
    assert told.hint == f"guest web1: let it run on: bhysend --resume --in-doubt {ID}"


def test_a_kept_guest_that_cannot_be_resumed_is_said_once(case: Case) -> None:
    case.custody.pause()
    case.guest.fails["resume"] = GuestError("busy")
    told, _ = recovered(case, case.custody.release)
    assert isinstance(told, HeldError)
    assert str(told) == "guest web1: it stands paused here, and cannot be resumed: busy"


def test_a_keeper_that_has_died_is_dismissed_before_the_next_one(case: Case) -> None:
    first = case.keeper
    first.alive = False
    case.custody.pause()
    assert first.dismissed == 1
    assert case.keeper is not first


def test_the_paused_guest_is_closed_once_nothing_is_done_to_it_any_more(case: Case) -> None:
    case.custody.close()  # never paused
    case.custody.pause()
    assert case.guest.closed == 0
    case.custody.close()
    assert case.guest.closed == 1


@pytest.mark.parametrize("is_offered", [False, True])
def test_a_page_that_changed_is_explained_by_who_let_the_guest_run(
    case: Case, is_offered: bool
) -> None:
    """The destination may be the first to notice, because a page is not what was sent."""
    case.custody.pause()
    if is_offered:
        case.custody.offer()
    case.guest.fails["require_paused"] = StaleError("web1: it was let run", "leave it to bhysend")
    found = case.custody.recover(GuestError("hv2: the bytes of page 3 are not what was sent"))
    assert found.instead is None
    lines = found.where.splitlines()
    assert lines[:2] == ["web1: it was let run", "leave it to bhysend"]
    assert lines[2].startswith("guest web1: it runs here; it was paused for ")
    assert "resume" in case.guest.done


@pytest.mark.parametrize(
    "asked", [GuestError("its QEMU does not answer"), GuestEndedError("ended"), ValueError("odd")]
)
def test_a_guest_that_cannot_be_asked_is_resumed_all_the_same(case: Case, asked: Exception) -> None:
    case.custody.pause()
    case.guest.fails["require_paused"] = asked
    found = case.custody.recover(GuestError("hv2: no disk"))
    assert found.instead is None
    assert found.where.startswith("guest web1: it runs here; it was paused for ")
    assert "resume" in case.guest.done

"""The conversation at the source: what bhysend waits for, how long, and what bhysend concludes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import pytest

from bhystream.errors import (
    BhyError,
    DowntimeError,
    GuestError,
    IncompatibleError,
    InputOutputError,
    Interrupted,
    ReaderGoneError,
    UsageError,
)
from bhystream.handover.answers import Answer, Inbox, LostError, pack
from bhystream.handover.handshake import Event
from bhystream.report import Console
from bhystream.send import conversation, flush
from bhystream.send.conversation import Conversation, Ready, Route
from bhystream.send.flush import Flush
from bhystream.send.rendezvous import connect
from bhystream.signals import Signals
from bhystream.stream.format import Type
from bhystream.stream.writer import Body, Bytes, Writer
from support.clock import Clock
from support.hoarding import HEADER, HELLO, ID, Hoarding

MIB = 1 << 20
MS = 1_000_000
NONCE = "00ff" * 8
TAKEN = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE, signal.SIGUSR1)

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the limits to 0: every answer is in the inbox before bhysend waits; none comes later."""
    monkeypatch.setattr(flush, "_PATIENCE_S", 0.0)
    for name in ("ACCEPT_SECONDS", "READY_SECONDS", "ANSWER_SECONDS", "_LAST_WORDS_S"):
        monkeypatch.setattr(conversation, name, 0)


class Case:
    """One conversation whose inbox the test fills."""

    def __init__(self, base: Path) -> None:
        self.signals = Signals()
        self.base = base
        self.fd = os.open(os.devnull, os.O_WRONLY)
        self.command: tuple[str, ...] = ()

    @cached_property
    def route(self) -> Route:
        """Open the route in the test, with the standard error that the test reads."""
        names = ("web1", "qemu:/web1")
        return Route(Console("bhysend"), self.signals, self.base, names, ID, self.command)

    def put(self, word: str, *args: str) -> None:
        self.route.inbox.put(HELLO, Answer(ID, word, args))

    def lose(self) -> None:
        self.route.inbox.lose("the way back was closed")

    def talk(self, writer: Writer) -> Conversation:
        return Conversation(self.route, writer, Console("bhysend"), self.signals)

    def begin(self, held: int = 0) -> tuple[Conversation, Hoarding]:
        """Begin, with a destination that has accepted the head already."""
        writer = Hoarding(self.fd, held, self.route.inbox)
        writer.section(Type.HEAD_END)
        self.put("ACCEPT")
        talk = self.talk(writer)
        talk.await_accept()
        return talk, writer


@pytest.fixture
def case(base: Path) -> Iterator[Case]:
    made = Case(base)
    yield made
    made.route.close(70)
    os.close(made.fd)


# The beginning.


def test_it_begins_when_the_head_is_accepted(case: Case) -> None:
    assert case.route.host == "the destination"
    talk, writer = case.begin()
    assert talk.host == "hv2"
    assert writer.pads == []


@pytest.mark.parametrize(
    ("word", "args", "cls", "text"),
    [
        ("REFUSED", ("no disk",), IncompatibleError, "hv2: no disk"),
        ("FAILED", ("no memory",), GuestError, "hv2: no memory"),
        ("SEEN", ("0",), GuestError, "hv2: no ACCEPT came for 0 s"),
    ],
)
def test_a_head_that_is_not_accepted(
    case: Case, word: str, args: tuple[str, ...], cls: type[BhyError], text: str
) -> None:
    talk = case.talk(Hoarding(case.fd, 0, case.route.inbox))
    case.put(word, *args)
    with pytest.raises(cls) as caught:
        talk.await_accept()
    assert (type(caught.value), str(caught.value)) == (cls, text)


def test_a_way_back_that_is_gone_at_the_beginning(case: Case) -> None:
    case.lose()
    with pytest.raises(GuestError, match="the way back was closed"):
        case.talk(Hoarding(case.fd, 0, case.route.inbox, says_hello=False)).await_accept()


def test_what_was_pushed_while_it_started_is_not_what_the_pipeline_holds(case: Case) -> None:
    """An operator was typing a password, or bhyrecv started slowly: the pipeline holds nothing."""

    class Late(Hoarding):
        def section(
            self, type_: int, payload: Bytes = b"", *, flags: int = 0, body: Body = b""
        ) -> None:
            super().section(type_, payload, flags=flags, body=body)
            if sum(self.pads) > 4 * MIB and self.held:
                self.held = 0
                self.inbox.put(HELLO, HELLO)
                self.inbox.put(HELLO, Answer(ID, "SEEN", (str(self.sequence - 1),)))
                self.inbox.put(HELLO, Answer(ID, "ACCEPT"))

    writer = Late(case.fd, 1 << 40, case.route.inbox, says_hello=False)
    talk = case.talk(writer)
    talk.await_accept()
    assert sum(writer.pads) > 4 * MIB
    writer.pads.clear()
    writer.section(Type.ROUND_END, bytes(24))
    talk.settle()
    assert writer.pads == []


def test_settling_measures_the_way_with_what_is_known(case: Case) -> None:
    """If settle() has only now found the amount, settle() measures again at once."""
    talk, writer = case.begin()
    writer.held = 3 * MIB
    writer.section(Type.ROUND_END, bytes(24))
    talk.settle()
    # Two pushes from nothing, because the link may only have hesitated; then the known amount.
    ladder = [64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20]
    starts = [at for at, length in enumerate(writer.pads) if length == ladder[0]]
    assert len(starts) == 2
    assert all(writer.pads[at : at + 5] == ladder for at in starts)
    writer.pads.clear()
    writer.section(Type.ROUND_END, bytes(24))
    talk.settle()
    assert 3 * MIB - 10240 <= sum(writer.pads) <= sum(ladder) + 2 * MIB
    assert set(writer.pads[:-1]) == {MIB}
    assert talk.trip_ns > 0


def test_what_a_filter_holds_is_no_time_of_the_link(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one full buffer of a filter would make every later estimate of the rate too small."""
    clock = Clock()
    monkeypatch.setattr(flush, "time", clock)
    monkeypatch.setattr(conversation, "time", clock)
    real_wait = Inbox.wait

    def wait(self: Inbox, condition: Callable[[], bool], seconds: float) -> bool:
        came = real_wait(self, condition, 0)
        clock.now_ns += 2 * MS if came else 600 * MS
        return came

    monkeypatch.setattr(Inbox, "wait", wait)
    talk, writer = case.begin()
    writer.held = 3 * MIB
    writer.section(Type.ROUND_END, bytes(24))
    before_ns = clock.now_ns
    took_ns = talk.settle()
    # Two pushes from nothing wait for each step of the ladder; then the amount is known.
    assert clock.now_ns - before_ns >= 2 * 5 * 600 * MS
    assert took_ns <= 3 * 2 * MS


def test_a_link_that_hesitated_once_holds_nothing_back(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, writer = case.begin()
    writer.held = 3 * MIB
    writer.section(Type.ROUND_END, bytes(24))
    real = Flush.through
    pushes: list[Flush] = []

    def through(self: Flush) -> None:
        real(self)
        pushes.append(self)
        writer.held = 0

    monkeypatch.setattr(Flush, "through", through)
    talk.settle()
    assert len(pushes) == 3
    assert pushes[-1].held_bytes <= 64 << 10


def test_what_is_held_is_learned_before_the_head_is_accepted(case: Case) -> None:
    _, writer = case.begin(MIB)
    assert sum(writer.pads) >= MIB


# READY.


def test_ready_brings_its_nonce(case: Case) -> None:
    talk, _ = case.begin()
    talk.refuse_early_ready()
    case.put("READY", NONCE)
    assert talk.await_ready(0) == Ready(HELLO, bytes.fromhex(NONCE))


def test_ready_before_its_time_is_refused(case: Case) -> None:
    talk, _ = case.begin()
    case.put("READY", NONCE)
    with pytest.raises(GuestError, match="hv2: READY came before END"):
        talk.refuse_early_ready()


@pytest.mark.parametrize(
    ("put", "text"),
    [
        (lambda case: case.put("FAILED", "no memory"), "hv2: no memory"),
        (lambda case: case.put("RAN"), "hv2: RAN"),
        (lambda case: case.lose(), "the way back was closed"),
        (lambda case: None, "hv2: no READY came for 0 s"),
    ],
)
def test_what_is_not_ready_is_an_error(case: Case, put: Callable[[Case], None], text: str) -> None:
    talk, _ = case.begin()
    put(case)
    with pytest.raises(GuestError) as caught:
        talk.await_ready(0)
    assert str(caught.value) == text


# The answer to GO.


@pytest.mark.parametrize(
    ("put", "event", "why"),
    [
        (lambda case: case.put("RUNNING"), Event.RUNNING, ""),
        (lambda case: case.put("FAILED", "no memory"), Event.FAILED, "no memory"),
        (
            lambda case: case.put("RAN"),
            Event.DOUBT,
            "hv2 cannot say whether the guest ran there",
        ),
        (
            lambda case: case.put("REFUSED", "no"),
            Event.DOUBT,
            "hv2 cannot say whether the guest ran there",
        ),
        (
            lambda case: case.lose(),
            Event.DOUBT,
            "the way back was closed",
        ),
    ],
)
def test_the_answer_to_go(case: Case, put: Callable[[Case], None], event: Event, why: str) -> None:
    talk, _ = case.begin()
    put(case)
    talk.commit()
    assert talk.await_outcome() == (event, why)


def test_a_way_there_that_is_gone_leaves_the_way_back(case: Case) -> None:
    """bhyrecv has answered and ended: nobody reads the PAD."""

    class Gone(Hoarding):
        def section(
            self, type_: int, payload: Bytes = b"", *, flags: int = 0, body: Body = b""
        ) -> None:
            if type_ == Type.PAD:
                self.inbox.put(HELLO, Answer(ID, "RUNNING"))
                raise InputOutputError("cannot write the stream: Broken pipe")
            super().section(type_, payload, flags=flags, body=body)

    case.put("ACCEPT")
    talk = case.talk(Gone(case.fd, 0, case.route.inbox))
    talk.await_accept()
    talk.commit()
    assert talk.await_outcome() == (Event.RUNNING, "")


def give_up(*_: object) -> bool:
    raise InputOutputError("cannot write the stream: Broken pipe")


def test_an_answer_that_does_not_come_is_doubt(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, _ = case.begin()
    monkeypatch.setattr(flush.Flush, "until", give_up)
    talk.commit()
    assert talk.await_outcome() == (Event.DOUBT, "no answer came for 0 s")


def test_an_answer_is_waited_for_when_nothing_can_be_pushed(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, _ = case.begin()

    def wait(*_: object) -> bool:
        case.put("RUNNING")
        return True

    monkeypatch.setattr(flush.Flush, "until", give_up)
    monkeypatch.setattr(case.route.inbox, "wait", wait)
    talk.commit()
    assert talk.await_outcome() == (Event.RUNNING, "")


def test_what_a_tick_raises_while_it_waits_is_doubt(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, _ = case.begin()
    monkeypatch.setattr(case.route.inbox, "wait", give_up)
    talk.commit()
    assert talk.await_outcome() == (Event.DOUBT, "no answer came for 0 s")


def test_an_interrupt_comes_too_late_and_is_told(
    case: Case, capfd: pytest.CaptureFixture[str]
) -> None:
    """The message also comes while bhysend records and writes GO: from commit() on."""
    talk, _ = case.begin()
    case.put("RUNNING")
    talk.commit()
    signal.raise_signal(signal.SIGINT)
    assert "SIGINT: too late, GO is out; waiting for the answer of hv2" in capfd.readouterr().err


# Why the conversation broke.


GONE = ReaderGoneError("cannot write the stream: Broken pipe")


@pytest.mark.parametrize("error", [GONE, LostError("the way back was closed")])
def test_what_the_destination_said_explains_a_broken_stream(case: Case, error: BhyError) -> None:
    case.begin()
    case.put("FAILED", "no memory")
    found = case.route.explain(error)
    assert (type(found), str(found)) == (GuestError, "hv2: no memory")


def test_nothing_explains_what_nobody_speaks_of(case: Case) -> None:
    case.begin()
    assert case.route.explain(GONE) is GONE


@pytest.mark.parametrize(
    "error",
    [
        GuestError("the guest's hypervisor is gone"),
        InputOutputError("cannot open /nonexistent: No such file or directory"),
        InputOutputError("nothing was taken from the stream for 30 s"),
        DowntimeError("not now"),
        UsageError("the pipeline holds bytes back"),
    ],
)
@pytest.mark.parametrize("says", [True, False])
def test_what_we_have_found_is_its_own_explanation(case: Case, error: BhyError, says: bool) -> None:
    """Neither the destination's reaction nor the status of a command is the cause."""
    if says:
        case.begin()
        case.put("FAILED", "the stream was aborted")
    else:
        case.command = python("sys.stdin.buffer.read(); sys.exit(255)")
    assert case.route.explain(error) is error


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"x" * 5000, "the way back: no answer in 4096 bytes"),
        (b"\n" * 5000, "the way back: no answer in 4096 bytes"),
        (pack(Answer(ID, "ACCEPT")), "the way back: ACCEPT comes before HELLO"),
        (pack(HELLO) + b"rubbish\n", "the way back: not an answer"),
        (pack(Answer("0" * 32, "HELLO", HELLO.args)), "the way back: an answer of another stream"),
    ],
)
def test_what_is_wrong_with_the_answers_is_not_hidden_by_a_status(
    case: Case, said: bytes, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the command has ended by itself, its end is not why bhysend has given up."""
    monkeypatch.setattr(conversation, "_LAST_WORDS_S", 60)
    monkeypatch.setattr(flush, "_PATIENCE_S", 60)
    case.command = python(f"os.write(1, {said!r}); sys.exit(255)")
    case.route.start()
    case.route.inbox.wait(lambda: bool(case.route.inbox.lost), 60)
    with pytest.raises(GuestError) as caught:
        case.route.inbox.check()
    assert case.route.explain(caught.value) is caught.value
    assert str(caught.value).startswith(why)


def test_a_way_back_that_was_closed_is_explained_by_the_end_of_the_command(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "_LAST_WORDS_S", 60)
    case.command = python("os.kill(os.getpid(), 9)")
    case.route.start()
    case.route.inbox.wait(lambda: bool(case.route.inbox.lost), 60)
    with pytest.raises(LostError) as caught:
        case.route.inbox.check()
    assert str(case.route.explain(caught.value)).endswith(": it was killed by SIGKILL (signal 9)")


@pytest.mark.parametrize("has_answers", [True, False])
def test_a_signal_ends_the_wait_for_an_explanation_and_for_the_command(
    case: Case, monkeypatch: pytest.MonkeyPatch, has_answers: bool
) -> None:
    for name in ("_LAST_WORDS_S", "_END_SECONDS", "_SHORT_SECONDS"):
        monkeypatch.setattr(conversation, name, 9999)
    case.command = python("signal.pause()")
    if has_answers:
        case.put("ACCEPT")
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    assert case.route.explain(GONE) is GONE
    timer.join()
    signal.raise_signal(signal.SIGINT)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    case.route.close(74)
    timer.join()
    # The signal that ended the wait was meant for what comes next too, as in a dry run.
    with pytest.raises(Interrupted, match="SIGINT"), case.signals.interruptible():
        pass


def test_a_command_that_lives_explains_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command would end only because bhysend closes its input."""
    monkeypatch.setattr(conversation, "_LAST_WORDS_S", 0)
    case.command = python("sys.stdin.buffer.read(); sys.exit(255)")
    assert case.route.explain(GONE) is GONE


# The end, and the third stage.


def test_a_third_stage_is_greeted_and_told_the_status(case: Case) -> None:
    assert case.route.stream_fd == 1
    assert case.route.answer_fd == -1
    case.begin()
    found = connect(case.base, ID)
    assert found is not None
    peer, names = found
    assert names == ["web1", "qemu:/web1"]
    with peer:
        case.route.close(81)
        case.route.close(0)
        assert peer.recv(100) == b"status 81\n"


# The command form.


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import os, signal, sys\n{code}")


def test_the_answers_of_a_command_are_its_standard_output(
    case: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conversation, "ACCEPT_SECONDS", 60)
    monkeypatch.setattr(flush, "_PATIENCE_S", 60)
    said = b"Last login: Mon\n" + b"".join(
        pack(answer) for answer in (HELLO, Answer(ID, "SEEN", ("0",)), Answer(ID, "ACCEPT"))
    )
    case.command = python(f"os.write(1, {said!r}); sys.stdin.buffer.read(); sys.exit(5)")
    writer = Writer(case.route.stream_fd, HEADER)
    writer.section(Type.HEAD_END)
    talk = case.talk(writer)
    talk.await_accept()
    assert case.route.answer_fd >= 0
    assert (talk.host, case.route.inbox.seen) == ("hv2", 0)
    case.route.close(0)
    case.route.close(0)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "bhysend: Last login: Mon"
    assert [line for line in lines[1:] if line.endswith("it ended with status 5")] == lines[1:]
    assert len(lines) == 2


def test_a_command_that_ended_explains_a_broken_stream_once(
    case: Case, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "_LAST_WORDS_S", 60)
    case.command = python("sys.exit(255)")
    found = case.route.explain(GONE)
    assert type(found) is GuestError
    assert str(found).endswith("it ended with status 255")
    case.route.close(69)
    assert capfd.readouterr().err == ""

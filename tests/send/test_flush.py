"""The push: bhysend learns how much a pipeline holds back, and presses that through."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import zlib
from collections.abc import Callable, Iterator

import pytest

from bhystream.errors import (
    GuestError,
    IncompatibleError,
    InputOutputError,
    ReaderGoneError,
    StreamError,
    UsageError,
)
from bhystream.handover.answers import Answer, Inbox
from bhystream.send import flush
from bhystream.send.flush import MAX_BYTES, Flush
from bhystream.stream import format as fmt
from bhystream.stream.format import Type
from bhystream.stream.reader import Reader
from bhystream.stream.writer import Body, Bytes, Writer
from support.clock import Clock
from support.hoarding import HEADER, HELLO, ID, Hoarding

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def null() -> Iterator[int]:
    fd = os.open(os.devnull, os.O_WRONLY)
    yield fd
    os.close(fd)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the patience to 0: a Hoarding fills the inbox before Flush waits."""
    monkeypatch.setattr(flush, "_PATIENCE_S", 0.0)


class Case:
    """A pipeline that contains one section, on which the destination has to act."""

    def __init__(self, fd: int, held: int) -> None:
        self.inbox = Inbox()
        self.pipeline = Hoarding(fd, held, self.inbox)
        self.push = Flush(self.pipeline, self.inbox)
        self.pipeline.section(Type.HEAD_END)

    @property
    def pads(self) -> list[int]:
        return self.pipeline.pads


def test_a_pipeline_that_holds_nothing_is_not_pushed(null: int) -> None:
    case = Case(null, 0)
    case.push.through()
    assert (case.pads, case.push.held_bytes) == ([], 0)
    assert case.push.trip_ns > 0


def test_what_is_pushed_doubles(null: int) -> None:
    case = Case(null, 1 * MIB)
    case.push.through()
    assert case.pads == [64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, 1 * MIB]


@pytest.mark.parametrize("held", [1, 64 * KIB, 64 * KIB + 1, 4 * MIB, 9_000_000, 40 * MIB])
def test_what_is_held_is_learned_and_then_pushed_at_once(null: int, held: int) -> None:
    case = Case(null, held)
    case.push.through()
    assert case.push.held_bytes == sum(case.pads)
    # The header and the padding of a PAD section push too.
    assert held - KIB * 10 <= case.push.held_bytes <= max(2 * held + 64 * KIB, 64 * KIB)
    learned = case.push.held_bytes
    case.pads.clear()
    case.pipeline.section(Type.HEAD_END)
    case.push.through()
    assert held - KIB * 10 <= sum(case.pads) <= learned
    assert all(length == 1 * MIB for length in case.pads[:-1])
    assert case.push.held_bytes == learned


def test_a_pipeline_that_holds_more_later_is_learned_again(null: int) -> None:
    case = Case(null, 64 * KIB)
    case.push.through()
    learned = case.push.held_bytes
    case.pipeline.held = 3 * MIB
    case.pipeline.section(Type.HEAD_END)
    case.push.through()
    assert case.push.held_bytes > learned


def test_what_is_held_is_never_forgotten(null: int) -> None:
    case = Case(null, 3 * MIB)
    case.push.through()
    learned = case.push.held_bytes
    case.pipeline.held = 0
    case.push.through()
    assert case.push.held_bytes == learned


def test_a_reader_that_ends_when_all_is_pushed_is_noticed_at_once() -> None:
    """As an ssh whose remote bhyrecv has ended: nothing is written any more that could fail."""
    reader, writer = os.pipe()
    pushed = threading.Event()

    def read() -> None:
        while not pushed.is_set():
            if select.select([reader], [], [], 0.01)[0]:
                os.read(reader, MIB)
        os.close(reader)

    with os.fdopen(writer, "wb", buffering=0):
        case = Case(writer, 2 * MAX_BYTES)
        thread = threading.Thread(target=read)
        thread.start()

        def seen() -> bool:
            if sum(case.pads) == MAX_BYTES:
                pushed.set()
            return False

        with pytest.raises(ReaderGoneError):
            case.push.until(seen, stall_s=20.0)
        thread.join()


@pytest.mark.parametrize(
    ("count", "lengths"),
    [
        (0, []),
        (1, [1]),
        (MIB, [MIB]),
        (MIB + 1, [MIB, 1]),
        (5 * MIB // 2, [MIB, MIB, MIB // 2]),
    ],
)
def test_no_pad_is_longer_than_its_cap(null: int, count: int, lengths: list[int]) -> None:
    assert fmt.CAPS[Type.PAD] == MIB
    case = Case(null, 0)
    case.push.pad(count)
    assert case.pads == lengths


def test_a_pad_cannot_be_compressed() -> None:
    """Zeros would press nothing through a filter that compresses."""
    written: list[bytes] = []

    class Keeping(Writer):
        def section(
            self, type_: int, payload: Bytes = b"", *, flags: int = 0, body: Body = b""
        ) -> None:
            written.append(bytes(payload))

    fd = os.open(os.devnull, os.O_WRONLY)
    Flush(Keeping(fd, HEADER), Inbox()).pad(2 * MIB)
    os.close(fd)
    assert len(zlib.compress(b"".join(written))) >= 2 * MIB


# Giving up.


def test_a_pipeline_that_holds_all_until_eof_is_found_out(null: int) -> None:
    case = Case(null, 1 << 40)
    with pytest.raises(UsageError, match=f"until EOF: {MAX_BYTES // MIB} MiB went in") as caught:
        case.push.until(lambda: case.inbox.seen >= 0, stall_s=0)
    assert sum(case.pads) == MAX_BYTES == 64 * MIB
    assert "sponge" in caught.value.hint
    assert case.push.held_bytes == 0


def test_what_was_learned_counts_to_the_most_that_is_pushed(null: int) -> None:
    case = Case(null, 40 * MIB)
    case.push.through()
    case.pads.clear()
    case.pipeline.held = 1 << 40
    case.pipeline.section(Type.HEAD_END)
    last = case.pipeline.sequence - 1
    with pytest.raises(UsageError):
        case.push.until(lambda: case.inbox.seen >= last, stall_s=0)
    assert sum(case.pads) == MAX_BYTES


def test_the_most_that_is_pushed_is_enough_for_what_is_just_less(null: int) -> None:
    case = Case(null, MAX_BYTES)
    case.push.through()
    assert case.push.held_bytes == MAX_BYTES


class Slow(Inbox):
    """A destination that says one word in each wait, until no word is left."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = words

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        if self.words:
            self.words -= 1
            self.seen += 1
            self.told += 1
        return condition()


def test_nothing_is_pushed_while_it_flows(null: int) -> None:
    inbox = Slow(100)
    pipeline = Hoarding(null, 1 << 40, inbox)
    Flush(pipeline, inbox).until(lambda: inbox.seen >= 99)
    assert pipeline.pads == []


def test_it_is_pushed_when_it_does_not_flow_any_more(null: int) -> None:
    inbox = Slow(10)
    pipeline = Hoarding(null, 1 << 40, inbox)
    with pytest.raises(UsageError):
        Flush(pipeline, inbox).until(lambda: inbox.seen >= 99, stall_s=0)
    assert sum(pipeline.pads) == MAX_BYTES


def test_what_flows_after_the_most_was_pushed_is_waited_for(null: int) -> None:
    """A slow destination still has all of the PAD to read, and its words still come."""
    inbox = Slow(0)

    class Late(Hoarding):
        def section(
            self, type_: int, payload: Bytes = b"", *, flags: int = 0, body: Body = b""
        ) -> None:
            super().section(type_, payload, flags=flags, body=body)
            if sum(self.pads) == MAX_BYTES:
                inbox.words = 50

    pipeline = Late(null, 1 << 40, inbox)
    Flush(pipeline, inbox).until(lambda: inbox.seen >= 49, stall_s=0)
    assert sum(pipeline.pads) == MAX_BYTES


def test_a_stall_is_counted_from_the_last_word(null: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    class Halting(Inbox):
        """An inbox that moves the clock by 6 s with each wait; every second wait brings a word."""

        def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
            clock.now_ns += 6 * 10**9
            self.seen += clock.now_ns // (6 * 10**9) % 2
            self.told = self.seen + 1
            return condition()

    monkeypatch.setattr(flush, "time", clock)
    inbox = Halting()
    pipeline = Hoarding(null, 1 << 40, inbox)
    Flush(pipeline, inbox).until(lambda: inbox.seen >= 99, stall_s=10)
    assert sum(pipeline.pads) == MAX_BYTES
    with pytest.raises(UsageError):
        Flush(pipeline, inbox).until(lambda: inbox.seen >= 199, stall_s=5)


def test_a_destination_that_waits_for_its_hypervisor_is_waited_for(null: int) -> None:
    """The destination reads nothing, and repeats SEEN: the bytes have arrived in front of it."""

    class Waiting(Slow):
        def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
            self.put(HELLO, Answer(ID, "SEEN", ("7" if self.words else "99",)))
            self.words = max(0, self.words - 1)
            return condition()

    inbox = Waiting(100)
    inbox.put(HELLO, HELLO)
    pipeline = Hoarding(null, 1 << 40, inbox, says_hello=False)
    Flush(pipeline, inbox).until(lambda: inbox.seen >= 99, stall_s=0)
    assert pipeline.pads == []


def test_a_destination_that_nothing_reaches_is_given_up(null: int) -> None:
    """The destination repeats HELLO: bhyrecv does so as long as nothing arrives."""

    class Greeting(Inbox):
        waits = 0

        def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
            self.waits += 1
            assert self.waits < 1000
            self.put(HELLO, HELLO)
            return condition()

    inbox = Greeting()
    pipeline = Hoarding(null, 1 << 40, inbox)
    with pytest.raises(UsageError, match="until EOF"):
        Flush(pipeline, inbox).until(lambda: inbox.seen >= 0, stall_s=0)


def test_a_refusal_ends_it(null: int) -> None:
    case = Case(null, 1 << 40)
    case.inbox.put(HELLO, Answer(ID, "REFUSED", ("no disk",)))
    with pytest.raises(IncompatibleError, match="hv2: no disk"):
        case.push.through()
    assert case.pads == []


def test_a_way_back_that_is_gone_ends_it(null: int) -> None:
    case = Case(null, 1 << 40)
    case.inbox.lose("the way back was closed")
    with pytest.raises(GuestError, match="the way back was closed"):
        case.push.through()
    assert case.pads == []


def test_what_has_come_already_is_no_reason_to_fail(null: int) -> None:
    case = Case(null, 0)
    case.inbox.lose("the way back was closed")
    case.push.through()


def test_a_pipe_that_is_gone_ends_it() -> None:
    theirs, ours = os.pipe()
    case = Case(ours, 1 << 40)
    os.close(theirs)
    with pytest.raises(InputOutputError):
        case.push.through()
    os.close(ours)


# Through real pipes.


class Hoarder(threading.Thread):
    """A filter that keeps `held` bytes, and a destination behind it that says SEEN."""

    def __init__(self, fd: int, held: int, inbox: Inbox) -> None:
        super().__init__(daemon=True)
        self._fd = fd
        self._held = held
        self._inbox = inbox
        self._kept = b""
        self.start()

    def readinto(self, buffer: memoryview) -> int:
        while len(self._kept) <= self._held:
            data = os.read(self._fd, 1 << 16)
            if not data:
                return 0
            self._kept += data
        count = min(len(buffer), len(self._kept) - self._held)
        buffer[:count] = self._kept[:count]
        self._kept = self._kept[count:]
        return count

    def run(self) -> None:
        reader = Reader(self)
        self._inbox.put(HELLO, HELLO)
        with contextlib.suppress(StreamError):  # the stream is cut in the end
            while reader.next() is not None:
                self._inbox.put(HELLO, Answer(ID, "SEEN", (str(reader.sequence - 1),)))


@pytest.mark.parametrize("held", [0, 100_000, 700_000])
def test_real_bytes_are_pressed_through(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flush, "_PATIENCE_S", 0.02)
    theirs, ours = os.pipe()
    inbox = Inbox()
    hoarder = Hoarder(theirs, held, inbox)
    writer = Writer(ours, HEADER)
    writer.section(Type.HOST, b'{"hypervisor": "qemu", "program": "test 1"}')
    pushing = Flush(writer, inbox)
    pushing.until(lambda: inbox.hello is not None)
    pushing.through()
    assert inbox.seen >= 0
    assert pushing.held_bytes > held - KIB
    os.close(ours)
    hoarder.join(60)
    assert not hoarder.is_alive()
    os.close(theirs)

"""bhyrecv's answers: when they are due, and what it does while nothing comes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bhystream.errors import GuestError, InputOutputError
from bhystream.handover import state
from bhystream.handover.answers import Answer, unpack
from bhystream.recv import reply
from bhystream.recv.reply import Reply, TimedInput
from support.clock import Clock

ID = "0123456789abcdef" * 2
MIB, MS = 1 << 20, 10**6


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(now_ns=10**12)
    monkeypatch.setattr(reply, "time", made)
    return made


class Pipe:
    """A pipe, which becomes standard output if the test asks for that."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe()

    def close_read(self) -> None:
        if self.read_fd >= 0:
            os.close(self.read_fd)
        self.read_fd = -1

    def close_write(self) -> None:
        if self.write_fd >= 0:
            os.close(self.write_fd)
        self.write_fd = -1

    def answers(self) -> list[Answer]:
        """Return what has come, and empty the pipe."""
        os.set_blocking(self.read_fd, False)
        try:
            data = os.read(self.read_fd, 1 << 20)
        except BlockingIOError:
            return []
        return [unpack(line) for line in data.splitlines(keepends=True)]

    def fill(self) -> int:
        """Fill the pipe with newlines; return their number."""
        os.set_blocking(self.write_fd, False)
        count = 0
        for size in (4096, 1):
            try:
                while True:
                    count += os.write(self.write_fd, b"\n" * size)
            except BlockingIOError:
                continue
        os.set_blocking(self.write_fd, True)
        return count


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close_read()
    made.close_write()


@pytest.fixture
def back(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> Pipe:
    """Make the way back."""
    monkeypatch.setattr(reply, "_STDOUT", pipe.write_fd)
    return pipe


def seen(*numbers: int) -> list[Answer]:
    return [Answer(ID, "SEEN", (str(number),)) for number in numbers]


# Answers.


def test_hello_names_host_and_state_directory(base: Path, back: Pipe) -> None:
    Reply(base, ID).hello()
    assert back.answers() == [Answer(ID, "HELLO", (state.host_id(base), str(base)))]


def test_an_answer_is_one_line_with_its_arguments(base: Path, back: Pipe) -> None:
    made = Reply(base, ID)
    made.say("ACCEPT")
    made.say("FAILED", "no disk, 100%")
    assert back.answers() == [Answer(ID, "ACCEPT"), Answer(ID, "FAILED", ("no disk, 100%",))]


def test_an_answer_that_nobody_reads_is_an_error_or_none(base: Path, back: Pipe) -> None:
    made = Reply(base, ID)
    back.close_read()
    with pytest.raises(InputOutputError):
        made.say("ACCEPT")
    made.try_to_say("ACCEPT")


def test_seen_is_said_at_first_and_then_when_it_is_due(
    base: Path, back: Pipe, clock: Clock
) -> None:
    made = Reply(base, ID)
    made.seen(0, 100, now=False)
    assert back.answers() == seen(0)
    made.seen(1, 200, now=False)
    clock.now_ns += 500 * MS - 1
    made.seen(2, 300, now=False)
    assert back.answers() == []
    clock.now_ns += 1
    made.seen(3, 400, now=False)
    made.seen(4, 500, now=False)
    assert back.answers() == seen(3)


def test_seen_is_said_every_16_mib(base: Path, back: Pipe, clock: Clock) -> None:
    made = Reply(base, ID)
    made.seen(0, 100, now=False)
    made.seen(1, 100 + 16 * MIB - 1, now=False)
    assert back.answers() == seen(0)
    made.seen(2, 100 + 16 * MIB, now=False)
    made.seen(3, 100 + 32 * MIB - 1, now=False)
    assert back.answers() == seen(2)


def test_seen_is_said_now_where_the_source_waits(base: Path, back: Pipe, clock: Clock) -> None:
    made = Reply(base, ID)
    for number in range(4):
        made.seen(number, 100, now=number != 3)
    assert back.answers() == seen(0, 1, 2)


def test_before_the_first_section_nothing_is_seen(base: Path, back: Pipe, clock: Clock) -> None:
    made = Reply(base, ID)
    made.seen(-1, 72, now=True)
    assert back.answers() == []


def test_seen_does_not_wait_for_a_full_pipe(base: Path, back: Pipe, clock: Clock) -> None:
    """If it waited, a way back that nobody reads would stop the stream."""
    made = Reply(base, ID)
    filled = back.fill()
    for number in range(1000):
        made.seen(number, number * 16 * MIB, now=True)
    assert os.read(back.read_fd, filled + 1000) == b"\n" * filled
    # No SEEN was written, so one is still due.
    made.seen(7, 0, now=False)
    assert back.answers() == seen(7)


def test_seen_to_a_way_back_that_is_gone_is_no_error(base: Path, back: Pipe, clock: Clock) -> None:
    back.close_read()
    Reply(base, ID).seen(0, 0, now=True)


# The way in, while nothing comes.


Read = Callable[..., bytes]


def read_into(source: TimedInput, size: int = 100) -> bytes:
    buffer = bytearray(size)
    return bytes(buffer[: source.readinto(memoryview(buffer))])


linux = pytest.mark.skipif(not hasattr(os, "splice"), reason="splice(2) is Linux's")


@pytest.fixture(params=["read", pytest.param("splice", marks=linux)])
def read(request: pytest.FixtureRequest) -> Iterator[Read]:
    """Yield what reads once, in one of both ways."""
    if request.param == "read":
        yield read_into
        return
    ends = os.pipe()

    def spliced(source: TimedInput, size: int = 100) -> bytes:
        count = source.splice(ends[1], size)
        return os.read(ends[0], count) if count else b""

    yield spliced
    for fd in ends:
        os.close(fd)


def test_a_read_without_a_limit_is_a_read(pipe: Pipe, read: Read) -> None:
    source = TimedInput(pipe.read_fd)
    os.write(pipe.write_fd, b"abcdef")
    assert (read(source, 4), read(source)) == (b"abcd", b"ef")
    pipe.close_write()
    assert read(source) == b""


def test_it_is_quiet_until_something_comes(
    pipe: Pipe, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply, "_HELLO_SECONDS", 0.0)
    source = TimedInput(pipe.read_fd)
    called = 0

    def on_quiet() -> None:
        nonlocal called
        called += 1
        if called == 3:
            os.write(pipe.write_fd, b"at last")

    source.on_quiet = on_quiet
    assert read(source) == b"at last"
    assert called == 3


def test_one_who_has_nothing_more_to_say_goes_on_reading(
    pipe: Pipe, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply, "_HELLO_SECONDS", 0.0)
    source = TimedInput(pipe.read_fd)

    def on_quiet() -> None:
        source.on_quiet = None
        os.write(pipe.write_fd, b"x")

    source.on_quiet = on_quiet
    assert read(source) == b"x"


def test_it_is_not_quiet_where_something_has_come(pipe: Pipe, read: Read) -> None:
    source = TimedInput(pipe.read_fd)
    source.on_quiet = lambda: pytest.fail("it was not quiet")
    os.write(pipe.write_fd, b"x")
    assert read(source) == b"x"
    pipe.close_write()
    assert read(source) == b""  # the end of the input does not call it either


@pytest.mark.parametrize("waiting", [b"", b"GO"])
def test_after_the_limit_nothing_is_read(pipe: Pipe, read: Read, waiting: bytes) -> None:
    """Not even bytes that are there: they may have been there for long."""
    source = TimedInput(pipe.read_fd)
    source.deadline = time.monotonic() - 1
    source.why = "no GO came for 60 s"
    os.write(pipe.write_fd, waiting)
    with pytest.raises(GuestError, match="no GO came for 60 s"):
        read(source)
    assert waiting == b"" or os.read(pipe.read_fd, 100) == waiting


def test_a_limit_ends_a_read_that_waits(pipe: Pipe, read: Read) -> None:
    source = TimedInput(pipe.read_fd)
    source.deadline = time.monotonic() + 0.02
    source.why = "nothing came"
    with pytest.raises(GuestError, match="nothing came"):
        read(source)


def test_a_limit_that_is_far_is_none(pipe: Pipe, read: Read) -> None:
    source = TimedInput(pipe.read_fd)
    source.deadline = time.monotonic() + 1000
    os.write(pipe.write_fd, b"GO")
    assert read(source) == b"GO"
    pipe.close_write()
    assert read(source) == b""


def test_a_quiet_way_is_told_until_the_limit(
    pipe: Pipe, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply, "_HELLO_SECONDS", 0.0)
    source = TimedInput(pipe.read_fd)
    source.deadline = time.monotonic() + 1000

    def on_quiet() -> None:
        source.deadline = time.monotonic() - 1

    source.on_quiet = on_quiet
    with pytest.raises(GuestError):
        read(source)


def test_a_descriptor_that_is_closed_is_an_error(pipe: Pipe, read: Read) -> None:
    source = TimedInput(pipe.read_fd)
    pipe.close_read()
    with pytest.raises(OSError, match="Bad file descriptor"):
        read(source)


def test_another_process_may_make_the_descriptor_non_blocking(pipe: Pipe, read: Read) -> None:
    """Both processes share it: for example, a command of ssh has it from a shell."""
    source = TimedInput(pipe.read_fd)
    os.set_blocking(pipe.read_fd, False)
    writer = threading.Timer(0.05, os.write, (pipe.write_fd, b"late"))
    writer.start()
    assert read(source) == b"late"
    writer.join()


@linux
def test_only_a_pipe_is_spliced(pipe: Pipe, tmp_path: Path) -> None:
    assert TimedInput(pipe.read_fd).can_splice
    with (tmp_path / "stream").open("w+b") as file:
        assert not TimedInput(file.fileno()).can_splice


# The rest of the stream.


def test_what_is_left_is_read_to_the_end(pipe: Pipe) -> None:
    """There is more than a pipe holds, and the writer ends without an error."""
    source = TimedInput(pipe.read_fd)
    written = 0

    def write() -> None:
        nonlocal written
        for _ in range(64):
            written += os.write(pipe.write_fd, bytes(1 << 16))
        pipe.close_write()

    writer = threading.Thread(target=write)
    writer.start()
    source.drain()
    writer.join()
    assert written == 64 << 16
    assert os.read(pipe.read_fd, 1) == b""


def test_what_never_ends_is_left_in_time(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TimedInput(pipe.read_fd)
    monkeypatch.setattr(reply, "_DRAIN_SECONDS", 0.02)
    source.drain()  # nothing comes
    monkeypatch.setattr(reply, "_DRAIN_SECONDS", 0.0)
    os.write(pipe.write_fd, b"x")
    source.drain()
    assert os.read(pipe.read_fd, 10) == b"x"


def test_what_cannot_be_read_is_left(pipe: Pipe) -> None:
    source = TimedInput(pipe.read_fd)
    pipe.close_read()
    source.drain()


def test_hello_is_repeated_often_enough_for_the_page() -> None:
    # bhystream(5): "Repeated every 10 seconds", SEEN "every 16 MiB or every 500 ms".
    assert (reply._HELLO_SECONDS, reply._SEEN_BYTES, reply._SEEN_NS) == (10, 16 * MIB, 500 * MS)

"""Writer on real descriptors: whole writes, a receiver that is gone, abort(), one write of END."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import random
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from bhystream.errors import BhyError, InputOutputError, ReaderGoneError
from bhystream.guest import Layout, Segment, State
from bhystream.stream import format as fmt
from bhystream.stream import writer as writer_module
from bhystream.stream.format import Feature, Form, Header, Type
from bhystream.stream.reader import Reader
from bhystream.stream.writer import Writer, write_all
from bhystream.strict_json import pack_json
from spec_reader import read
from support.both import agree

HEADER = Header(Form.PLAIN, Feature(0), bytes(range(16)), 0x0123456789ABCDEF)
HOST = pack_json({"hypervisor": "qemu", "program": "test 1"})


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Make a pipe of 16 KiB; yield its reading and its writing end."""
    reader, writer = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 16384)
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError as error:
            assert error.errno == errno.EBADF


class Drain(threading.Thread):
    """Read a pipe to its end, few bytes at a time."""

    def __init__(self, fd: int, step: int) -> None:
        super().__init__(daemon=True)
        self._fd = fd
        self._step = step
        self.got = b""

    def run(self) -> None:
        parts = []
        while part := os.read(self._fd, self._step):
            parts.append(part)
        self.got = b"".join(parts)


def write_head(writer: Writer, npages: int = 4) -> None:
    writer.section(Type.HOST, HOST)
    writer.section(Type.LAYOUT, fmt.pack_layout(Layout((Segment("ram", 0, npages),))))
    writer.section(Type.CONFIG, pack_json({"name": "web1"}))
    writer.section(Type.DEVICES, pack_json([]))
    writer.section(Type.HEAD_END)


def write_zeros(writer: Writer, npages: int = 4) -> None:
    payload = fmt.MEMORY_HEAD.pack(writer.rounds, 1, 0, 0) + fmt.EXTENT.pack(0, npages, 1)
    writer.section(Type.MEMORY, payload)
    writer.round_end(0, npages, last=True)


def write_tail(writer: Writer) -> None:
    writer.section(Type.TIME, fmt.TIME.pack(0, 0))
    writer.end()


def test_what_is_written_is_read_by_both_readers(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    sizes = [0, 1, 8, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (2 << 20) + 7]
    states = {f"s{number}": rng.randbytes(size) for number, size in enumerate(sizes)}
    with (tmp_path / "stream").open("w+b") as file:
        writer = Writer(file.fileno(), HEADER)
        write_head(writer)
        write_zeros(writer)
        for name, data in states.items():
            writer.state(State(name, data))
            writer.section(Type.PAD, rng.randbytes(rng.randrange(20)))
        writer.section(Type.TIME, fmt.TIME.pack(1, 2))
        end = writer.end()
        raw = os.pread(file.fileno(), writer.offset_bytes + 1, 0)
    assert len(raw) == writer.offset_bytes
    recorder, found = agree(raw)
    assert found.states == states
    assert recorder.ended is not None and recorder.ended.end == end
    assert (writer.rounds, writer.data_pages, writer.zero_pages) == (1, 0, 4)
    assert writer.state_bytes == sum(sizes)
    assert writer.sequence == found.sections == end.sections + 1
    assert writer.ended and writer.at_border


def written(path: Path, *states: State) -> tuple[Writer, bytes]:
    """Write a stream with these states; return its writer and its bytes."""
    with path.open("w+b") as file:
        writer = Writer(file.fileno(), HEADER)
        write_head(writer)
        write_zeros(writer)
        for state in states:
            writer.state(state)
        write_tail(writer)
        return writer, os.pread(file.fileno(), writer.offset_bytes + 1, 0)


Cut = list[tuple[Type, int, int]]  # type, length of the part, flags
X = b"x"


def parts(raw: bytes) -> Cut:
    """Return the type, the length and the flags of each part of a state in a stream."""
    found: Cut = []
    reader = Reader(io.BytesIO(raw))
    while section := reader.next():
        payload = bytes(section.payload)
        if section.type == Type.STATE_ZEROS:
            found.append((Type.STATE_ZEROS, fmt.unpack_state_zeros(payload)[2], section.flags))
        elif section.type in (Type.STATE, Type.STATE_OPTIONAL):
            length = len(fmt.unpack_state(payload)[2])
            found.append((Type(section.type), length, section.flags))
    return found


@pytest.mark.parametrize(
    ("data", "cut"),
    [
        (b"", [(Type.STATE, 0, 1)]),
        (bytes(4095), [(Type.STATE, 4095, 1)]),
        (bytes(4096), [(Type.STATE_ZEROS, 4096, 1)]),
        (bytes(4097), [(Type.STATE_ZEROS, 4096, 0), (Type.STATE, 1, 1)]),
        (bytes(4095) + X, [(Type.STATE, 4096, 1)]),
        (bytes(8192) + X, [(Type.STATE_ZEROS, 8192, 0), (Type.STATE, 1, 1)]),
        (X * 4096 + bytes(8192), [(Type.STATE, 4096, 0), (Type.STATE_ZEROS, 8192, 1)]),
        (X + bytes(4095) + bytes(4096) + X,
         [(Type.STATE, 4096, 0), (Type.STATE_ZEROS, 4096, 0), (Type.STATE, 1, 1)]),
        (X * (1 << 20) + X,  [(Type.STATE, 1 << 20, 0), (Type.STATE, 1, 1)]),
        (X * (1 << 20) + bytes(4096), [(Type.STATE, 1 << 20, 0), (Type.STATE_ZEROS, 4096, 1)]),
        (X * (1 << 20) + bytes(9), [(Type.STATE, 1 << 20, 0), (Type.STATE, 9, 1)]),
        (bytes(5 << 20), [(Type.STATE_ZEROS, 5 << 20, 1)]),
    ],
)  # fmt: skip
def test_long_zeros_of_a_state_are_a_count(tmp_path: Path, data: bytes, cut: Cut) -> None:
    writer, raw = written(tmp_path / "stream", State("s", data))
    assert parts(raw) == cut
    assert writer.state_bytes == len(data)
    assert agree(raw)[1].states == {"s": data}


def test_states_with_zeros_anywhere_are_read_by_both_readers(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    blocks = [
        bytes(4096),
        rng.randbytes(4096),
        bytes(4000),
        X,
        bytes(12288),
        rng.randbytes(1 << 19),
    ]
    states = {
        f"s{number}": b"".join(rng.choices(blocks, k=rng.randrange(9))) for number in range(20)
    }
    _, raw = written(tmp_path / "stream", *(State(*item) for item in states.items()))
    assert agree(raw)[1].states == states


def test_an_optional_state_is_written_as_it_is_and_not_counted(tmp_path: Path) -> None:
    states = (State("a", b"abc"), State("fpu/0", bytes((1 << 20) + 1), is_optional=True))
    writer, raw = written(tmp_path / "stream", *states, State("fpu/1", b"", is_optional=True))
    optional = Type.STATE_OPTIONAL
    assert parts(raw) == [
        *[(Type.STATE, 3, 1), (optional, 1 << 20, 0)],
        *[(optional, 1, 1), (optional, 0, 1)],
    ]
    assert writer.state_bytes == 3
    _, found = agree(raw)
    assert found.states == {"a": b"abc"}
    assert found.optional_states == {"fpu/0": bytes((1 << 20) + 1), "fpu/1": b""}


def test_a_short_write_is_continued(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.write, []

    def short(fd: int, data: memoryview) -> int:
        calls.append(len(data))
        return real(fd, data[: 1 + len(calls) % 37])

    monkeypatch.setattr(os, "write", short)
    drain = Drain(pipe[0], 11)
    drain.start()
    writer = Writer(pipe[1], HEADER)
    write_head(writer)
    write_zeros(writer)
    write_tail(writer)
    os.close(pipe[1])
    drain.join()
    assert len(calls) > 30
    assert len(drain.got) == writer.offset_bytes
    agree(drain.got)


def test_a_slow_reader_and_signals_cut_no_byte(pipe: tuple[int, int]) -> None:
    """A signal ends a write(2) that waits in the middle of its data for a full pipe."""
    fired: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: fired.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    drain = Drain(pipe[0], 512)
    drain.start()
    data = random.Random(1).randbytes(1 << 20)
    try:
        writer = Writer(pipe[1], HEADER)
        write_head(writer)
        write_zeros(writer)
        writer.state(State("big", data))
        write_tail(writer)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    os.close(pipe[1])
    drain.join()
    assert fired
    assert read(io.BytesIO(drain.got)).states == {"big": data}


def test_a_receiver_that_is_gone_is_an_error_of_the_pipe(pipe: tuple[int, int]) -> None:
    writer = Writer(pipe[1], HEADER)
    os.close(pipe[0])
    with pytest.raises(ReaderGoneError, match="cannot write the stream: Broken pipe") as caught:
        writer.section(Type.HOST, HOST)
    assert caught.value.status == 74
    assert not writer.at_border
    with pytest.raises(InputOutputError):
        Writer(pipe[1], HEADER)


def test_a_file_system_that_is_full_is_an_error_of_the_pipe() -> None:
    with (
        Path("/dev/full").open("wb", buffering=0) as file,
        pytest.raises(InputOutputError) as caught,
    ):
        write_all(file.fileno(), b"x")
    assert str(caught.value) == "cannot write the stream: No space left on device"


def test_end_is_one_write() -> None:
    reader, writer_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with reader, writer_socket:
        writer = Writer(writer_socket.fileno(), HEADER)
        write_head(writer)
        write_zeros(writer)
        write_tail(writer)
        packets = [reader.recv(1 << 16) for _ in range(1 + writer.sequence)]
    assert len(packets[-1]) == 96
    assert struct.unpack_from("<I", packets[-1]) == (Type.END,)
    agree(b"".join(packets))


def test_page_bytes_are_a_write_of_their_own() -> None:
    """The writer writes the header and the list, then the pages without a copy of them."""
    reader, writer_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    payload = fmt.MEMORY_HEAD.pack(0, 1, 1, 0) + fmt.EXTENT.pack(0, 1, 0) + bytes(8)
    with reader, writer_socket:
        writer = Writer(writer_socket.fileno(), HEADER)
        reader.recv(1 << 16)
        writer.section(Type.MEMORY, payload, body=b"p" * 4096)
        assert len(reader.recv(1 << 16)) == 32 + len(payload)
        assert reader.recv(1 << 16) == b"p" * 4096
        writer.section(Type.MEMORY, payload, flags=fmt.FLAG_ZSTD, body=b"f" * 13)
        sizes = [len(reader.recv(1 << 16)) for _ in range(3)]
    assert sizes == [32 + len(payload), 13, 3]


# abort()


def contents(fd: int) -> bytes:
    """Return what is in a pipe now."""
    got = b""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while poller.poll(0):
        part = os.read(fd, 65536)
        if not part:
            break
        got += part
    return got


def test_abort_tells_the_reader_why(pipe: tuple[int, int]) -> None:
    writer = Writer(pipe[1], HEADER)
    writer.section(Type.HOST, HOST)
    writer.abort(75, "it changes\ntoo fast")
    found = read(io.BytesIO(contents(pipe[0])))
    assert found.abort == (75, "it changes?too fast")


def test_abort_writes_nothing_inside_a_section(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(pipe[1], HEADER)
    real = os.write
    calls: list[int] = []

    def interrupted(fd: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(fd, data[:20])

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.section(Type.HOST, HOST)
    monkeypatch.setattr(os, "write", real)
    assert not writer.at_border
    writer.abort(75, "interrupted")
    assert len(contents(pipe[0])) == 72 + 20


def test_abort_writes_nothing_if_a_section_was_not_counted(pipe: tuple[int, int]) -> None:
    """A signal may raise after a section is written, before its checksum is in the digest."""

    class Interrupted:
        def update(self, data: bytes) -> NoReturn:
            raise KeyboardInterrupt

    writer = Writer(pipe[1], HEADER)
    writer._digest = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        writer.section(Type.HOST, HOST)
    written = len(contents(pipe[0]))
    writer.abort(75, "interrupted")
    assert written == writer.offset_bytes
    assert contents(pipe[0]) == b""


def test_abort_writes_nothing_after_end(pipe: tuple[int, int]) -> None:
    header = Header(Form.KEPT, Feature.NO_MEMORY, bytes(16), 0)
    writer = Writer(pipe[1], header)
    write_head(writer)
    writer.end()
    writer.abort(70, "the record cannot be removed")
    agree(contents(pipe[0]))


@pytest.mark.timeout(20)
def test_abort_does_not_wait_for_a_full_pipe(pipe: tuple[int, int]) -> None:
    writer = Writer(pipe[1], HEADER)
    os.set_blocking(pipe[1], False)
    filled = 72
    while True:
        try:
            filled += os.write(pipe[1], b"x")
        except BlockingIOError:
            break
    os.set_blocking(pipe[1], True)
    writer.abort(75, "interrupted")
    assert len(contents(pipe[0])) == filled


def test_abort_keeps_to_what_a_writable_pipe_takes(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 32 + 8 + writer_module._ABORT_ROOM_BYTES == select.PIPE_BUF
    # The text's room if PIPE_BUF is the least that POSIX allows.
    monkeypatch.setattr(writer_module, "_ABORT_ROOM_BYTES", 512 - 40)
    writer = Writer(pipe[1], HEADER)
    writer.abort(75, "x" * 2000)
    raw = contents(pipe[0])
    assert len(raw) == 72 + 512
    assert read(io.BytesIO(raw)).abort == (75, "x" * 472)


def closed(fds: tuple[int, int]) -> None:
    os.close(fds[1])


def gone(fds: tuple[int, int]) -> None:
    os.close(fds[0])


@pytest.mark.parametrize("harm", [closed, gone])
def test_abort_never_raises(pipe: tuple[int, int], harm: Callable[[tuple[int, int]], None]) -> None:
    writer = Writer(pipe[1], HEADER)
    harm(pipe)
    writer.abort(75, "interrupted")


# sync()


def test_a_stream_in_a_file_is_made_durable(
    tmp_path: Path, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    Writer(pipe[1], HEADER).sync()
    assert synced == []
    with (tmp_path / "stream").open("wb") as file:
        Writer(file.fileno(), HEADER).sync()
        assert synced == [file.fileno()]


def test_a_file_that_cannot_be_made_durable_is_an_error_of_the_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (tmp_path / "stream").open("wb") as file:
        writer = Writer(file.fileno(), HEADER)
        with pytest.raises(BhyError, match="cannot write the stream: No space left") as caught:
            writer.sync()
    assert caught.value.status == 74


# Room.


def test_room_is_waited_for_and_missed(pipe_ends: tuple[int, int]) -> None:
    read_fd, write_fd = pipe_ends
    writer = Writer(write_fd, Header(Form.PLAIN, Feature(0), bytes(16), 1))
    writer.await_room(0)
    os.set_blocking(write_fd, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write_fd, bytes(4096))
    with pytest.raises(InputOutputError, match="nothing was taken from the stream for 0 s"):
        writer.await_room(0)
    threading.Timer(0.05, lambda: os.read(read_fd, 1 << 20)).start()
    writer.await_room(60)
    os.close(read_fd)
    with pytest.raises(ReaderGoneError):
        writer.await_room(0)


@pytest.fixture
def pipe_ends() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


def test_a_signal_ends_the_wait_for_a_slow_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No signal ends fsync(2), which writes as much as a guest has memory."""
    is_in, may_end = threading.Event(), threading.Event()

    def fsync(fd: int) -> None:
        is_in.set()
        may_end.wait()
        raise OSError(28, "No space left on device")  # nobody is there to be told

    def interrupt() -> None:
        is_in.wait()
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "fsync", fsync)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with (tmp_path / "s").open("wb") as file, pytest.raises(KeyboardInterrupt):
            Writer(file.fileno(), HEADER).sync()
    finally:
        may_end.set()
        thread.join()

"""The client of the checkpoint socket, against small servers on real sockets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bhystream.backend.bhyve import fifo, nvlist
from bhystream.backend.bhyve.checkpoint import (
    Checkpoint,
    NobodyListensError,
    Outcome,
    RefusedError,
    UnansweredError,
    settle,
)
from bhystream.backend.bhyve.nvlist import Descriptor, Value
from bhystream.backend.process import identify, is_alive
from bhystream.errors import AccessError, GuestError
from standin.rig import await_true

LIMIT_S = 20.0
Request = dict[str, Value]
Handler = Callable[[socket.socket, Request], None]


class Server:
    """A thread that serves one connection after the other; this process plays the bhyve."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self.requests: list[Request] = []
        self._handler = handler
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(10)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                request = nvlist.receive(connection)
                if request is not None:
                    self.requests.append(request)
                    self._handler(connection, request)
                    for value in request.values():
                        if isinstance(value, Descriptor):
                            os.close(value.fd)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as made:  # a socket's path must be short
        yield Path(made)


Serve = Callable[[Handler], Server]


@pytest.fixture
def serve(run_dir: Path) -> Iterator[Serve]:
    made: list[Server] = []

    def start(handler: Handler) -> Server:
        made.append(Server(run_dir / "web1", handler))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture
def directory_fd(run_dir: Path) -> Iterator[int]:
    fd = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def client(run_dir: Path, serve: Serve) -> Iterator[Callable[[Handler], Checkpoint]]:
    made: list[Checkpoint] = []

    def connect(handler: Handler) -> Checkpoint:
        serve(handler)
        made.append(Checkpoint(run_dir, "web1", "guest web1"))
        return made[-1]

    yield connect
    for checkpoint in made:
        checkpoint.close()


Client = Callable[[Handler], Checkpoint]


def silent(connection: socket.socket, request: Request) -> None:
    """Answer as G4 does, by closing the connection, which the server does afterwards."""


def reply(pairs: Request) -> Handler:
    return lambda connection, request: nvlist.send(connection, pairs)


def hold(release: threading.Event) -> Handler:
    """Return a handler that answers nothing until `release` is set."""

    def handle(connection: socket.socket, request: Request) -> None:
        release.wait(LIMIT_S)

    return handle


# A bhyve that is a process.  Its first argument says what it does with a request.
CHILD = """
import os, socket, sys
from bhystream.backend.bhyve import nvlist
mode, path = sys.argv[1:]
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen(10)
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    request = nvlist.receive(connection)
    if request is None:
        continue
    if mode == "exits":
        os._exit(5)
    if mode == "dies":
        os.kill(os.getpid(), 9)
    if mode == "replies and exits":
        nvlist.send(connection, {})
        os._exit(0)
"""


class Child:
    def __init__(self, mode: str, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, mode, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def child(run_dir: Path) -> Iterator[Callable[[str], Child]]:
    made: list[Child] = []

    def start(mode: str) -> Child:
        made.append(Child(mode, run_dir / "web1"))
        return made[-1]

    yield start
    for one in made:
        one.end()


# The request.


def test_a_request_names_the_file_in_its_directory(
    run_dir: Path, serve: Serve, directory_fd: int
) -> None:
    def make(connection: socket.socket, request: Request) -> None:
        fd = request["fddir"]
        assert isinstance(fd, Descriptor)
        os.close(os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=fd.fd))

    server = serve(make)
    checkpoint = Checkpoint(run_dir, "web1", "guest web1")
    checkpoint.request(directory_fd, "ckp")
    assert checkpoint.await_outcome(LIMIT_S) == Outcome.CLOSED
    assert checkpoint.served_ns > 0
    checkpoint.close()
    checkpoint.close()
    assert (run_dir / "made").exists()
    assert os.fstat(directory_fd)
    assert texts(server.requests[0]) == {
        "cmd": "checkpoint",
        "filename": "ckp",
        "suspend": False,
    }


def texts(request: Request) -> Request:
    return {key: value for key, value in request.items() if not isinstance(value, Descriptor)}


def test_the_fifo_goes_along_until_the_request_is_served(
    run_dir: Path, serve: Serve, directory_fd: int
) -> None:
    release = threading.Event()
    serve(hold(release))
    size = fifo.make(run_dir / "meta")
    fd = fifo.arm(run_dir / "meta", size)
    checkpoint = Checkpoint(run_dir, "web1", "guest web1")
    checkpoint.request(directory_fd, "ckp", fd)
    os.close(fd)
    try:
        assert fifo.has_reader(run_dir / "meta")
        assert fifo.pending(run_dir / "meta") == size - 1
    finally:
        release.set()
    assert checkpoint.await_outcome(LIMIT_S) == Outcome.CLOSED
    checkpoint.close()
    await_true(lambda: not fifo.has_reader(run_dir / "meta"), "the end of the request")


def test_a_request_that_stands_is_told(client: Client, directory_fd: int) -> None:
    release = threading.Event()
    checkpoint = client(hold(release))
    checkpoint.request(directory_fd, "ckp")
    asked: list[int] = []

    def is_held() -> bool:
        asked.append(1)
        return len(asked) == 3

    try:
        assert checkpoint.await_outcome(LIMIT_S, is_held) == Outcome.HELD
    finally:
        release.set()
    assert checkpoint.await_outcome(LIMIT_S) == Outcome.CLOSED


def test_one_that_never_stands_is_not_waited_for_longer_than_the_limit(
    client: Client, directory_fd: int
) -> None:
    release = threading.Event()
    checkpoint = client(hold(release))
    checkpoint.request(directory_fd, "ckp")
    try:
        with pytest.raises(UnansweredError):
            checkpoint.await_outcome(0.05, lambda: False)
    finally:
        release.set()


def test_a_connection_that_asked_nothing_asks_at_its_end(run_dir: Path, serve: Serve) -> None:
    """Without a request, bhyve would complain about the connection in the guest's log."""
    server = serve(silent)
    checkpoint = Checkpoint(run_dir, "web1", "guest web1")
    checkpoint.close()
    checkpoint.close()
    assert settle(run_dir, "web1", "guest web1", LIMIT_S)
    assert [texts(request) for request in server.requests] == [{"cmd": "bhysend-sync"}] * 2


# The request carries our own end of the connection, because bhyve does not ignore SIGPIPE.

REPLIES_LATE = """
import os, signal, socket, sys
from bhystream.backend.bhyve import nvlist
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(10)
print("ready", flush=True)
connection, _ = listener.accept()
request = nvlist.receive(connection)
for key in sys.argv[2:]:
    os.close(request.pop(key).fd)
print("received", flush=True)
sys.stdin.readline()
try:
    connection.sendall(nvlist.pack({})[0])
except OSError:
    os._exit(1)
os._exit(0)
"""


@pytest.mark.parametrize(("drops", "status"), [([], 0), (["bhysend-reply"], -signal.SIGPIPE)])
def test_a_reply_to_one_who_is_gone_is_no_signal(
    run_dir: Path, directory_fd: int, drops: list[str], status: int
) -> None:
    bhyve = subprocess.Popen(
        [sys.executable, "-c", REPLIES_LATE, str(run_dir / "web1"), *drops],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with bhyve:
        assert bhyve.stdout is not None and bhyve.stdin is not None
        assert bhyve.stdout.readline() == b"ready\n"
        checkpoint = Checkpoint(run_dir, "web1", "guest web1")
        checkpoint.request(directory_fd, "ckp")
        assert bhyve.stdout.readline() == b"received\n"
        checkpoint.close()
        bhyve.stdin.write(b"\n")
        bhyve.stdin.flush()
        assert bhyve.wait(LIMIT_S) == status


def test_the_process_that_listens_is_known(run_dir: Path, child: Callable[[str], Child]) -> None:
    bhyve = child("exits")
    checkpoint = Checkpoint(run_dir, "web1", "guest web1")
    assert checkpoint.identity == identify(bhyve.process.pid, "bhyve")
    checkpoint.close()


# The outcome of a request.


def test_an_end_of_the_connection_is_told(client: Client, directory_fd: int) -> None:
    checkpoint = client(silent)
    checkpoint.request(directory_fd, "ckp")
    assert checkpoint.await_outcome(LIMIT_S) == Outcome.CLOSED


def test_a_reply_is_told(client: Client, directory_fd: int) -> None:
    checkpoint = client(reply({}))
    checkpoint.request(directory_fd, "ckp")
    assert checkpoint.await_outcome(LIMIT_S) == Outcome.REPLIED


def test_an_error_is_told_in_bhyve_s_words(client: Client, directory_fd: int) -> None:
    checkpoint = client(reply({"error": "cannot save \x1b[31mnvme"}))
    checkpoint.request(directory_fd, "ckp")
    with pytest.raises(RefusedError, match=r"^guest web1: its bhyve refused: cannot save \\x1b"):
        checkpoint.await_outcome(LIMIT_S)


def test_a_reply_without_sense_is_no_reply(client: Client, directory_fd: int) -> None:
    checkpoint = client(lambda connection, request: connection.sendall(b"x" * 40))
    checkpoint.request(directory_fd, "ckp")
    assert checkpoint.await_outcome(LIMIT_S) == Outcome.CLOSED


def test_a_descriptor_in_a_reply_is_closed(client: Client, directory_fd: int) -> None:
    read_end, write_end = os.pipe()

    def answer(connection: socket.socket, request: Request) -> None:
        nvlist.send(connection, {"fd": Descriptor(write_end)})
        os.close(write_end)

    checkpoint = client(answer)
    checkpoint.request(directory_fd, "ckp")
    assert checkpoint.await_outcome(LIMIT_S) == Outcome.REPLIED
    assert os.read(read_end, 1) == b""  # EOF: no copy of write_end is left
    os.close(read_end)


def test_a_bhyve_that_hangs_is_waited_for_no_longer_than_the_limit(
    client: Client, directory_fd: int
) -> None:
    release = threading.Event()
    checkpoint = client(hold(release))
    checkpoint.request(directory_fd, "ckp")
    try:
        with pytest.raises(UnansweredError, match="guest web1: its bhyve has not answered"):
            checkpoint.await_outcome(0.05)
    finally:
        release.set()
    assert checkpoint.await_outcome(LIMIT_S) == Outcome.CLOSED


@pytest.mark.parametrize("mode", ["exits", "dies", "replies and exits"])
def test_the_end_of_the_process_is_told(
    run_dir: Path, child: Callable[[str], Child], directory_fd: int, mode: str
) -> None:
    bhyve = child(mode)
    checkpoint = Checkpoint(run_dir, "web1", "guest web1")
    checkpoint.request(directory_fd, "ckp")
    outcome = checkpoint.await_outcome(LIMIT_S)
    if mode != "replies and exits":  # the reply may be seen before the end
        assert outcome == Outcome.EXITED
    bhyve.process.wait()
    assert checkpoint.await_outcome(LIMIT_S) == Outcome.EXITED
    checkpoint.close()


# Connections.


def test_a_missing_socket_is_named(run_dir: Path) -> None:
    with pytest.raises(NobodyListensError, match=f"cannot connect to {run_dir}/web1: No such") as e:
        Checkpoint(run_dir, "web1", "guest web1")
    assert "BHYVE_SNAPSHOT" in e.value.hint


def test_a_socket_that_nobody_listens_at_is_named(run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(run_dir / "web1"))
    with pytest.raises(NobodyListensError, match=f"connect to {run_dir}/web1: Connection refused"):
        Checkpoint(run_dir, "web1", "guest web1")


def test_a_forbidden_socket_is_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(self: socket.socket, address: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", forbid)
    with pytest.raises(AccessError, match=f"connect to {run_dir}/web1: Permission denied"):
        Checkpoint(run_dir, "web1", "guest web1")


def test_a_path_that_is_too_long_is_named(run_dir: Path) -> None:
    with pytest.raises(GuestError, match="AF_UNIX path too long"):
        Checkpoint(run_dir, "x" * 120, "guest x")


def test_a_full_queue_is_waited_for_and_is_no_end(run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run_dir / "web1"))
        listener.listen(0)
        waiting: list[socket.socket] = []
        try:
            while True:
                waiting.append(socket.socket(socket.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect(str(run_dir / "web1"))
        except BlockingIOError:
            pass
        with pytest.raises(GuestError, match="is busy, or hangs") as raised:
            Checkpoint(run_dir, "web1", "guest web1", 0.1)
        assert not isinstance(raised.value, NobodyListensError)
        with pytest.raises(GuestError, match="is busy, or hangs"):
            settle(run_dir, "web1", "guest web1", 0.1)
        for one in waiting:
            one.close()


# settle().


@pytest.mark.parametrize("handler", [silent, reply({"error": "command not found"}), reply({})])
def test_any_answer_settles(run_dir: Path, serve: Serve, handler: Handler) -> None:
    server = serve(handler)
    assert settle(run_dir, "web1", "guest web1", LIMIT_S)
    assert [texts(request) for request in server.requests] == [{"cmd": "bhysend-sync"}]


def test_it_is_settled_only_when_earlier_requests_are_served(
    run_dir: Path, serve: Serve, directory_fd: int
) -> None:
    release = threading.Event()

    def handle(connection: socket.socket, request: Request) -> None:
        if request["cmd"] == "checkpoint":
            release.wait(LIMIT_S)

    serve(handle)
    checkpoint = Checkpoint(run_dir, "web1", "guest web1")
    checkpoint.request(directory_fd, "ckp")
    checkpoint.close()
    with ThreadPoolExecutor(1) as pool:
        settled = pool.submit(settle, run_dir, "web1", "guest web1", LIMIT_S)
        try:
            with pytest.raises(TimeoutError):
                settled.result(0.2)
        finally:
            release.set()
        assert settled.result(LIMIT_S)


def test_a_request_that_goes_on_is_not_settled(run_dir: Path, serve: Serve) -> None:
    release = threading.Event()
    serve(hold(release))
    try:
        with pytest.raises(UnansweredError):
            settle(run_dir, "web1", "guest web1", 0.05)
    finally:
        release.set()


@pytest.mark.parametrize("mode", ["exits", "dies"])
def test_a_process_that_ends_instead_of_answering_is_gone(
    run_dir: Path, child: Callable[[str], Child], mode: str
) -> None:
    bhyve = child(mode)
    who = identify(bhyve.process.pid, "bhyve")
    assert not settle(run_dir, "web1", "guest web1", LIMIT_S)
    assert not settle(run_dir, "web1", "guest web1", LIMIT_S, who)
    assert not is_alive(who)


def test_where_nobody_listens_the_process_decides(
    run_dir: Path, child: Callable[[str], Child]
) -> None:
    assert not settle(run_dir, "web2", "guest web2", LIMIT_S)
    bhyve = child("exits")
    who = identify(bhyve.process.pid, "bhyve")
    with pytest.raises(NobodyListensError):
        settle(run_dir, "web2", "guest web2", 0.1, who)
    bhyve.end()
    assert not settle(run_dir, "web2", "guest web2", LIMIT_S, who)

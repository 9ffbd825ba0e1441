"""The rendezvous of the answers: real sockets, real pipes, one thread."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bhystream.errors import InputOutputError, UsageError
from bhystream.handover.answers import Answer, pack
from bhystream.send.rendezvous import connect, path_of
from support.bhysend import Brief, Source
from support.descriptors import descriptors
from support.processes import blocked
from support.third_stage import ID, LIMIT_S, NAMES

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

HELLO = Answer(ID, "HELLO", ("hv2/a1", "/var/lib/bhysend"))
ELSEWHERE = Answer(ID, "HELLO", ("hv3/b2", "/var/lib/bhysend"))


@pytest.fixture
def source(base: Path) -> Iterator[Source]:
    before = descriptors()
    made = Source(base)
    yield made
    made.rendezvous.close(0)
    made.inbox.close()
    assert descriptors() == before
    assert list((base / "run").iterdir()) == []
    assert not any(thread.name == "answers" for thread in threading.enumerate())


def meet(base: Path) -> socket.socket:
    """Connect as a third stage does, and check the greeting."""
    found = connect(base, ID)
    assert found is not None
    peer, names = found
    assert names == list(NAMES)
    peer.settimeout(LIMIT_S)
    return peer


def rest_of(peer: socket.socket) -> bytes:
    """Read to the end of the connection."""
    data = b""
    while more := peer.recv(100):
        data += more
    return data


def seen(number: int) -> bytes:
    return pack(Answer(ID, "SEEN", (str(number),)))


# Meeting.


def test_a_third_stage_is_told_the_guest_and_brings_answers(source: Source) -> None:
    source.listen()
    with closing(meet(source.base)) as peer:
        peer.sendall(pack(HELLO) + seen(3))
        assert source.seen(3)
        assert source.inbox.hello == HELLO


def test_a_signal_goes_to_the_thread_that_may_be_blocked_and_not_to_this_one(
    source: Source,
) -> None:
    source.listen()
    taken = {signal.SIGALRM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
    [reader] = [thread for thread in threading.enumerate() if thread.name == "answers"]
    assert taken <= blocked(reader.native_id)
    assert not taken & blocked(threading.main_thread().native_id)


def test_the_greeting_is_one_line_of_json_and_nothing_else(source: Source) -> None:
    source.listen()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path_of(source.base, ID))
        source.rendezvous.close(0)
        assert rest_of(peer) == json.dumps(NAMES).encode() + b"\nstatus 0\n"


def test_where_no_bhysend_is_none_is_found(base: Path) -> None:
    before = descriptors()
    assert connect(base, ID) is None
    assert descriptors() == before


def test_the_bhysend_of_another_stream_is_not_found(source: Source) -> None:
    source.listen()
    assert connect(source.base, "f" * 32) is None


def test_the_socket_of_a_killed_bhysend_is_none_and_is_removed(base: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path_of(base, ID))
    assert connect(base, ID) is None
    assert list((base / "run").iterdir()) == []
    assert connect(base, ID) is None


def test_what_comes_with_the_greeting_is_left(base: Path) -> None:
    """bhysend may tell the status at once: connect() must not read it with the greeting."""
    with closing(Brief(base, json.dumps(NAMES).encode() + b"\nstatus 76\n")):
        peer = meet(base)
        assert rest_of(peer) == b"status 76\n"
        peer.close()


@pytest.mark.parametrize("greeting", [b"", b'["web1"', b"web1\n", b"\xff\n"])
def test_one_that_does_not_greet_is_none(base: Path, greeting: bytes) -> None:
    before = descriptors()
    with closing(Brief(base, greeting)):
        assert connect(base, ID) is None
    assert descriptors() == before


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_a_path_that_is_too_long_for_a_socket_is_refused(tmp_path: Path, spare: int) -> None:
    # sun_path is shortest on FreeBSD: 104 bytes with the NUL.
    room = 103 - len(f"/run/{ID}")
    base = Path("/" + "d" * (room - 1 - spare))
    if spare >= 0:
        assert len(path_of(base, ID)) == 103 - spare
        return
    for ask in (lambda: path_of(base, ID), lambda: connect(base, ID)):
        with pytest.raises(UsageError, match="too long for a socket in it"):
            ask()


def test_the_length_of_a_path_is_that_of_its_bytes() -> None:
    with pytest.raises(UsageError):
        path_of(Path("/" + "\u00fc" * 50), ID)


def test_a_path_that_is_too_long_opens_nothing(base: Path) -> None:
    before = descriptors()
    far = base / ("d" * 90)
    source = Source(far)
    with pytest.raises(UsageError, match="too long"):
        source.listen()
    source.rendezvous.close(64)
    source.inbox.close()
    assert descriptors() == before


def test_a_socket_that_cannot_be_bound_is_an_error(base: Path) -> None:
    before = descriptors()
    source = Source(base)
    (base / "run").rmdir()
    with pytest.raises(InputOutputError, match=f"cannot listen on {base}/run/{ID}: No such file"):
        source.listen()
    source.rendezvous.close(74)
    source.inbox.close()
    assert descriptors() == before


# What comes in.


def test_several_connections_of_one_host_fill_one_box(source: Source) -> None:
    source.listen()
    peers = [meet(source.base) for _ in range(6)]
    for number, peer in enumerate(peers):
        peer.sendall(pack(HELLO) + seen(number))
        assert source.seen(number)
    for peer in peers[1:]:
        peer.close()
    # One connection is left, and still counts.
    peers[0].sendall(pack(Answer(ID, "ACCEPT")))
    assert source.inbox.wait(lambda: source.inbox.accepted, LIMIT_S)
    assert source.inbox.lost == ""
    peers[0].close()
    assert source.lost() == "the way back was closed"


def test_another_host_on_another_connection_does_not_count(source: Source) -> None:
    source.listen()
    with closing(meet(source.base)) as first, closing(meet(source.base)) as second:
        first.sendall(pack(HELLO) + seen(1))
        assert source.seen(1)
        second.sendall(pack(ELSEWHERE) + pack(Answer(ID, "RUNNING")))
        second.shutdown(socket.SHUT_WR)
        first.sendall(seen(2))
        assert source.seen(2)
        first.shutdown(socket.SHUT_WR)
        source.lost()
        assert (source.inbox.hello, source.inbox.final) == (HELLO, None)


def test_garbage_ends_its_connection_and_no_other(source: Source) -> None:
    source.listen()
    with closing(meet(source.base)) as bad, closing(meet(source.base)) as good:
        good.sendall(pack(HELLO) + seen(1))
        assert source.seen(1)
        # Answers before the garbage count, even if they come in the same read.
        bad.sendall(pack(HELLO) + pack(Answer(ID, "ACCEPT")) + b"garbage\n")
        assert source.inbox.wait(lambda: source.inbox.accepted, LIMIT_S)
        good.sendall(seen(2))
        assert source.seen(2)
        bad.sendall(pack(Answer(ID, "RUNNING")))
        good.shutdown(socket.SHUT_WR)
        source.lost()
        assert source.inbox.final is None


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "the way back was closed"),
        (pack(HELLO), "the way back was closed"),
        (pack(HELLO) + b"x\n", "the way back: not an answer"),
        (pack(Answer(ID, "ACCEPT")), "the way back: ACCEPT comes before HELLO"),
        (b"x" * 5000, "the way back: no answer in 4096 bytes"),
        (
            pack(Answer("f" * 32, "HELLO", ("a/1", "/b"))),
            f"the way back: an answer of another stream, {'f' * 32}",
        ),
        (pack(HELLO) + pack(ELSEWHERE), "the way back: another host answers than before"),
    ],
)
def test_why_nothing_more_comes(source: Source, raw: bytes, why: str) -> None:
    source.listen()
    with closing(meet(source.base)) as peer:
        peer.sendall(raw)
        peer.shutdown(socket.SHUT_WR)
        assert source.lost() == why


def test_the_end_of_one_that_was_reset_is_a_loss(source: Source) -> None:
    """The peer closes with the greeting unread, so bhysend sees a reset, and no EOF."""
    source.listen()
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(path_of(source.base, ID))
    peer.recv(1, socket.MSG_PEEK)
    peer.close()
    assert source.lost() == "the way back was closed"


def test_noise_before_the_first_answer_is_shown(source: Source) -> None:
    source.listen()
    with closing(meet(source.base)) as peer:
        peer.sendall(b"Last login: Mon\n" + pack(HELLO) + seen(1))
        assert source.seen(1)
    assert source.noise == [b"Last login: Mon\n"]


# The command form.


def test_a_commands_pipe_is_read_to_its_end(source: Source) -> None:
    theirs, ours = os.pipe()
    source.rendezvous.read(theirs)
    source.listen()
    os.write(ours, pack(HELLO) + seen(5))
    assert source.seen(5)
    os.close(ours)
    assert source.lost() == "the way back was closed"
    source.rendezvous.close(0)
    os.close(theirs)  # the descriptor stayed the caller's


def test_a_third_stage_beside_a_command_is_heard_too(source: Source) -> None:
    theirs, ours = os.pipe()
    source.rendezvous.read(theirs)
    source.listen()
    os.write(ours, pack(HELLO))
    with closing(meet(source.base)) as peer:
        peer.sendall(pack(HELLO) + seen(1))
        assert source.seen(1)
        os.close(ours)
        peer.sendall(seen(2))
        assert source.seen(2)
        assert source.inbox.lost == ""
    assert source.lost() == "the way back was closed"
    os.close(theirs)


def test_a_command_that_talks_without_end_is_read_while_nobody_looks(source: Source) -> None:
    """The main thread may be blocked, so the test writes more than any pipe holds."""
    theirs, ours = os.pipe()
    source.rendezvous.read(theirs)
    source.listen()
    os.write(ours, pack(HELLO))
    for number in range(20000):
        os.write(ours, seen(number))
    assert source.seen(19999)
    os.close(ours)
    source.lost()
    os.close(theirs)


# The end.


def test_every_third_stage_is_told_the_status(source: Source) -> None:
    source.listen()
    peers = [meet(source.base) for _ in range(3)]
    peers[1].sendall(pack(HELLO) + b"garbage\n" + seen(1))
    peers[2].shutdown(socket.SHUT_WR)
    source.rendezvous.close(81)
    for peer in peers:
        assert rest_of(peer) == b"status 81\n"
        peer.close()


def test_one_that_is_gone_is_no_obstacle_to_telling_another(source: Source) -> None:
    source.listen()
    meet(source.base).close()
    with closing(meet(source.base)) as peer:
        source.rendezvous.close(5)
        assert rest_of(peer) == b"status 5\n"


def test_a_status_is_told_once(source: Source) -> None:
    source.listen()
    with closing(meet(source.base)) as peer:
        source.rendezvous.close(1)
        source.rendezvous.close(2)
        assert rest_of(peer) == b"status 1\n"


def test_after_the_end_nobody_is_met(source: Source) -> None:
    source.listen()
    source.rendezvous.close(0)
    assert connect(source.base, ID) is None


def test_one_that_was_never_started_is_closed(base: Path) -> None:
    before = descriptors()
    source = Source(base)
    source.rendezvous.listen(base)
    source.rendezvous.close(70)
    source.inbox.close()
    assert descriptors() == before

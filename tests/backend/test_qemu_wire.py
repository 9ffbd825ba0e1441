"""The QMP protocol on one socket, without a QEMU."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from bhystream.backend.qemu import wire
from bhystream.backend.qemu.wire import RefusedError, Wire, WireError

LIMIT_S = 20.0
SOON_S = 0.05


class Two:
    """Both ends of a connection: the wire, and the peer, which says what a test wants."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        self.wire = Wire(ours)
        self.peer.settimeout(LIMIT_S)
        self._lines = self.peer.makefile("rb")

    def ask(self, command: str) -> int:
        return self.wire.send(command, None, LIMIT_S)

    def asked(self) -> object:
        return json.loads(self._lines.readline())

    def say(self, *said: object) -> None:
        self.peer.sendall(b"".join(json.dumps(each).encode() + b"\r\n" for each in said))

    def close(self) -> None:
        self.wire.close()
        self._lines.close()
        self.peer.close()


@pytest.fixture
def two() -> Iterator[Two]:
    made = Two()
    yield made
    made.close()


def test_a_command_is_one_line(two: Two) -> None:
    first = two.wire.send("stop", None, LIMIT_S)
    second = two.wire.send("getfd", {"fdname": "a\nb"}, LIMIT_S)
    assert two.asked() == {"execute": "stop", "id": first}
    assert two.asked() == {"execute": "getfd", "id": second, "arguments": {"fdname": "a\nb"}}


def test_each_command_gets_its_own_answer(two: Two) -> None:
    ids = [two.ask("a"), two.ask("b"), two.ask("c")]
    two.say(*({"return": id_ * 10, "id": id_} for id_ in reversed(ids)))
    assert [two.wire.answer(id_, LIMIT_S) for id_ in ids] == [id_ * 10 for id_ in ids]


def test_events_and_the_answers_of_others_are_dropped(two: Two) -> None:
    id_ = two.ask("a")
    two.say({"event": "STOP", "id": id_}, {"return": 1, "id": "x"}, {"return": 2, "id": id_ + 1})
    two.say({"return": 3}, {"return": 5, "id": True}, {"return": 4, "id": id_})
    assert two.wire.answer(id_, LIMIT_S) == 4


def test_a_late_answer_is_dropped(two: Two) -> None:
    late, next_ = two.ask("a"), two.ask("b")
    with pytest.raises(TimeoutError):
        two.wire.answer(late, SOON_S)
    two.say({"return": 1, "id": late}, {"return": 2, "id": next_})
    assert two.wire.answer(next_, LIMIT_S) == 2
    with pytest.raises(KeyError):
        two.wire.answer(late, LIMIT_S)


def test_an_answer_that_is_forgotten_is_dropped(two: Two) -> None:
    ids = [two.ask("a"), two.ask("b"), two.ask("c")]
    two.say(*({"return": id_, "id": id_} for id_ in ids[:2]))
    assert two.wire.answer(ids[1], LIMIT_S) == ids[1]
    two.wire.forget(ids)
    for id_ in ids:
        with pytest.raises(KeyError):
            two.wire.answer(id_, LIMIT_S)


def test_an_error_is_in_qemus_words(two: Two) -> None:
    id_ = two.ask("nix")
    two.say({"error": {"class": "CommandNotFound", "desc": "no nix"}, "id": id_})
    with pytest.raises(RefusedError, match=r"^no nix$"):
        two.wire.answer(id_, LIMIT_S)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"id": 1}, "without a value"), ({"error": {}, "id": 1}, "without a value"),
        ({"error": {"desc": 7}, "id": 1}, "without a value"), ({"error": {}}, "could not read"),
        ([], "not an object"), (7, "not an object"),
    ],
)  # fmt: skip
def test_what_is_no_answer_ends_the_connection(two: Two, said: object, why: str) -> None:
    id_ = two.ask("a")
    two.say(said)
    with pytest.raises(WireError, match=why):
        two.wire.answer(id_, LIMIT_S)


def test_the_end_of_the_connection_is_an_error(two: Two) -> None:
    id_ = two.ask("a")
    two.peer.shutdown(socket.SHUT_RDWR)
    with pytest.raises((WireError, ConnectionResetError)):
        two.wire.answer(id_, LIMIT_S)


def test_a_line_without_end_is_an_error(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_LINE_BYTES", 100)
    two.peer.sendall(b"x" * 200)
    with pytest.raises(WireError, match="a line without end"):
        two.wire.greeting(LIMIT_S)


def test_a_long_line_in_pieces_is_read(two: Two) -> None:
    id_ = two.ask("a")
    long = "x" * (1 << 20)
    talk = threading.Thread(target=two.say, args=[{"return": long, "id": id_}])
    talk.start()
    assert two.wire.answer(id_, LIMIT_S) == long
    talk.join()


def test_a_peer_that_takes_nothing_holds_nobody_up(two: Two) -> None:
    with pytest.raises(TimeoutError):
        two.wire.send("a", {"b": "x" * (8 << 20)}, SOON_S)


def test_a_descriptor_goes_with_its_command(two: Two) -> None:
    read_end, write_end = os.pipe()
    two.wire.send("getfd", {"fdname": "x"}, LIMIT_S, write_end)
    os.close(write_end)
    line, [theirs], _, _ = socket.recv_fds(two.peer, 4096, 1)
    assert json.loads(line)["execute"] == "getfd"
    os.write(theirs, b"y")
    os.close(theirs)
    assert os.read(read_end, 10) == b"y"
    os.close(read_end)

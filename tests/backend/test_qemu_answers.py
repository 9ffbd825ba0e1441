"""What the backend does with an answer of QEMU's that QMP does not know, and with such records."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.qemu import facts, graph, migration, plugged
from bhystream.backend.qemu.paused import open_paused
from bhystream.backend.qemu.qmp import ConnectionLostError, Qmp
from bhystream.backend.qemu.wire import Wire
from bhystream.errors import GuestError, Interrupted
from support.qmp_answers import Answers

Ask = Callable[[Qmp], object]
NO_DEVICES = {"devices": [], "disks": [], "smp": {"cpus": 1}}

ODD: list[tuple[str, Ask, list[Any]]] = [
    ("query-kvm", facts.gather, ["q35", None]),
    ("query-target", facts.gather, ["q35", {"enabled": 1}, []]),
    ("query-memdev", facts.memory_backend, [None]),
    ("query-memdev", facts.memory_backend, [[{"id": "ram0"}]]),
    ("query-memdev", facts.memory_backend, [[{"id": "ram0", "size": 1e999}]]),
    ("query-memory-size-summary", facts.memory_backend,
     [[{"id": "ram0", "size": 1, "share": True}], "ram0", 7]),
    ("query-block", lambda qmp: graph.drives(qmp, "/"), [{"a": 1}]),
    ("query-block", lambda qmp: graph.drives(qmp, "/"), [[{"inserted": {"image": 1}}]]),
    ("query-block", lambda qmp: graph.drives(qmp, "/"), [[{"inserted": "x"}]]),
    ("query-x", lambda qmp: qmp.ask("query-x", lambda reply: reply[3], doing="ask"), [[]]),
    ("query-jobs", graph.refuse_jobs, [7]),
    ("query-block-exports", graph.refuse_jobs, [[], [7]]),
    ("qom-list", lambda qmp: plugged.check_plugged(qmp, NO_DEVICES), [[{"name": 1}]]),
    ("query-cpus-fast", lambda qmp: plugged.check_plugged(qmp, NO_DEVICES), [[], [], 1]),
    ("query-migrate-capabilities", migration.capabilities, [[{"state": 1}]]),
    ("query-migrate", migration.progress, ["active"]),
    ("query-migrate-parameters", lambda qmp: migration.parameter(qmp, "x"), [{"x": "fast"}]),
]  # fmt: skip


@pytest.mark.parametrize(("command", "ask", "values"), ODD)
def test_an_odd_answer_is_an_error_of_the_guest(command: str, ask: Ask, values: list[Any]) -> None:
    with pytest.raises(GuestError, match=f"QEMU's answer to {command} is not what QMP says"):
        ask(Answers(values))


@pytest.mark.parametrize("file", ["/a\0b", 'json:{"filename": "\\ud800"}'])
def test_a_name_that_no_file_has_leads_to_no_file(file: str) -> None:
    block = {"device": "d0", "inserted": {"drv": "raw", "file": file}}
    (drive,) = graph.drives(Answers([[block]]), "/srv")
    assert drive.medium is not None and not drive.medium.is_there


@pytest.mark.parametrize(
    ("qdev", "device"),
    [("vd0", "vd0"), ("/machine/peripheral/vd0/virtio-backend", "vd0"), ("/machine/peripheral", ""),
     ("/m/peripheral/", ""), ("/machine/peripheral-anon/device[0]", ""), ("", "")],
)  # fmt: skip
def test_a_path_of_qom_that_ends_early_names_no_device(qdev: str, device: str) -> None:
    (drive,) = graph.drives(Answers([[{"device": "d0", "qdev": qdev}]]), "/srv")
    assert drive.device == device


def test_a_name_in_json_that_nests_deep_is_a_name() -> None:
    assert graph.file_of("json:" + "[" * 100_000) == "json:" + "[" * 100_000


GREETING = b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, '
GREETING += b'"capabilities": []}}\r\n'
READY = b'{"return": {}, "id": ID}\r\n'


@pytest.fixture
def spoken(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Return a function that makes a socket which says each of some bytes after a command of ours.

    "ID" stands for the id of the command.
    """
    servers: list[socket.socket] = []

    def serve(server: socket.socket, said: tuple[bytes, ...]) -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            with connection:
                for number, each in enumerate(said):
                    asked = json.loads(connection.recv(4096)) if number else {}
                    connection.sendall(each.replace(b"ID", json.dumps(asked.get("id")).encode()))

    def make(*said: bytes) -> str:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        servers.append(server)
        server.bind(path := str(tmp_path / f"q{len(servers)}"))
        server.listen()
        threading.Thread(target=serve, args=(server, said), daemon=True).start()
        return path

    yield make
    for server in servers:
        server.close()


@pytest.mark.parametrize(
    "greeting",
    [
        b"", b"\n", b"SSH-2.0-OpenSSH\r\n", b"{}\n", b"[]\n", b"7\n", b"\xff\n",
        b"[" * 100_000 + b"\n", b'{"QMP": {"a": "\\ud800"}}\n',
        b'{"QMP": {}}\n', b'{"QMP": {"version": [], "capabilities": {}}}\n', b'{"QMP": 1e999}\n',
        b'{"return": {}}\n', b'{"error": {"class": "a", "desc": "b"}}\n',
    ],
)  # fmt: skip
def test_what_does_not_greet_as_qmp_does_is_an_error(
    spoken: Callable[..., str], greeting: bytes
) -> None:
    with pytest.raises(GuestError, match="does not speak QMP"):
        Qmp(spoken(greeting), "guest web1")


def out_of_memory(self: Wire, *_: object) -> None:
    raise MemoryError


def test_without_memory_nobody_says_that_it_does_not_speak_qmp(
    spoken: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wire, "greeting", out_of_memory)
    with pytest.raises(MemoryError):
        Qmp(spoken(GREETING), "guest web1")


def test_a_command_without_memory_is_a_lost_connection(
    spoken: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    qmp = Qmp(spoken(GREETING, READY, READY), "guest web1")
    monkeypatch.setattr(Wire, "answer", out_of_memory)
    with pytest.raises(ConnectionLostError, match="cannot examine it: there is not enough memory"):
        qmp.execute("query-x", doing="examine it")


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"\n", b"x\n", b"[]\n", b"[" * 100_000 + b"\n", b"\xff\n", b'{"return": 1}\n',
        b'{"return": 1, "id": "other"}\n', b'{"error": 7, "id": ID}\n',
        b'{"error": {"class": 1}, "id": ID}\n', b'{"event": 7}\n',
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_a_lost_connection(
    spoken: Callable[..., str], answer: bytes
) -> None:
    qmp = Qmp(spoken(GREETING, READY, answer), "guest web1")
    with pytest.raises(ConnectionLostError, match="guest web1: cannot examine it: "):
        qmp.execute("query-status", doing="examine it", limit_s=1)
    qmp.close()


RECORD: dict[str, Any] = {
    "hypervisor": "qemu", "name": "web1", "qmp": "/q", "pid": 1, "start_ticks": 2, "boot_id": "b",
    "restore": {"capabilities": {"x": True}, "parameters": {"y": 1}}, "announce": False,
}  # fmt: skip


def test_a_record_is_opened() -> None:
    open_paused(RECORD).close()


@pytest.mark.parametrize(
    "change",
    [
        {"pid": "1"}, {"pid": 1e999}, {"start_ticks": None}, {"boot_id": 7}, {"name": 7},
        {"qmp": []},
        {"restore": []}, {"restore": {"capabilities": 1}}, {"restore": {"parameters": {"y": "z"}}},
        {"announce": "no"}, {"hypervisor": "bhyve"},
    ],
)  # fmt: skip
def test_a_record_with_a_field_of_another_type_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(GuestError, match="cannot read the record of a paused QEMU guest"):
        open_paused({**RECORD, **change})


def test_a_qemu_that_does_not_answer_is_waited_for_until_the_caller_gives_up(
    tmp_path: Path,
) -> None:
    """The limit of the greeting is not what ends this wait, nor is that of a command."""
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        for greets in (False, True):
            waited: list[int] = []

            def give_up(waited: list[int] = waited) -> None:
                waited.append(1)
                if len(waited) == 2:
                    raise Interrupted("interrupted by SIGINT")

            serving = threading.Thread(target=_greet, args=(listener, greets))
            serving.start()
            with contextlib.ExitStack() as stack:
                stack.callback(serving.join)
                with pytest.raises(Interrupted):
                    qmp = Qmp(path, "guest web1", give_up)
                    stack.callback(qmp.close)
                    qmp.execute("query-status", doing="ask")
            assert len(waited) == 2


def _greet(listener: socket.socket, greets: bool) -> None:
    """Accept one client, and answer nothing but, if greets, the negotiation; then wait for EOF."""
    peer, _ = listener.accept()
    with contextlib.suppress(OSError, ValueError), peer, peer.makefile("rb", buffering=0) as lines:
        if greets:
            peer.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
            request = json.loads(lines.readline())
            peer.sendall(json.dumps({"return": {}, "id": request.get("id")}).encode() + b"\r\n")
        while lines.read(1 << 16):
            pass

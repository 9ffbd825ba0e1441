"""QMP commands, on connections that are left as soon as possible.

QEMU serves one QMP client at a time, and in a test that client is the product.
So the harness connects, asks, and leaves; a measurement that must not wait for a
connection keeps a Session.  The harness shares no code with the product.
Source: docs/interop/qmp-spec.txt in QEMU.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

_ANSWER_S = 60.0


class QmpError(Exception):
    """QEMU refused the command; the message is QEMU's."""


def run_command(path: Path, command: str, arguments: Mapping[str, Any]) -> Any:
    """Run one command on the socket at path and return its result.

    Raises QmpError if QEMU refuses, OSError if no process listens, and
    TimeoutError if no answer comes: most likely another client is connected.
    """
    with Session(path) as session:
        return session.ask(command, arguments)


class Session:
    """One connection, for several commands and for events; a context manager.

    Raises what run_command() raises.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._events: list[Any] = []
        try:
            self._socket.settimeout(_ANSWER_S)
            self._socket.connect(str(path))
            self._stream = self._socket.makefile("rwb")
            self._receive()  # the greeting
            self.ask("qmp_capabilities", {})
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        self._socket.close()

    def ask(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run one command and return its result."""
        request = {"execute": command, "arguments": dict(arguments or {})}
        self._stream.write(json.dumps(request).encode() + b"\n")
        self._stream.flush()
        while True:
            answer = self._receive()
            if "error" in answer:
                raise QmpError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
            self._events.append(answer)

    def await_event(self, name: str) -> Any:
        """Return the data of the first event of this name that was not returned before."""
        while True:
            while self._events:
                event = self._events.pop(0)
                if event["event"] == name:
                    return event.get("data", {})
            self._events.append(self._receive())

    def _receive(self) -> Any:
        line = self._stream.readline()
        if not line:
            raise ConnectionResetError("QEMU closed the QMP connection")
        return json.loads(line)


def peer_pid(path: Path) -> int:
    """Return the pid of the process that listens on a socket.  Raises OSError if there is none."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid: int = struct.unpack("=iii", credentials)[0]
    return pid

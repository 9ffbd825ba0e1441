"""One QMP command at a time, on a connection of its own.

QEMU serves one QMP client at a time, and in a test that client is the product.
So the harness connects, asks, and leaves.  It shares no code with the product.
Source: docs/interop/qmp-spec.txt in QEMU.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ANSWER_S = 60.0


class QmpError(Exception):
    """QEMU refused the command; the message is QEMU's."""


def run_command(path: Path, command: str, arguments: Mapping[str, Any]) -> Any:
    """Run one command on the socket at path and return its result.

    Raises QmpError if QEMU refuses, OSError if no process listens, and
    TimeoutError if no answer comes: most likely another client is connected.
    """
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_ANSWER_S)
        client.connect(str(path))
        with client.makefile("rwb") as stream:
            _receive(stream)  # the greeting
            _ask(stream, "qmp_capabilities", {})
            return _ask(stream, command, arguments)


def peer_pid(path: Path) -> int:
    """Return the pid of the process that listens on a socket.  Raises OSError if there is none."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid: int = struct.unpack("=iii", credentials)[0]
    return pid


def _ask(stream: Any, command: str, arguments: Mapping[str, Any]) -> Any:
    request = {"execute": command, "arguments": dict(arguments)}
    stream.write(json.dumps(request).encode() + b"\n")
    stream.flush()
    while True:
        answer = _receive(stream)
        if "error" in answer:
            raise QmpError(f"{command}: {answer['error']['desc']}")
        if "return" in answer:
            return answer["return"]
        # else the line is an event, for which nothing here waits


def _receive(stream: Any) -> Any:
    line = stream.readline()
    if not line:
        raise ConnectionResetError("QEMU closed the QMP connection")
    return json.loads(line)

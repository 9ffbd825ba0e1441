"""The QMP protocol on one socket: lines of JSON, and an id that tells which command is answered.

Blocking calls, each with a limit.  A library for asyncio, such as `qemu.qmp`, takes three
times as long for a command (0.6 ms instead of 0.2), and the guest is paused meanwhile.

Events are dropped: whoever waits for something asks.  So are the answers that come after their
limit, by their ids.
Source: docs/interop/qmp-spec.rst in QEMU.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bhystream.strict_json import loads

# The longest answers, of query-block, have some kilobytes for each disk.
MAX_LINE_BYTES = 10 << 20
# How often on_wait is called.
LOOK_S = 0.2
_READ_BYTES = 1 << 16


class WireError(Exception):
    """What came is not QMP, or nothing more will come: the connection is of no use any more."""


class RefusedError(Exception):
    """QEMU has answered a command with an error; the message is QEMU's."""


class Wire:
    """The client's end of one QMP connection.  Calls raise WireError, OSError, TimeoutError."""

    def __init__(self, sock: socket.socket, on_wait: Callable[[], None] = lambda: None) -> None:
        """Take a connected socket over; close() closes it.  Nothing is read yet.

        on_wait: called every LOOK_S while a line is awaited; ends the wait if it raises.
        """
        self._socket = sock
        self._on_wait = on_wait
        self._received = bytearray()
        self._searched = 0
        self._sent = 0
        # The commands whose answers are wanted; None until the answer is here.
        self._answers: dict[int, Mapping[str, Any] | None] = {}

    def greeting(self, limit_s: float) -> Mapping[str, Any]:
        """Return the contents of QEMU's greeting, the first line."""
        found = self._line(time.monotonic() + limit_s).get("QMP")
        if not (
            isinstance(found, dict)
            and isinstance(found.get("version"), dict)
            and isinstance(found.get("capabilities"), list)
        ):
            raise WireError("another greeting than QMP's")
        return found

    def send(
        self, command: str, arguments: Mapping[str, object] | None, limit_s: float, *fds: int
    ) -> int:
        """Send a command; return its id, for answer().

        fds: are sent along with its first byte, and stay the caller's.
        """
        self._sent += 1
        words: dict[str, object] = {"execute": command, "id": self._sent}
        if arguments:
            words["arguments"] = dict(arguments)
        line = json.dumps(words).encode() + b"\n"
        self._socket.settimeout(limit_s)
        at = socket.send_fds(self._socket, [line], list(fds)) if fds else 0
        self._socket.sendall(line[at:])
        self._answers[self._sent] = None
        return self._sent

    def answer(self, id_: int, limit_s: float) -> Any:
        """Return the value that a command has returned.  Raises RefusedError too.

        Whatever this raises, nobody may wait for the answer any more.
        """
        deadline_s = time.monotonic() + limit_s
        try:
            while (answer := self._answers[id_]) is None:
                self._take(self._line(deadline_s))
        finally:
            del self._answers[id_]
        if "return" in answer:
            return answer["return"]
        error = answer.get("error")
        if isinstance(error, dict) and isinstance(error.get("desc"), str):
            raise RefusedError(error["desc"])
        raise WireError("an answer without a value")

    def forget(self, ids: Sequence[int]) -> None:
        """Drop the answers to these commands, whether or not they have come."""
        for id_ in ids:
            self._answers.pop(id_, None)

    def close(self) -> None:
        """Close the connection.  May be called twice."""
        self._socket.close()

    def _take(self, line: Mapping[str, Any]) -> None:
        if "event" in line:
            return
        id_ = line.get("id")
        if id_ is None and "error" in line:
            raise WireError("QEMU could not read a command")
        if type(id_) is int and id_ in self._answers:
            self._answers[id_] = line

    def _line(self, deadline_s: float) -> Mapping[str, Any]:
        """Return the next object that QEMU says."""
        while (end := self._received.find(b"\n", self._searched)) < 0:
            self._searched = len(self._received)
            if self._searched > MAX_LINE_BYTES:
                raise WireError("a line without end")
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._socket.settimeout(min(left_s, LOOK_S))
            try:
                more = self._socket.recv(_READ_BYTES)
            except TimeoutError:
                self._on_wait()
                continue
            if not more:
                raise WireError("it has closed the connection")
            self._received += more
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._searched = 0
        try:
            found = loads(line)
        except ValueError as error:
            raise WireError(f"not JSON: {error}") from None
        if not isinstance(found, dict):
            raise WireError("not an object of JSON")
        return found

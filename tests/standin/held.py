"""Hold a stand-in in the last write of a checkpoint, as bhysend holds bhyve.  Linux only.

with Hold(host, "g") as hold:       # a rehearsal may have been made before
    hold.ask()                      # sends the request, with the FIFO as a further descriptor
    hold.await_held()
    hold.release()                  # or drain(path), by any process
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import select
import socket
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bhystream.backend.bhyve import nvlist

from .rig import Rig, await_true


class Hold:
    """A FIFO at a guest's FILE.meta that lacks one byte, and the request that fills it."""

    def __init__(self, host: Rig, name: str = "g") -> None:
        self._host = host
        self._name = name
        self.path = host.snapshot(name).meta
        self.path.unlink(missing_ok=True)
        os.mkfifo(self.path)
        self.fifo = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)
        self.capacity = self._arm()
        self.connection: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.drop()

    def _arm(self) -> int:
        """Fill the FIFO but for one byte; return the FIFO's capacity in bytes."""
        capacity = 0
        with suppress(BlockingIOError):
            while True:
                capacity += os.write(self.fifo, bytes(4096))
        with suppress(BlockingIOError):
            while True:
                os.read(self.fifo, 1 << 16)
        assert os.write(self.fifo, bytes(capacity - 1)) == capacity - 1
        return capacity

    def ask(self, *, is_anchored: bool = True) -> None:
        """Send the request, and do not wait for a reply.  is_anchored: send the FIFO with it."""
        fddir = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        pairs: dict[str, nvlist.Value] = {
            "cmd": "checkpoint",
            "filename": self._name,
            "suspend": False,
            "fddir": nvlist.Descriptor(fddir),
        }
        if is_anchored:
            pairs["bhysend.anchor"] = nvlist.Descriptor(self.fifo)
        self.connection = self._host.connect(self._name)
        nvlist.send(self.connection, pairs)
        os.close(fddir)

    @property
    def filled_bytes(self) -> int:
        """The number of bytes in the FIFO (FIONREAD)."""
        count = array.array("i", [0])
        fcntl.ioctl(self.fifo, termios.FIONREAD, count)
        return count[0]

    def await_held(self) -> None:
        """Wait until the FIFO is full."""
        await_true(lambda: self.filled_bytes == self.capacity, "a full FIFO")

    def release(self) -> dict[str, Any]:
        """Read the FIFO until the connection has ended; return FILE.meta's content."""
        return parse(self.capacity, drain(self.fifo, self.has_ended))

    def has_ended(self) -> bool:
        """Say whether the handler has returned: the connection has a reply, or has ended."""
        assert self.connection is not None
        return bool(select.select([self.connection], [], [], 0)[0])

    def drop(self) -> None:
        """Close our descriptors, as if this process were gone."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self.fifo >= 0:
            os.close(self.fifo)
            self.fifo = -1


def drain(fifo: int, is_over: Callable[[], bool]) -> bytes:
    """Read a FIFO until is_over() is true, and then until the FIFO is empty; return the bytes."""
    text = b""

    def is_read() -> bool:
        nonlocal text
        was_over = is_over()
        with suppress(BlockingIOError):
            while part := os.read(fifo, 1 << 16):
                text += part
        return was_over

    await_true(is_read, lambda: f"the end after {len(text)} bytes")
    return text


def parse(capacity: int, text: bytes) -> dict[str, Any]:
    """Return the JSON that follows the bytes that filled the FIFO."""
    found: dict[str, Any] = json.loads(text[capacity - 1 :])
    return found


def kern_bytes(meta: dict[str, Any]) -> int:
    """Return the size of FILE.kern according to FILE.meta."""
    return sum(entry["size"] for entry in [*meta["kern_structs"], *meta["devices"]])


def fifos_of(pid: int, fifo: Path) -> int:
    """Return how many descriptors of a process are the FIFO."""
    wanted = fifo.stat().st_ino
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found += link.stat().st_ino == wanted
    return found

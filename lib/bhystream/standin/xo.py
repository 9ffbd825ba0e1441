"""The text of FILE.meta, and when it is written: libxo's pretty JSON, in a handle's buffer.

Nothing reaches the file before flush(): that of finish(), that of destroy(),
and one in between where the text grows beyond HIGH_WATER_BYTES.  A checkpoint
that fails flushes in destroy() what it has collected, which bhyve calls when
its guest runs again.  Source: contrib/libxo/libxo/libxo.c, xo_do_emit_fields(),
xo_finish_h(), xo_destroy(), xo_flush_h(), FreeBSD 15.1, read.

FreeBSD's pipes take bytes one by one: one free byte of a full FIFO is taken,
and the rest of the write(2) waits.  Linux takes as much as PIPE_BUF whole or
not at all, so the first byte goes by itself here.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress

HIGH_WATER_BYTES = 8 * 1024 - 512
"""Source: contrib/libxo/libxo/xo_buf.h, XO_BUF_HIGH_WATER."""


class Xo:
    """A handle on a file.  fd: the caller's.

    between: called after the first byte of a write into a FIFO, before the rest.
    """

    def __init__(self, fd: int, between: Callable[[], None]) -> None:
        self._fd = fd
        self._between = between
        self._is_fifo = stat.S_ISFIFO(os.fstat(fd).st_mode)
        self._text = "{"
        self._has_members = [False]

    def open_container(self, key: str) -> None:
        """Begin an object: a member of the one that is open."""
        self._member(f"{json.dumps(key)}: {{")
        self._has_members.append(False)

    def open_list(self, key: str) -> None:
        """Begin a list of objects."""
        self._member(f"{json.dumps(key)}: [")
        self._has_members.append(False)

    def open_instance(self) -> None:
        """Begin an object of the list that is open."""
        self._member("{")
        self._has_members.append(False)

    def emit(self, key: str, value: str | int) -> None:
        """Write a value; here, and nowhere else, a text that is too long is flushed."""
        self._member(f"{json.dumps(key)}: {json.dumps(value)}")
        if len(self._text) > HIGH_WATER_BYTES:
            self.flush()

    def close(self, bracket: str) -> None:
        """End what was opened last.  bracket: "}" or "]"."""
        self._has_members.pop()
        self._text += f"\n{self._indent()}{bracket}"

    def finish(self) -> None:
        """End the text and flush it."""
        self.close("}")
        self._text += "\n"
        self.flush()

    def destroy(self) -> None:
        """Flush what is left."""
        self.flush()

    def flush(self) -> None:
        """Write what there is.  What cannot be written is lost, and bhyve does not notice."""
        data, self._text = self._text.encode(), ""
        with suppress(OSError):
            if self._is_fifo and data:
                data = data[os.write(self._fd, data[:1]) :]
                self._between()
            while data:
                data = data[os.write(self._fd, data) :]

    def _member(self, text: str) -> None:
        comma = "," if self._has_members[-1] else ""
        self._has_members[-1] = True
        self._text += f"{comma}\n{self._indent()}{text}"

    def _indent(self) -> str:
        return "  " * len(self._has_members)

"""The text of FILE.meta, libxo's pretty JSON in a handle's buffer, and when it is written.

Text reaches the file only in flush(), which is called by finish(), by destroy(),
and in between if the text grows beyond HIGH_WATER_BYTES.  bhyve calls destroy()
when its guest runs again: if the checkpoint failed, the text that was collected
is flushed then.  Source: contrib/libxo/libxo/libxo.c, xo_do_emit_fields(),
xo_finish_h(), xo_destroy(), xo_flush_h(), FreeBSD 15.1, read.

A pipe of FreeBSD takes bytes one by one: if a FIFO has one free byte, a write(2)
fills that byte and waits with the rest.  Linux takes up to PIPE_BUF bytes as a
whole or not at all, so flush() writes the first byte by itself.
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
    """A handle on a file.

    fd: the file's descriptor, which the caller closes.  between: called after
    the first byte of a write into a FIFO, before the rest.
    """

    def __init__(self, fd: int, between: Callable[[], None]) -> None:
        self._fd = fd
        self._between = between
        self._is_fifo = stat.S_ISFIFO(os.fstat(fd).st_mode)
        self._text = "{"
        self._has_members = [False]

    def open_container(self, key: str) -> None:
        """Begin an object, as a member of the open object."""
        self._member(f"{json.dumps(key)}: {{")
        self._has_members.append(False)

    def open_list(self, key: str) -> None:
        """Begin a list of objects."""
        self._member(f"{json.dumps(key)}: [")
        self._has_members.append(False)

    def open_instance(self) -> None:
        """Begin an object in the open list."""
        self._member("{")
        self._has_members.append(False)

    def emit(self, key: str, value: str | int) -> None:
        """Add a value.  Only this method flushes the text if it grows too long."""
        self._member(f"{json.dumps(key)}: {json.dumps(value)}")
        if len(self._text) > HIGH_WATER_BYTES:
            self.flush()

    def close(self, bracket: str) -> None:
        """End the object or list that was opened last.  bracket: "}" or "]"."""
        self._has_members.pop()
        self._text += f"\n{self._indent()}{bracket}"

    def finish(self) -> None:
        """End the text and flush it."""
        self.close("}")
        self._text += "\n"
        self.flush()

    def destroy(self) -> None:
        """Flush the text that is left."""
        self.flush()

    def flush(self) -> None:
        """Write the text.  Text that cannot be written is lost, and bhyve does not notice."""
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

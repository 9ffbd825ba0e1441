"""A QMP connection without a QEMU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from bhystream.backend.qemu.qmp import Qmp


class Answers(Qmp):
    """A QMP connection whose answers are the values of a list, in turn; None at its end."""

    def __init__(self, values: list[Any]) -> None:
        self.path = "/q"
        self.who = "guest web1"
        self.version = "7.2.22"
        self.pid = os.getpid()
        self._values = iter(values)

    def execute(self, command: str, *_: object, **__: object) -> Any:
        return next(self._values, None)

    @contextlib.contextmanager
    def ahead(self, *_: str) -> Iterator[None]:
        yield

    def __del__(self) -> None:
        """Do nothing: nothing is open."""

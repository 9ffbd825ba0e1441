"""A process that is killed at a step while it saves, or puts back, a paused guest's registers.

    Dying("set_register", 9).install()      # before the ninth register is set
    Dying("", 17).install()                 # before step 17, whatever it is

Each change of a vCPU, of the guest's memory or of the journal is a step, and so
is the middle of each write.  Each instruction of the stub is one step, since a
CPU completes an instruction that it has begun.
"""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bhystream.backend.bhyve.journal import Journal
from bhystream.backend.bhyve.savedvcpu import PACKED_BYTES
from bhystream.standin.interpreter import Interpreter
from bhystream.standin.vm import StandinVm

JOURNAL_BYTES = 16 + PACKED_BYTES

_CALLS: tuple[tuple[type, str], ...] = (
    *((StandinVm, name) for name in ("set_register", "set_descriptor", "inject_nmi")),
    *((StandinVm, name) for name in ("resume_cpu", "suspend_cpu")),
    *((Journal, name) for name in ("write", "mark", "remove")),
    (Path, "rename"),
)


class Dying:
    """The counter of the steps.

    name: of the steps that count, "" for all.  count: the step to die at, from 1.
    """

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self._left = count
        self._runs = False
        self.taken: list[str] = []

    def step(self, name: str) -> None:
        """Count a step, and die if it is the last one."""
        self.taken.append(name)
        if self._name in ("", name):
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Count every step of this process from now on."""
        for kind, name in _CALLS:
            setattr(kind, name, self._before(name, getattr(kind, name)))
        Interpreter._one = self._before(  # type: ignore[method-assign]
            "instruction", Interpreter._one
        )
        StandinVm.run = self._running(  # type: ignore[method-assign, assignment]
            StandinVm.run
        )
        StandinVm.map = self._mapping(StandinVm.map)  # type: ignore[method-assign]
        os.write = self._writing(os.write)

    def _before(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **keys: Any) -> Any:
            self.step(name)
            return real(*args, **keys)

        return stepped

    def _running(self, real: Callable[[StandinVm, int], int]) -> Callable[[StandinVm, int], int]:
        def run(vm: StandinVm, vcpu: int) -> int:
            self._runs = True
            try:
                return real(vm, vcpu)
            finally:
                self._runs = False

        return run

    def _mapping(self, real: Callable[..., mmap.mmap]) -> Callable[..., Any]:
        """Make this process's own writes to the guest's memory steps, but not the vCPU's."""

        def mapped(vm: StandinVm, gpa: int, size: int, *, is_writable: bool = False) -> Any:
            found = real(vm, gpa, size, is_writable=is_writable)
            return Memory(self, found) if is_writable and not self._runs else found

        return mapped

    def _writing(self, real: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
        """Add a step in the middle of the journal's write."""

        def write(fd: int, data: Any) -> int:
            if len(data) != JOURNAL_BYTES:
                return real(fd, data)
            half = real(fd, data[: len(data) // 2])
            self.step("half file")
            return half + real(fd, data[half:])

        return write


class Memory:
    """A mapping whose writes are steps."""

    def __init__(self, dying: Dying, mapping: mmap.mmap) -> None:
        self._dying = dying
        self._mapping = mapping

    def __len__(self) -> int:
        return len(self._mapping)

    def __getitem__(self, where: Any) -> Any:
        return self._mapping[where]

    def __setitem__(self, where: slice, data: bytes) -> None:
        middle = where.start + len(data) // 2
        self._dying.step("memory")
        self._mapping[where.start : middle] = data[: middle - where.start]
        self._dying.step("half memory")
        self._mapping[middle : where.stop] = data[middle - where.start :]

    def close(self) -> None:
        self._mapping.close()

"""Pipelines of real processes, with a deadline and a certain end for each process.

    with Pipeline(["bhysend", guest], ["pv", "-q"], ["bhyrecv"], env=env) as pipeline:
        sender, _, receiver = pipeline.wait()
    assert (sender.status, receiver.status) == (80, 0), report(sender, receiver)

Standard errors go to files, so no process ever waits for the test to read.  Processes that still
run when the with block ends are killed.  Tests wait for conditions; a deadline only ends a broken
test.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from support.waiting import DEADLINE_S

ROOT = Path(__file__).resolve().parents[2]
BHYSEND = (sys.executable, str(ROOT / "bhysend"))
BHYRECV = (sys.executable, str(ROOT / "bhyrecv"))

_NARROW_BYTES = 4096

Words = Sequence[str | Path]


@dataclass(frozen=True)
class Ended:
    """How a process ended.  status: negative for a signal.  output: if it was not piped on."""

    argv: tuple[str, ...]
    status: int
    output: bytes
    stderr: str


def report(*ended: Ended) -> str:
    """Return statuses and standard errors, for the message of a failed assertion."""
    return "\n".join(f"{' '.join(one.argv)}: {one.status}\n{one.stderr}" for one in ended)


class Stage:
    """One process of a pipeline, in a process group of its own."""

    def __init__(
        self, argv: Words, env: Mapping[str, str], stdin: int, stdout: int | IO[bytes] | None
    ) -> None:
        """Start the process.  stdout: a descriptor, a file, or None to keep the output."""
        self.argv = tuple(str(word) for word in argv)
        self._errors = _file()
        self._output = _file() if stdout is None else None
        self.process = subprocess.Popen(
            self.argv,
            stdin=stdin,
            stdout=self._output if stdout is None else stdout,
            stderr=self._errors,
            env=dict(env),
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stderr(self) -> str:
        """What the process has written to its standard error so far."""
        return _content(self._errors).decode(errors="replace")

    @property
    def output(self) -> bytes:
        """What the process has written to its standard output so far, if the output is kept."""
        return _content(self._output) if self._output else b""

    def await_end(self, deadline_s: float = DEADLINE_S) -> Ended:
        """Wait until the process has ended.  Raises TimeoutError after deadline_s."""
        try:
            status = self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{' '.join(self.argv)} does not end\n{self.stderr}") from None
        return Ended(self.argv, status, self.output, self.stderr)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process alone, unless the process has ended."""
        self.process.send_signal(number)

    def catches(self, number: int) -> bool:
        """Say whether the process handles a signal by now, as a program at work does."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        [mask] = re.findall(r"^SigCgt:\s+([0-9a-f]+)$", status, re.MULTILINE)
        return bool(int(mask, 16) >> (number - 1) & 1)

    def close(self) -> None:
        """Kill the process and all others in its process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._errors.close()
        if self._output:
            self._output.close()


class Pipeline:
    """Processes that read from one another, like `a | b | c` in a shell."""

    def __init__(
        self,
        *commands: Words,
        env: Mapping[str, str],
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        narrow: bool = False,
    ) -> None:
        """Start all commands.

        stdin, stdout: of the first and of the last command; None keeps the output.
        narrow: the first command writes into a socket that takes only a few KiB, so that this
        command cannot get far ahead of its reader.
        """
        self.stages: list[Stage] = []
        self._env = env
        reader = stdin if isinstance(stdin, int) else stdin.fileno()
        ours: list[int] = []
        try:
            for index, argv in enumerate(commands[:-1]):
                left, right = _link(narrow and index == 0)
                ours += [left, right]
                self.stages.append(Stage(argv, env, reader, left))
                reader = right
            self.stages.append(Stage(commands[-1], env, reader, stdout))
        except BaseException:
            self.close()
            raise
        finally:
            for fd in ours:
                os.close(fd)

    def __getitem__(self, index: int) -> Stage:
        return self.stages[index]

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error:
            for stage in self.stages:
                print(f"{' '.join(map(str, stage.argv))}: {stage.stderr}")
        self.close()

    def wait(self, deadline_s: float = DEADLINE_S) -> list[Ended]:
        """Wait until all processes have ended.  Raises TimeoutError after deadline_s."""
        end = time.monotonic() + deadline_s
        try:
            return [stage.await_end(max(end - time.monotonic(), 0.0)) for stage in self.stages]
        except TimeoutError as error:
            said = "\n".join(f"{stage.argv[1:3]}: {stage.stderr}" for stage in self.stages)
            raise TimeoutError(f"{error}\n{said}") from None

    def close(self) -> None:
        """Kill all processes that still run."""
        for stage in self.stages:
            stage.close()


def run(
    *commands: Words,
    env: Mapping[str, str],
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
) -> list[Ended]:
    """Run a pipeline until all of its processes have ended."""
    with Pipeline(*commands, env=env, stdin=stdin, stdout=stdout) as pipeline:
        return pipeline.wait()


def _link(narrow: bool) -> tuple[int, int]:
    """Return (write end, read end)."""
    if not narrow:
        read_end, write_end = os.pipe()
        return write_end, read_end
    writer, reader = socket.socketpair()
    writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _NARROW_BYTES)
    return writer.detach(), reader.detach()


def _file() -> IO[bytes]:
    """Return a file in memory that is gone when its last descriptor is closed."""
    return os.fdopen(os.memfd_create("stage"), "w+b")


def _content(file: IO[bytes]) -> bytes:
    """Read a file that a process writes to, without moving the offset shared with the process."""
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0)

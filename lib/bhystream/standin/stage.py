"""Two hosts of stand-ins in one temporary directory, and the end of every process in them.

    DIR/NAME.conf        a guest's bhyve_config(5)
    DIR/a/, DIR/b/       the hosts; each is a stand-in's directory (__init__.py), with in addition
        var/             the host's state directory
        disk rom console the files that the guest's configuration names

Nothing outside of DIR is touched.  A stand-in ends by itself when its node is
gone, a stand-in paused by a checkpoint when vmm/ is gone.  On Linux, every process
that a program leaves behind becomes our child.  So no process of the stage lives
on when the stage has closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bhystream import inherited
from bhystream.backend.bhyve.host import VMM_DIR
from bhystream.errors import GuestError

from .kernel import StandinHost

_PR_SET_CHILD_SUBREAPER = 36  # Source: prctl(2), linux/prctl.h
_BASES = ("/dev/shm", "/tmp")
_POLL_S = 0.01
_POLITE_S = 10.0  # a bhysend that was interrupted brings its guest back before it ends
_END_S = 5.0
_TAP = "tap0"
_UUID = "6d6f7665-6420-6c69-7665-000000000001"


class PlayedHost:
    """One host: a directory, and the environment in which programs find it."""

    def __init__(self, directory: Path) -> None:
        """Make the directory with everything that a guest's configuration names."""
        self.directory = directory
        self.console = directory / "console"
        self.disk = directory / "disk"
        self.rom = directory / "rom"
        for name in ("vmm", "run", "net", "var"):
            (directory / name).mkdir(mode=0o700, parents=True)
        (directory / "net" / _TAP).write_text("bridge0\n")
        self.rom.write_bytes(b"boot ROM")
        self.disk.touch()
        os.truncate(self.disk, 1 << 20)

    def variables(self) -> dict[str, str]:
        """Return the variables that name this host."""
        own = str(self.directory)
        return {VMM_DIR: own, "BHYSEND_STATE_DIR": f"{own}/var"}

    def resources(self) -> dict[str, str]:
        """Return what this host lends a guest, by the short words of `bhyrecv -o`."""
        return {
            "disk0": str(self.disk),
            "net0": _TAP,
            "com1": str(self.console),
            "bootrom": str(self.rom),
        }

    def lines(self) -> list[str]:
        """Return the complete lines that a guest has printed on its console here."""
        try:
            return self.console.read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []


class Stage:
    """The directory with two hosts, `here` and `there`; a context manager.

    needed_bytes: space for all that the guests will write.  Raises GuestError
    if no directory has that much space.
    """

    def __init__(self, needed_bytes: int) -> None:
        adopt_orphans()
        base = _roomy(needed_bytes)
        self.directory = Path(tempfile.mkdtemp(prefix="bhydemo-", dir=base))
        self._programs: list[subprocess.Popen[bytes]] = []
        try:
            self.here = PlayedHost(self.directory / "a")
            self.there = PlayedHost(self.directory / "b")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def write_config(self, name: str, keys: Sequence[str]) -> Path:
        """Write a guest's configuration for the host `here`; return its path.

        keys: further lines of bhyve_config(5).
        """
        host = self.here
        lines = [
            *keys,
            f"uuid={_UUID}",
            f"lpc.bootrom={host.rom}",
            f"lpc.com1.path={host.console}",
            "pci.0.0.0.device=hostbridge",
            "pci.0.3.0.device=virtio-blk",
            f"pci.0.3.0.path={host.disk}",
            "pci.0.3.0.ser=DEMO-1",
            "pci.0.4.0.device=virtio-net",
            f"pci.0.4.0.backend={_TAP}",
            "pci.0.4.0.mac=58:9c:fc:00:00:01",
            "pci.0.31.0.device=lpc",
        ]
        path = self.directory / f"{name}.conf"
        path.write_text("\n".join(lines) + "\n")
        return path

    def start_guest(self, name: str, config: Path, options: Sequence[str] = ()) -> None:
        """Start a stand-in on the host `here`; its standard error goes to DIR/NAME.log.

        options: further options of the command line.
        """
        with (self.directory / f"{name}.log").open("wb") as log:
            subprocess.Popen(
                [
                    *inherited.program("standin"),
                    "-k",
                    str(config),
                    *options,
                    name,
                ],
                env={**os.environ, VMM_DIR: str(self.here.directory)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_program(
        self, words: Sequence[str], variables: dict[str, str], stderr: int
    ) -> subprocess.Popen[bytes]:
        """Start a program that a Ctrl-C at the terminal also reaches.

        variables: added to the environment.  stderr: a descriptor; the caller closes it.
        """
        program = subprocess.Popen(
            words,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        self._programs.append(program)
        return program

    def close(self) -> None:
        """End every process of the stage and remove its directory.  Bounded; never raises."""
        with _undisturbed():
            # End the programs first: an interrupted bhysend brings its guest back,
            # and the guest is ended after that.
            for program in self._programs:
                if program.poll() is None:
                    program.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        program.wait(_POLITE_S)
            for vmm in self.directory.glob("?/vmm"):
                shutil.rmtree(vmm, ignore_errors=True)
            _end_children()
            # A bhysend that was killed leaves its null device mounted.
            for mounted in self.directory.glob("?/*/dev/null"):
                StandinHost(self.directory).unmount_null(mounted.parent)
            shutil.rmtree(self.directory, ignore_errors=True)


def _roomy(needed_bytes: int) -> Path:
    """Return a directory with enough space, in memory if possible.

    Its path must be short: an AF_UNIX path has at most 104 bytes on FreeBSD, 108
    on Linux.  A container's /dev/shm often has only 64 MiB.
    """
    for name in (*_BASES, tempfile.gettempdir()):
        path = Path(name)
        if path.is_dir() and os.access(path, os.W_OK | os.X_OK):
            found = os.statvfs(path)
            if found.f_bavail * found.f_frsize >= needed_bytes:
                return path
    raise GuestError(f"{needed_bytes >> 20} MiB are needed, but not free in /dev/shm or /tmp")


def adopt_orphans() -> None:
    """Become the parent of every process that our children leave behind.  Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_children() -> None:
    """Wait for all children, and kill those that do not end by themselves."""
    start = time.monotonic()
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            continue
        waited_s = time.monotonic() - start
        if waited_s >= 2 * _END_S:
            return  # SIGKILL does not end the children that are left
        for child in _children() if waited_s >= _END_S else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(_POLL_S)


def _children() -> list[int]:
    """Return the process ids of our children.  Source: proc_pid_task(5); Linux only."""
    found: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in path.read_text().split()]
    return found


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore the signals that would end this process, until the with block ends.

    Also the alarm, which can raise what one of them has raised in vain: see signals.py.
    """
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

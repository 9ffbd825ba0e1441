"""Hosts and guests of the stand-in, for tests.

    with Rig() as host:                             # a host: its directory, short, in memory
        guest = host.start("g")                     # a process; boots and runs
        guest.console.await_sweeps(1)               # every page checked once; WRONG raises
        host.suspend("g")                           # by the checkpoint socket, until its EOF
        guest.await_exit()                          # 5, as after bhyve's own suspend
        host.snapshot("g").flip(page=300)           # plant a fault
        again = host.start("g", restore=host.snapshot("g").path)
        again.console.await_wrong()

Two Rigs are two hosts.  `Rig(generation=4, fail=["hang"])` writes host.json;
host.settings(fail=[]) writes host.json anew under a running guest.  A test finds
a guest that bhyrecv started by the guest's name: host.pid(name), Console(path).
When a Rig closes, close() kills every guest of the host, and removes its directory.

A Spec is a small guest by default (64 MiB, 1024 pages touched, two vCPUs), so
that a sweep takes a tenth of a second.  Tests wait for conditions, with a
deadline that only ends a broken test.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bhystream.backend.bhyve import nvlist
from bhystream.backend.bhyve.host import VMM_DIR
from bhystream.standin.kernel import StandinHost
from support.waiting import until

DEADLINE_S = 30.0
_PAGE = 4096


def await_true(condition: Callable[[], object], what: str | Callable[[], str]) -> None:
    """Wait until a condition holds, as until() does, for as long as a stand-in may take."""
    until(condition, what, DEADLINE_S)


class GuestIsWrong(AssertionError):
    """A guest printed WRONG, or ended, while a test waited for something else."""


@dataclass(frozen=True)
class Sweep:
    """One `sweep` line: its number, the pages checked, the pages found wrong since boot."""

    number: int
    pages: int
    wrong: int


class Console:
    """The lines that a guest printed to com1.

    why_ended: returns why the guest will print no more, or "".  forgives_fpu:
    lost FPU registers are no fault, because a plain restore loses them.
    """

    def __init__(self, path: Path, why_ended: Callable[[], str] = lambda: "") -> None:
        self.path = path
        self._why_ended = why_ended
        self.forgives_fpu = False

    def lines(self) -> list[str]:
        """Return the complete lines."""
        try:
            return self.path.read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []

    def beats(self) -> list[int]:
        """Return the numbers of the beats."""
        return [int(line[5:]) for line in self.lines() if re.fullmatch(r"beat \d+", line)]

    def sweeps(self) -> list[Sweep]:
        """Return the sweeps."""
        pattern = re.compile(r"sweep (\d+) pages (\d+) wrong (\d+)")
        found = (pattern.fullmatch(line) for line in self.lines())
        return [Sweep(*(int(n) for n in match.groups())) for match in found if match]

    def wrong(self) -> list[str]:
        """Return the WRONG lines."""
        lines = [line for line in self.lines() if line.startswith("WRONG ")]
        return [one for one in lines if not (self.forgives_fpu and one.startswith("WRONG fpu "))]

    def await_beats(self, count: int) -> None:
        """Wait until this console has this many beats.  Raises GuestIsWrong."""
        self._await(lambda: len(self.beats()) >= count, f"{count} beats")

    def await_sweeps(self, count: int) -> None:
        """Wait for this many sweeps that began after the call, with all pages right.

        The sweep under way is not counted.  Raises GuestIsWrong.
        """
        wanted = len(self.sweeps()) + count + 1
        self._await(lambda: len(self.sweeps()) >= wanted, f"{count} sweeps")

    def await_wrong(self, what: str = "") -> str:
        """Wait until the guest prints a WRONG line that contains a text; return the line."""
        found: list[str] = []

        def is_there() -> bool:
            found[:] = [line for line in self.wrong() if what in line]
            return bool(found) or bool(self._why_ended())

        await_true(is_there, lambda: f"WRONG {what} in {self.lines()[-8:]}")
        if not found:
            raise GuestIsWrong(f"{self._why_ended()}; {self.lines()[-8:]}")
        return found[0]

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        def is_there() -> bool:
            if self.wrong():
                raise GuestIsWrong("; ".join(self.wrong()[:4]))
            if condition():
                return True
            if self._why_ended():
                raise GuestIsWrong(f"{self._why_ended()}; {self.lines()[-8:]}")
            return False

        await_true(is_there, lambda: f"{what} in {self.lines()[-8:]}")


def assert_unbroken(*consoles: Console) -> None:
    """Assert that the joined consoles have every beat once, no fault, and rising sweep numbers."""
    for console in consoles:
        assert not console.wrong(), console.wrong()[:4]
    beats = [beat for console in consoles for beat in console.beats()]
    assert beats == list(range(1, len(beats) + 1)), beats
    sweeps = [sweep.number for console in consoles for sweep in console.sweeps()]
    assert sweeps == sorted(set(sweeps)), sweeps


@dataclass(frozen=True)
class Spec:
    """A guest's configuration.

    devices: ("bus.slot.function", emulation), besides hostbridge and lpc.  has_rom:
    a boot ROM, with which the stand-in creates the VM itself.  keys: further keys.
    """

    cpus: int = 2
    memory: str = "64M"
    touched: str = "4M"
    working_set: str = "1M"
    rate: str = "16M"
    devices: tuple[tuple[str, str], ...] = (("0.3.0", "virtio-blk"), ("0.4.0", "virtio-net"))
    has_rom: bool = True
    keys: dict[str, str] = field(default_factory=dict)


class Guest:
    """One stand-in process.  console: what it prints; stderr: its messages."""

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], console: Path, messages: Path
    ) -> None:
        self.name = name
        self.process = process
        self.messages = messages
        self.console = Console(console, self._why_ended)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.process.pid

    def await_exit(self) -> int:
        """Wait for the process and return its status, -9 if SIGKILL ended it."""
        return self.process.wait(DEADLINE_S)

    def kill(self) -> None:
        """Kill the process by SIGKILL: node and socket stay behind."""
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def power_off(self) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.terminate()
        return self.await_exit()

    def stderr(self) -> str:
        """Return the process's messages."""
        return self.messages.read_text(errors="replace")

    def _why_ended(self) -> str:
        status = self.process.poll()
        return "" if status is None else f"ended with {status}: {self.stderr().strip()}"


class Snapshot:
    """The three files of a snapshot, which a test can read and spoil."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kern = path.with_name(path.name + ".kern")
        self.meta = path.with_name(path.name + ".meta")

    def read_meta(self) -> dict[str, Any]:
        """Return the parsed .meta."""
        found: dict[str, Any] = json.loads(self.meta.read_text())
        return found

    def blob(self, name: str) -> bytes:
        """Return the blob of a kernel structure or of a device."""
        entry = self._entry(self.read_meta(), name)
        start = entry["file_offset"]
        return self.kern.read_bytes()[start : start + entry["size"]]

    def put_blob(self, name: str, blob: bytes) -> None:
        """Replace a blob by another blob of the same size."""
        entry = self._entry(self.read_meta(), name)
        assert len(blob) == entry["size"]
        with self.kern.open("r+b") as file:
            file.seek(entry["file_offset"])
            file.write(blob)

    def swap(self, one: str, other: str) -> None:
        """Swap two blobs, in .meta."""
        meta = self.read_meta()
        first, second = self._entry(meta, one), self._entry(meta, other)
        first["device"], second["device"] = other, one
        self.meta.write_text(json.dumps(meta))

    def page(self, page: int) -> bytes:
        """Return a page of the memory image."""
        with self.path.open("rb") as file:
            file.seek(page * _PAGE)
            return file.read(_PAGE)

    def put_page(self, page: int, data: bytes, at: int = 0) -> None:
        """Write into a page of the memory image, at a byte offset."""
        with self.path.open("r+b") as file:
            file.seek(page * _PAGE + at)
            file.write(data)

    def flip(self, page: int, at: int = 1234) -> None:
        """Flip one bit of one byte."""
        self.put_page(page, bytes((self.page(page)[at] ^ 1,)), at)

    @staticmethod
    def _entry(meta: dict[str, Any], name: str) -> dict[str, Any]:
        entries = [*meta["kern_structs"], *meta["devices"]]
        found: dict[str, Any] = next(entry for entry in entries if entry["device"] == name)
        return found


class Rig:
    """One host: its directory, the settings in host.json, and its guests."""

    def __init__(self, **settings: Any) -> None:
        base = Path("/dev/shm")
        base = base if os.access(base, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
        self._begin(Path(tempfile.mkdtemp(prefix="si", dir=base)))
        for name in ("net", "run", "vmm", "vm", "s"):
            (self.directory / name).mkdir()
        self.rom = self.directory / "rom"
        self.rom.write_bytes(b"rom")
        self.settings(**settings)

    @classmethod
    def at(cls, directory: Path) -> Self:
        """Return a host that another process made and will close."""
        found = cls.__new__(cls)
        found._begin(directory)
        return found

    def _begin(self, directory: Path) -> None:
        self.directory = directory
        self.host = StandinHost(directory)
        self._settings: dict[str, Any] = {}
        self._guests: list[Guest] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """The environment by which programs find this host."""
        return {**os.environ, VMM_DIR: str(self.directory)}

    def settings(self, **changed: Any) -> None:
        """Change keys of host.json, atomically."""
        self._settings.update(changed)
        new = self.directory / "host.json.new"
        new.write_text(json.dumps(self._settings))
        new.replace(self.directory / "host.json")

    def write_config(self, name: str, spec: Spec, console: Path) -> Path:
        """Write a bhyve_config(5) file, and the disks and taps that it names; return its path."""
        lines = [f"# {name}", f"cpus={spec.cpus}", f"memory.size={spec.memory}"]
        if spec.has_rom:
            lines.append(f"lpc.bootrom={self.rom}")
        lines += [f"lpc.com1.path={console}", "pci.0.0.0.device=hostbridge"]
        lines.append("pci.0.31.0.device=lpc")
        for place, kind in spec.devices:
            lines.append(f"pci.{place}.device={kind}")
            host_name = f"{name}-{place.replace('.', '-')}"
            if kind in ("virtio-blk", "ahci-hd", "ahci-cd", "nvme"):
                disk = self.directory / f"{host_name}.img"
                disk.touch()
                lines.append(f"pci.{place}.path={disk}")
            elif kind in ("virtio-net", "e1000"):
                tap = f"tap-{host_name}"
                if not self.host.has_tap(tap):
                    self.host.make_tap(tap, "bridge0")
                lines.append(f"pci.{place}.backend={tap}")
        lines += [f"standin.{k}={getattr(spec, k)}" for k in ("touched", "working_set", "rate")]
        lines += [f"{key}={value}" for key, value in spec.keys.items()]
        path = self.directory / f"{name}.config"
        path.write_text("\n".join(lines) + "\n")
        return path

    def run(
        self,
        *arguments: str,
        name: str = "g",
        console: Path | None = None,
        **environment: str,
    ) -> Guest:
        """Start the stand-in with the given command line and return at once.

        name: for guest() only; the name that the stand-in gets is an argument.
        """
        messages = self.directory / f"{name}-{len(self._guests)}.stderr"
        with messages.open("wb") as file:
            process = subprocess.Popen(
                [*self.host.program(), *arguments],
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        guest = Guest(name, process, console or self.directory / "no-console", messages)
        self._guests.append(guest)
        return guest

    def start(
        self, name: str = "g", spec: Spec | None = None, restore: Path | None = None
    ) -> Guest:
        """Start a guest from a configuration file and wait until it runs.

        restore: the memory file of a snapshot.
        """
        guest = self.launch(name, spec, restore)
        guest.console.await_beats(1)
        return guest

    def launch(
        self, name: str = "g", spec: Spec | None = None, restore: Path | None = None
    ) -> Guest:
        """Start a guest as start() does, but do not wait."""
        spec = spec or Spec()
        console = self.directory / f"{name}-{len(self._guests)}.console"
        config = self.write_config(name, spec, console)
        if not spec.has_rom and not self.host.exists(name):
            self.host.create(name)
        arguments = ["-A", "-H", "-P", "-k", str(config)]
        arguments += ["-r", str(restore)] if restore else []
        guest = self.run(*arguments, name, name=name, console=console)
        guest.console.forgives_fpu = restore is not None
        return guest

    def guest(self, name: str) -> Guest:
        """Return the guest of this name that was started last."""
        return next(guest for guest in reversed(self._guests) if guest.name == name)

    def snapshot(self, name: str) -> Snapshot:
        """Return the snapshot that checkpoint() and suspend() write for a guest."""
        return Snapshot(self.directory / "s" / name)

    def connect(self, name: str) -> socket.socket:
        """Connect to a guest's checkpoint socket; wait until it exists."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.settimeout(DEADLINE_S)

        def is_connected() -> bool:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                made.connect(str(self.directory / "run" / name))
                return True
            return False

        await_true(is_connected, f"the checkpoint socket of {name}")
        return made

    def ask(self, name: str, **pairs: nvlist.Value) -> dict[str, nvlist.Value] | None:
        """Send a request and return the reply, None for EOF."""
        with self.connect(name) as connection:
            nvlist.send(connection, pairs)
            return nvlist.receive(connection)

    def checkpoint(
        self,
        name: str,
        *,
        suspend: bool = False,
        filename: str | None = None,
        directory: Path | None = None,
    ) -> dict[str, nvlist.Value] | None:
        """Ask for a checkpoint and return the reply, None for EOF."""
        fd = os.open(directory or self.directory / "s", os.O_RDONLY | os.O_DIRECTORY)
        try:
            return self.ask(
                name,
                cmd="checkpoint",
                filename=filename or name,
                suspend=suspend,
                fddir=nvlist.Descriptor(fd),
            )
        finally:
            os.close(fd)

    def suspend(self, name: str) -> Snapshot:
        """Suspend a guest; return its snapshot when the socket has reached EOF."""
        assert self.checkpoint(name, suspend=True) is None
        return self.snapshot(name)

    def waiting(self, name: str) -> frozenset[int]:
        """Return the vCPUs of a VM that wait in bhyve."""
        vm = self.host.open_vm(name)
        try:
            return vm.waiting_vcpus()
        finally:
            vm.close()

    def pid(self, name: str) -> int | None:
        """Return the process that listens at a guest's socket, if any.  Linux only: SO_PEERCRED."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
            try:
                made.connect(str(self.directory / "run" / name))
            except (FileNotFoundError, ConnectionRefusedError):
                return None
            credentials = made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid: int = struct.unpack("<iII", credentials)[0]
            return pid

    def _processes(self) -> Iterator[int]:
        """Yield the stand-ins of this host, even those that are stopped or have no socket."""
        mine = f"{VMM_DIR}={self.directory}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
                if {b"bhystream.standin", mine}.issubset(words.split(b"\0")):
                    yield int(process.name)

    def close(self) -> None:
        """Kill every guest of this host, even those that bhyrecv started; remove the directory."""
        for guest in self._guests:
            if guest.process.poll() is None:
                guest.kill()
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def supervised(host: Rig, name: str, *arguments: str, tap: str = "") -> Iterator[Guest]:
    """Run the supervisor of one guest; kill both when the with block ends."""
    program = [sys.executable, "-P", "-m", "bhystream.standin.supervisor"]
    words = ["-t", tap] if tap else []
    messages = host.directory / f"{name}.supervisor"
    with messages.open("wb") as file:
        process = subprocess.Popen(
            [*program, *words, name, "--", *arguments],
            env=host.environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield Guest(name, process, host.directory / f"{name}-0.console", messages)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(DEADLINE_S)

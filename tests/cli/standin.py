"""A guest that travels from one stand-in's host to the next; see travel.py.

Each place is one run on a host, which is a directory of its own (BHYSEND_VMM_DIR).  A paused guest
is a process that is held in the last write of a checkpoint.  A guest that is being built is also a
process, which has no checkpoint socket until the restore goes on.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bhystream.backend.bhyve.host import VMM_DIR
from standin import rig
from standin.rig import Console, Rig, Sweep
from support.processes import is_gone
from support.waiting import DEADLINE_S, until

from .pipeline import BHYRECV, BHYSEND
from .travel import Host, Site, Traveller

# Settings for the checkpoint interface of FreeBSD 14 and 15 (4), and of FreeBSD 16 (5).
GENERATIONS: dict[int, dict[str, Any]] = {
    4: {"generation": 4},
    5: {"generation": 5},
}
# The free memory of a host, enough for every guest of the tests.
_FREE_BYTES = 64 << 30
# The capacity of a FIFO, on Linux as on FreeBSD.
_FULL_BYTES = 1 << 16


@dataclass(frozen=True)
class StandinSpec:
    """The configuration of a guest, and the generation of its hosts."""

    guest: rig.Spec
    memory_mib: int
    generation: int = 5
    name: str = "proof"
    settings: dict[str, Any] = field(default_factory=dict)


class StandinPlace(Site):
    """One run of a guest on a host.

    config: the guest's bhyve_config(5) there.  work: the keys that say what a booted guest does.
    """

    def __init__(self, host: Rig, spec: StandinSpec, console: Path) -> None:
        self.rig = host
        self.memory_bytes = spec.memory_mib << 20
        self.operand = spec.name
        self.console = Console(console, self._why_ended)
        self.config = host.write_config(spec.name, spec.guest, console)
        # bhyve has no keys for the guest's work: leave the standin.* keys out.
        lines = self.config.read_text().splitlines()
        self.work = [line for line in lines if line.startswith("standin.")]
        lines = [line for line in lines if line not in self.work]
        self.config.write_text("\n".join(lines) + "\n")
        self.staging = host.directory / "staging"
        self.staging.mkdir(mode=0o700, exist_ok=True)

    @property
    def environment(self) -> list[str]:
        """The words before a program that let the program find this host."""
        variables = {
            VMM_DIR: self.rig.directory,
            "BHYRECV_STAGING": self.staging,
        }
        return ["env", *(f"{key}={value}" for key, value in variables.items())]

    def arrive(self) -> None:
        self.pid = self.rig.pid(self.operand) or 0
        assert self.pid, f"no process listens: {self.console.lines()[-4:]}"

    def runs(self) -> bool:
        pid = self.rig.pid(self.operand)
        return pid is not None and not _stands(pid)

    def is_held(self, host: Host) -> bool:
        pid = self.rig.pid(self.operand)
        return pid is not None and _stands(pid)

    def is_loaded(self, host: Host) -> bool:
        return not self.runs() and _is_complete(host.state / "loaded")

    def is_building(self) -> bool:
        return any(self.staging.glob("bhyrecv-*"))

    def hypervisors(self) -> list[int]:
        found = []
        for pid in self.processes():
            with suppress(OSError):
                if b"\0bhystream.standin\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def processes(self) -> list[int]:
        wanted = f"{VMM_DIR}={self.rig.directory}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    @contextmanager
    def reaped(self) -> Iterator[None]:
        try:
            yield
        finally:
            for pid in self.hypervisors():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                until(lambda pid=pid: is_gone(pid), "the end of the killed")  # type: ignore[misc]

    def has_vm(self) -> bool:
        """Say whether this host has a VM of the guest, running or not."""
        return (self.rig.directory / "vmm" / self.operand).exists()

    def allocated_bytes(self) -> int:
        """Return the bytes that the guest's memory takes here."""
        return (self.rig.directory / "vmm" / self.operand).stat().st_blocks * 512

    def forsake(self) -> None:
        assert self.said() == b""
        with self.reaped():
            pass
        for path in (self.rig.directory / "vmm").iterdir():
            path.unlink()
        for path in self.staging.glob("bhyrecv-*"):
            shutil.rmtree(path)

    def assert_nothing_left(self) -> None:
        assert self.processes() == []
        assert self._files() == []
        assert self.said() == b""  # bhyve opens the console before it restores

    def assert_tidy(self, host: Host) -> None:
        assert host.files("held") == [], [str(p) for p in (host.state / "held").rglob("*")]
        if not self.runs():
            assert self._files() == []
        assert list(self.staging.iterdir()) == []
        assert str(self.rig.directory) not in Path("/proc/mounts").read_text()

    def _files(self) -> list[Path]:
        """Return the files here of any guest, running or not."""
        return [*self.staging.iterdir(), *(self.rig.directory / "vmm").iterdir()]

    def said(self) -> bytes:
        return self.console.path.read_bytes() if self.console.path.exists() else b""

    def beats(self) -> list[int]:
        return self.console.beats()

    def await_beats(self, count: int = 1, deadline_s: float = DEADLINE_S) -> None:
        self.console.await_beats(len(self.console.beats()) + count)

    def await_sweeps(self, count: int = 1) -> None:
        self.console.await_sweeps(count)

    def _why_ended(self) -> str:
        if not self.pid or not is_gone(self.pid):
            return ""
        said = [path.read_text() for path in self.rig.directory.glob("*.stderr")]
        return f"stand-in {self.pid} has ended: {''.join(said).strip()}"


class StandinTraveller(Traveller):
    """A guest of the stand-in."""

    needs = "-o disk0= -o net0= -o com1= -o bootrom="
    missing = ("bootrom: no -o bootrom= is given", "disk0: no -o disk0= is given")

    def __init__(self, spec: StandinSpec) -> None:
        """Boot the guest on a host of its own, and wait until it runs."""
        self.spec = spec
        self.name = spec.name
        self.npages = spec.memory_mib << 8
        self._hosts: dict[str, Rig] = {}
        self._legs = 0
        self._lived: list[Console] = []
        try:
            place = self.next()
            work = [word for each in place.work for word in ("-o", each)]
            place.rig.run(
                *("-A", "-H", "-P", "-k", str(place.config), *work, spec.name),
                name=spec.name,
                console=place.console.path,
            )
            self.at = place
            place.console.await_beats(1)
            self.arrive(place)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for host in self._hosts.values():
            # A test that failed may leave a mount, and then the directory could not be removed.
            for line in Path("/proc/mounts").read_text().splitlines():
                point = line.split()[1]
                if point.startswith(f"{host.directory}/"):
                    subprocess.run(["umount", point], check=False)
            host.close()

    def next(self, name: str | None = None) -> StandinPlace:
        self._legs += 1
        key = name or f"{self._legs}"
        if key not in self._hosts:
            settings = {**GENERATIONS[self.spec.generation], **self.spec.settings}
            made = Rig(free_memory_bytes=_FREE_BYTES, **settings)
            (made.directory / "vm").rmdir()  # no vm-bhyve here
            self._hosts[key] = made
        host = self._hosts[key]
        return StandinPlace(host, self.spec, host.directory / f"{self._legs}.console")

    def send(self, *options: str) -> list[str]:
        config = ["-C", str(self.at.config)]
        return [*self.at.environment, *BHYSEND, *config, *options, self.at.operand]

    def receive(self, to: Site, *options: str) -> list[str]:
        return self.receive_bare(to, *options, *self.resources(to))

    def receive_bare(self, to: Site, *options: str) -> list[str]:
        return [*standin_place(to).environment, *BHYRECV, *options, to.operand]

    def resources(self, to: Site) -> list[str]:
        place = standin_place(to)
        here, name = place.rig.directory, self.name
        values = {
            "disk0": here / f"{name}-0-3-0.img",
            "net0": f"tap-{name}-0-4-0",
            "com1": place.console.path,
            "bootrom": place.rig.rom,
        }
        return [word for key, value in values.items() for word in ("-o", f"{key}={value}")]

    def arrive(self, to: Site) -> None:
        self.at = standin_place(to)
        self._lived.append(self.at.console)
        super().arrive(to)

    def beats(self) -> list[int]:
        return [beat for console in self._lived for beat in console.beats()]

    def sweeps(self) -> list[Sweep]:
        """Return the sweeps that the guest has finished."""
        return [sweep for console in self._lived for sweep in console.sweeps()]

    def assert_unbroken(self) -> None:
        rig.assert_unbroken(*self._lived)


def standin_place(place: Site) -> StandinPlace:
    """Return the place, which must be the stand-in's."""
    assert isinstance(place, StandinPlace)
    return place


def standin(guest: Traveller) -> StandinTraveller:
    """Return the guest, which must be the stand-in's."""
    assert isinstance(guest, StandinTraveller)
    return guest


def _stands(pid: int) -> bool:
    """Say whether a stand-in is held: the FIFO that it writes FILE.meta to is full."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if not os.readlink(entry).endswith("/ckp.meta"):
                continue
            fd = os.open(entry, os.O_RDONLY | os.O_NONBLOCK)
            try:
                queued = fcntl.ioctl(fd, termios.FIONREAD, struct.pack("i", 0))
            except OSError:  # the descriptor is not a FIFO
                continue
            finally:
                os.close(fd)
            if struct.unpack("i", queued)[0] == _FULL_BYTES:
                return True
    return False


def _is_complete(directory: Path) -> bool:
    """Say whether a kept guest's files lie in a directory of the state directory."""
    return any(
        all((path / f"ckp{suffix}").exists() for suffix in ("", ".kern", ".meta"))
        for path in directory.glob("*")
    )

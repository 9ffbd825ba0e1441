"""A bhyve guest that proves itself, and the two names between which it moves on one host.

The guest is a boot ROM (BHYSEND_TEST_ROM) with one vCPU and no disk.  Ten times a second the guest
prints "HB n ..." on COM1: n counts up from 0 over the guest's whole life, "bad 0" says that each
page checked was right, and "LOST" says that a vector register has lost its value.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

BHYVE, BHYVECTL = "/usr/sbin/bhyve", "/usr/sbin/bhyvectl"
DEADLINE_S = 180.0
NEEDS_FREEBSD = [
    pytest.mark.bhyve,
    pytest.mark.skipif(
        not sys.platform.startswith("freebsd"), reason="a bhyve guest needs FreeBSD"
    ),
]
"""The marks of tests that boot a guest."""

_BEAT = re.compile(r"HB (\d+) .* bad (\d+) ")
# The first unit of nmdm(4) that only these tests use; each console gets the next unit.
_UNIT, _COUNT = 700, count()
_UUID = "0f0e0d0c-1111-2222-3333-444444444444"


def until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"no {what} in {deadline_s:.0f} s"
        time.sleep(0.02)


def program(name: str) -> list[str]:
    """Return the words that run bhysend or bhyrecv."""
    return [sys.executable, "-P", "-m", f"bhystream.{name.removeprefix('bhy')}"]


@dataclass
class Ended:
    """The exit status and the messages of a program."""

    status: int
    said: str


class Console:
    """The other side of a guest's serial port, a nmdm(4).

    A thread reads all the time, because nmdm(4) buffers little.
    """

    def __init__(self, unit: int) -> None:
        self._fd = os.open(f"/dev/nmdm{unit}B", os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY)
        tty.setraw(self._fd)
        termios.tcflush(self._fd, termios.TCIOFLUSH)  # what the guest of a killed run has printed
        self._said = b""
        self._is_over = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._is_over.is_set():
            if select.select([self._fd], [], [], 0.1)[0]:
                with suppress(BlockingIOError):
                    self._said += os.read(self._fd, 1 << 16)

    def said(self) -> str:
        """Return all that the guest has printed."""
        return self._said.decode(errors="replace").replace("\r", "")

    def close(self) -> None:
        self._is_over.set()
        self._reader.join()
        os.close(self._fd)


@dataclass
class Host:
    """Both ends of a move: two state directories on this host, and the guest.

    at: the guest's name now.  lived: the consoles that the guest has had, in order.
    taps: the interface of its network card under each name; none if it has no card.  mac: of
    that card.  cpus: its vCPUs, of which the guest uses one.
    """

    rom: str
    memory: str
    directory: Path
    at: str = ""
    lived: list[Console] = field(default_factory=list)
    units: dict[str, int] = field(default_factory=dict)
    taps: Mapping[str, str] = field(default_factory=dict)
    mac: str = ""
    cpus: int = 1

    def state(self, side: str) -> Path:
        return self.directory / side

    def environment(self, side: str) -> dict[str, str]:
        """Return the environment of one side: "a" sends, "b" receives."""
        return {**os.environ, "BHYSEND_STATE_DIR": str(self.state(side))}

    def start(self, name: str) -> None:
        """Boot the guest under a name."""
        Path("/var/run/bhyve").mkdir(exist_ok=True)
        self._make_console(name)
        with (self.directory / f"{name}.log").open("wb") as log:
            # bhyve's parent must be init: another parent could start the guest again.
            words = ["/bin/sh", "-c", '"$@" &', "sh", BHYVE, "-k", str(self._config(name)), name]
            subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                check=True,
            )
        self.at = name
        until(lambda: self.beats() and self.pid(), "heartbeat of the guest")

    def reboot(self) -> None:
        """Boot the guest anew, after its end: what it has printed before does not count."""
        for console in self.lived:
            console.close()
        self.lived.clear()
        self.start("rom1")

    def _make_console(self, name: str) -> None:
        """Give the guest a new serial port under a name."""
        self.units[name] = _UNIT + next(_COUNT)
        self.lived.append(Console(self.units[name]))

    def _config(self, name: str) -> Path:
        path = self.directory / f"{name}.conf"
        keys = {
            "cpus": str(self.cpus),
            "memory.size": self.memory,
            "acpi_tables": "false",
            "uuid": _UUID,
            "lpc.bootrom": self.rom,
            "lpc.com1.path": f"/dev/nmdm{self.units[name]}A",
            "pci.0.0.0.device": "hostbridge",
            "pci.0.31.0.device": "lpc",
        }
        if self.taps:
            card = {"device": "virtio-net", "backend": self.taps[name], "mac": self.mac}
            keys |= {f"pci.0.4.0.{key}": value for key, value in card.items()}
        path.write_text("".join(f"{key}={value}\n" for key, value in keys.items()))
        return path

    # The move.

    def send(self, *options: str) -> list[str]:
        return [*program("bhysend"), "-C", str(self._config(self.at)), *options, self.at]

    def receive(self, name: str, *options: str) -> list[str]:
        """Return the command that receives the guest under another name."""
        self._make_console(name)
        lent = ["-o", f"com1=/dev/nmdm{self.units[name]}A", "-o", f"bootrom={self.rom}"]
        if self.taps:
            lent += ["-o", f"net0={self.taps[name]}"]
        environment = ["env", f"BHYSEND_STATE_DIR={self.state('b')}"]
        return [*environment, *program("bhyrecv"), *lent, *options, name]

    def run(self, *words: str, side: str = "a", deadline_s: float = DEADLINE_S) -> Ended:
        """Run a program until it ends."""
        done = subprocess.run(
            words,
            env=self.environment(side),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=deadline_s,
            check=False,
        )
        print(done.stderr)
        return Ended(done.returncode, done.stderr)

    def shell(self, text: str) -> Ended:
        """Run a pipeline; the status is that of the last command."""
        return self.run("sh", "-c", text)

    # The guest.

    def other(self) -> str:
        """Return the name that the guest does not have now."""
        return "rom2" if self.at == "rom1" else "rom1"

    def arrived(self, name: str) -> None:
        """Assert that the guest's bhyve runs under a name, and that the old name is gone."""
        assert self.pid(self.at) == 0
        assert not os.path.exists(f"/dev/vmm/{self.at}")
        self.at = name
        assert self.pid()

    def stayed(self) -> None:
        """Forget the console that receive() made: the guest has stayed under its name."""
        self.lived.pop().close()

    def pid(self, name: str = "") -> int:
        """Return the process id of the guest's bhyve, 0 if there is none."""
        named = re.compile(rf"[ :/]{name or self.at}( |$)")
        words = ["/bin/ps", "-axww", "-o", "pid=", "-o", "comm=", "-o", "args="]
        found = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        for line in found.splitlines():
            pid, comm, args = (*line.split(None, 2), "")[:3]
            if comm == "bhyve" and named.search(args):
                return int(pid)
        return 0

    def lines(self) -> list[str]:
        """Return the guest's whole lines; a line may begin on one console and end on the next."""
        return "".join(console.said() for console in self.lived).split("\n")[:-1]

    def beats(self) -> list[tuple[int, int]]:
        """Return (number, bad) of each whole heartbeat."""
        return [(int(m[1]), int(m[2])) for line in self.lines() if (m := _BEAT.match(line))]

    def prove(self, more: int = 15) -> None:
        """Assert that it beats on: no beat is missing, no page wrong, no vector register lost."""
        count = len(self.beats())
        until(lambda: len(self.beats()) >= count + more, f"{more} more heartbeats")
        beats = self.beats()
        numbers = [number for number, _ in beats]
        missing = sorted(set(range(numbers[-1] + 1)) - set(numbers))
        assert not missing, f"missing: {missing}"
        # A number that was printed twice would come from a second copy of the guest.
        assert numbers == sorted(set(numbers)), numbers
        assert not any(bad for _, bad in beats)
        assert "LOST" not in "\n".join(self.lines())

    def stands_still(self) -> bool:
        """Say whether the guest prints no beat for a second."""
        before = len(self.beats())
        time.sleep(1.0)
        return len(self.beats()) == before

    def end(self) -> None:
        """Kill every bhyve and destroy every VM that has one of the guest's names."""
        for name in ("rom1", "rom2"):
            if pid := self.pid(name):
                subprocess.run(["/bin/kill", "-9", str(pid)], check=False)
                until(lambda name=name: not self.pid(name), "end of bhyve")  # type: ignore[misc]
            if os.path.exists(f"/dev/vmm/{name}"):
                subprocess.run([BHYVECTL, "--destroy", f"--vm={name}"], check=False)


@contextmanager
def booted(directory: Path, memory: str = "128M", **card: Any) -> Iterator[Host]:
    """Boot the guest, and end it after the with block.  card: the fields taps and mac of Host."""
    rom = os.environ.get("BHYSEND_TEST_ROM")
    if not rom:
        pytest.skip("BHYSEND_TEST_ROM names a boot ROM that proves itself")
    host = Host(rom, memory, directory, **card)
    for side in "ab":
        host.state(side).mkdir(mode=0o700, exist_ok=True)
    host.end()
    try:
        host.start("rom1")
        yield host
    finally:
        host.end()
        for console in host.lived:
            console.close()

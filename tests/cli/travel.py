"""A host that guests leave and arrive at, and a guest on its way through one QEMU after the other.

    host, guest = Host(directory), Traveller(Spec())
    to = guest.next()
    sent, received = run(guest.send(), guest.receive(to), env=host.env)
    assert (sent.status, received.status) == (80, 0), report(sent, received)
    guest.settle(host, to)      # held, discarded, its QEMU gone; the guest lives there now
    guest.prove()               # two full sweeps, and no heartbeat missing since it was booted

Source and destination are one host, with one state directory: what is left behind by either
program is found there.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from guest import Guest, Serial, SerialLog, Spec, images, peer_pid, reaping
from guest.qmp import run_command

from .pipeline import BHYRECV, BHYSEND, Ended, Words, report, run, until

SHM = Path("/dev/shm")


def short_directory() -> Path:
    """Make a directory in memory whose name leaves room for a socket's: a path has 107 bytes."""
    return Path(tempfile.mkdtemp(prefix="bhyc-", dir=SHM))


def process_state(pid: int) -> str:
    """Return the state of a process as proc_pid_stat(5) has it, X if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "X"
    return text[text.rindex(")") + 2]


def is_gone(pid: int) -> bool:
    """Say whether a process has ended; one that only waits for its parent has."""
    return process_state(pid) in "ZX"


def processes_with(word: str) -> list[int]:
    """Return the processes, but this one, that have a word in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if word.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def qemu_at(qmp: Path) -> list[int]:
    """Return the QEMUs that were started with this QMP socket."""
    found = []
    for pid in processes_with(f"unix:{qmp}"):
        with suppress(OSError):
            if b"qemu-system" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
                found.append(pid)
    return found


def limited(command: Words, *settings: str) -> list[str]:
    """Return a command of ours with other limits; see limited.py."""
    python, *rest = (str(word) for word in command)
    return [python, str(Path(__file__).with_name("limited.py")), *settings, "--", *rest]


@contextmanager
def fifo(path: Path) -> Iterator[int]:
    """Make a FIFO and hold both ends, so that nobody's open(2) waits."""
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def script(path: Path, text: str) -> None:
    """Write a shell script that can be run."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)


class Firmware(Guest):
    """A guest without an operating system: its firmware finds nothing to boot, and waits."""

    @property
    def argv(self) -> list[str]:
        """QEMU's command line."""
        words = super().argv
        for option in ("-kernel", "-initrd", "-append"):
            at = words.index(option)
            del words[at : at + 2]
        return words


@dataclass(frozen=True)
class Row:
    """A line of -l."""

    guest: str
    phase: str
    id: str
    operand: str


class Host:
    """A state directory, and the environment of programs that use it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.state.mkdir(mode=0o700, parents=True)
        self.env = {**os.environ, "BHYSEND_STATE_DIR": str(self.state)}

    def run(self, *argv: str | Path) -> Ended:
        """Run one program to its end."""
        [ended] = run(argv, env=self.env)
        return ended

    def rows(self, program: Words = BHYSEND) -> list[Row]:
        """Return what `-l` lists."""
        ended = self.run(*program, "-l")
        assert ended.status == 0, report(ended)
        lines = [line.split("\t") for line in ended.output.decode().splitlines()]
        return [Row(guest, phase, id_, operand) for guest, phase, _, id_, operand, _ in lines]

    def act(self, program: Words, verb: str, guest: str) -> Ended:
        """Run --discard or --resume, which must succeed."""
        ended = self.run(*program, verb, guest)
        assert ended.status == 0, report(ended)
        return ended

    def shell(self, command: str) -> Ended:
        """Run a command as it is printed for the operator, "ssh HOST" being this host."""
        bin_ = self.directory / "bin"
        if not bin_.exists():
            bin_.mkdir()
            for name, words in (("bhysend", BHYSEND), ("bhyrecv", BHYRECV)):
                script(bin_ / name, f'exec {shlex.join(words)} "$@"')
            script(bin_ / "ssh", 'shift\nexec sh -c "$*"')
        path = f"{bin_}:{os.environ['PATH']}"
        # The other host does not have our variable; the command has to name it.
        env = {key: value for key, value in self.env.items() if key != "BHYSEND_STATE_DIR"}
        [ended] = run(["sh", "-c", command], env={**env, "PATH": path})
        return ended

    def is_locked(self) -> bool:
        """Say whether any guest's lock is held."""
        for path in (self.state / "lock").glob("*"):
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
        return False

    def await_unlocked(self) -> None:
        """Wait until nobody works on any guest: of a killed bhysend the keeper ends last."""
        until(lambda: not self.is_locked(), "the locks")

    def files(self, name: str) -> list[str]:
        """Return the names in one directory of the state directory."""
        return sorted(path.name for path in (self.state / name).glob("*"))


class Place:
    """Where a guest lives, or is to live: the paths of one QEMU.

    pid: of the QEMU, once arrive() was called.
    """

    def __init__(self, qmp: Path, serial: Path, ram: Path) -> None:
        self.qmp = qmp
        self.ram = ram
        self.serial = Serial(serial, self._why_dead)
        self.pid = 0

    @property
    def operand(self) -> str:
        return f"qemu:{self.qmp}"

    def arrive(self) -> None:
        """Note the process that listens."""
        self.pid = peer_pid(self.qmp)

    def status(self) -> str:
        """Return QEMU's run state."""
        state: str = run_command(self.qmp, "query-status", {})["status"]
        return state

    def processes(self) -> list[int]:
        """Return the processes that name this place: bhyrecv's, QEMU, shells around them."""
        return processes_with(str(self.qmp))

    def forsake(self) -> None:
        """See that what a killed bhyrecv left has never run, and end it, as an operator does."""
        if qemu_at(self.qmp):
            assert self.status() == "inmigrate"
            assert self.serial.read().raw == b""
        with reaping(self.qmp):
            pass
        for path in (self.qmp, self.serial.path):
            path.unlink(missing_ok=True)

    def assert_nothing_left(self) -> None:
        """Assert that neither a QEMU, nor a file of it, is here."""
        assert self.processes() == []
        for path in (self.qmp, self.ram, self.serial.path):
            assert not os.path.lexists(path)
        # Memory, named by its bhyrecv; one that is at work belongs to somebody else's tests.
        left = [path for path in SHM.glob("bhyrecv-*") if is_gone(int(path.name.split("-")[-1]))]
        assert left == []

    def _why_dead(self) -> str | None:
        return f"QEMU {self.pid} has ended" if self.pid and is_gone(self.pid) else None


class Traveller:
    """One guest, wherever it lives, and all that it has said since it was booted.

    place: where it lives.  past: its serial output in the places before.
    """

    def __init__(self, spec: Spec, *, boot: bool = True) -> None:
        """Boot it, and wait until it is ready."""
        self.spec = spec
        self.directory = short_directory()
        self.past = SerialLog(b"")
        self._images = images()
        self._places: list[Place] = []
        self._first = Guest(spec)
        try:
            self._first.start()
            self.place = self._add(
                Place(self._first.qmp_path, self._first.serial.path, self._first.ram_path)
            )
            self.place.arrive()
            if boot:
                self.place.serial.await_ready()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill every QEMU that it was in, and remove their files."""
        for place in self._places:
            with reaping(place.qmp):
                pass
        self._first.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _add(self, place: Place) -> Place:
        self._places.append(place)
        return place

    def next(self, socket: str | None = None) -> Place:
        """Return a place where nothing is yet.  socket: its name, to come back to it later."""
        leg = f"{len(self._places)}"
        here = self.directory
        return self._add(
            Place(here / f"{socket or leg}.qmp", here / f"{leg}.serial", here / f"{leg}.ram")
        )

    def waiting(self, guest: Guest) -> Place:
        """Return the place of a QEMU that was started with incoming=True."""
        return self._add(Place(guest.qmp_path, guest.serial.path, guest.ram_path))

    def send(self, *options: str) -> list[str]:
        """Return the command that sends it from where it lives."""
        return [*BHYSEND, *options, self.place.operand]

    def receive(self, to: Place, *options: str) -> list[str]:
        """Return the command that receives it, with the host's resources that it needs."""
        return [*BHYRECV, *options, *self.resources(to), to.operand]

    def argv(self, to: Place) -> list[str]:
        """Return the QEMU command line, program first, that an operator would write for a place."""
        return self.spec.argv(
            self._images, ram_path=to.ram, qmp_path=to.qmp, serial_path=to.serial.path
        )

    def resources(self, to: Place) -> list[str]:
        """Return the -o options of a place."""
        values = {
            "serial0": to.serial.path,
            "kernel": self._images.kernel,
            "initrd": self._images.initramfs,
        }
        if self.spec.disk is not None:
            values["disk0"] = self.spec.disk
        return [word for key, value in values.items() for word in ("-o", f"{key}={value}")]

    def move(
        self,
        host: Host,
        *,
        send: tuple[str, ...] = (),
        receive: tuple[str, ...] = (),
        to: Place | None = None,
        sweeps: int = 2,
    ) -> list[Ended]:
        """Move it through a plain pipe; it must arrive, and prove itself there."""
        to = to or self.next()
        ended = run(self.send(*send), self.receive(to, *receive), env=host.env)
        assert [one.status for one in ended] == [80, 0], report(*ended)
        self.settle(host, to)
        self.prove(sweeps)
        return ended

    def settle(self, host: Host, to: Place) -> None:
        """See it held, discard it, and take it from now on as living there."""
        rows = host.rows()
        assert [(row.guest, row.phase) for row in rows] == [(self.spec.name, "held")]
        assert rows[0].operand == self.place.operand
        assert self.place.status() == "postmigrate"
        host.act(BHYSEND, "--discard", self.spec.name)
        assert is_gone(self.place.pid)
        assert host.rows() == []
        assert not host.is_locked()
        self.arrive(to)

    def hand_over(self, host: Host, to: Place) -> None:
        """See it gone from where it lived, without an operator; it lives there now."""
        until(lambda: is_gone(self.place.pid), "the end of the source's QEMU")
        self.assert_settled(host)
        assert to.status() == "running"
        self.arrive(to)

    def run_on(self, host: Host, sweeps: int = 2) -> None:
        """See it run on where it was, and nobody at work on it any more."""
        self.prove(sweeps)
        assert self.place.status() == "running"
        self.assert_settled(host)

    def assert_settled(self, host: Host) -> None:
        """Assert that at the source nothing is left to decide, and nobody at work."""
        host.await_unlocked()
        assert host.rows() == []
        assert host.files("source") == []
        assert host.files("run") == []

    def arrive(self, to: Place) -> None:
        """Take it as living there; where it lived, it says nothing any more."""
        self.past = self.log()
        self.place = to
        to.arrive()

    def log(self) -> SerialLog:
        """Return all that it has said."""
        return self.past + self.place.serial.read()

    def prove(self, sweeps: int = 2) -> None:
        """Wait for full sweeps that begin now; nothing bad, and no heartbeat ever missing."""
        beats = len(self.log().heartbeats)
        self.place.serial.await_sweeps(sweeps)
        log = self.log()
        log.assert_unbroken()
        assert len(log.heartbeats) > beats

    def await_log(self, condition: Callable[[SerialLog], bool], what: str) -> None:
        """Wait for something in all that it has said."""
        until(lambda: condition(self.log()), what)

    def is_well(self) -> bool:
        """Say whether it runs and has proven itself so far."""
        try:
            if self.place.status() != "running":
                return False
            self.place.serial.await_heartbeats(1, 20.0)
            self.log().assert_unbroken()
        except (AssertionError, OSError):
            return False
        return True


class Stable:
    """Guests that are booted once and lent to one test after the other.

    A test gives a guest back where it has moved to, running.  One that is not well any more is
    replaced, so that one failed test does not fail the rest.
    """

    def __init__(self) -> None:
        self._guests: dict[str, Traveller] = {}

    def lend(self, spec: Spec) -> Traveller:
        """Return a running guest of this kind."""
        key = repr(spec)
        guest = self._guests.get(key)
        if guest is not None and not guest.is_well():
            guest.close()
            guest = None
        if guest is None:
            guest = self._guests[key] = Traveller(spec)
        return guest

    def close(self) -> None:
        """End all of them."""
        for guest in self._guests.values():
            guest.close()

"""A host that guests leave and arrive at, and a guest on its way from one hypervisor to the next.

    host, guest = Host(directory), QemuTraveller(Spec())
    to = guest.next()
    sent, received = run(guest.send(), guest.receive(to), env=host.env)
    assert (sent.status, received.status) == (80, 0), report(sent, received)
    guest.settle(host, to)      # the held guest is discarded here, and lives there now
    guest.prove()               # two full sweeps, and no heartbeat missing since it was booted

This module knows no hypervisor: qemu.py has the classes for QEMU, standin.py those for bhyve's
stand-in.  Source and destination share one state directory, where a test finds everything that
either program leaves behind.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from support.processes import is_gone
from support.waiting import DEADLINE_S, until

from .pipeline import BHYRECV, BHYSEND, Ended, Words, report, run

SHM = Path("/dev/shm")


def short_directory() -> Path:
    """Make a directory in memory, with a path short enough for a socket: that has 107 bytes."""
    return Path(tempfile.mkdtemp(prefix="bhyc-", dir=SHM))


def processes_with(word: str) -> list[int]:
    """Return the processes, except this one, that have a word in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if word.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def keeper_of(pid: int) -> int:
    """Return the keeper of a bhysend, 0 if there is no keeper yet."""
    for keeper in processes_with("bhystream.send.keeper"):
        with suppress(OSError):
            text = Path(f"/proc/{keeper}/stat").read_text()
            if int(text[text.rindex(")") + 2 :].split()[1]) == pid:
                return keeper
    return 0


def program_at(command: Sequence[str | Path]) -> int:
    """Return the index of the program in a command, which may begin with env and variables."""
    if str(command[0]) != "env":
        return 0
    return next(at for at, word in enumerate(command) if at and "=" not in str(word))


def limited(command: Words, *settings: str) -> list[str]:
    """Return the command that runs one of our programs with other limits; see limited.py."""
    words = [str(word) for word in command]
    at = program_at(words) + 1
    return [*words[:at], str(Path(__file__).with_name("limited.py")), *settings, "--", *words[at:]]


@contextmanager
def fifo(path: Path) -> Iterator[int]:
    """Make a FIFO and keep both ends open, so that no open(2) of it waits."""
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def script(path: Path, text: str) -> None:
    """Write an executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)


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
        """Run one program until it ends."""
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
        """Run a command as bhysend prints it for the operator; "ssh HOST" means this host."""
        bin_ = self.directory / "bin"
        if not bin_.exists():
            bin_.mkdir()
            for name, words in (("bhysend", BHYSEND), ("bhyrecv", BHYRECV)):
                script(bin_ / name, f'exec {shlex.join(words)} "$@"')
            script(bin_ / "ssh", 'shift\nexec sh -c "$*"')
        path = f"{bin_}:{os.environ['PATH']}"
        # The other host does not have our variable, so the command has to set it.
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
        """Wait until no process works on any guest: a killed bhysend's keeper ends last."""
        until(lambda: not self.is_locked(), "the locks")

    def files(self, name: str) -> list[str]:
        """Return the names in one directory of the state directory."""
        return sorted(path.name for path in (self.state / name).glob("*"))


@contextmanager
def new_host() -> Iterator[Host]:
    """Make a host, and remove its directory after the with block."""
    directory = short_directory()
    try:
        yield Host(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Site(ABC):
    """The place where a guest lives, or is to live: one run of one hypervisor.

    operand: names the guest for both programs.  pid: the hypervisor's, after arrive().
    """

    operand = ""
    pid = 0

    def has_ended(self) -> bool:
        """Say whether the process that arrive() noted is gone."""
        return is_gone(self.pid)

    @abstractmethod
    def arrive(self) -> None:
        """Note the process that runs the guest."""

    @abstractmethod
    def runs(self) -> bool:
        """Say whether a guest runs here."""

    @abstractmethod
    def is_held(self, host: Host) -> bool:
        """Say whether the guest stands here as at a source: paused or held, and whole."""

    @abstractmethod
    def is_loaded(self, host: Host) -> bool:
        """Say whether the guest stands here as bhyrecv -u leaves a guest."""

    @abstractmethod
    def is_building(self) -> bool:
        """Say whether a bhyrecv has begun to make a guest here."""

    @abstractmethod
    def hypervisors(self) -> list[int]:
        """Return the hypervisor's processes here."""

    @abstractmethod
    def processes(self) -> list[int]:
        """Return the processes of this place: bhyrecv's and the hypervisor's."""

    @abstractmethod
    def reaped(self) -> AbstractContextManager[None]:
        """Kill, after the with block, every hypervisor that is here then."""

    @abstractmethod
    def forsake(self) -> None:
        """Assert that a guest left by a killed bhyrecv never ran; end it, as an operator would."""

    @abstractmethod
    def assert_nothing_left(self) -> None:
        """Assert that no hypervisor and no file of a hypervisor is here."""

    @abstractmethod
    def assert_tidy(self, host: Host) -> None:
        """Assert that a finished move has left no file at its source."""

    @abstractmethod
    def said(self) -> bytes:
        """Return what the guest has said here."""

    @abstractmethod
    def beats(self) -> list[int]:
        """Return the numbers of the heartbeats that the guest printed here."""

    @abstractmethod
    def await_beats(self, count: int = 1, deadline_s: float = DEADLINE_S) -> None:
        """Wait for `count` more heartbeats."""

    @abstractmethod
    def await_sweeps(self, count: int = 1) -> None:
        """Wait for `count` full sweeps that begin after the call and find no bad page."""


class Traveller(ABC):
    """One guest, wherever it lives, and all that it has said since it was booted.

    name, npages: the guest's.  place: where the guest lives.  needs: the resources that bhysend -n
    names for a destination.  missing: the message of bhyrecv if they are not given.
    """

    name = "proof"
    npages = 0
    needs = ""
    missing: tuple[str, ...] = ()
    place: Site

    @abstractmethod
    def close(self) -> None:
        """Kill every hypervisor that the guest was in, and remove their files."""

    @abstractmethod
    def next(self, name: str | None = None) -> Site:
        """Return a new, empty place.  name: of a place to which the guest can come back later."""

    @abstractmethod
    def resources(self, to: Site) -> list[str]:
        """Return the -o options of a place."""

    @abstractmethod
    def send(self, *options: str) -> list[str]:
        """Return the command that sends the guest from its place, the operand last."""

    @abstractmethod
    def receive(self, to: Site, *options: str) -> list[str]:
        """Return the command that receives the guest, with the resources that the guest needs."""

    @abstractmethod
    def receive_bare(self, to: Site, *options: str) -> list[str]:
        """Return the command that receives the guest, without the resources."""

    def named_memory(self, to: Site) -> list[str]:
        """Return the options that name the guest's memory file there, if there is a choice."""
        return []

    @abstractmethod
    def beats(self) -> list[int]:
        """Return the numbers of all heartbeats since the guest was booted."""

    @abstractmethod
    def assert_unbroken(self) -> None:
        """Assert that the guest found no bad page, and that no heartbeat is missing."""

    def move(
        self,
        host: Host,
        *,
        send: tuple[str, ...] = (),
        receive: tuple[str, ...] = (),
        to: Site | None = None,
        sweeps: int = 2,
    ) -> list[Ended]:
        """Move the guest through a plain pipe; assert that it arrives and proves itself there."""
        to = to or self.next()
        ended = run(self.send(*send), self.receive(to, *receive), env=host.env)
        assert [one.status for one in ended] == [80, 0], report(*ended)
        self.settle(host, to)
        self.prove(sweeps)
        return ended

    def settle(self, host: Host, to: Site) -> None:
        """Assert that the guest is held, discard it here, and note that the guest lives there."""
        rows = host.rows()
        assert [(row.guest, row.phase) for row in rows] == [(self.name, "held")]
        assert rows[0].operand == self.place.operand
        assert self.place.is_held(host)
        host.act(BHYSEND, "--discard", self.name)
        assert self.place.has_ended()
        self.place.assert_tidy(host)
        assert host.files("source") == []
        assert not host.is_locked()
        self.arrive(to)

    def hand_over(self, host: Host, to: Site) -> None:
        """Assert that the guest left its old place without an operator; note its new place."""
        until(self.place.has_ended, "the end of the source's hypervisor")
        self.assert_settled(host)
        assert to.runs()
        self.arrive(to)

    def run_on(self, host: Host, sweeps: int = 2, *, is_tidy: bool = True) -> None:
        """Assert that the guest runs on where it was, and that no process works on it any more.

        is_tidy: False if bhysend may have been killed before it had a keeper: the next bhysend
        then removes what the killed one left.
        """
        host.await_unlocked()
        self.place.arrive()
        self.prove(sweeps)
        assert self.place.runs()
        self.assert_settled(host, is_tidy=is_tidy)

    def assert_settled(self, host: Host, *, is_tidy: bool = True) -> None:
        """Assert that at the source nothing is left to decide, and no process works on a guest."""
        host.await_unlocked()
        assert host.files("source") == []
        assert host.files("run") == []
        if is_tidy:
            self.place.assert_tidy(host)

    def arrive(self, to: Site) -> None:
        """Note that the guest lives there, and no longer prints at its old place."""
        self.place = to
        to.arrive()

    def prove(self, sweeps: int = 2) -> None:
        """Wait for full sweeps; assert that no page is bad and no heartbeat was ever missing."""
        beats = len(self.beats())
        self.place.await_sweeps(sweeps)
        self.assert_unbroken()
        assert len(self.beats()) > beats

    def is_well(self) -> bool:
        """Say whether the guest runs and has proven itself so far."""
        try:
            if not self.place.runs():
                return False
            self.place.await_beats(1, 20.0)
            self.assert_unbroken()
        except (AssertionError, OSError):
            return False
        return True


class Stable:
    """Guests that are booted once and lent to one test after the other.

    A test gives its guest back running, at the guest's new place.  A guest that is not well any
    more is replaced, so that one failed test does not make the others fail.
    """

    def __init__(self) -> None:
        self._guests: dict[str, Traveller] = {}

    def lend(self, kind: str, boot: Callable[[], Traveller]) -> Traveller:
        """Return a running guest of this kind.  boot: boots a new guest."""
        guest = self._guests.get(kind)
        if guest is not None and not guest.is_well():
            guest.close()
            guest = None
        if guest is None:
            guest = self._guests[kind] = boot()
        return guest

    def close(self) -> None:
        """End all guests."""
        for guest in self._guests.values():
            guest.close()

"""Two hosts of the stand-in with their state directories, and bhyve guests that move.

    guest = two.start()                     # at two.here; its console proves it
    source = two.source()                   # BhyveSource, in this process
    ended = two.move()                      # bhysend and bhyrecv, as processes, command form
    two.arrived().console.await_sweeps(1)   # at two.there

The two hosts share nothing, neither state nor staging directories.  A guest that
a test leaves running ends with its Rig.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import IO

import pytest

from bhystream.backend.bhyve.paused import BhyvePaused
from bhystream.backend.bhyve.source import BhyveSource
from bhystream.guest import Json
from bhystream.handover import state
from bhystream.standin.kernel import StandinHost
from cli.pipeline import BHYRECV, BHYSEND, ROOT, Ended, Words, run
from standin.rig import Console, Guest, Rig, Spec, assert_unbroken, await_true, supervised

from .revived import open_paused

ID = "0123456789abcdef" * 2
UUID = "11111111-2222-3333-4444-555555555555"
LIMITED = str(ROOT / "tests" / "cli" / "limited.py")


def _can(*command: str) -> bool:
    """Say whether a shell that runs behind these words can bind the null device to a file."""
    with tempfile.NamedTemporaryFile() as file:
        script = f"mount --bind /dev/null {file.name} && umount {file.name}"
        return subprocess.run([*command, "sh", "-c", script], capture_output=True).returncode == 0


@cache
def sink_prefix() -> tuple[str, ...] | None:
    """Return the words that let a program behind them use the sink, None if no words do."""
    return next((words for words in ((), ("unshare", "-Urm")) if _can(*words)), None)


def require_sink() -> tuple[str, ...]:
    """Return sink_prefix().  If that is None, skip the test, or in CI fail it."""
    found = sink_prefix()
    if found is None:
        if os.environ.get("CI") == "true":
            raise AssertionError("neither root nor unshare -Urm: the sink cannot be tested")
        pytest.skip("needs root or unshare -Urm")
    return found


def without_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sink fail in this process, as without the right to mount."""

    def refuse(self: StandinHost, directory: Path) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(StandinHost, "mount_null", refuse)


@contextmanager
def small_tmpfs(directory: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of that size.  Skips the test without root, or in CI fails without a sink."""
    if sink_prefix() != ():
        if os.environ.get("CI") == "true" and sink_prefix() is None:
            raise AssertionError("a small tmpfs cannot be mounted")
        pytest.skip("needs root")
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "t", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


class Two:
    """A source and a destination."""

    def __init__(self, directory: Path, here: Rig, there: Rig) -> None:
        """Make the state and staging directories in `directory`: a short path, in memory."""
        self.directory, self.here, self.there = directory, here, there
        self.staging_there = self._made("staging-there")
        self.base, self.base_there = self._made("s"), self._made("t")
        os.environ["BHYSEND_VMM_DIR"] = str(here.directory)
        for base in (self.base_there, self.base):
            os.environ["BHYSEND_STATE_DIR"] = str(base)
            state.directory()
        os.environ["BHYRECV_STAGING"] = str(self.staging_there)
        self.guests: list[Guest] = []

    def _made(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir(mode=0o700)
        return path

    # The source.

    @contextmanager
    def supervise(self, spec: Spec | None = None, name: str = "g") -> Iterator[Guest]:
        """Start a guest as vm-bhyve does; yield the supervisor, which outlives the guest."""
        spec = spec or Spec()
        config = self.here.write_config(name, spec, self.here.directory / f"{name}-0.console")
        directory = self.here.directory / "vm" / name
        directory.mkdir()
        (directory / f"{name}.conf").write_text(f'uuid="{UUID}"\n')
        tap = f"tap-{name}-0-4-0"
        (self.here.directory / "net" / tap).unlink()
        words = ["-AHP", "-k", str(config)]
        with supervised(self.here, name, *words, tap=f"{tap}:bridge0") as guest:
            self.guests.append(guest)
            guest.console.await_beats(1)
            yield guest

    def hide_work(self, name: str = "g", host: Rig | None = None) -> None:
        """Leave what a guest does out of the file that its bhyve was started with.

        No bhyve has keys for that, and bhysend reads the file that vm-bhyve's log names.
        """
        path = (host or self.here).directory / f"{name}.config"
        lines = [line for line in path.read_text().splitlines() if "standin." not in line]
        path.write_text("\n".join([*lines, ""]))

    def lock(self, what: str, name: str = "g") -> str | None:
        """Return the first line of one of vm-bhyve's locks, None if there is no such lock."""
        path = self.here.directory / "vm" / name / f"{what}.lock"
        return path.read_text().splitlines()[0] if path.exists() else None

    def start(self, spec: Spec | None = None, name: str = "g") -> Guest:
        """Start a guest at the source and wait until it runs."""
        guest = self.here.start(name, spec)
        self.guests.append(guest)
        return guest

    def config(self, name: str = "g", *without: str) -> Path:
        """Return the file of the guest's configuration as an operator has it, for -C.

        without: lines that have one of these words are left out.
        """
        words = ("standin.", *without)
        lines = (self.here.directory / f"{name}.config").read_text().splitlines()
        kept = [line for line in lines if not any(word in line for word in words)]
        path = self.directory / f"{name}.conf"
        path.write_text("\n".join([*kept, f"uuid={UUID}", ""]))
        return path

    def source(self, name: str = "g", *, without: str = "#") -> BhyveSource:
        """Open a guest of the source in this process."""
        config = str(self.config(name, without))
        return BhyveSource(self.here.host, name, self.base, config, force=False)

    def prepared(self, name: str = "g", *, without: str = "#") -> tuple[BhyveSource, Json]:
        """Return a guest of the source, made ready for the pause, and its record."""
        made = self.source(name, without=without)
        try:
            return made, made.prepare(ID).record
        except BaseException:
            made.close()
            raise

    def hold(self, name: str = "g") -> BhyvePaused:
        """Pause a guest of the source, so that it stands held; return it, found by its record."""
        made, record = self.prepared(name)
        try:
            made.pause()
        finally:
            made.close()
        return open_paused(record)

    # Moves.

    def send(self, *options: str, name: str = "g", without: str = "#") -> list[str]:
        """Return bhysend's words, without a guest's name where options have a verb."""
        words = [*(sink_prefix() or ()), *BHYSEND, *options]
        if any(option.startswith("--") or option == "-l" for option in options):
            return [*words, name]
        return [*words, "-C", str(self.config(name, without)), name]

    def receive(self, *options: str, name: str = "g", without: str = "#") -> list[str]:
        """Return bhyrecv's words, with its environment in front."""
        environment = [
            f"BHYSEND_VMM_DIR={self.there.directory}",
            f"BHYSEND_STATE_DIR={self.base_there}",
            f"BHYRECV_STAGING={self.staging_there}",
        ]
        words = ["env", *environment, *BHYRECV, *options]
        if not any(option.startswith("--") or option in ("-l", "-q") for option in options):
            words += self.resources(name, without)
        return [*words, name]

    def resources(self, name: str = "g", without: str = "#") -> list[str]:
        """Make the resources that a guest needs at the destination; return their -o options."""
        text = self.config(name, without).read_text()
        words = ["-o", f"com1={self.there.directory}/{name}.console"]
        if "lpc.bootrom=" in text:
            words += ["-o", f"bootrom={self.there.rom}"]
        for index, _ in enumerate(re.findall(r"^pci\..*\.path=", text, re.M)):
            disk = self.there.directory / f"{name}-{index}.img"
            disk.touch()
            words += ["-o", f"disk{index}={disk}"]
        for index, _ in enumerate(re.findall(r"^pci\..*\.backend=", text, re.M)):
            tap = f"tap{index}-{name}"
            if not self.there.host.has_tap(tap):
                self.there.host.make_tap(tap, "bridge0")
            words += ["-o", f"net{index}={tap}"]
        return words

    def run(self, *commands: Words) -> list[Ended]:
        """Run a pipeline on the source."""
        return run(*commands, env=self.here.environment)

    def run_into(self, file: IO[bytes], command: Words) -> list[Ended]:
        """Run one command on the source, its standard output a file."""
        return run(command, env=self.here.environment, stdout=file)

    def run_from(self, file: IO[bytes], command: Words) -> list[Ended]:
        """Run one command on the source, its standard input a file."""
        return run(command, env=self.here.environment, stdin=file)

    def move(self, *options: str, name: str = "g", without: str = "#") -> Ended:
        """Move a guest in the command form."""
        send = self.send(*options, name=name, without=without)
        [ended] = self.run([*send, *self.receive(name=name, without=without)])
        return ended

    # Where the guest is.

    def arrived(self, name: str = "g") -> Console:
        """Return the console at the destination."""
        return Console(self.there.directory / f"{name}.console")

    def assert_runs_on(self, *, name: str = "g", sweeps: int = 1) -> None:
        """Assert that the guest runs at the source, unharmed, and that no move has left a trace."""
        guest = next(guest for guest in reversed(self.guests) if guest.name == name)
        guest.console.await_sweeps(sweeps)
        assert_unbroken(guest.console)
        assert guest.process.poll() is None
        assert self.held() == []
        assert not self.there.host.exists(name)

    def assert_comes_back(self, name: str = "g") -> None:
        """Wait until the guest runs at the source again, and no process works on it any more."""
        Console(self.console(name)).await_sweeps(1)
        await_true(lambda: not list((self.base / "source").glob("*.json")), "the record's end")
        self.assert_runs_on(name=name)

    def console(self, name: str) -> Path:
        """Return the path of a guest's console at the source."""
        return next(guest.console.path for guest in self.guests if guest.name == name)

    def assert_moved(self, *, name: str = "g", sweeps: int = 1) -> None:
        """Assert that the guest runs at the destination only, and that no memory was lost."""
        there = self.arrived(name)
        there.await_sweeps(sweeps)
        assert_unbroken(Console(self.console(name)), there)
        assert not self.here.host.exists(name)
        assert self.here.pid(name) is None
        assert self.left() == []

    def held(self) -> list[str]:
        """Return the ids of the directories that are kept at the source."""
        return [path.name for path in (self.base / "held").glob("*")]

    def left(self) -> list[str]:
        """Return the files that moves have left in the directories of both hosts."""
        found = [*self.staging_there.iterdir(), *(self.base / "source").iterdir()]
        for base in (self.base, self.base_there):
            for kept in ("held", "loaded"):
                found += (base / kept).iterdir() if (base / kept).exists() else ()
        # A destination keeps the record of each bhyve that it has started.
        return [str(path) for path in found if path.suffix != ".started"]


def _remove(directory: Path) -> None:
    """Remove a directory, and unmount what a failed test has left mounted in it."""
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        point = line.split()[1].encode().decode("unicode_escape")
        if Path(point).is_relative_to(directory):
            subprocess.run(["umount", "-l", point])
    shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def two_hosts(**settings: object) -> Iterator[Two]:
    """Make two hosts with the same settings; afterwards end the guests on both hosts."""
    before = dict(os.environ)
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="si2", dir="/dev/shm"))
        stack.callback(_remove, directory)
        here, there = (stack.enter_context(Rig(**settings)) for _ in range(2))
        try:
            yield Two(directory, here, there)
        finally:
            os.environ.clear()
            os.environ.update(before)

"""The -p command runs while the guest is paused, and only then: tests on a stand-in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.stream.verify import Ended, Walk
from standin.rig import Guest, Rig, Spec

ROOT = Path(__file__).resolve().parents[2]
SPEC = Spec(keys={"uuid": "11111111-2222-3333-4444-555555555555"})


@pytest.fixture
def host() -> Iterator[Rig]:
    with Rig() as made:
        yield made


def words(host: Rig, *options: str) -> tuple[list[str | Path], dict[str, str]]:
    """Return the command line that sends guest g, and the environment for it."""
    config = host.directory / "g.conf"
    lines = (host.directory / "g.config").read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("standin.")))
    state = host.directory / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    where = {"BHYSEND_STATE_DIR": str(state)}
    environment = {**host.environment, **where, "PYTHONPATH": str(ROOT / "lib")}
    return [sys.executable, ROOT / "bhysend", "-C", config, *options, "g"], environment


def send(host: Rig, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run bhysend on guest g, and write the stream to a file."""
    command, environment = words(host, *options)
    with path.open("wb") as file:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )


def is_running(guest: Guest) -> bool:
    return guest.process.poll() is None


def test_the_guest_stands_still_while_the_command_runs(host: Rig, tmp_path: Path) -> None:
    """The guest is paused in its process, so the process writes nothing to the guest's disks."""
    guest = host.start("g", SPEC)
    sizes = tmp_path / "sizes"
    look = f"stat -c %s {guest.console.path} >>{sizes}"
    done = send(host, tmp_path / "s", "-p", f"{look}; sleep 0.5; {look}")
    assert done.returncode == 80, done.stderr
    before, after = sizes.read_text().split()
    assert before == after  # a guest that runs beats ten times a second
    assert is_running(guest)


def test_a_command_that_fails_lets_the_guest_run_on(host: Rig, tmp_path: Path) -> None:
    guest = host.start("g", SPEC)
    done = send(host, tmp_path / "s", "-p", "exit 3")
    assert done.returncode == 69, done.stderr
    assert re.search("guest g: it runs here; it was paused for [0-9.]+ (ms|s)\n", done.stderr)
    assert is_running(guest)
    guest.console.await_beats(len(guest.console.beats()) + 3)
    guest.console.await_sweeps(1)


def test_a_command_goes_with_a_checkpoint(host: Rig, tmp_path: Path) -> None:
    """The guest runs on when the command has ended, and the copy is of that moment."""
    guest = host.start("g", SPEC)
    done = send(host, tmp_path / "s", "-k", "-p", f"touch {tmp_path}/was-here")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "was-here").exists()
    assert is_running(guest)
    guest.console.await_sweeps(1)


def test_the_pause_of_a_checkpoint_ends_with_its_copy(host: Rig, tmp_path: Path) -> None:
    """The rounds come while the guest runs, and the state when the guest runs again."""
    guest = host.start("g", SPEC)
    path = tmp_path / "s"
    done = send(host, path, "-k")
    assert done.returncode == 0, done.stderr
    assert "kept, it runs on here" in done.stderr
    with path.open("rb") as file:
        events = list(Walk(file).events())
    [ended] = [event for event in events if isinstance(event, Ended)]
    assert ended.end.rounds > 1
    assert ended.time is not None and ended.time.paused_for_ns > 0
    assert is_running(guest)
    assert os.listdir(host.directory / "state" / "source") == []
    assert os.listdir(host.directory / "state" / "held") == []

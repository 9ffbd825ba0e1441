"""The -p command runs while the guest is paused, and at no other time: on a stand-in."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from bhystream.verify import Ended, Walk
from standin.rig import Guest, Rig, Spec

ROOT = Path(__file__).resolve().parent.parent
MORE_THAN_A_HEAD = 64 << 10
SPEC = Spec(keys={"uuid": "11111111-2222-3333-4444-555555555555"})


@pytest.fixture
def host() -> Iterator[Rig]:
    with Rig() as made:
        yield made


def words(host: Rig, *options: str) -> tuple[list[str | Path], dict[str, str]]:
    """Return the command that sends guest g, and its environment."""
    config = host.directory / "g.conf"
    lines = (host.directory / "g.config").read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("standin.")))
    state = host.directory / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    where = {"BHYSEND_STATE_DIR": str(state), "BHYSEND_STAGING": str(host.directory)}
    environment = {**host.environment, **where, "PYTHONPATH": str(ROOT / "lib")}
    return [sys.executable, ROOT / "bhysend", "-C", config, *options, "g"], environment


def send(host: Rig, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run bhysend of guest g into a file."""
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


def test_the_guest_is_paused_when_the_command_begins(host: Rig, tmp_path: Path) -> None:
    """A suspended bhyve has ended, so that what it would still write to its disks cannot come."""
    guest = host.start("g", SPEC)
    fields = f"/proc/{guest.pid}/stat"
    done = send(host, tmp_path / "s", "-p", f"! test -e {fields} || grep -q ') Z ' {fields}")
    assert done.returncode == 80, done.stderr
    assert guest.await_exit() == 5


def test_a_command_that_fails_brings_a_suspended_guest_back(host: Rig, tmp_path: Path) -> None:
    guest = host.start("g", SPEC)
    done = send(host, tmp_path / "s", "-p", "exit 3")
    assert done.returncode == 69, done.stderr
    assert "it runs here" in done.stderr
    assert guest.await_exit() == 5
    assert host.host.exists("g")


def test_no_command_goes_with_a_checkpoint_of_bhyves(host: Rig, tmp_path: Path) -> None:
    """The guest runs on before the command could begin: a disk copied then would be too new."""
    guest = host.start("g", SPEC)
    done = send(host, tmp_path / "s", "-k", "-p", "true")
    assert done.returncode == 64, done.stderr
    assert "-p with -k: bhyve's checkpoint lets the guest run on by itself" in done.stderr
    assert (tmp_path / "s").stat().st_size == 0
    assert is_running(guest)


def test_the_pause_of_a_checkpoint_ends_with_it(host: Rig) -> None:
    """It does not last until the reader of the pipe has taken the memory."""
    guest = host.start("g", SPEC)
    command, environment = words(host, "-k")
    child = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=PIPE, stderr=PIPE, bufsize=0
    )
    assert child.stdout is not None and child.stderr is not None
    stream = child.stdout.read(1)
    start_ns = time.monotonic_ns()
    while len(stream) < MORE_THAN_A_HEAD:
        stream += child.stdout.read(MORE_THAN_A_HEAD)
    # The memory arrives, so the checkpoint is over.  More than a pipe holds is still to come.
    waited_ns = -time.monotonic_ns()
    guest.console.await_sweeps(15)
    waited_ns += time.monotonic_ns()
    stream += child.stdout.readall()  # type: ignore[attr-defined]
    all_ns = time.monotonic_ns() - start_ns
    said = child.stderr.read().decode()
    assert child.wait(60) == 0, said
    [ended] = [event for event in Walk(io.BytesIO(stream)).events() if isinstance(event, Ended)]
    assert ended.time is not None
    assert 0 < ended.time.paused_for_ns < all_ns - waited_ns
    assert is_running(guest)
    assert os.listdir(host.directory / "state" / "source") == []

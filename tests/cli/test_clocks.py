"""bhyrecv --advance-clock: the guest's clocks go on as if it had run during the pause."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bhystream.standin.cpu import Cpus

from . import kinds
from .kinds import G4, G5
from .pipeline import report, run
from .standin import StandinPlace, StandinTraveller
from .travel import Host, Site, Stable

OPTION = "--advance-clock"
BOTH = pytest.mark.parametrize("kind", [G5, G4])
MOVED_ON = "; its clocks moved on by "
# A pause that is long against everything else, on a busy host too.
LONG_S = 3
LONG = ("-f", "-p", f"sleep {LONG_S}")
TSC_HZ, HPET_HZ = 2_500_000_000, 1 << 24


@pytest.fixture
def guest(kind: str) -> Iterator[StandinTraveller]:
    """A guest that has never stood still: its clocks are those of its host."""
    found = kinds.own(kind)
    yield found
    found.close()


def lost_s(to: Site, name: str) -> list[float]:
    """Return by how many seconds each clock of the guest is behind its host's."""
    assert isinstance(to, StandinPlace)
    cpus = Cpus(to.rig.directory / "vmm" / f"{name}.cpu", is_intel=True)
    try:
        tscs = [-cpu.get("tsc_offset") % 2**64 / TSC_HZ for cpu in cpus]
        return [*tscs, -cpus.hpet_offset % 2**32 / HPET_HZ]
    finally:
        cpus.close()


def paused_s(stderr: str) -> float:
    """Return the pause as both hosts have measured it, which bhyrecv says in seconds."""
    found = re.search(r"bhyrecv.*; paused ([0-9.]+) s,", stderr)
    assert found, stderr
    return float(found[1])


@BOTH
def test_without_the_option_the_clocks_lose_the_pause(guest: StandinTraveller, host: Host) -> None:
    to = guest.next()
    sent = host.run(*guest.send(*LONG), *guest.receive(to))
    assert sent.status == 0 and MOVED_ON not in sent.stderr, report(sent)
    assert min(lost_s(to, guest.name)) >= LONG_S
    guest.hand_over(host, to)


@BOTH
def test_with_the_option_they_go_on(guest: StandinTraveller, host: Host) -> None:
    """They lose what no host has measured: the transit of END, and bhyve's restore."""
    for turn in (1, 2):
        to = guest.next()
        sent = host.run(*guest.send(*LONG), *guest.receive(to, OPTION))
        assert sent.status == 0 and MOVED_ON in sent.stderr, report(sent)
        assert paused_s(sent.stderr) >= LONG_S, report(sent)
        # A clock that was moved too far would be behind by nearly a whole turn.
        assert max(lost_s(to, guest.name)) < turn * LONG_S / 2
        guest.hand_over(host, to)
        guest.prove(1)


@BOTH
def test_a_file_may_lie_for_a_while(guest: StandinTraveller, host: Host, tmp_path: Path) -> None:
    path, to = tmp_path / "g.bhys", guest.next()
    with path.open("wb") as file:
        [kept] = run(guest.send("-k"), env=host.env, stdout=file)
    assert kept.status == 0, report(kept)
    time.sleep(LONG_S)
    with path.open("rb") as file:
        [received] = run(guest.receive(to, OPTION), env=host.env, stdin=file)
    assert received.status == 0 and MOVED_ON in received.stderr, report(received)
    assert max(lost_s(to, guest.name)) < LONG_S
    guest.run_on(host, sweeps=1)


@pytest.mark.standin
def test_a_kernel_that_is_not_known_is_left_alone(host: Host) -> None:
    with closing(kinds.own("g5", knows_clocks=False)) as guest:
        to = guest.next()
        sent = host.run(*guest.send(), *guest.receive(to, OPTION))
        assert sent.status == 0 and MOVED_ON not in sent.stderr, report(sent)
        assert "its clocks are as they were saved: " in sent.stderr, report(sent)
        guest.hand_over(host, to)
        guest.prove(1)


@pytest.mark.guest
def test_qemu_cannot(stable: Stable, host: Host) -> None:
    guest = kinds.small("qemu", stable)
    to = guest.next()
    sent = host.run(*guest.send(), *guest.receive(to, OPTION))
    assert sent.status == 0 and MOVED_ON not in sent.stderr, report(sent)
    assert "its clocks are as they were saved: QEMU" in sent.stderr, report(sent)
    guest.hand_over(host, to)

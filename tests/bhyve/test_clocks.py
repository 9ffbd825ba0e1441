"""The clocks of a real guest after a move, as bhyve saves them: with --advance-clock, without it.

    BHYSEND_TEST_ROM=/root/rom.bin python -m pytest -m bhyve -v -rA tests/bhyve/test_clocks.py

Run the tests as root.  They keep the guest (bhysend -k) before and after a move, and compare the
TSC in both streams with the time between the two pauses.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from bhystream.backend.bhyve import clocks
from bhystream.backend.bhyve.freebsd import CLOCKS, FreeBsdHost
from bhystream.guest import State
from bhystream.stream.verify import Ended as StreamEnded
from bhystream.stream.verify import Walk

from .rom import NEEDS_FREEBSD, Ended, Host, booted

pytestmark = NEEDS_FREEBSD

OPTION = "--advance-clock"


@pytest.fixture
def host() -> Iterator[Host]:
    if FreeBsdHost().clock_layout() is None:
        pytest.skip("this kernel keeps its clocks in a way that is not known here")
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as path, booted(Path(path)) as made:
        yield made


class Seen(NamedTuple):
    """What the guest's TSC says, in seconds, and the time of day at which it said so."""

    tsc_s: float
    at_s: float


def seen(host: Host) -> Seen:
    """Keep the guest, and read its clock in the stream."""
    path = host.directory / "seen.bhys"
    kept = host.shell(f"{shlex.join(host.send('-k', '-f'))} > {path}")
    assert kept.status == 0, kept.said
    here = FreeBsdHost()
    layout = here.clock_layout()
    hz = int(here.sysctl("machdep.tsc_freq") or 0)
    assert layout and hz
    tsc, states, ended = 0, [], None
    with path.open("rb", buffering=0) as file:
        for event in Walk(file).events():
            if isinstance(event, State):
                states.append(event)
                if event.name == "kern/vm":
                    assert len(event.data) == layout.vcpu_bytes + layout.vm_tail_bytes
                    tsc = int.from_bytes(event.data[layout.tsc_at :][:8], "little")
                if event.name == "kern/vhpet":
                    assert len(event.data) == clocks.HPET_BYTES
            elif isinstance(event, StreamEnded):
                ended = event
    path.unlink()
    ran_on_ns = clocks.ran_on_ns(states)
    assert ended and ended.time and ran_on_ns
    return Seen(tsc / hz, (ended.time.paused_at_ns + ran_on_ns) / 1e9)


def moved(host: Host, *options: str) -> tuple[Ended, float, float]:
    """Move the guest; return what was said, its pause, and by how much its TSC fell behind."""
    before = seen(host)
    to = host.other()
    done = host.run(*host.send("-f", "-p", "sleep 5"), *host.receive(to, *options))
    assert done.status == 0, done.said
    host.arrived(to)
    after = seen(host)
    pause = re.search(r"bhyrecv.*; paused ([0-9.]+) s,", done.said)
    assert pause, done.said
    lost = (after.at_s - before.at_s) - (after.tsc_s - before.tsc_s)
    print(f"paused {pause[1]} s, lost {lost:.3f} s {options}")
    return done, float(pause[1]), lost


def test_the_layout_is_that_of_this_kernel(host: Host) -> None:
    """The TSC counts the seconds between two saves, and so is where the table says."""
    assert FreeBsdHost().sysctl("kern.osreldate") in CLOCKS
    one, other = seen(host), seen(host)
    passed = other.at_s - one.at_s
    # A save stops the guest, not its TSC.
    assert abs((other.tsc_s - one.tsc_s) - passed) < passed / 2


def test_without_the_option_the_clock_loses_the_pause(host: Host) -> None:
    _, pause, lost = moved(host)
    assert lost > pause / 2
    host.prove()


def test_with_the_option_the_clock_goes_on(host: Host) -> None:
    for _ in range(2):
        done, pause, lost = moved(host, OPTION)
        assert "; its clocks moved on by " in done.said, done.said
        assert abs(lost) < pause / 2
        host.prove()

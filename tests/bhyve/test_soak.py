"""Moves during which a process is killed at any moment, of a real bhyve guest on a FreeBSD host.

    BHYSEND_TEST_ROM=/root/rom.bin BHYSEND_TEST_KILLS=50 BHYSEND_TEST_SEED=1 \\
        python -m pytest -m bhyve -s tests/bhyve/test_soak.py

After each kill there is one guest, which goes on where it was, with no heartbeat missing or printed
twice; or the killed process was a bhyve, and the guest went with it.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from .harmed import Harmed, records
from .rom import NEEDS_FREEBSD, Host, booted, program, until

pytestmark = NEEDS_FREEBSD
KILLS = int(os.environ.get("BHYSEND_TEST_KILLS", "5"))
SEED = int(os.environ.get("BHYSEND_TEST_SEED", "1"))
_WHO = ("bhysend", "keeper", "bhyrecv", "there", "back", "source", "destination")


def where(host: Host, move_of: Harmed, who: str) -> str:
    """Return where the guest is after a kill: here, there, or gone with its bhyve."""
    phase = move_of.phase()
    said = move_of.log.read_text()
    assert phase in ("", "in-doubt"), f"{phase}\n{said}"
    if phase:
        asked = move_of.ask()
        if asked == 81 and who == "destination":
            # The guest ran there, and was killed there; nobody else may let it run again.
            return "gone"
        assert asked == 0 or asked in range(64, 78), said
        assert (asked == 0) == bool(host.pid(move_of.to)), said
    until(lambda: not (host.pid() and host.pid(move_of.to)), "end of one of the copies")
    if host.pid():
        return "here"
    if host.pid(move_of.to):
        return "there"
    assert who in ("source", "destination"), said
    return "gone"


def one_kill(host: Host, rng: random.Random, move_s: float) -> tuple[str, float]:
    """Kill a process during a move; return where the guest was in the end, and the time."""
    who, share = rng.choice(_WHO), rng.random()
    for name in ("reached", "go", "there", "back"):
        (host.directory / name).unlink(missing_ok=True)
    start = time.monotonic()
    with Harmed(host, "nowhere") as move_of:
        time.sleep(share * move_s)
        is_killed = move_of.kill_if_there(who)
        move_of.wait()
        took_s = time.monotonic() - start
        end = where(host, move_of, who)
        if end == "there":
            until(lambda: not host.pid(), "end of the source's bhyve")
            host.arrived(move_of.to)
        elif end == "here":
            host.stayed()
        else:
            host.end()
            for record in records(host):
                host.run(*program("bhysend"), "--discard", record.stem)
            host.reboot()
    host.prove(5)
    print(f"{who} at {share:.0%}: {end if is_killed else 'no such process'}", flush=True)
    return end if is_killed else "", took_s if end == "there" else move_s


def test_kills_at_any_moment() -> None:
    rng = random.Random(SEED)
    ends: Counter[str] = Counter()
    with (
        tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as path,
        booted(Path(path)) as host,
    ):
        move_s = 5.0
        while sum(ends.values()) < KILLS:
            end, move_s = one_kill(host, rng, move_s)
            if end:
                ends[end] += 1
    print(f"seed {SEED}: {sum(ends.values())} kills, {dict(ends)}")

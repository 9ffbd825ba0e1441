"""Measure how long a guest is silent while it moves, at its serial port.

The proof guest (512 MiB, tens of them rewritten each second) moves on and on between QEMUs of
this host, through a plain pipe and through ssh to a private server in turn, so that a busy
neighbour hits both alike.  The guest beats each 100 ms; what is shown is the silence between its
last beat at the source and its first at the destination, less that 100 ms: a lower bound of the
downtime, and the downtime is at most 100 ms more.

usage: PYTHONPATH=tests python tests/bench/bench_downtime.py [turns]
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from cli.pipeline import report, run
from cli.sshd import Sshd
from cli.travel import Host, Traveller
from guest import Spec, Stamps, handover_gap

BEAT_MS = 100.0
PAUSED = re.compile(r"paused (\S+ m?s) and the way of END, (\S+ m?s) of it here")

Wrap = Callable[[list[str]], list[str]]


def silence_ms(host: Host, guest: Traveller, wrap: Wrap) -> tuple[float, str]:
    """Move the guest once; return its silence less the beat, and what the programs say."""
    to = guest.next()
    guest.place.serial.await_heartbeats(5)
    with Stamps(guest.place.serial.path) as here, Stamps(to.serial.path) as there:
        # What is not new is not stamped right, and is not asked for.
        guest.place.serial.await_heartbeats(2)
        sent, received = run(guest.send(), wrap(guest.receive(to)), env=host.env)
        assert (sent.status, received.status) == (80, 0), report(sent, received)
        to.serial.await_heartbeats(2)
    guest.settle(host, to)
    guest.prove()
    said = PAUSED.search(received.stderr)
    return handover_gap(here, there).gap_ms - BEAT_MS, said[0] if said else ""


def main(argv: list[str]) -> int:
    """Print the median of each transport."""
    turns = int(argv[1]) if len(argv) > 1 else 5
    found: dict[str, list[float]] = {"pipe": [], "ssh": []}
    with tempfile.TemporaryDirectory(prefix="bhyc-", dir="/dev/shm") as directory:
        host = Host(Path(directory))
        (Path(directory) / "sshd").mkdir()
        guest = Traveller(Spec())
        try:
            with Sshd(Path(directory) / "sshd") as server:

                def through_ssh(command: list[str]) -> list[str]:
                    return server.command(command, BHYSEND_STATE_DIR=str(host.state))

                for _ in range(turns):
                    for name, wrap in (("pipe", list), ("ssh", through_ssh)):
                        silence, said = silence_ms(host, guest, wrap)
                        found[name].append(silence)
                        print(f"{name}: silent for {silence:.0f} ms; {said}", flush=True)
        finally:
            guest.close()
    for name, all_ms in found.items():
        print(
            f"{name}: median {statistics.median(all_ms):.0f} ms of {turns} "
            f"({min(all_ms):.0f} to {max(all_ms):.0f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

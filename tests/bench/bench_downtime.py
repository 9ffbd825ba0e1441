"""Measure how long a guest is silent while it moves, at its serial port.

The proof guest (512 MiB, tens of them rewritten each second) moves on and on between QEMUs of
this host, through a pipe and through ssh to a private server, in the plain form and in the command
form with its answers, in turn, so that a busy neighbour hits all alike.  The guest beats each
100 ms; what is shown is the silence between its last beat at the source and its first at the
destination, less that 100 ms: a lower bound of the downtime, and the downtime is at most 100 ms
more.

usage: PYTHONPATH=tests python tests/bench/bench_downtime.py [turns]
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from cli.pipeline import report, run
from cli.qemu import QemuTraveller, qemu_place
from cli.sshd import Sshd
from cli.travel import Host
from guest import Spec, Stamps, handover_gap

BEAT_MS = 100.0
PAUSED = re.compile(r"paused .*")

Wrap = Callable[[list[str]], list[str]]


def silence_ms(host: Host, guest: QemuTraveller, wrap: Wrap, answered: bool) -> tuple[float, str]:
    """Move the guest once; return its silence less the beat, and what bhysend says."""
    to, place = guest.next(), qemu_place(guest.place)
    place.serial.await_heartbeats(5)
    with Stamps(place.serial.path) as here, Stamps(to.serial.path) as there:
        # What is not new is not stamped right, and is not asked for.
        place.serial.await_heartbeats(2)
        receive = wrap(guest.receive(to))
        if answered:
            ended = run([*guest.send(), *receive], env=host.env)
        else:
            ended = run(guest.send(), receive, env=host.env)
        assert [one.status for one in ended] == ([0] if answered else [80, 0]), report(*ended)
        to.serial.await_heartbeats(2)
    if answered:
        guest.arrive(to)
    else:
        guest.settle(host, to)
    guest.prove()
    said = PAUSED.findall(ended[0].stderr)
    return handover_gap(here, there).gap_ms - BEAT_MS, said[-1]


def main(argv: list[str]) -> int:
    """Print the median of each transport."""
    turns = int(argv[1]) if len(argv) > 1 else 5
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="bhyc-", dir="/dev/shm") as directory:
        host = Host(Path(directory))
        (Path(directory) / "sshd").mkdir()
        guest = QemuTraveller(Spec())
        try:
            with Sshd(Path(directory) / "sshd") as server:

                def through_ssh(command: list[str]) -> list[str]:
                    return server.command(command, BHYSEND_STATE_DIR=str(host.state))

                for _ in range(turns):
                    for name, wrap, answered in (
                        ("plain, pipe", list, False),
                        ("plain, ssh", through_ssh, False),
                        ("answered, pipe", list, True),
                        ("answered, ssh", through_ssh, True),
                    ):
                        silence, said = silence_ms(host, guest, wrap, answered)
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

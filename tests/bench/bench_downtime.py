"""Measure, at its serial port, how long a guest is silent while it moves.

The proof guest (512 MiB, of which it rewrites tens of MiB each second) moves again and again
between QEMUs of this host: through a pipe and through ssh to a private server, in the plain form
and in the command form with its answers.  The forms take turns, so that a busy neighbour hits all
of them alike.  The guest beats every 100 ms.  The printed time is the silence between the last
beat at the source and the first beat at the destination, less 100 ms: a lower bound of the
downtime, which is at most 100 ms longer.

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
    """Move the guest once; return its silence less BEAT_MS, and bhysend's line about the pause."""
    to, place = guest.next(), qemu_place(guest.place)
    place.serial.await_heartbeats(5)
    with Stamps(place.serial.path) as here, Stamps(to.serial.path) as there:
        # Only beats that arrive from here on have right stamps.
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
    """Print the median silence for each transport."""
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

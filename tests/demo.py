"""Show a live migration: a Linux guest moves between two QEMUs on this host.

demo.sh installs what this script needs, and starts it.  The guest rewrites its
memory all the time and checks every page; the report at the end is what the guest
itself printed, and the time of its silence is measured at its serial line.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from guest import Guest, Spec, images, reaping
from guest.serial import Serial, Stamps, assert_unbroken, handover_gap

BIN = Path(sys.executable).parent


def say(text: str) -> None:
    """Print one of the demonstration's own lines."""
    print(f"demo: {text}", flush=True)


def move(source: str, destination: str, resources: list[str], state: Path) -> int:
    """Run bhysend with bhyrecv as its command; return its exit status."""
    env = {**os.environ, "BHYSEND_STATE_DIR": str(state)}
    receive = [str(BIN / "bhyrecv"), *resources, destination]
    say(f"bhysend -v {source} bhyrecv -o ... {destination}")
    return subprocess.run(
        [BIN / "bhysend", "-v", source, *receive], env=env, check=False
    ).returncode


def main() -> int:
    """Boot the guest, move it, let it prove itself."""
    say("booting a Linux guest of 512 MiB that rewrites and checks its memory all the time")
    with Guest(Spec(name="demo")) as guest:
        guest.serial.await_ready()
        guest.serial.await_sweeps(1)
        qmp = guest.directory / "there.sock"
        serial = guest.directory / "there.log"
        found = images()
        resources = [
            *("-o", f"serial0={serial}", "-o", f"kernel={found.kernel}"),
            *("-o", f"initrd={found.initramfs}"),
        ]
        state = guest.directory / "state"
        with reaping(qmp), Stamps(guest.serial.path) as here, Stamps(serial) as there:
            guest.serial.await_heartbeats(3)
            status = move(f"qemu:{guest.qmp_path}", f"qemu:{qmp}", resources, state)
            if status:
                say(f"FAILED: bhysend ended with {status}")
                return 1
            log = Serial(serial).await_sweeps(2)
            assert_unbroken(guest.serial.read(), log)
            gap = handover_gap(here, there)
    beat = log.last
    say(
        f"the guest runs on there: heartbeat {beat.sequence} without one missing, every page "
        f"checked, {beat.bad} wrong"
    )
    say(f"silent for {gap.gap_ms:.0f} ms between two heartbeats that are 100 ms apart")
    say("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

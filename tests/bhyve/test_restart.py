"""The line that bhyrecv prints starts a guest again when it reboots, and ends when it powers off.

    python -m pytest -m bhyve tests/bhyve/test_restart.py

Run the test as root, on a host on which vm-bhyve does not have the guests rom1 and rom2.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess

from .rom import BHYVECTL, NEEDS_FREEBSD, Host, program, until

pytestmark = NEEDS_FREEBSD


def is_supervised(line: str) -> bool:
    """Say whether the line still runs: it holds the lock that it names."""
    [lock] = re.findall(r"-st 0 (\S+)", line)
    done = subprocess.run(["/usr/bin/lockf", "-nst", "0", lock, "true"], check=False)
    return done.returncode == os.EX_TEMPFAIL


def test_it_starts_the_guest_at_each_reboot_until_it_powers_off(button_host: Host) -> None:
    to = button_host.other()
    done = button_host.run(*button_host.send("-f"), *button_host.receive(to))
    assert done.status == 0, done.said
    button_host.arrived(to)
    [line] = re.findall(r"(daemon -f lockf .*)$", done.said, re.MULTILINE)
    subprocess.run(["/bin/sh", "-c", line], check=True)
    until(lambda: is_supervised(line), "process of the line")
    for _ in range(2):
        before, first = button_host.pid(), len(button_host.lines())
        subprocess.run([BHYVECTL, "--force-reset", f"--vm={to}"], check=True)
        until(lambda before=before: button_host.pid() not in (0, before), "bhyve")  # type: ignore[misc]
        until(lambda first=first: "HB 00000003" in "".join(button_host.lines()[first:]), "beat")  # type: ignore[misc]
    # The guest that was started again is one that bhysend knows, without -C.
    listed = button_host.run(*program("bhysend"), "-n", "-f", to, side="b")
    assert listed.status == 0, listed.said
    os.kill(button_host.pid(), signal.SIGTERM)
    until(lambda: not button_host.pid(), "end of the guest")
    until(lambda: not is_supervised(line), "end of the line")

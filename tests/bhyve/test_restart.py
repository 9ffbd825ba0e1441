"""The line that bhyrecv prints starts a guest again when it reboots, and ends when it powers off.

    python -m pytest -m bhyve tests/bhyve/test_restart.py

Run the test as root, on a host on which vm-bhyve does not have the guests rom1 and rom2.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from .button import with_button
from .rom import BHYVECTL, Host, program, until

pytestmark = [
    pytest.mark.bhyve,
    pytest.mark.skipif(
        not sys.platform.startswith("freebsd"), reason="a bhyve guest needs FreeBSD"
    ),
]


@pytest.fixture
def host() -> Iterator[Host]:
    with with_button() as made:
        yield made


def is_supervised(line: str) -> bool:
    """Say whether the line still runs: it holds the lock that it names."""
    [lock] = re.findall(r"-st 0 (\S+)", line)
    done = subprocess.run(["/usr/bin/lockf", "-nst", "0", lock, "true"], check=False)
    return done.returncode == os.EX_TEMPFAIL


def test_it_starts_the_guest_at_each_reboot_until_it_powers_off(host: Host) -> None:
    to = host.other()
    done = host.run(*host.send("-f"), *host.receive(to))
    assert done.status == 0, done.said
    host.arrived(to)
    [line] = re.findall(r"(daemon -f lockf .*)$", done.said, re.MULTILINE)
    subprocess.run(["/bin/sh", "-c", line], check=True)
    until(lambda: is_supervised(line), "process of the line")
    for _ in range(2):
        before, first = host.pid(), len(host.lines())
        subprocess.run([BHYVECTL, "--force-reset", f"--vm={to}"], check=True)
        until(lambda before=before: host.pid() not in (0, before), "bhyve")  # type: ignore[misc]
        until(lambda first=first: "HB 00000003" in "".join(host.lines()[first:]), "beat")  # type: ignore[misc]
    # The guest that was started again is one that bhysend knows, without -C.
    listed = host.run(*program("bhysend"), "-n", "-f", to, side="b")
    assert listed.status == 0, listed.said
    os.kill(host.pid(), signal.SIGTERM)
    until(lambda: not host.pid(), "end of the guest")
    until(lambda: not is_supervised(line), "end of the line")

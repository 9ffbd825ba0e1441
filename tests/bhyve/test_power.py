"""The power button of a guest that has moved: SIGTERM presses it, as at the source.

    python -m pytest -m bhyve tests/bhyve/test_power.py

Run the tests as root.  They need no ROM: the guest is that of button.py.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.backend.bhyve import powerbutton
from bhystream.backend.bhyve.freebsd import FreeBsdHost
from bhystream.backend.bhyve.freebsd_trace import Trace

from .button import button_rom, with_button
from .rom import Host, until

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


def test_sigterm_presses_it_after_each_move(host: Host) -> None:
    assert FreeBsdHost().has_power_button(host.pid())
    for _ in range(2):
        to = host.other()
        done = host.run(*host.send("-f"), *host.receive(to))
        assert done.status == 0, done.said
        assert "power button" not in done.said
        host.arrived(to)
        host.prove(5)
        assert FreeBsdHost().has_power_button(host.pid())
    os.kill(host.pid(), signal.SIGTERM)
    until(lambda: not host.pid(), "end of the guest")
    assert host.lived[-1].said().endswith("P")


def reboot_without_acpi(host: Host) -> None:
    """Boot the guest anew, and let it leave ACPI off."""
    Path(host.rom).write_bytes(button_rom(has_acpi=False))
    host.end()
    host.reboot()
    assert not FreeBsdHost().has_power_button(host.pid())


def test_a_guest_without_acpi_gets_none(host: Host) -> None:
    """Before the guest switches ACPI on, SIGTERM ends its bhyve, also after a move."""
    reboot_without_acpi(host)
    to = host.other()
    done = host.run(*host.send("-f"), *host.receive(to))
    assert done.status == 0, done.said
    host.arrived(to)
    assert not FreeBsdHost().has_power_button(host.pid())
    os.kill(host.pid(), signal.SIGTERM)
    until(lambda: not host.pid(), "end of bhyve")


def test_one_of_several_vcpus_takes_the_writes(host: Host) -> None:
    """The vCPUs that the guest has not started ask for VM_RUN all the time, as in a restore."""
    host.cpus = 2
    reboot_without_acpi(host)
    for _ in range(20):
        trace = Trace(host.pid())
        is_done = trace.write_ports(powerbutton.CONNECT, 60.0)
        trace.let_go()
        assert is_done
        assert FreeBsdHost().has_power_button(host.pid())
        host.prove(2)
    os.kill(host.pid(), signal.SIGTERM)
    until(lambda: not host.pid(), "end of the guest")
    assert host.lived[-1].said().endswith("P")

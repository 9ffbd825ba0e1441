"""The power button of a guest that has moved: SIGTERM presses it, as at the source.

    python -m pytest -m bhyve tests/bhyve/test_power.py

Run the tests as root.  They need no ROM: the guest is that of button.py.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from bhystream.backend.bhyve import powerbutton
from bhystream.backend.bhyve.freebsd import FreeBsdHost
from bhystream.backend.bhyve.freebsd_trace import Trace

from .button import button_rom
from .rom import NEEDS_FREEBSD, Host, until

pytestmark = NEEDS_FREEBSD


def test_sigterm_presses_it_after_each_move(button_host: Host) -> None:
    assert FreeBsdHost().has_power_button(button_host.pid())
    for _ in range(2):
        to = button_host.other()
        done = button_host.run(*button_host.send("-f"), *button_host.receive(to))
        assert done.status == 0, done.said
        assert "power button" not in done.said
        button_host.arrived(to)
        button_host.prove(5)
        assert FreeBsdHost().has_power_button(button_host.pid())
    os.kill(button_host.pid(), signal.SIGTERM)
    until(lambda: not button_host.pid(), "end of the guest")
    assert button_host.lived[-1].said().endswith("P")


def reboot_without_acpi(button_host: Host) -> None:
    """Boot the guest anew, and let it leave ACPI off."""
    Path(button_host.rom).write_bytes(button_rom(has_acpi=False))
    button_host.end()
    button_host.reboot()
    assert not FreeBsdHost().has_power_button(button_host.pid())


def test_a_guest_without_acpi_gets_none(button_host: Host) -> None:
    """Before the guest switches ACPI on, SIGTERM ends its bhyve, also after a move."""
    reboot_without_acpi(button_host)
    to = button_host.other()
    done = button_host.run(*button_host.send("-f"), *button_host.receive(to))
    assert done.status == 0, done.said
    button_host.arrived(to)
    assert not FreeBsdHost().has_power_button(button_host.pid())
    os.kill(button_host.pid(), signal.SIGTERM)
    until(lambda: not button_host.pid(), "end of bhyve")


def test_one_of_several_vcpus_takes_the_writes(button_host: Host) -> None:
    """The vCPUs that the guest has not started ask for VM_RUN all the time, as in a restore."""
    button_host.cpus = 2
    reboot_without_acpi(button_host)
    for _ in range(20):
        trace = Trace(button_host.pid())
        is_done = trace.write_ports(powerbutton.CONNECT, 60.0)
        trace.let_go()
        assert is_done
        assert FreeBsdHost().has_power_button(button_host.pid())
        button_host.prove(2)
    os.kill(button_host.pid(), signal.SIGTERM)
    until(lambda: not button_host.pid(), "end of the guest")
    assert button_host.lived[-1].said().endswith("P")

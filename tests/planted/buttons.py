"""Bugs of the power button: lost, given to a guest without one, or connected too late."""

from __future__ import annotations

from planted.bug import Bug, Kind

TESTS = "backend/test_bhyve_powerbutton.py::"
RESTORE = "backend/bhyve/restore.py"
CONNECTS = "        return trace.write_ports(powerbutton.CONNECT, _CONNECT_S)\n"

BUGS = (
    Bug(
        Kind.BUTTON,
        "it is not connected",
        RESTORE,
        CONNECTS,
        "        return True\n",
        (
            f"{TESTS}test_the_button_moves_along[early]",
            f"{TESTS}test_a_waiting_guest_has_it_before_it_is_released",
        ),
    ),
    Bug(
        Kind.BUTTON,
        "it is not connected: on FreeBSD",
        RESTORE,
        CONNECTS,
        "        return True\n",
        ("bhyve/test_power.py::test_sigterm_presses_it_after_each_move",),
        needs_freebsd=True,
    ),
    Bug(
        Kind.BUTTON,
        "a guest without one gets one",
        RESTORE,
        "        if not self._guest.has_power_button:\n",
        "        if False:\n",
        (f"{TESTS}test_a_guest_without_a_button_gets_none[told1]",),
    ),
    Bug(
        Kind.BUTTON,
        "any value in the stream counts as true",
        "backend/bhyve/wanted.py",
        "head.host.get(identity.POWER_BUTTON) is True",
        "bool(head.host.get(identity.POWER_BUTTON))",
        (f"{TESTS}test_a_guest_without_a_button_gets_none[told4]",),
    ),
    Bug(
        Kind.BUTTON,
        "nobody is told that it is lost",
        "backend/bhyve/sink.py",
        "        if not restore.is_connected:\n",
        "        if False:\n",
        (f"{TESTS}test_a_button_that_is_lost_is_told",),
    ),
    Bug(
        Kind.BUTTON,
        "the hypervisor ignores what bhyrecv ignores",
        "inherited.py",
        "            signal.signal(one, lambda *_: None)\n",
        "            pass\n",
        ("backend/test_launch.py::test_a_child_heeds_the_signals_that_we_ignore",),
        is_quick=True,
    ),
)

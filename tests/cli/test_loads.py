"""No module is loaded while a guest stands, or when nothing but the answer is left to wait for.

Loading takes time, which is part of the pause; it may fail, for want of memory or of files; and
the module may by then be of another version, if the programs are upgraded during a move.
"""

from __future__ import annotations

import re
from pathlib import Path

from .attempt import THIRD
from .pipeline import Ended, report, run
from .travel import Host, Traveller, program_at

LOADS = str(Path(__file__).with_name("loads.py"))


def watched(command: list[str], point: str) -> list[str]:
    """Return the command that also says which modules it has loaded since a point."""
    at = program_at(command) + 1
    return [*command[:at], LOADS, point, "--", *command[at:]]


def loaded(ended: Ended) -> set[str]:
    """Return the modules that a watched program has loaded since its point.

    The stand-in's own do not count: they take the place of a kernel.
    """
    [found] = re.findall(r"^loaded:(.*)$", ended.stderr, re.M)
    return {name for name in str(found).split() if not name.startswith("bhystream.standin.")}


def test_a_move_loads_nothing_in_the_pause(host: Host, small: Traveller) -> None:
    to = small.next()
    send = watched(small.send("-a"), "send.custody.Custody.pause")
    receive = watched(small.receive(to), "recv.building.Building.load")
    sent, received, third = run(send, receive, THIRD, env=host.env)
    assert (sent.status, received.status, third.status) == (0, 0, 0), report(sent, received, third)
    assert loaded(sent) == loaded(received) == set()
    small.hand_over(host, to)


def test_a_guest_is_resumed_with_what_is_loaded(host: Host, small: Traveller) -> None:
    send = watched(small.send("-p", "false"), "send.custody.Custody.pause")
    [sent] = run([*send, *small.receive(small.next())], env=host.env)
    assert sent.status == 69, report(sent)
    assert loaded(sent) == set()
    small.run_on(host, sweeps=1)

"""A guest that no manager knows: bhyrecv keeps its configuration, and bhysend finds it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import kinds
from .pipeline import report
from .standin import StandinPlace, StandinTraveller
from .travel import Host

pytestmark = pytest.mark.standin


@pytest.fixture
def guest() -> Iterator[StandinTraveller]:
    found = kinds.own("g5")
    yield found
    found.close()


def bare(guest: StandinTraveller, *options: str) -> list[str]:
    """Return the words of a bhysend without -C."""
    words = guest.send(*options)
    at = words.index("-C")
    return [*words[:at], *words[at + 2 :]]


def conf_of(host: Host) -> Path:
    [found] = (host.state / "conf").iterdir()
    return found


def moved(guest: StandinTraveller, host: Host) -> str:
    """Move the guest once; return what was said."""
    to = guest.next()
    sent = host.run(*guest.send(), *guest.receive(to))
    assert sent.status == 0, report(sent)
    guest.hand_over(host, to)
    return sent.stderr


def test_a_guest_that_has_arrived_needs_no_configuration_to_leave(
    guest: StandinTraveller, host: Host
) -> None:
    refused = host.run(*bare(guest, "-n"))
    assert "its configuration is not known" in refused.stderr, report(refused)
    said = moved(guest, host)
    path = conf_of(host)
    assert f"its configuration here is {path}; this line starts it again:" in said
    assert isinstance(guest.at, StandinPlace)
    assert f"pwait -v {guest.at.pid} " in said and f" {path}.lock " in said
    to = guest.next()
    sent = host.run(*bare(guest), *guest.receive(to))
    assert sent.status == 0, report(sent)
    guest.hand_over(host, to)
    guest.prove(1)


def of_another_process(path: Path) -> None:
    """Let the file name a process that is not there."""
    head, _, rest = path.read_text().partition("\n")
    _, word, pid, *others = head.split()
    path.write_text(" ".join(["#", word, str(int(pid) + 1), *others]) + f"\n{rest}")


def test_a_guest_that_the_line_has_started_again_needs_none_either(
    guest: StandinTraveller, host: Host
) -> None:
    [line] = [line for line in moved(guest, host).splitlines() if "daemon -f" in line]
    of_another_process(conf_of(host))
    assert isinstance(guest.at, StandinPlace)
    script = shlex.split(line[line.index("daemon") :])[-1]
    guest.at.rig.settings(parent_command=f"sh -c {script}")
    asked = host.run(*bare(guest, "-n"))
    assert asked.status == 0, report(asked)
    guest.at.rig.settings(parent_command=f"sh -c {script.replace('proof.conf', 'other.conf')}")
    refused = host.run(*bare(guest, "-n"))
    assert "its configuration is not known" in refused.stderr, report(refused)


def test_the_configuration_of_an_earlier_process_is_not_believed(
    guest: StandinTraveller, host: Host
) -> None:
    moved(guest, host)
    path = conf_of(host)
    of_another_process(path)
    refused = host.run(*bare(guest, "-n"))
    assert "its configuration is not known" in refused.stderr, report(refused)
    assert f"if the guest was started again from {path}, that is the file" in refused.stderr
    assert isinstance(guest.at, StandinPlace)
    environment = guest.at.environment
    named = host.run(*bare(guest, "-n")[: len(environment)], *guest.send("-n")[len(environment) :])
    assert named.status == 0, report(named)
    guest.run_on(host, sweeps=1)

"""A guest is announced on a real bridge, and a second guest watches.

    BHYSEND_TEST_ROM=/root/rom.bin python -m pytest -m bhyve -v -rA tests/bhyve/test_network.py

Run the tests as root.  They make a bridge and taps of their own.  The test is each guest
on the bridge: it opens the guest's tap, as bhyve does.  Only the last test runs a bhyve.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bhystream.backend import programs
from bhystream.backend.bhyve import freebsd_announce
from bhystream.backend.bhyve.host import Host
from bhystream.backend.process import Identity, identify
from bhystream.errors import GuestError

from .rom import booted, until

pytestmark = [
    pytest.mark.bhyve,
    pytest.mark.skipif(not sys.platform.startswith("freebsd"), reason="a bridge needs FreeBSD"),
]

IFCONFIG = "/sbin/ifconfig"
MOVED, SECOND = "58:9c:fc:00:00:08", "58:9c:fc:00:00:09"
ALL = "ff:ff:ff:ff:ff:ff"
RARP, OTHER = "8035", "88b5"  # ethertypes; the other is for experiments
NANNOUNCED = 4
LIMIT_S = 60.0


def ifconfig(*words: str) -> None:
    programs.do(f"ifconfig {' '.join(words)}", IFCONFIG, *words)


class Card:
    """A guest's network card: the other end of a tap or vmnet interface on the bridge."""

    def __init__(self, tap: str) -> None:
        self.tap = tap
        self._fd = os.open(f"/dev/{tap}", os.O_RDWR | os.O_NONBLOCK)

    def send(self, to: str, source: str) -> None:
        """Send a frame."""
        text = to.replace(":", "") + source.replace(":", "") + OTHER
        os.write(self._fd, bytes.fromhex(text).ljust(60, b"\0"))

    def receive(self, wait_s: float = 0.5) -> list[tuple[str, str]]:
        """Return (source, ethertype) of the frames that have come, when no more come for a while.

        A frame crosses the bridge inside the write that sends it, so it is here already.
        """
        found = []
        while select.select([self._fd], [], [], wait_s)[0]:
            frame = os.read(self._fd, 2048)
            found.append((frame[6:12].hex(":"), frame[12:14].hex()))
        return found

    def close(self) -> None:
        """Close the tap.  Twice is no error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Bridge:
    """A bridge with three guests: moved, second, and a third, which stands for the source's host.

    process: what counts as the moved guest's bhyve.
    """

    def __init__(self, stack: ExitStack, kind: str = "tap") -> None:
        """kind: of the moved guest's interface.  What is made ends with the stack."""
        self.name = self._make(stack, "bridge")
        made = [self._make(stack, each) for each in (kind, "tap", "tap")]
        self.moved, self.second, self.third = self.cards = [Card(tap) for tap in made]
        for card in self.cards:
            stack.callback(card.close)
            ifconfig(card.tap, "up")
            ifconfig(self.name, "addm", card.tap)
        ifconfig(self.name, "up")
        self.child = subprocess.Popen(["/bin/sleep", "600"])
        stack.callback(self.end)
        self.process = identify(self.child.pid, "sleep")

    @staticmethod
    def _make(stack: ExitStack, kind: str) -> str:
        name = programs.ask(IFCONFIG, kind, "create").strip()
        assert name.startswith(kind)
        stack.callback(programs.ask, IFCONFIG, name, "destroy")
        return name

    def end(self) -> None:
        """End the process that counts as the moved guest's bhyve."""
        self.child.kill()
        self.child.wait()

    def where(self, mac: str = MOVED) -> str:
        """Return the member behind which the bridge has an address, "" if there is none."""
        rows = map(str.split, programs.ask(IFCONFIG, self.name, "addr").splitlines())
        return next((row[2] for row in rows if row[0] == mac), "")

    def is_at_third(self) -> None:
        """Let the bridge note the moved guest's address at the third, and forget all frames."""
        self.third.send(ALL, MOVED)
        assert self.where() == self.third.tap
        for card in self.cards:
            card.receive()


@pytest.fixture
def bridge(request: pytest.FixtureRequest) -> Iterator[Bridge]:
    """Make a bridge that has noted the second guest, and the moved guest at the third."""
    with ExitStack() as stack:
        made = Bridge(stack, getattr(request, "param", "tap"))
        made.second.send(ALL, SECOND)
        made.is_at_third()
        yield made


def announcers(process: Identity) -> list[str]:
    """Return the command lines of the processes that announce a guest again."""
    lines = programs.ask("/bin/ps", "-axww", "-o", "args=").splitlines()
    return [line for line in lines if "freebsd_announce" in line and str(process.pid) in line]


@pytest.mark.parametrize("bridge", ["tap", "vmnet"], indirect=True)
def test_frames_of_a_second_guest_reach_the_guest_after_the_announcement(
    host: Host, bridge: Bridge
) -> None:
    bridge.second.send(MOVED, SECOND)
    assert bridge.third.receive() == [(SECOND, OTHER)]
    assert bridge.moved.receive() == []
    host.announce({bridge.moved.tap: MOVED}, bridge.process)
    bridge.second.send(MOVED, SECOND)
    assert (SECOND, OTHER) in bridge.moved.receive()
    assert (SECOND, OTHER) not in bridge.third.receive()
    assert bridge.where() == bridge.moved.tap


def test_the_second_guest_sees_the_announcement_and_the_source_s_host_too(
    host: Host, bridge: Bridge
) -> None:
    """The third may be a switch: it learns from the source of the frame where the guest is."""
    host.announce({bridge.moved.tap: MOVED}, bridge.process)
    bridge.end()
    for card in (bridge.second, bridge.third):
        assert card.receive()[:2] == [(MOVED, RARP)] * 2
    assert bridge.moved.receive()[:1] == [(MOVED, RARP)]


def test_the_guest_is_announced_three_times_more(host: Host, bridge: Bridge) -> None:
    host.announce({bridge.moved.tap: MOVED}, bridge.process)
    seen = bridge.second.receive()
    bridge.third.send(ALL, MOVED)  # as if a frame of the time before the move had come late
    until(lambda: bridge.where() == bridge.moved.tap, "second announcement", LIMIT_S)
    until(lambda: not announcers(bridge.process), "end of the announcements", LIMIT_S)
    seen += bridge.second.receive()
    assert seen.count((MOVED, RARP)) == 2 * NANNOUNCED


def test_a_guest_that_has_ended_is_not_announced_any_more(host: Host, bridge: Bridge) -> None:
    host.announce({bridge.moved.tap: MOVED}, bridge.process)
    assert announcers(bridge.process)
    bridge.end()
    until(lambda: not announcers(bridge.process), "end of the announcements", LIMIT_S)
    assert bridge.second.receive().count((MOVED, RARP)) < 2 * NANNOUNCED


def test_a_static_address_stays(host: Host, bridge: Bridge) -> None:
    ifconfig(bridge.name, "static", bridge.third.tap, MOVED)
    host.announce({bridge.moved.tap: MOVED}, bridge.process)
    assert bridge.where() == bridge.third.tap


def test_an_interface_that_is_down_or_gone_is_an_error(host: Host, bridge: Bridge) -> None:
    ifconfig(bridge.moved.tap, "down")
    cards = {bridge.moved.tap: MOVED, "tap9999": SECOND}
    words = f"{bridge.moved.tap}: Network is down; tap9999: Device not configured"
    with pytest.raises(GuestError, match=words):
        host.announce(cards, bridge.process)


def test_a_moved_guest_is_found_though_it_sends_nothing(bridge: Bridge) -> None:
    """The guest of rom.py has no driver for its card."""
    for card in (bridge.moved, bridge.third):
        card.close()  # bhyve opens the tap
    taps = {"rom1": bridge.third.tap, "rom2": bridge.moved.tap}
    with (
        tempfile.TemporaryDirectory(prefix="n", dir="/tmp") as path,
        booted(Path(path), taps=taps, mac=MOVED) as guest,
    ):
        assert freebsd_announce.send({bridge.third.tap: MOVED}) == []
        assert bridge.where() == bridge.third.tap
        done = guest.run(*guest.send("-f", "-r", "2"), *guest.receive("rom2"))
        assert done.status == 0, done.said
        assert "not told" not in done.said
        assert bridge.where() == bridge.moved.tap
        guest.arrived("rom2")
        guest.prove()

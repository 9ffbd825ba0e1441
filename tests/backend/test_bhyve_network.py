"""What the network is told of a guest: which cards, on which ways to a running guest, and never
at the guest's cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.backend.bhyve import network
from bhystream.backend.bhyve.defaults import default_mac
from bhystream.backend.bhyve.keys import Slot
from cli.pipeline import report
from standin.rig import Spec

from .arriving import Arriving, arriving
from .bhyve_rig import require_sink, two_hosts
from .revived import open_loaded
from .test_bhyve_loaded import left_loaded

TWO_CARDS = (("0.4.0", "virtio-net"), ("0.5.0", "virtio-net"))
MACS = {f"tap{at}": default_mac(Slot(0, slot, 0), "g") for at, slot in enumerate((4, 5))}


@pytest.fixture
def guest() -> Iterator[Arriving]:
    with arriving(Spec(devices=TWO_CARDS)) as made:
        yield made


RESTARTS = "nothing starts it again"


def told(directory: Path) -> list[dict[str, str]]:
    """Return what the network of a stand-in's host was told, in order."""
    path = directory / "announced"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def card(slot: int, backend: str, **more: str) -> dict[str, str]:
    """Return the keys of a network card; its MAC address ends with the slot."""
    keys = {"device": "virtio-net", "mac": f"58:9c:fc:00:00:{slot:02x}", "backend": backend}
    return {f"pci.0.{slot}.0.{key}": value for key, value in (keys | more).items()}


def test_cards_with_a_tap_or_vmnet_interface_are_announced() -> None:
    keys = card(3, "tap7") | card(4, "vmnet0", device="e1000") | card(5, "ngd0") | card(6, "slirp")
    keys |= card(7, "netgraph") | card(8, "web1", type="tap") | card(9, "tap9", type="netgraph")
    keys |= {"pci.0.2.0.device": "virtio-blk", "pci.0.2.0.path": "/disk"}
    assert network.cards(keys) == {
        "tap7": "58:9c:fc:00:00:03",
        "vmnet0": "58:9c:fc:00:00:04",
        "web1": "58:9c:fc:00:00:08",
    }


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_a_started_guest_is_announced_when_it_runs(guest: Arriving, late: bool) -> None:
    sink = guest.sink()
    guest.build(sink, late=late)
    sink.start()
    assert told(guest.there.directory) == []  # nothing of it takes time of the pause
    sink.settle()
    assert told(guest.there.directory) == [MACS]
    assert [notice.partition(" when")[0] for notice in sink.notices[:1]] == [RESTARTS]


def test_an_announcement_that_fails_is_a_notice(guest: Arriving) -> None:
    sink = guest.sink()
    guest.build(sink)
    sink.start()
    (guest.there.directory / "net" / "tap1").unlink()
    sink.settle()
    first, second, *_ = sink.notices
    assert first == "the network was not told where it is: tap1: Device not configured"
    assert second.startswith(RESTARTS)
    guest.await_unbroken()


def test_a_guest_left_loaded_is_announced_when_it_is_resumed(guest: Arriving) -> None:
    record = left_loaded(guest)
    assert told(guest.there.directory) == []
    open_loaded(record).resume()
    assert told(guest.there.directory) == [MACS]


def test_a_guest_is_resumed_though_its_announcement_fails(guest: Arriving) -> None:
    record = left_loaded(guest)
    (guest.there.directory / "announced").mkdir()
    found = open_loaded(record)
    found.resume()
    assert found.runs()
    assert not Path(record["kept"]).exists()
    guest.await_unbroken()


def test_a_guest_without_a_card_is_not_announced() -> None:
    with arriving(Spec(devices=())) as guest:
        sink = guest.sink()
        guest.build(sink)
        sink.start()
        sink.settle()
        assert told(guest.there.directory) == []


def test_bhyrecv_announces_the_guest_of_a_move() -> None:
    require_sink()
    with two_hosts() as two:
        two.start(Spec(devices=TWO_CARDS))
        ended = two.move()
        assert ended.status == 0, report(ended)
        [cards] = told(two.there.directory)
        assert cards == {f"{tap}-g": mac for tap, mac in MACS.items()}
        assert told(two.here.directory) == []

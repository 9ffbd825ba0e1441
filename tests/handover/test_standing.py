"""The question that a new move asks: whether its guest stands here since an earlier stream."""

from __future__ import annotations

from pathlib import Path

import pytest

from bhystream.errors import GuestError, RecordError
from bhystream.guest import GO, HELD, PAUSED
from bhystream.handover.standing import refuse_held
from bhystream.handover.state import Lock
from bhystream.handover.where import in_doubt
from support.recorded import A, B, Host

PEER = ("hv2/0123456789abcdef", "/var/db/bhysend")


@pytest.fixture
def host(base: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(base, monkeypatch)


def test_a_held_guest_is_not_sent_again(host: Host) -> None:
    for phase in (PAUSED, HELD):
        record = host.record(phase)
        with pytest.raises(GuestError, match=f"{phase} here since an earlier stream") as caught:
            refuse_held(host.base, "qemu:/web1")
        # A guest that is paused before END cannot run anywhere else.
        assert (f"bhysend --discard {A}" in caught.value.hint) == (phase == HELD)
        assert f"bhysend --resume {A}" in caught.value.hint
        assert host.roles["source"].all() == [record]
    assert {what for what, _ in host.guest.asked} == {"close"}


def test_a_guest_in_doubt_is_not_sent_again_and_the_way_out_is_named(host: Host) -> None:
    record = host.record(GO, peer=PEER)
    with pytest.raises(GuestError, match="in-doubt here since an earlier stream") as caught:
        refuse_held(host.base, "qemu:/web1")
    assert caught.value.hint == in_doubt(record, host.base)
    assert host.roles["source"].all() == [record]


def test_another_guest_is_sent(host: Host) -> None:
    record = host.record(HELD)
    refuse_held(host.base, "qemu:/web2")
    assert host.roles["source"].all() == [record]
    assert host.opened == []


def test_a_guest_that_is_being_brought_back_is_not_taken_for_gone(host: Host) -> None:
    """Between the suspend and the resume only the holder of the lock can find the guest."""
    record = host.record(PAUSED)
    host.guest.alive = False
    lock = Lock(host.base, "lock-1", "guest web1")
    with pytest.raises(GuestError, match="another bhysend or bhyrecv works on it"):
        refuse_held(host.base, "qemu:/web1")
    lock.release()
    assert host.opened == []
    assert host.roles["source"].all() == [record]


def test_the_record_of_a_guest_that_is_gone_is_no_obstacle(host: Host) -> None:
    host.record(HELD)
    host.guest.alive = False
    refuse_held(host.base, "qemu:/web1")
    assert host.roles["source"].all() == []


@pytest.mark.parametrize("alive", [True, False])
def test_a_record_that_is_broken_may_be_the_guests(host: Host, alive: bool) -> None:
    """This holds also if the guest has another record, which can be read, and is gone."""
    host.record(HELD)
    host.guest.alive = alive
    (host.base / f"source/{B}.json").touch()
    for lock_name in (None, "lock-1", "lock-2"):
        with pytest.raises(GuestError) as caught:
            refuse_held(host.base, "qemu:/web1", lock_name)
        assert isinstance(caught.value, RecordError) or alive

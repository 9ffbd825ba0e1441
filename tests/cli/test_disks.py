"""The disks at the destination are compared with what the source's held at the pause."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from guest import make_disk

from . import kinds
from .kinds import SMALL
from .pipeline import BHYRECV, BHYSEND, Ended, report, run
from .qemu import QemuTraveller
from .standin import StandinTraveller, standin_place
from .travel import Host, Site

MIB = 1 << 20
DIFFERS = "it does not hold what the source's disk held when the guest was paused"


@pytest.fixture
def guest() -> Iterator[StandinTraveller]:
    guest = kinds.own("g5")
    disk_of(guest, guest.place).write_bytes(os.urandom(4 * MIB))
    yield guest
    guest.close()


def disk_of(guest: StandinTraveller, place: Site) -> Path:
    return standin_place(place).rig.directory / f"{guest.name}-0-3-0.img"


def with_another_disk(guest: StandinTraveller) -> Site:
    """Return a new place whose disk is not the guest's."""
    to = guest.next()
    disk_of(guest, to).write_bytes(os.urandom(4 * MIB))
    return to


def assert_refused(guest: StandinTraveller, host: Host, to: Site, refused: Ended) -> None:
    """Assert that the destination has refused the disk, and the guest runs on at the source."""
    assert refused.status == 69, report(refused)
    assert DIFFERS in refused.stderr, report(refused)
    to.assert_nothing_left()
    assert host.rows() == [] and host.rows(BHYRECV) == []
    guest.run_on(host, sweeps=1)


def moved(guest: StandinTraveller, host: Host, to: Site, *options: str) -> Ended:
    """Move the guest in the command form.  options: of bhyrecv."""
    return host.run(*guest.send("-r", "0"), *guest.receive(to, *options))


@pytest.mark.standin
def test_a_wrong_and_a_stale_disk_are_refused_and_a_copy_is_taken(
    guest: StandinTraveller, host: Host
) -> None:
    to = with_another_disk(guest)
    here, there = disk_of(guest, guest.place), disk_of(guest, to)
    assert_refused(guest, host, to, moved(guest, host, to))

    # A copy from before the last write of the guest's file system.
    shutil.copy(here, there)
    with here.open("r+b") as file:
        file.seek(65536)
        file.write(b"superblock")
    refused = moved(guest, host, to)
    assert_refused(guest, host, to, refused)
    assert f"disk0: {there}" in refused.stderr

    to = guest.next()
    shutil.copy(here, disk_of(guest, to))
    sent = moved(guest, host, to)
    assert sent.status == 0, report(sent)
    guest.hand_over(host, to)
    guest.prove(1)


@pytest.mark.standin
def test_with_f_another_disk_is_taken_and_said(guest: StandinTraveller, host: Host) -> None:
    to = with_another_disk(guest)
    sent = moved(guest, host, to, "-f")
    assert sent.status == 0, report(sent)
    assert DIFFERS in sent.stderr
    guest.hand_over(host, to)
    guest.prove(1)


@pytest.mark.standin
def test_the_plain_form_starts_nothing_on_another_disk(guest: StandinTraveller, host: Host) -> None:
    to = with_another_disk(guest)
    sent, received = run(guest.send("-r", "0"), guest.receive(to), env=host.env)
    assert (sent.status, received.status) == (80, 76), report(sent, received)
    assert DIFFERS in received.stderr
    assert host.rows(BHYRECV) == []
    host.act(BHYSEND, "--resume", guest.name)
    guest.run_on(host, sweeps=1)


@pytest.mark.standin
def test_the_disks_are_sampled_after_the_command_at_the_pause(
    guest: StandinTraveller, host: Host
) -> None:
    """What -p copies is what the destination has to have."""
    to = guest.next()
    here, there = disk_of(guest, guest.place), disk_of(guest, to)
    shutil.copy(here, there)
    change = f"printf journal | dd of={here} conv=notrunc status=none && cp {here} {there}"
    sent = host.run(*guest.send("-r", "0", "-p", change), *guest.receive(to))
    assert sent.status == 0, report(sent)
    guest.hand_over(host, to)
    guest.prove(1)


@pytest.mark.standin
def test_a_kept_stream_starts_only_on_the_disk_of_its_pause(
    guest: StandinTraveller, host: Host, tmp_path: Path
) -> None:
    to = guest.next()
    here, there = disk_of(guest, guest.place), disk_of(guest, to)
    path = tmp_path / "g.bhys"
    with path.open("wb") as file:
        copy = f"cp {here} {there}"
        [kept] = run(guest.send("-k", "-r", "0", "-p", copy), env=host.env, stdout=file)
    assert kept.status == 0, report(kept)
    data = there.read_bytes()
    there.write_bytes(data[:-512] + os.urandom(512))
    with path.open("rb") as file:
        [refused] = run(guest.receive(to), env=host.env, stdin=file)
    assert refused.status == 76 and DIFFERS in refused.stderr, report(refused)
    there.write_bytes(data)
    with path.open("rb") as file:
        [started] = run(guest.receive(to, "-u"), env=host.env, stdin=file)
    assert started.status == 0, report(started)
    host.act(BHYRECV, "--discard", guest.name)


@pytest.mark.guest
def test_a_disk_of_qemu_is_compared_too(host: Host, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img")
    guest = QemuTraveller(replace(SMALL, disk=disk))
    try:
        stale = tmp_path / "stale.img"
        shutil.copy(disk, stale)
        guest.prove(1)
        to = guest.next()
        words = [
            f"disk0={stale}" if word == f"disk0={disk}" else word for word in guest.receive(to)
        ]
        assert words != guest.receive(to)
        [refused] = run([*guest.send(), *words], env=host.env)
        assert refused.status == 69 and DIFFERS in refused.stderr, report(refused)
        guest.run_on(host, sweeps=1)
        guest.move(host, to=guest.next(), sweeps=1)
    finally:
        guest.close()

"""Machine types, vCPUs, disks and kinds of memory, and ten moves in a row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from guest import Guest, Spec, make_disk
from guest.machine import MACHINE_TYPES

from .pipeline import BHYRECV, BHYSEND, report, run
from .qemu import QemuTraveller
from .travel import Host

pytestmark = pytest.mark.guest

PROOF = {"mib": 48, "work": 24, "holes": 4, "rate": 24, "sweep": 150}
Q35 = Spec("q35", memory_mib=192, proof=PROOF)


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("machine", list(MACHINE_TYPES))
def test_each_machine_moves_with_its_disk(
    machine: Literal["q35", "pc", "microvm"], vcpus: int, host: Host, tmp_path: Path
) -> None:
    disk = make_disk(tmp_path / "disk.img")
    spec = replace(Q35, machine=machine, vcpus=vcpus, disk=disk)
    guest = QemuTraveller(spec)
    try:
        guest.move(host, to=guest.next(), sweeps=1)
        carried = guest.past.last.disk or 0
        assert (guest.log().last.disk or 0) > carried > 0
        # Move it back: a guest that bhyrecv has started can be sent again.
        guest.move(host)
    finally:
        guest.close()


def test_two_copies_never_write_to_one_disk(host: Host, tmp_path: Path) -> None:
    """QEMU's lock on the image stops the operator's mistakes; the right commands work."""
    guest = QemuTraveller(replace(Q35, disk=make_disk(tmp_path / "disk.img")))
    try:
        to = guest.next()
        ended = run(guest.send(), guest.receive(to, "-u"), env=host.env)
        assert [one.status for one in ended] == [80, 0], report(*ended)
        to.arrive()
        # The guest is taken back: the paused copy must not keep the disk locked.
        host.act(BHYSEND, "--resume", "proof")
        guest.prove(1)
        taken = host.run(*BHYRECV, "--resume", "proof")
        assert taken.status == 69, report(taken)
        assert [row.phase for row in host.rows(BHYRECV)] == ["loaded"]
        host.act(BHYRECV, "--discard", "proof")
        guest.prove(1)
        to = guest.next()
        ended = run(guest.send(), guest.receive(to), env=host.env)
        assert [one.status for one in ended] == [80, 0], report(*ended)
        # The guest is resumed here although it runs there.
        taken = host.run(*BHYSEND, "--resume", "proof")
        assert taken.status == 69, report(taken)
        guest.settle(host, to)
        guest.prove(1)
    finally:
        guest.close()


def test_memory_in_a_memfd_moves_into_a_file(host: Host) -> None:
    guest = QemuTraveller(replace(Q35, ram="memfd", vcpus=2))
    try:
        guest.move(host)
    finally:
        guest.close()


@pytest.mark.parametrize("ram", ["file", "memfd"])
def test_a_qemu_that_waits_is_filled(ram: Literal["file", "memfd"], host: Host) -> None:
    spec = replace(Q35, ram=ram)
    guest = QemuTraveller(spec)
    try:
        with Guest(spec, incoming=True) as waiting:
            to = guest.waiting(waiting)
            ended = run(guest.send(), [*BHYRECV, to.operand], env=host.env)
            assert [one.status for one in ended] == [80, 0], report(*ended)
            guest.settle(host, to)
            guest.prove()
            assert to.pid == waiting.pid
    finally:
        guest.close()


def test_ten_moves_in_a_row(host: Host) -> None:
    guest = QemuTraveller(replace(Q35, vcpus=2))
    try:
        for leg in range(10):
            to = guest.next("there" if leg % 2 == 0 else "here")
            ended = run(guest.send(), guest.receive(to), env=host.env)
            assert [one.status for one in ended] == [80, 0], f"{leg}: {report(*ended)}"
            guest.settle(host, to)
            to.serial.await_heartbeats(1)
        guest.prove()
        assert len(host.files("destination")) == 10
    finally:
        guest.close()

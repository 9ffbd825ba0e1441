"""What to start QEMU with instead: each thing that cannot travel is named once, with its cure."""

from __future__ import annotations

import pytest

from bhystream.backend.qemu import allow, cures
from bhystream.backend.qemu.config import OTHER_IMAGE, reduce_argv
from bhystream.backend.qemu.facts import CURE, Facts
from bhystream.backend.qemu.graph import Drive, Medium
from bhystream.backend.qemu.source import QemuSource
from bhystream.errors import GuestError, IncompatibleError, Reason

from .qemu_rig import Rig, monitor
from .test_qemu_config import BASE, FACTS


def refused(*argv: str, facts: Facts = FACTS) -> tuple[Reason, ...]:
    """Return the reasons against a command line."""
    with pytest.raises(IncompatibleError) as caught:
        reduce_argv(list(argv), facts)
    return caught.value.reasons()


@pytest.mark.parametrize(
    ("extra", "cure"),
    [
        ("-device nvme,serial=x", "start QEMU with -device virtio-blk-pci, in place of"
         " -device nvme"),
        ("-device vmxnet3", "start QEMU with -device virtio-net-pci, or e1000, in place of"
         " -device vmxnet3"),
        ("-device qxl", "start QEMU with -device VGA, or bochs-display, in place of -device qxl"),
        ("-device vfio-pci,host=1:0.0", "start QEMU without -device vfio-pci"),
        ("-device virtio-net-pci,mq=on", "start QEMU without mq in -device virtio-net-pci"),
        ("-device virtio-rng-pci,romfile=/x", "start QEMU without romfile in"
         " -device virtio-rng-pci"),
        ("-drive file=/x,if=scsi", "start QEMU with -drive if=ide or if=none or if=pflash or"
         " if=virtio"),
        ("-drive file=/x,if=virtio,snapshot=on", "start QEMU without snapshot in -drive"),
        ("-drive if=virtio,file.driver=nbd", "start QEMU with -drive file=nbd:..., in place of the"
         " driver nbd"),
        ("-drive file=/x,if=virtio,format=vmdk", cures.FORMATS),
        ("-blockdev driver=rbd,node-name=r", "start QEMU with -drive file=rbd:..., in place of the"
         " driver rbd"),
        ("-blockdev driver=vmdk,node-name=r", cures.FORMATS),
        ("-netdev tap,id=n,queues=4", "start QEMU without queues in -netdev"),
        ("-netdev vhost-user,id=n", "start QEMU with -netdev bridge or dgram or hubport or socket"
         " or stream or tap or user or vde"),
        ("-object secret,id=s", "start QEMU without -object secret"),
        ("-object memory-backend-ram,id=r2,size=1M", CURE),
        ("-vga qxl", "start QEMU with -vga cirrus or none or std"),
        ("-usbdevice tablet", "start QEMU with -usb and -device usb-tablet, in place of"
         " -usbdevice"),
        ("-net nic", "start QEMU with -netdev and -device, in place of -net"),
        ("-fsdev local,id=f", "start QEMU without -fsdev"),
        ("-machine firmware=/x", "start QEMU without firmware in -machine"),
        ("-machine accel=hvf", "start QEMU with -accel kvm or tcg"),
        ("-m 512M,slots=2,maxmem=1G", "start QEMU without maxmem and slots in -m"),
        ("-m 256M", f"start QEMU with -m {512 << 20}B"),
        ("-boot splash=x", "start QEMU without splash in -boot"),
        ("-global migration.x-ignore-shared=on", "start QEMU without"
         " -global migration.x-ignore-shared"),
        ("disk.img", "start QEMU with -drive file="),
    ],
)  # fmt: skip
def test_each_reason_names_the_option(extra: str, cure: str) -> None:
    facts = Facts(machine="pc-q35-7.2", accel="" if "hvf" in extra else "tcg")
    [reason] = refused(*BASE, *extra.split(), facts=facts)
    assert reason.cure == cure
    assert reason.what


def test_what_is_named_instead_can_travel() -> None:
    named = " ".join(cures._DEVICES.values()).replace(", or", "").split()
    assert set(named) <= allow.DRIVERS
    assert not set(cures._DEVICES) & allow.DRIVERS


def test_all_is_named_at_once_and_nothing_comes_from_another_reason() -> None:
    """An unknown option takes its argument along; a device without its drive says nothing new."""
    argv = [word for word in BASE if word != "-nodefaults"]
    extra = (
        "-fsdev local,id=f -drive file=/x,if=none,id=d0,format=raw,snapshot=on,throttle=1"
        " -device virtio-blk-pci,drive=d0,mq=on,ats=/ -icount 1 -device nvme,drive=d1 -S"
    )
    assert [one.what for one in refused(*argv, *extra.split())] == [
        "option -fsdev cannot travel: bhysend does not know it",
        "drive property snapshot cannot travel: bhysend does not know it",
        "drive property throttle cannot travel: bhysend does not know it",
        "device virtio-blk-pci: property mq cannot travel: bhysend does not know it",
        "device virtio-blk-pci: property ats cannot travel: '/'",
        "option -icount cannot travel: bhysend does not know it",
        "device nvme cannot travel: bhysend does not know it",
        "QEMU was started without -nodefaults: devices that it adds by itself are not described",
    ]


def test_the_arguments_of_known_options_are_never_skipped() -> None:
    found = refused(*BASE, "-fsdev", "local", "disk.img", "-enable-kvm", "disk2.img")
    assert [one.what.partition(":")[0] for one in found] == [
        "option -fsdev cannot travel",
        "argument disk.img",
        "argument disk2.img",
    ]


def test_every_disk_with_another_image_is_named() -> None:
    drives = tuple(
        Drive(f"virtio{at}", "", False, Medium("", "raw", 512, False, f"/new{at}"))
        for at in range(2)
    )
    facts = Facts(machine="pc-q35-7.2", accel="tcg", drives=drives, directory="/")
    words = [f"-drive if=virtio,format=raw,file=/old{at}" for at in range(2)]
    found = refused(*BASE, *" ".join(words).split(), facts=facts)
    assert [one.what for one in found] == [
        f"disk virtio{at}: QEMU writes to /new{at}, but its command line names /old{at}"
        for at in range(2)
    ]
    assert {one.cure for one in found} == {OTHER_IMAGE}


@pytest.mark.guest
def test_a_guest_is_examined_whatever_speaks_against_it(rig: Rig) -> None:
    words = ("-device", "virtio-keyboard-pci", "-smbios", "type=11,value=x")
    path = rig.start("here", *words)
    with monitor(path) as ask:
        ask("stop")
    with pytest.raises(GuestError) as caught:
        QemuSource(path)
    assert caught.value.status == 69  # of the first reason
    assert [str(caught.value), *caught.value.hint.splitlines()] == [
        "guest here: cannot send it: it is 'paused', not running; let it run first (QMP: cont)",
        "guest here: device virtio-keyboard-pci cannot travel: bhysend does not know it; start"
        " QEMU with -device usb-kbd, in place of -device virtio-keyboard-pci",
        "guest here: option -smbios: type=11 cannot travel: bhysend does not know it; start QEMU"
        " without -smbios type=11",
    ]


@pytest.mark.guest
def test_every_device_that_came_or_went_is_named(rig: Rig) -> None:
    path = rig.start("here", "-device", "qemu-xhci,id=x", "-device", "usb-kbd,id=k")
    with monitor(path) as ask:
        for each in ("late", "later"):
            assert ask("device_add", driver="usb-tablet", id=each) == {}
        assert ask("device_del", id="k") == {}
    with pytest.raises(IncompatibleError) as caught:
        QemuSource(path)
    assert [one.what for one in caught.value.reasons()] == [
        "device late was plugged in after the start",
        "device later was plugged in after the start",
        "device k was unplugged after the start",
    ]

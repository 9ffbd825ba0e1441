"""Trays and devices that are not as QEMU's command line tells them."""

from __future__ import annotations

from typing import Any

import pytest

from bhystream.backend.qemu import open_paused
from bhystream.backend.qemu.sink import QemuSink
from bhystream.backend.qemu.source import QemuSource
from bhystream.errors import IncompatibleError
from support.waiting import until

from .qemu_rig import (
    DEADLINE_S,
    MIB,
    Ask,
    Rig,
    cdrom,
    copy_memory,
    disk,
    export,
    image,
    monitor,
    state_of,
)

pytestmark = pytest.mark.guest

# ---- trays


def cd_of(source: QemuSource) -> dict[str, Any]:
    [found] = source.head().config["disks"]
    return dict(found)


def test_an_ejected_cd_is_not_put_back(rig: Rig) -> None:
    path = rig.start("here", *cdrom(image(rig, "cd")))
    with monitor(path) as ask:
        ask("eject", id="ide0", force=True)
    source = QemuSource(path)
    assert (cd_of(source)["empty"], source.resources()) == (True, [])
    given = rig.sink("there", disk0=rig.path("cd"))
    assert given.check(source.head()) == [
        "disk0: the drive is empty at the source; remove -o disk0="
    ]
    sink = rig.sink("there")
    assert sink.check(source.head()) == []
    [destination] = sink.open(b"")
    paused = source.pause()
    copy_memory(source, destination)
    sink.load(paused.states())
    sink.start()
    sink.settle()
    with monitor(str(rig.state_dir / "there.qmp")) as ask:
        [tray] = ask("query-block")
    assert tray["tray_open"] and "inserted" not in tray
    open_paused(sink.record()).close()
    source.close()


@pytest.mark.parametrize("first", ["cd", ""])
def test_a_cd_that_was_put_in_is_told(rig: Rig, first: str) -> None:
    path = rig.start("here", *cdrom(image(rig, first) if first else ""))
    other = image(rig, "other", size=2 * MIB)
    with monitor(path) as ask:
        assert ask("blockdev-change-medium", id="ide0", filename=other, format="raw") == {}
    source = QemuSource(path)
    found = cd_of(source)
    assert (found["empty"], found["size_bytes"]) == (False, 2 * MIB)
    assert source.resources() == ["disk0="]
    [reason] = rig.sink("there", disk0=image(rig, "cd")).check(source.head())
    assert reason.startswith("disk0: ") and str(2 * MIB) in reason
    assert rig.sink("there", disk0=other).check(source.head()) == []
    source.close()


@pytest.mark.parametrize("ident", ["id=ide0", "bus=ide.0"])
def test_a_tray_of_blockdev_is_told_too(rig: Rig, ident: str) -> None:
    file = f"driver=file,filename={image(rig, 'cd')},node-name=f0,read-only=on"
    above = "driver=raw,node-name=n0,file=f0,read-only=on"
    device = f"ide-cd,drive=n0,{ident}"
    path = rig.start("here", "-blockdev", file, "-blockdev", above, "-device", device)
    QemuSource(path).close()
    with monitor(path) as ask:
        [drive] = ask("query-block")
        ask("eject", id=drive["qdev"], force=True)
    source = QemuSource(path)
    assert cd_of(source)["empty"]
    source.close()


# ---- devices

USB = ("-device", "qemu-xhci,id=x0")
TABLET = (*USB, "-device", "usb-tablet,id=t0,serial=one")


def exchange(ask: Ask, device: str, **new: str) -> None:
    """Unplug a USB device, which QEMU does at once, and plug in another."""
    assert ask("device_del", id=device) == {}
    if new:
        until(lambda: "error" not in ask("device_add", **new), "the device", DEADLINE_S)


@pytest.mark.parametrize(
    ("extra", "device", "new", "named"),
    [
        (TABLET, "t0", {}, "device t0 was unplugged"),
        (TABLET, "t0", {"driver": "usb-kbd", "id": "t1"}, "device t1 was plugged in"),
        (TABLET, "t0", {"driver": "usb-kbd", "id": "t0"},
         "device t0 is a usb-kbd now, not the usb-tablet of the start"),
        (TABLET, "t0", {"driver": "usb-tablet", "id": "t0", "serial": "two"},
         "device t0 is another one than at the start: serial was one, is two"),
        ((*USB, "-device", "usb-tablet"), "/machine/peripheral-anon/device[0]", {},
         "a usb-tablet without an id was unplugged"),
        ((*USB, "-device", "usb-tablet"), "/machine/peripheral-anon/device[0]",
         {"driver": "usb-kbd"}, "a usb-kbd without an id was plugged in"),
    ],
)  # fmt: skip
def test_a_device_that_was_exchanged_is_refused_by_name(
    rig: Rig, extra: tuple[str, ...], device: str, new: dict[str, str], named: str
) -> None:
    path = rig.start("here", *extra)
    QemuSource(path).close()
    with monitor(path) as ask:
        exchange(ask, device, **new)
    with pytest.raises(IncompatibleError, match=named) as caught:
        QemuSource(path)
    assert all("restart QEMU" in one.cure for one in caught.value.reasons())


def test_a_stick_with_another_disk_is_refused_by_name(rig: Rig) -> None:
    stick = ("-drive", f"if=none,id=d0,file={image(rig, 'base')},format=raw")
    path = rig.start("here", *USB, *stick, "-device", "usb-storage,id=s0,drive=d0")
    QemuSource(path).close()
    with monitor(path) as ask:
        file = {"driver": "file", "filename": image(rig, "other")}
        assert ask("blockdev-add", **{"driver": "raw", "node-name": "n9", "file": file}) == {}
        exchange(ask, "s0", driver="usb-storage", id="s0", drive="n9")
    with pytest.raises(IncompatibleError, match="disk d0 is not there any more"):
        QemuSource(path)


def test_what_argv_writes_otherwise_is_the_same_device(rig: Rig) -> None:
    net = "virtio-net-pci,netdev=n0,id=net0,mac=52-54-00-AA-bb-01,addr=5.0,bus=pcie.0"
    path = rig.start(
        "here", "-netdev", "user,id=n0", "-device", net, "-device", "virtio-blk,drive=d0,addr=0x6",
        "-drive", f"if=none,id=d0,file={image(rig, 'base')},format=raw", "-device", "ahci",
        "-device", "virtio-rng,id=r0,addr=0x7.0x1", "-device", "pcie-root-port,id=rp0,chassis=1",
        "-object", "rng-builtin,id=b0", "-device", "virtio-rng-pci,id=r1,bus=rp0,rng=b0",
    )  # fmt: skip
    QemuSource(path).close()


def test_a_waiting_qemu_with_another_disk_is_refused(rig: Rig) -> None:
    source = QemuSource(rig.start("here", *disk(image(rig, "base", "qcow2"), "qcow2")))
    larger = image(rig, "larger", "qcow2", 16 * MIB)
    waiting = rig.start("wait", "-S", "-incoming", "defer", *disk(larger, "qcow2"))
    sink = QemuSink(waiting, {}, None, False, str(rig.state_dir))
    assert sink.check(source.head()) == [
        f"disk0.size_bytes: the stream says {8 * MIB}, here {16 * MIB}"
    ]
    sink.abort()
    assert state_of(waiting) == "inmigrate"
    source.close()


def test_a_waiting_qemu_whose_disk_is_exported_is_refused(rig: Rig) -> None:
    source = QemuSource(rig.start("here", *disk(image(rig, "base"))))
    waiting = rig.start("wait", "-S", "-incoming", "defer", *disk(image(rig, "copy")))
    with monitor(waiting) as ask:
        export(ask, rig)
    sink = QemuSink(waiting, {}, None, False, str(rig.state_dir))
    [reason] = sink.check(source.head())
    assert "the nbd export 'backup'" in reason
    sink.abort()
    source.close()

"""A configuration from a stream is hostile: one test case for each rule broken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from bhystream.backend.qemu.validate import validate
from bhystream.errors import IncompatibleError
from support.limits import of_page

GOOD: dict[str, Any] = {
    "hypervisor": "qemu", "name": "web1", "arch": "x86_64",
    "machine": {"type": "pc-q35-7.2", "props": {"smm": "off"}},
    "accel": {"type": "tcg", "props": {}},
    "cpu": {"model": "qemu64", "features": ["+ssse3"]},
    "smp": {"cpus": 2}, "memory": {"id": "ram0", "size_bytes": 1 << 26},
    "objects": [{"type": "rng", "id": "rng0"}],
    "devices": [{"driver": "virtio-blk-pci", "props": {"drive": "d0", "id": "vd0"}}],
    "disks": [{"key": "disk0", "id": "d0", "if": "none", "empty": False,
               "props": {"format": "raw"}, "size_bytes": 1024}],
    "nets": [{"key": "net0", "id": "n0", "kind": "netdev", "backend": "tap", "props": {}}],
    "serials": [{"key": "serial0", "id": "", "option": True}],
    "vga": "none", "rtc": {}, "uuid": "", "boot": {}, "smbios": [],
    "globals": {"ICH9-LPC.disable_s3": "1"}, "kernel": False, "initrd": False, "bios": False,
    "append": "", "flags": ["no-reboot"], "action": {}, "watchdog_action": "",
}  # fmt: skip

Change = Callable[[dict[str, Any]], Any]


def test_the_good_one_is_good() -> None:
    assert validate(GOOD) == GOOD


def test_the_result_shares_nothing_with_the_stream() -> None:
    given = copy.deepcopy(GOOD)
    result = validate(given)
    given["devices"][0]["props"]["drive"] = "x,file=/etc/shadow"
    assert result["devices"][0]["props"]["drive"] == "d0"


HOSTILE: list[tuple[str, Change]] = [
    ("unknown key 'exec'", lambda c: c.update(exec="/bin/sh")),
    ("'cpu' is missing", lambda c: c.pop("cpu")),
    ("config.name", lambda c: c.update(name="a,process=x")),
    ("config.name", lambda c: c.update(name="../x")),
    ("config.name", lambda c: c.update(name="web1\n")),
    ("config.arch", lambda c: c.update(arch="../../bin/sh")),
    ("config.machine.type", lambda c: c["machine"].update(type="pc-q35-7.2,firmware=x")),
    ("config.machine.type", lambda c: c["machine"].update(type="none")),
    ("config.machine.props: unknown key", lambda c: c["machine"]["props"].update(firmware="x")),
    ("config.machine.props.smm", lambda c: c["machine"]["props"].update(smm="off,dumpdtb=x")),
    ("config.accel.type", lambda c: c["accel"].update(type="qtest")),
    ("config.cpu.model", lambda c: c["cpu"].update(model="max,x=y")),
    ("config.cpu.model", lambda c: c["cpu"].update(model="help")),
    (r"config.cpu.features\[0\]", lambda c: c["cpu"].update(features=["a=b,c=d"])),
    ("config.smp.cpus", lambda c: c["smp"].update(cpus=0)),
    ("config.smp.cpus", lambda c: c["smp"].update(cpus=True)),
    ("config.smp.cpus", lambda c: c["smp"].update(cpus=1 << 70)),
    ("config.smp: 'cpus' is missing", lambda c: c.update(smp={})),
    ("config.memory.size_bytes", lambda c: c["memory"].update(size_bytes=1 << 60)),
    ("config.memory.size_bytes", lambda c: c["memory"].update(size_bytes=4097)),
    ("config.memory.size_bytes", lambda c: c["memory"].update(size_bytes=-4096)),
    ("config.memory.size_bytes", lambda c: c["memory"].update(size_bytes=8192.0)),
    ("config.memory.id", lambda c: c["memory"].update(id="r,mem-path=/x")),
    (r"config.objects\[0\].type", lambda c: c["objects"][0].update(type="secret")),
    (r"config.objects\[0\].id", lambda c: c["objects"][0].update(id="r,filename=/x")),
    (r"config.objects\[0\]: unknown key", lambda c: c["objects"][0].update(filename="/x")),
    (r"config.devices\[0\].driver", lambda c: c["devices"][0].update(driver="vfio-pci")),
    (r"config.devices\[0\].driver", lambda c: c["devices"][0].update(driver="loader")),
    ("unknown key 'file'", lambda c: c["devices"][0]["props"].update(file="x")),
    ("romfile", lambda c: c["devices"][0]["props"].update(romfile="x.rom")),
    ("props.addr", lambda c: c["devices"][0]["props"].update(addr="5,romfile=/x")),
    ("props.addr", lambda c: c["devices"][0]["props"].update(addr="/etc/passwd")),
    ("props.addr", lambda c: c["devices"][0]["props"].update(addr=5)),
    ("drive=d1 is not described", lambda c: c["devices"][0]["props"].update(drive="d1")),
    ("netdev=d0 is not described", lambda c: c["devices"][0]["props"].update(netdev="d0")),
    ("props.id", lambda c: c["devices"][0]["props"].update(id="bhyrecv-x")),
    (r"disks\[0\]: unknown key 'file'", lambda c: c["disks"][0].update(file="/etc/shadow")),
    ("unknown key 'file'", lambda c: c["disks"][0]["props"].update(file="/etc/shadow")),
    ("props.format", lambda c: c["disks"][0]["props"].update(format="vvfat")),
    ("props.cache", lambda c: c["disks"][0]["props"].update(cache="none,file=/x")),
    (r"disks\[0\].key", lambda c: c["disks"][0].update(key="disk1")),
    (r"disks\[0\].key", lambda c: c["disks"][0].update(key="kernel")),
    (r"disks\[0\].if", lambda c: c["disks"][0].update({"if": "floppy"})),
    (r"disks\[0\].id", lambda c: c["disks"][0].update(id="d,file=/x")),
    ("used twice", lambda c: c["disks"].append(c["disks"][0] | {"key": "disk1"})),
    (r"nets\[0\].backend", lambda c: c["nets"][0].update(backend="vhost-user")),
    (r"nets\[0\]: unknown key 'script'", lambda c: c["nets"][0].update(script="/bin/sh")),
    ("unknown key 'script'", lambda c: c["nets"][0]["props"].update(script="/bin/sh")),
    ("props.model", lambda c: c["nets"][0]["props"].update(model="x")),
    (r"serials\[0\].option", lambda c: c["serials"][0].update(option="yes")),
    (r"serials\[0\]: unknown key 'path'", lambda c: c["serials"][0].update(path="/x")),
    ("config.vga", lambda c: c.update(vga="qxl")),
    ("config.boot: unknown key", lambda c: c["boot"].update(splash="x")),
    ("config.rtc.base", lambda c: c["rtc"].update(base="a,b")),
    ("config.uuid", lambda c: c.update(uuid="x")),
    ("unknown key 'file'", lambda c: c["smbios"].append({"type": 1, "props": {"file": "x"}})),
    (r"smbios\[0\].type", lambda c: c["smbios"].append({"type": 11.5, "props": {}})),
    ("serial", lambda c: c["smbios"].append({"type": 1, "props": {"serial": "a,file=/x"}})),
    ("config.globals: unknown key", lambda c: c["globals"].update({"loader.file": "x"})),
    ("config.globals: unknown key", lambda c: c["globals"].update({"e1000.romfile": "x"})),
    ("config.globals: unknown key", lambda c: c["globals"].update({"migration.x": "on"})),
    ("disable_s3", lambda c: c["globals"].update({"ICH9-LPC.disable_s3": "1,x=/y"})),
    ("config.kernel", lambda c: c.update(kernel="/boot/vmlinuz")),
    ("config.append", lambda c: c.update(append="a\0b")),
    ("config.append", lambda c: c.update(append="x" * 5000)),
    (r"config.flags\[0\]", lambda c: c.update(flags=["daemonize"])),
    ("config.action: unknown key", lambda c: c["action"].update(exec="x")),
    ("config.watchdog_action", lambda c: c.update(watchdog_action="a b")),
    ("config.devices: not a list", lambda c: c.update(devices=c["devices"] * 300)),
    ("config.devices: not a list", lambda c: c.update(devices={"0": 1})),
    ("config.machine: not an object", lambda c: c.update(machine=[])),
]


@pytest.mark.parametrize(("named", "change"), HOSTILE)
def test_a_hostile_configuration_is_refused_by_name(named: str, change: Change) -> None:
    config = copy.deepcopy(GOOD)
    change(config)
    with pytest.raises(IncompatibleError, match=named):
        validate(config)


@pytest.mark.parametrize("config", [None, [], "x", 7, {1: 2}, {}])
def test_what_is_no_configuration_is_refused(config: object) -> None:
    with pytest.raises(IncompatibleError):
        validate(config)


def test_a_message_shows_hostile_text_short_and_in_ascii() -> None:
    with pytest.raises(IncompatibleError) as caught:
        validate({**GOOD, "\x1b[2J" + "\u202e" * 500: 1})
    text = str(caught.value)
    assert text.isascii() and text.isprintable() and len(text) < 200


LIMITS: dict[str, Callable[[dict[str, Any], int], None]] = {
    "entries in a list or an object of CONFIG": lambda config, count: config.update(
        objects=[{"type": "rng", "id": f"rng{at}"} for at in range(count)]
    ),
    "features of the processor": lambda config, count: config["cpu"].update(
        features=["+ssse3"] * count
    ),
    "bytes of memory in CONFIG": lambda config, count: config["memory"].update(size_bytes=count),
}


@pytest.mark.parametrize("what", LIMITS)
def test_so_much_is_taken_and_no_more(what: str) -> None:
    """The numbers are those of bhystream(5), LIMITS."""
    config, most = copy.deepcopy(GOOD), of_page()[what]
    LIMITS[what](config, most)
    assert validate(config) == config
    LIMITS[what](config, most + 1)
    with pytest.raises(IncompatibleError):
        validate(config)

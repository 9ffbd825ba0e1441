"""A bhyve configuration from a stream is hostile: one test case for each rule that it breaks."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from backend.bhyve_samples import ARGV
from bhystream.backend.bhyve import keys
from bhystream.backend.bhyve.argv import parse_argv
from bhystream.backend.bhyve.compare import differences
from bhystream.backend.bhyve.config import split
from bhystream.backend.bhyve.validate import validate
from bhystream.errors import IncompatibleError

GOOD: dict[str, Any] = {
    "name": "web1",
    "keys": {
        "cpus": "2", "sockets": "1", "cores": "2", "threads": "1",
        "memory.size": str(4 << 30), "uuid": "4ca2e2b7-6f0b-11ef-8a6a-0cc47a8c1a2e",
        "acpi_tables": "true",
        "pci.0.0.0.device": "hostbridge", "pci.0.31.0.device": "lpc",
        "pci.0.3.0.device": "virtio-blk", "pci.0.3.0.ser": "BHYVE-0001",
        "pci.0.4.0.device": "ahci", "pci.0.4.0.port.0.type": "cd", "pci.0.4.0.port.0.ser": "CD",
        "pci.0.5.0.device": "virtio-net", "pci.0.5.0.mac": "58:9c:fc:00:00:01",
        "pci.0.6.0.device": "fbuf", "pci.0.6.0.w": "1024",
        "pci.0.7.0.device": "xhci", "pci.0.7.0.slot.1.device": "tablet",
    },
    "resources": {
        "disk0": "pci.0.3.0.path", "disk1": "pci.0.4.0.port.0.path",
        "net0": "pci.0.5.0.backend", "com1": "lpc.com1.path", "bootrom": "lpc.bootrom",
        "vnc": "pci.0.6.0.rfb",
    },
    "disks": {
        "disk0": {"mediasize": 1 << 40, "sectorsize": 512, "candelete": True, "writable": True},
        "disk1": {"mediasize": 0, "sectorsize": 2048, "candelete": False, "writable": False},
    },
    "nets": {"net0": {"mtu": 1500}},
}  # fmt: skip
DISK = GOOD["disks"]["disk0"]

Change = Callable[[dict[str, Any]], Any]


def without(key: str) -> Change:
    return lambda section: section["keys"].pop(key)


def test_the_good_one_is_good() -> None:
    assert validate(GOOD) == GOOD


def test_a_section_of_before_has_nothing_behind_its_disks() -> None:
    old = {field: GOOD[field] for field in ("name", "keys", "resources")}
    assert validate(old) == old
    with pytest.raises(IncompatibleError, match="unknown field 'disc'"):
        validate({**old, "disc": {}})


def test_the_result_shares_nothing_with_the_stream() -> None:
    given = copy.deepcopy(GOOD)
    result = validate(given)
    given["keys"]["pci.0.3.0.ser"] = "x\nmonitor=true"
    given["resources"]["disk0"] = "bogus"
    given["disks"]["disk0"]["writable"] = False
    assert result == GOOD


def set_key(key: str, value: object) -> Change:
    return lambda section: section["keys"].__setitem__(key, value)


def set_disk(facts: object) -> Change:
    return lambda section: section["disks"].__setitem__("disk0", facts)


def set_word(word: str, key: object) -> Change:
    return lambda section: section["resources"].__setitem__(word, key)


HOSTILE: list[tuple[str, Change]] = [
    ("the section has more than 5", lambda s: s.update(exec="/bin/sh")),
    ("'keys' is missing", lambda s: s.pop("keys")),
    ("unknown field 'key'", lambda s: s.update(key=s.pop("keys"))),
    ("name: '../x'", lambda s: s.update(name="../x")),
    ("name: '..'", lambda s: s.update(name="..")),
    ("name: '-r'", lambda s: s.update(name="-r")),
    (r"name: 'web1\\n'", lambda s: s.update(name="web1\n")),
    ("name: 7", lambda s: s.update(name=7)),
    ("keys is not an object", lambda s: s.update(keys=["a"])),
    ("resources is not an object", lambda s: s.update(resources=None)),
    ("keys has more than 1024", lambda s: s["keys"].update({f"k{n}": "1" for n in range(1100)})),
    ("resources has more", lambda s: s["resources"].update({f"d{n}": "x" for n in range(600)})),
    (r"keys: 'a\\nb' is no key", set_key("a\nb", "1")),
    ("keys: '' is no key", set_key("", "1")),
    ("keys: '#' is no key", set_key("#", "1")),
    ("is no key", set_key("k" * 65, "1")),
    ("keys: 7 is no key", lambda s: s["keys"].update({7: "1"})),
    ("cpus: 2 is not allowed", set_key("cpus", 2)),
    ("uuid: None is not allowed", set_key("uuid", None)),
    (r"uuid: 'a\\nmonitor=true'", set_key("uuid", "a\nmonitor=true")),
    (r"pci.0.3.0.ser: 'x\\x00'", set_key("pci.0.3.0.ser", "x\0")),
    ("pci.0.3.0.ser: .*is not allowed", set_key("pci.0.3.0.ser", "x" * 2000)),
    ("pci.0.3.0.ser: '%.uuid.'", set_key("pci.0.3.0.ser", "%(uuid)")),
    ("pci.0.3.0.ser: '/etc/shadow'", set_key("pci.0.3.0.ser", "/etc/shadow")),
    ("key pci.0.9.0.foo is not known", set_key("pci.0.9.0.foo", "1")),
    ("key pci.0.3.0.foo is not known", set_key("pci.0.3.0.foo", "1")),
    ("key pci.256.0.0.device is not known", set_key("pci.256.0.0.device", "lpc")),
    ("key pci.0.32.0.device is not known", set_key("pci.0.32.0.device", "virtio-rnd")),
    ("key config.dump is not known", set_key("config.dump", "true")),
    ("key monitor is not known", set_key("monitor", "true")),
    ("key name is not known", set_key("name", "web2")),
    ("key tpm.path is not known", set_key("tpm.path", "/dev/tpm0")),
    ("key pci.0.7.0.slot.9.device is not known", set_key("pci.0.7.0.slot.9.device", "tablet")),
    ("pci.0.9.0.device: 'nvme' is not allowed", set_key("pci.0.9.0.device", "nvme")),
    ("pci.0.9.0.device: 'passthru' is not allowed", set_key("pci.0.9.0.device", "passthru")),
    ("pci.0.9.0.device: 'virtio-9p' is not allowed", set_key("pci.0.9.0.device", "virtio-9p")),
    ("pci.0.9.0.device: '/bin/sh' is not allowed", set_key("pci.0.9.0.device", "/bin/sh")),
    ("pci.0.3.0.path belongs to the host", set_key("pci.0.3.0.path", "/etc/shadow")),
    ("pci.0.4.0.port.0.path belongs", set_key("pci.0.4.0.port.0.path", "/etc/shadow")),
    ("pci.0.5.0.backend belongs", set_key("pci.0.5.0.backend", "tap0")),
    ("pci.0.5.0.type belongs", set_key("pci.0.5.0.type", "tap")),
    ("pci.0.6.0.rfb belongs", set_key("pci.0.6.0.rfb", "0.0.0.0:1")),
    ("pci.0.6.0.password belongs", set_key("pci.0.6.0.password", "x")),
    ("pci.0.6.0.wait belongs", set_key("pci.0.6.0.wait", "true")),
    ("key pci.0.6.0.tcp is not known", set_key("pci.0.6.0.tcp", "0.0.0.0:1")),
    ("lpc.com1.path belongs", set_key("lpc.com1.path", "/dev/mem")),
    ("lpc.bootrom belongs", set_key("lpc.bootrom", "/etc/shadow")),
    ("lpc.bootvars belongs", set_key("lpc.bootvars", "/etc/shadow")),
    ("key bootvars is not known", set_key("bootvars", "/etc/shadow")),
    ("gdb.port belongs", set_key("gdb.port", "1")),
    ("vcpu.0.cpuset belongs", set_key("vcpu.0.cpuset", "0")),
    ("keyboard.layout: .* is not allowed", set_key("keyboard.layout", "../../../etc/passwd")),
    ("pci.0.31.0.pcireg.vendor: 'host'", set_key("pci.0.31.0.pcireg.vendor", "host")),
    ("acpi_tables: 'yes' is not allowed", set_key("acpi_tables", "yes")),
    ("cpus: '0x2' is not allowed", set_key("cpus", "0x2")),
    ("cpus: '99999' is not allowed", set_key("cpus", "99999")),
    ("are not 3 cpus", set_key("cpus", "3")),
    ("memory.size: '4G' is not allowed", set_key("memory.size", "4G")),
    ("memory.size: .* is not allowed", set_key("memory.size", str(1 << 60))),
    ("no multiple of 4096", set_key("memory.size", str((1 << 30) + 1))),
    ("uuid: 'x' is not allowed", set_key("uuid", "x")),
    ("pci.0.5.0.mac: .* is not allowed", set_key("pci.0.5.0.mac", "01:00:00:00:00:00")),
    ("uuid is missing", without("uuid")),
    ("sockets is missing", without("sockets")),
    ("memory.size is missing", without("memory.size")),
    ("pci.0.5.0.mac is missing", without("pci.0.5.0.mac")),
    ("pci.0.3.0.ser is missing", without("pci.0.3.0.ser")),
    ("pci.0.4.0.port.0.ser is missing", without("pci.0.4.0.port.0.ser")),
    ("pci.0.4.0.port.0.type is missing", without("pci.0.4.0.port.0.type")),
    ("key pci.0.3.0.ser is not known", without("pci.0.3.0.device")),
    ("a second fbuf", set_key("pci.0.9.0.device", "fbuf")),
    ("a second lpc", set_key("pci.0.9.0.device", "lpc")),
    ("resources: disk0: 'pci.0.3.0.ser' is no resource", set_word("disk0", "pci.0.3.0.ser")),
    ("resources: x: 'uuid' is no resource", set_word("x", "uuid")),
    ("resources: x: 'pci.0.9.0.path' is no resource", set_word("x", "pci.0.9.0.path")),
    ("resources: x: 'gdb.address' is no resource", set_word("x", "gdb.address")),
    ("resources: disk0 has to be pci.0.3.0.path", set_word("disk0", "pci.0.4.0.port.0.path")),
    ("resources: disk0 has to be", lambda s: s["resources"].pop("disk0")),
    ("resources: vnc has to be", lambda s: s["resources"].pop("vnc")),
    ("resources: disk2 belongs to nothing", set_word("disk2", "pci.0.3.0.path")),
    ("resources: bootrom2 belongs to nothing", set_word("bootrom2", "lpc.bootrom")),
    ("resources: net0 has to be", lambda s: s["resources"].update(
        net1=s["resources"].pop("net0"))),
    ("disk0: 7 is not allowed", set_word("disk0", 7)),
    ("domains.0.size: '4294963200' is not|memory.size: '4294967296' is not 4294963200",
     lambda s: s["keys"].update({"domains.0.size": str((4 << 30) - 4096), "domains.0.cpus": "0"})),
    ("domains.0.size: None is not", set_key("domains.0.cpus", "0")),
    ("domains.0.cpus is missing", set_key("domains.0.size", str(4 << 30))),
    ("domains.0.domain_policy belongs", set_key("domains.0.domain_policy", "prefer:0")),
    ("pci.0.5.0.peerhook belongs", set_key("pci.0.5.0.peerhook", "x")),
    ("pci.0.5.0.path belongs", set_key("pci.0.5.0.path", "/etc/shadow")),
    ("lpc.pc-testdev: 'true' is not allowed", set_key("lpc.pc-testdev", "true")),
    ("disks is not an object", lambda s: s.update(disks=[])),
    ("disks: 'disk7' is none of its resources", lambda s: s["disks"].update(disk7=DISK)),
    ("disks: 'net0' is none of its resources", lambda s: s["disks"].update(net0=DISK)),
    ("disks: 7 is none of its resources", lambda s: s["disks"].update({7: DISK})),
    ("disks: disk0 is not an object", set_disk(None)),
    ("disks: disk0 has more than 4 entries", set_disk({**DISK, "path": "/etc/shadow"})),
    ("disks: disk0: writable is None", set_disk({k: DISK[k] for k in [*DISK][:3]})),
    ("disks: disk0: mediasize is -1", set_disk({**DISK, "mediasize": -1})),
    ("disks: disk0: mediasize is 9223372036854775808", set_disk({**DISK, "mediasize": 1 << 63})),
    ("disks: disk0: mediasize is True", set_disk({**DISK, "mediasize": True})),
    (r"disks: disk0: mediasize is '\\x1b", set_disk({**DISK, "mediasize": "\x1b"})),
    ("disks: disk0: sectorsize is 0", set_disk({**DISK, "sectorsize": 0})),
    ("disks: disk0: sectorsize is 1048577", set_disk({**DISK, "sectorsize": (1 << 20) + 1})),
    ("disks: disk0: candelete is 1", set_disk({**DISK, "candelete": 1})),
    ("disks: disk0: writable is 'true'", set_disk({**DISK, "writable": "true"})),
    ("nets: 'disk0' is none of its", lambda s: s.update(nets={"disk0": {"mtu": 1500}})),
    ("nets: net0: mtu is 0", lambda s: s.update(nets={"net0": {"mtu": 0}})),
    ("nets: net0: mtu is 65536", lambda s: s.update(nets={"net0": {"mtu": 65536}})),
    ("nets: net0: mtu is None", lambda s: s.update(nets={"net0": {"tap": "tap0"}})),
]  # fmt: skip


@pytest.mark.parametrize(("message", "change"), HOSTILE, ids=[case[0] for case in HOSTILE])
def test_a_hostile_section_is_refused(message: str, change: Change) -> None:
    section = copy.deepcopy(GOOD)
    change(section)
    with pytest.raises(IncompatibleError, match=message):
        validate(section)


# One number for each key, and below the other spellings that a parser might take for it.
NUMBERS = {
    "cpus": "2", "sockets": "1", "cores": "2", "threads": "1", "memory.size": str(4 << 30),
    "domains.0.size": str(4 << 30), "domains.0.cpus": "0,1",
    "pci.0.3.0.sectorsize": "512", "pci.0.3.0.bootindex": "1", "pci.0.4.0.port.0.nmrr": "7200",
    "pci.0.4.0.port.0.sectorsize": "2048/4096", "pci.0.5.0.mtu": "1500", "pci.0.6.0.w": "1024",
    "pci.0.6.0.h": "0",
}  # fmt: skip
ARABIC = str.maketrans("0123456789", "\u0660\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668\u0669")
SPELLINGS: dict[str, Callable[[str], str]] = {
    "zero-in-front": lambda good: f"0{good}",
    "plus": lambda good: f"+{good}",
    "minus": lambda good: f"-{good}",
    "minus-zero": lambda good: "-0",
    "space-in-front": lambda good: f" {good}",
    "space-behind": lambda good: f"{good} ",
    "other-digits": lambda good: good.translate(ARABIC),
    "one-other-digit": lambda good: good[:-1] + good[-1].translate(ARABIC),
    "full-width": lambda good: good[:-1] + chr(ord(good[-1]) + 0xFEE0),
    "hex": lambda good: f"0x{good}",
    "HEX": lambda good: f"0X{good}",
    "fraction": lambda good: f"{good}.0",
    "exponent": lambda good: f"{good}e0",
    "underscore": lambda good: f"{good[0]}_{good[1:]}0",
    "unit": lambda good: f"{good}M",
    "too-long": lambda good: good + "0" * 20,
    "none": lambda good: "",
}


def numbered() -> dict[str, Any]:
    return {**copy.deepcopy(GOOD), "keys": {**GOOD["keys"], **NUMBERS}}


def test_the_numbers_are_good() -> None:
    assert validate(numbered()) == numbered()


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_has_one_spelling(key: str, spelling: str) -> None:
    section = numbered()
    section["keys"][key] = SPELLINGS[spelling](NUMBERS[key])
    with pytest.raises(IncompatibleError, match=re.escape(f"{key}: ")):
        validate(section)


def test_every_number_of_a_section_is_in_these_tests() -> None:
    """A key takes a number if its value may be 64 or 1 << 30, but no word and no register."""
    every = dict(keys._GLOBAL)
    every |= {f"domains.0.{name}": rule for name, rule in keys._DOMAIN_RULES.items()}
    for device, rules in {**keys.SAVED, "ahci": keys._AHCI_PORT}.items():
        at = {"virtio-blk": "pci.0.3.0", "ahci": "pci.0.4.0.port.0", "fbuf": "pci.0.6.0"}
        every |= {f"{at.get(device, 'pci.0.5.0')}.{name}": rule for name, rule in rules.items()}
    for key, rule in every.items():
        is_number = any(rule.clean(text) for text in ("64", str(1 << 30))) and not rule.clean("x")
        is_register = bool(rule.clean("cafe"))
        if rule.role == "guest" and is_number and not is_register and not rule.clean("true"):
            same = key.replace("pci.0.4.0.port.0.bootindex", "pci.0.3.0.bootindex")
            assert same in NUMBERS, key


@pytest.mark.parametrize("key", ["lpc.pcireg.vendor", "pci.0.0.0.devid", "pci.0.0.0.vendor"])
def test_a_register_has_hexadecimal_digits(key: str) -> None:
    section = copy.deepcopy(GOOD)
    for good in ("8086", "0x8086", "0xcAfE", "0", "0x0001", "F"):
        section["keys"][key] = good
        assert validate(section)["keys"][key] == good
    for bad in ("0X8086", "0x", "0x12345", "12345", "+1", "-1", " 1", "1 ", "80_6", "1h", "",
                "\u0668", "\uff11"):  # fmt: skip
        section["keys"][key] = bad
        with pytest.raises(IncompatibleError, match=re.escape(f"{key}: ")):
            validate(section)


def test_a_source_writes_a_register_in_the_form_that_travels() -> None:
    assert keys.SAVED["lpc"]["pcireg.vendor"].clean("0X80Fe") == "0x80Fe"
    assert keys.SAVED["virtio-blk"]["sectorsize"].clean("0x200/4096") == "512/4096"
    assert keys.SAVED["virtio-blk"]["sectorsize"].clean("512/4096/1") is None
    assert keys.number(0, 9)("\u0665") is None


# The first and the last number of each range; both are allowed.
ENDS: dict[str, tuple[int, int]] = {
    "pci.0.3.0.sectorsize": (1, 9_999_999), "pci.0.3.0.bootindex": (0, 65535),
    "pci.0.4.0.port.0.nmrr": (0, 65535), "pci.0.5.0.mtu": (64, 65535),
    "pci.0.6.0.w": (0, 65535), "pci.0.6.0.h": (0, 65535),
}  # fmt: skip
FACTS = {"mediasize": (0, 2**63 - 1), "sectorsize": (1, 1 << 20)}


@pytest.mark.parametrize("key", ENDS)
def test_the_ends_of_a_range_belong_to_it(key: str) -> None:
    section, (first, last) = numbered(), ENDS[key]
    for good in (first, last):
        section["keys"][key] = str(good)
        assert validate(section) == section
    for bad in (first - 1, last + 1):
        section["keys"][key] = str(bad)
        with pytest.raises(IncompatibleError, match=re.escape(f"{key}: ")):
            validate(section)


@pytest.mark.parametrize("fact", FACTS)
def test_the_ends_of_a_range_of_facts_belong_to_it(fact: str) -> None:
    section = numbered()
    for number in (FACTS[fact][0] - 1, FACTS[fact][1] + 1):
        section["disks"]["disk0"][fact] = number
        with pytest.raises(IncompatibleError, match=f"disk0: {fact} is"):
            validate(section)
    for number in FACTS[fact]:
        section["disks"]["disk0"][fact] = number
        assert validate(section) == section


def test_the_least_and_the_most_memory_can_be_had() -> None:
    for count, is_good in ((1 << 20, True), (1 << 46, True), ((1 << 20) - 4096, False),
                           ((1 << 46) + 4096, False), ((1 << 20) + 1, False)):  # fmt: skip
        section = copy.deepcopy(GOOD)
        section["keys"]["memory.size"] = str(count)
        if is_good:
            assert validate(section) == section
            continue
        with pytest.raises(IncompatibleError, match=r"memory\.size: "):
            validate(section)


@pytest.mark.parametrize(
    "bad",
    ["00:00:00:00:00:00", "01:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "58:9C:fc:00:00:01",
     "58:9c:fc:0:0:1", "58:9c:fc:00:00", "58-9c-fc-00-00-01"],
)  # fmt: skip
def test_a_mac_address_is_that_of_one_station(bad: str) -> None:
    section = copy.deepcopy(GOOD)
    section["keys"]["pci.0.5.0.mac"] = bad
    with pytest.raises(IncompatibleError, match=r"pci\.0\.5\.0\.mac: "):
        validate(section)
    section["keys"]["pci.0.5.0.mac"] = "00:00:00:00:00:01"
    assert validate(section) == section


@pytest.mark.parametrize("section", [None, [], "x", 7, [GOOD], {}])
def test_what_is_no_section_is_refused(section: object) -> None:
    with pytest.raises(IncompatibleError, match="the stream's configuration"):
        validate(section)


def test_a_message_shows_hostile_text_short_and_plain() -> None:
    section = copy.deepcopy(GOOD)
    section["keys"]["uuid"] = "\x1b[2J" * 500
    with pytest.raises(IncompatibleError) as caught:
        validate(section)
    assert len(str(caught.value)) < 200 and str(caught.value).isprintable()


def test_the_same_machine_differs_in_nothing() -> None:
    assert differences(GOOD, copy.deepcopy(GOOD)) == []


def test_every_difference_is_listed() -> None:
    here = copy.deepcopy(GOOD)
    here["keys"]["cpus"] = "4"
    here["keys"]["x86.mptable"] = "false"
    del here["keys"]["pci.0.7.0.slot.1.device"]
    del here["resources"]["com1"]
    assert differences(GOOD, here) == [
        "cpus: the stream says 2, here 4",
        "pci.0.7.0.slot.1.device: the stream says tablet, here nothing",
        "x86.mptable: the stream says true, here false",
        "com1: the stream says lpc.com1.path, here nothing",
    ]


def test_a_default_that_is_written_down_is_no_difference() -> None:
    here = copy.deepcopy(GOOD)
    here["keys"] |= {"x86.mptable": "true", "pci.0.3.0.ro": "false"}
    assert differences(GOOD, here) == []


def test_a_computed_serial_of_a_disk_more_is_a_difference() -> None:
    here = copy.deepcopy(GOOD)
    here["keys"] |= {"pci.0.9.0.device": "virtio-blk", "pci.0.9.0.ser": "BHYVE-X"}
    lines = differences(GOOD, here, {"pci.0.9.0.ser"})
    assert "pci.0.9.0.ser: the stream says nothing, here BHYVE-X" in lines


def test_a_serial_that_only_the_path_gave_is_no_difference() -> None:
    ours = split(parse_argv(ARGV))
    theirs = split(parse_argv([word.replace("/zroot/vm/", "/other/vm/") for word in ARGV]))
    assert ours.section != theirs.section
    assert differences(ours.section, theirs.section, theirs.computed) == []
    assert len(differences(ours.section, theirs.section)) == 2

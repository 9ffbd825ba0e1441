"""The operator's -o and -x: the resources that a guest gets, and those that are missing."""

from __future__ import annotations

from typing import Any

import pytest

from backend.bhyve_samples import ARGV
from bhystream.backend.bhyve import command, config
from bhystream.backend.bhyve.argv import parse_argv
from bhystream.backend.bhyve.resources import Wishes, missing
from bhystream.backend.bhyve.validate import validate
from bhystream.errors import UsageError

ALL = {
    "disk0": "/dev/zvol/b/web1",
    "disk1": "/b/disk1.img",
    "net0": "tap9",
    "com1": "/dev/nmdm-web1.1A",
    "bootrom": "/rom.fd",
    "bootvars": "/b/vars.fd",
    "vnc": "127.0.0.1:5907",
}


@pytest.fixture
def section() -> dict[str, Any]:
    return validate(config.split(parse_argv(ARGV)).section)


def test_every_resource_given_is_no_reason(section: dict[str, Any]) -> None:
    found = Wishes.parse(ALL).resolve(section)
    assert found.reasons == ()
    assert found.values == {
        "pci.0.4.0.path": "/dev/zvol/b/web1",
        "pci.0.5.0.port.0.path": "/b/disk1.img",
        "pci.0.6.0.backend": "tap9",
        "lpc.com1.path": "/dev/nmdm-web1.1A",
        "lpc.bootrom": "/rom.fd",
        "lpc.bootvars": "/b/vars.fd",
        "pci.0.8.0.rfb": "127.0.0.1:5907",
    }


def test_what_bhyve_is_started_with_is_the_same_machine(section: dict[str, Any]) -> None:
    found = Wishes.parse(ALL).resolve(section)
    text = command.config_file({**found.section["keys"], **found.values})
    again = config.read(text, "web1")
    assert again.section == section
    assert again.full["pci.0.4.0.path"] == "/dev/zvol/b/web1"
    assert again.computed == frozenset()


def test_each_missing_resource_is_a_reason(section: dict[str, Any]) -> None:
    assert Wishes.parse({}).resolve(section).reasons == (
        "disk0: no -o disk0= is given (pci.0.4.0.path, virtio-blk)",
        "disk1: no -o disk1= is given (pci.0.5.0.port.0.path, ahci)",
        "net0: no -o net0= is given (pci.0.6.0.backend, virtio-net)",
        "com1: no -o com1= is given (lpc.com1.path)",
        "bootrom: no -o bootrom= is given (lpc.bootrom)",
        "bootvars: no -o bootvars= is given (lpc.bootvars)",
        "vnc: no -o vnc= is given (pci.0.8.0.rfb, fbuf)",
    )


def test_the_words_are_listed_ready_to_paste(section: dict[str, Any]) -> None:
    assert missing(section) == [f"{word}=" for word in ALL]


def test_a_resource_may_be_named_by_its_key(section: dict[str, Any]) -> None:
    given = {**ALL, "pci.0.4.0.path": "/x"}
    del given["disk0"]
    found = Wishes.parse(given).resolve(section)
    assert found.reasons == () and found.values["pci.0.4.0.path"] == "/x"


def test_a_resource_named_twice_is_a_reason(section: dict[str, Any]) -> None:
    found = Wishes.parse({**ALL, "pci.0.4.0.path": "/x"}).resolve(section)
    assert found.reasons == ("pci.0.4.0.path: it is given twice",)


def test_what_is_the_hosts_may_be_given_too(section: dict[str, Any]) -> None:
    found = Wishes.parse({**ALL, "pci.0.8.0.password": "geheim"}).resolve(section)
    assert found.reasons == () and found.values["pci.0.8.0.password"] == "geheim"


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        ("disk", "/x", "-o disk: no such word"),
        ("disk01", "/x", "-o disk01: no such word"),
        ("serial0", "/x", "-o serial0: no such word"),
        ("com5", "/x", "-o com5: no such word"),
        ("cpus", "4", "-o cpus: no such word"),
        ("pci.0.3 .0", "x", "no such word"),
        ("disk0", "", "-o disk0=: the value is empty"),
        ("disk0", "/x\ny=z", "-o disk0=: the value"),
        ("disk0", "/%(name)", "-o disk0=: the value"),
        ("disk0", "x.img", "-o disk0=x.img: say an absolute path"),
        ("com1", "stdio", "-o com1=stdio: say an absolute path"),
        ("bootrom", "rom.fd", "say an absolute path"),
        ("net0", "a" * 16, "say an interface's name"),
        ("net0", "tap0,mac=1", "say an interface's name"),
        ("net0", "..", "say an interface's name"),
        ("net0", "/dev/tap0", "say an interface's name"),
        ("vnc", "unix:x", r"say \[ADDRESS:\]PORT or unix:PATH"),
        ("vnc", "unix:/" + "x" * 103, r"say \[ADDRESS:\]PORT or unix:PATH"),
        ("vnc", "unix:/" + "ä" * 60, r"say \[ADDRESS:\]PORT or unix:PATH"),
        ("vnc", "localhost:1", r"say \[ADDRESS:\]PORT"),
        ("vnc", "1.2.3.4:0", r"say \[ADDRESS:\]PORT"),
        ("vnc", "70000", r"say \[ADDRESS:\]PORT"),
    ],
)
def test_a_wrong_word_or_value_is_a_usage_error(word: str, value: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Wishes.parse({word: value})


@pytest.mark.parametrize(
    "value", ["5900", "0.0.0.0:5900", "[::1]:5900", "unix:/run/vnc", "unix:/" + "x" * 102]
)
def test_an_address_may_be_written_in_four_ways(value: str) -> None:
    assert Wishes.parse({"vnc": value}).values["vnc"] == value


def test_a_word_that_the_guest_has_not_is_a_reason(section: dict[str, Any]) -> None:
    found = Wishes.parse({**ALL, "disk7": "/x", "pci.0.30.0.path": "/y"}).resolve(section)
    assert found.reasons == (
        "disk7: the guest has none; remove -o disk7=",
        "pci.0.30.0.path: the guest has none; remove -o pci.0.30.0.path=",
    )


def test_the_guests_own_keys_are_not_the_operators(section: dict[str, Any]) -> None:
    found = Wishes.parse({**ALL, "pci.0.6.0.mac": "58:9c:fc:00:00:09"}).resolve(section)
    assert found.reasons == ("pci.0.6.0.mac: the guest has none; remove -o pci.0.6.0.mac=",)


def test_a_wrong_value_for_a_key_is_a_reason(section: dict[str, Any]) -> None:
    given = {key: value for key, value in ALL.items() if key != "net0"}
    found = Wishes.parse({**given, "pci.0.6.0.backend": "a/b"}).resolve(section)
    assert found.reasons[0] == "pci.0.6.0.backend: 'a/b' is not allowed for pci.0.6.0.backend"


def test_a_device_is_left_out_with_its_resource(section: dict[str, Any]) -> None:
    given = {word: value for word, value in ALL.items() if word not in ("vnc", "disk1", "com1")}
    found = Wishes.parse(given, ["pci.0.8.0", "pci.0.5.0", "lpc.com1"]).resolve(section)
    assert found.reasons == ()
    assert not [key for key in found.section["keys"] if key.startswith(("pci.0.8.", "pci.0.5."))]
    assert set(found.section["resources"]) == set(given)
    assert "fbuf@pci.0.8.0" not in config.devices(found.section)


def test_words_keep_their_numbers_when_a_device_is_left_out(section: dict[str, Any]) -> None:
    given = {word: value for word, value in ALL.items() if word != "disk0"}
    found = Wishes.parse(given, ["pci.0.4.0"]).resolve(section)
    assert found.reasons == ()
    assert found.values["pci.0.5.0.port.0.path"] == "/b/disk1.img"


def test_a_resource_of_what_is_left_out_is_a_reason(section: dict[str, Any]) -> None:
    found = Wishes.parse(ALL, ["pci.0.8.0"]).resolve(section)
    assert found.reasons == ("vnc: it is left out by -x; remove -o vnc=",)
    given = {word: value for word, value in ALL.items() if word != "vnc"} | {"pci.0.8.0.rfb": "1"}
    assert Wishes.parse(given, ["pci.0.8.0"]).resolve(section).reasons == (
        "pci.0.8.0.rfb: it is left out by -x; remove -o pci.0.8.0.rfb=",
    )


def test_what_stood_behind_a_disk_is_left_out_with_it(section: dict[str, Any]) -> None:
    facts = {"mediasize": 1, "sectorsize": 512, "candelete": False, "writable": True}
    whole = {**section, "disks": {"disk0": facts, "disk1": facts}, "nets": {"net0": {"mtu": 1500}}}
    left = Wishes.parse({}, ["pci.0.4.0"]).resolve(validate(whole)).section
    assert left["disks"] == {"disk1": facts} and left["nets"] == {"net0": {"mtu": 1500}}


def test_a_backend_that_is_no_interface_is_lent_with_its_keys(section: dict[str, Any]) -> None:
    more = {"pci.0.6.0.path": "sw:", "pci.0.6.0.peerhook": "link1", "pci.0.6.0.type": "netgraph"}
    found = Wishes.parse({**ALL, "net0": "netgraph", **more}).resolve(section)
    assert found.reasons == () and more.items() <= found.values.items()


def test_a_key_of_no_device_is_left_out(section: dict[str, Any]) -> None:
    section["keys"] |= {"pci.enable_bars": "true"}
    found = Wishes.parse(ALL, ["pci.enable_bars"]).resolve(section)
    assert found.reasons == () and "pci.enable_bars" not in found.section["keys"]


def test_a_domain_gets_this_hosts_policy(section: dict[str, Any]) -> None:
    section["keys"] |= {"domains.0.size": str(4 << 30), "domains.0.cpus": "0-1"}
    found = Wishes.parse({**ALL, "domains.0.domain_policy": "prefer:1"}).resolve(section)
    assert found.reasons == () and found.values["domains.0.domain_policy"] == "prefer:1"


def test_a_single_key_is_left_out(section: dict[str, Any]) -> None:
    found = Wishes.parse(ALL, ["pci.0.8.0.w"]).resolve(section)
    assert found.reasons == () and "pci.0.8.0.w" not in found.section["keys"]
    assert "pci.0.8.0.w" in section["keys"]


@pytest.mark.parametrize(
    "key",
    ["memory", "uuid", "lpc", "pci.0.4.0.path", "pci.0.4.0.device", "pci.0.6.0.mac", "lpc.bootrom",
     "pci.0.5.0.port.0.type"],
)  # fmt: skip
def test_what_a_guest_cannot_be_without_is_not_left_out(section: dict[str, Any], key: str) -> None:
    found = Wishes.parse(ALL, [key]).resolve(section)
    assert found.reasons == (f"-x {key}: the guest cannot be without it",)
    assert found.section == section


def test_leaving_out_what_is_not_there_is_a_reason(section: dict[str, Any]) -> None:
    found = Wishes.parse(ALL, ["pci.0.30.0"]).resolve(section)
    assert found.reasons == ("-x pci.0.30.0: the configuration has no such key",)


@pytest.mark.parametrize("key", ["a b", "pci", "pci.0", "pci.0.4", "pci.0.99.0", ""])
def test_leaving_out_what_is_no_key_is_a_usage_error(key: str) -> None:
    with pytest.raises(UsageError, match=f"-x {key}: no key and no device"):
        Wishes.parse({}, [key])

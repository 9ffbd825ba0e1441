"""The facts of disks and cards: the source tells them, and the destination compares them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.bhyve import backing
from bhystream.backend.bhyve.config import GuestConfig, read
from bhystream.backend.bhyve.resources import Wishes
from bhystream.backend.bhyve.validate import validate
from standin.rig import Rig

MIB = 1 << 20


@pytest.fixture
def host() -> Iterator[Rig]:
    with Rig() as made:
        made.host.make_tap("tap0", None)
        for name, size in (("a", MIB), ("b", 2 * MIB), ("cd", 4096)):
            with (made.directory / name).open("wb") as file:
                file.truncate(size)
        yield made


def config(host: Rig, *lines: str) -> GuestConfig:
    """Return a guest with a virtio-blk disk, an ahci disk, a CD and a network card."""
    at = host.directory
    text = f"""cpus=1
uuid=4ca2e2b7-6f0b-11ef-8a6a-0cc47a8c1a2e
pci.0.3.0.device=virtio-blk
pci.0.3.0.path={at}/a
pci.0.4.0.device=ahci
pci.0.4.0.port.0.type=hd
pci.0.4.0.port.0.path={at}/b
pci.0.4.0.port.1.type=cd
pci.0.4.0.port.1.path={at}/cd
pci.0.5.0.device=virtio-net
pci.0.5.0.backend=tap0
"""
    return read("\n".join([text, *lines, ""]), "web1")


def section(host: Rig, *lines: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """Return the CONFIG section as a destination has it.  changes: facts to change, by word."""
    found = backing.described(host.host, config(host, *lines))
    for word, facts in changes.items():
        (found["nets"] if word.startswith("net") else found["disks"])[word].update(facts)
    return validate(found)


def judged(host: Rig, found: dict[str, Any], **lent: str) -> tuple[list[str], list[str]]:
    """Return the reasons against a section with this host's files and tap, changed by `lent`."""
    at = str(host.directory)
    words = {"disk0": f"{at}/a", "disk1": f"{at}/b", "disk2": f"{at}/cd", "net0": "tap0"}
    more = {key.replace("__", "."): value for key, value in lent.items()}
    resolved = Wishes.parse(words | more).resolve(found)
    assert resolved.reasons == ()
    return backing.reasons(host.host, resolved.section, resolved.values)


# ---- the source


LPC = ("pci.0.31.0.device=lpc", "lpc.bootrom={at}/rom", "lpc.com1.path={at}/console")
NOT_THERE = [
    ("pci.0.3.0.path", "{at}/c", "there is no such file"),
    ("pci.0.3.0.path", "a", "it is no absolute path, and bhyve runs in /"),
    ("pci.0.3.0.path", "./a", "it is no absolute path, and bhyve runs in /"),
    ("pci.0.3.0.path", "{at}", "bhyve cannot open it as a disk"),
    ("pci.0.4.0.port.0.path", "{at}/c", "there is no such file"),
    ("pci.0.4.0.port.1.path", "cd", "it is no absolute path, and bhyve runs in /"),
    ("lpc.bootrom", "{at}/r", "there is no such file"),
    ("lpc.bootrom", "rom", "it is no absolute path, and bhyve runs in /"),
    ("lpc.bootvars", "{at}/vars", "there is no such file"),
    ("lpc.com1.path", "console", "it is no absolute path, and bhyve runs in /"),
    ("lpc.com1.path", "{at}/c", "there is no such file"),
    ("pci.0.5.0.backend", "tap9", "there is no such interface"),
]


@pytest.mark.parametrize(("key", "value", "why"), NOT_THERE)
def test_what_a_running_guest_cannot_run_with_is_said(
    host: Rig, key: str, value: str, why: str
) -> None:
    at = host.directory
    (at / "console").touch()
    lines = [line.format(at=at) for line in LPC]
    assert backing.missing(host.host, config(host, *lines)) == []
    value = value.format(at=at)
    found = backing.missing(host.host, config(host, *lines, f"{key}={value}"))
    cure = f"give with -C the {key} that the guest was started with"
    assert found == [f"{key}: {value!r}: {why}; {cure}"]
    assert found[0].cure == cure


@pytest.mark.parametrize(
    "line",
    [
        "lpc.com1.path=stdio",
        "lpc.com1.path=tcp=127.0.0.1:5555",
        "lpc.com1.path=/dev/nmdm-none.1A",
        "pci.0.4.0.port.1.path=/ejected.iso",
        "pci.0.5.0.backend=slirp",
    ],
)
def test_what_is_no_file_or_may_be_gone_is_not_looked_for(host: Rig, line: str) -> None:
    lines = [each.format(at=host.directory) for each in LPC[:2]]
    assert backing.missing(host.host, config(host, *lines, line)) == []


def test_disks_and_cards_are_told(host: Rig) -> None:
    found = backing.described(host.host, config(host))
    plain = {"sectorsize": 512, "candelete": False, "writable": True}
    assert found["disks"] == {
        "disk0": {"mediasize": MIB, **plain},
        "disk1": {"mediasize": 2 * MIB, **plain},
        "disk2": {"mediasize": 4096, **plain},
    }
    assert found["nets"] == {"net0": {"mtu": 1500}}
    assert str(host.directory) not in str(found)
    assert validate(found) == found


def test_a_disk_is_told_as_its_guest_sees_it(host: Rig) -> None:
    device = {"can_delete": True, "is_device": True}
    disks = {str(host.directory / name): device for name in "ab"}
    host.settings(disks={**disks, str(host.directory / "cd"): {"can_delete": True}})
    keys = ("pci.0.3.0.sectorsize=4096/8192", "pci.0.3.0.ro=on")
    nodelete = ("pci.0.4.0.port.0.nodelete=yes", "pci.0.4.0.port.1.nodelete=yes")
    found = backing.described(host.host, config(host, *keys, *nodelete))["disks"]
    assert found["disk0"] == {
        "mediasize": MIB, "sectorsize": 4096, "candelete": True, "writable": False,
    }  # fmt: skip
    assert found["disk1"]["candelete"] is False
    assert found["disk2"]["candelete"] is True, "bhyve heeds nodelete on a device only"


@pytest.mark.parametrize("path", ["none", "", "../dev/null"])
def test_what_is_no_disk_is_not_told(host: Rig, path: str) -> None:
    line = f"pci.0.3.0.path={host.directory}/{path}"
    found = backing.described(host.host, config(host, line))
    assert sorted(found["disks"]) == ["disk1", "disk2"]


@pytest.mark.parametrize("backend", ["netgraph", "slirp", "tap9"])
def test_a_backend_that_is_no_interface_here_is_not_told(host: Rig, backend: str) -> None:
    host.host.make_tap("netgraph", None)
    found = backing.described(host.host, config(host, f"pci.0.5.0.backend={backend}"))
    assert found["nets"] == {}


# ---- the destination


def test_the_same_disks_and_card_are_no_reason(host: Rig) -> None:
    assert judged(host, section(host, "pci.0.5.0.mtu=1500")) == ([], [])


def test_a_section_of_before_is_not_compared(host: Rig) -> None:
    found = section(host, "pci.0.5.0.mtu=1500")
    del found["disks"], found["nets"]
    host.settings(mtus={"tap0": 9000}, disks={str(host.directory / "a"): {"can_delete": True}})
    assert judged(host, found) == ([], [])


HARD = [
    ({"disk0": {"mediasize": MIB + 1}},
     "disk0: mediasize: the source has 1048577, {at}/a 1048576;"
     " the guest would write beyond the end: lend a disk of that size"),
    ({"disk1": {"mediasize": 3 * MIB}},
     "disk1: mediasize: the source has 3145728, {at}/b 2097152;"
     " the guest would write beyond the end: lend a disk of that size"),
    ({"disk0": {"sectorsize": 4096}},
     "disk0: sectorsize: the source has 4096, {at}/a 512;"
     " the guest counts sectors of the source's size: lend such a disk"),
    ({"disk0": {"candelete": True}},
     "disk0: candelete: the source has true, {at}/a false;"
     " bhyve's restore refuses that: lend a file for a file, a zvol for a zvol"),
]  # fmt: skip
SOFT = [
    ({"disk0": {"mediasize": 4096}},
     "disk0: mediasize: the source has 4096, {at}/a 1048576; it may be another disk; -f overrules"),
    ({"disk1": {"candelete": True}},
     "disk1: candelete: the source has true, {at}/b false; the guest has found the source's value;"
     " -f overrules"),
    ({"disk1": {"writable": False}},
     "disk1: writable: the source has false, {at}/b true; the guest could write where it could"
     " not; -f overrules"),
    ({"disk2": {"mediasize": 8192, "sectorsize": 2048, "candelete": True, "writable": False}},
     "disk2: mediasize: the source has 8192, {at}/cd 4096; it is another image; -f overrules"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "line"), HARD)
def test_what_breaks_a_guest_is_hard(host: Rig, changes: dict[str, Any], line: str) -> None:
    assert judged(host, section(host, **changes)) == ([line.format(at=host.directory)], [])


@pytest.mark.parametrize(("changes", "line"), SOFT)
def test_what_may_be_meant_is_soft(host: Rig, changes: dict[str, Any], line: str) -> None:
    assert judged(host, section(host, **changes)) == ([], [line.format(at=host.directory)])


def test_a_disk_that_may_not_be_written_here_is_hard(host: Rig) -> None:
    found = section(host)
    host.settings(disks={str(host.directory / "b"): {"is_writable": False}})
    assert judged(host, found) == (
        [
            f"disk1: writable: the source has true, {host.directory}/b false;"
            " the guest's writes would fail: lend a writable disk"
        ],
        [],
    )
    assert judged(host, section(host, "pci.0.4.0.port.0.ro=true")) == ([], [])


def test_a_device_whose_sectors_are_larger_than_the_guests_is_hard(host: Rig) -> None:
    found = section(host, "pci.0.3.0.sectorsize=512")
    device = {"is_device": True, "sector_bytes": 4096}
    host.settings(disks={str(host.directory / "a"): device})
    assert judged(host, found) == (
        [
            f"disk0: {host.directory}/a: its sectors have 4096 bytes, the guest's 512;"
            " bhyve refuses the disk: lend one with smaller sectors"
        ],
        [],
    )
    assert judged(host, section(host, "pci.0.3.0.sectorsize=8192")) == ([], [])
    host.settings(disks={str(host.directory / "a"): {"sector_bytes": 4096}})
    assert judged(host, found) == ([], []), "bhyve does not ask a file"


def test_what_bhyve_cannot_open_is_hard(host: Rig) -> None:
    found = section(host)
    (host.directory / "fifo").mkdir()
    assert judged(host, found, disk0=f"{host.directory}/none", disk1=f"{host.directory}/fifo") == (
        [
            f"disk0: {host.directory}/none: there is no such file",
            f"disk1: {host.directory}/fifo: bhyve cannot open it as a disk",
        ],
        [],
    )


def other_name(path: Path, kind: str) -> str:
    """Return another name of a file."""
    other = path.with_name("other")
    if kind == "hard link":
        other.hardlink_to(path)
    elif kind == "symlink":
        other.symlink_to(path.name)
    elif kind == "directory":
        other.symlink_to(".")
        return str(other / path.name)
    return str(other) if kind.endswith("link") else str(path)


@pytest.mark.parametrize("kind", ["text", "hard link", "symlink", "directory"])
def test_one_disk_is_not_lent_twice_under_any_name(host: Rig, kind: str) -> None:
    other = other_name(host.directory / "a", kind)
    found = section(host, disk1={"mediasize": MIB})
    assert judged(host, found, disk1=other) == ([f"disk1: {other}: it is lent as disk0 too"], [])


@pytest.mark.parametrize("word", ["com1", "bootvars", "bootrom"])
def test_nothing_else_is_lent_what_a_disk_is(host: Rig, word: str) -> None:
    keys = {"com1": "lpc.com1.path=/x", "bootvars": f"lpc.bootvars={host.rom}"}
    lines = [f"lpc.bootrom={host.rom}", keys.get(word, "")]
    lent = {"bootrom": str(host.rom), word: str(host.directory / "a")}
    found = section(host, *filter(None, lines))
    assert judged(host, found, **lent) == (
        [f"{word}: {host.directory}/a: it is lent as disk0 too"],
        [],
    )


def test_what_is_only_read_may_be_lent_twice(host: Rig) -> None:
    cd = "pci.0.4.0.port.2.type=cd", f"pci.0.4.0.port.2.path={host.directory}/cd"
    assert judged(host, section(host, *cd), disk3=f"{host.directory}/cd") == ([], [])
    found = section(host, "pci.0.3.0.ro=true", "pci.0.4.0.port.0.ro=true", disk1={"mediasize": MIB})
    assert judged(host, found, disk1=f"{host.directory}/a") == ([], [])


def test_two_serial_ports_share_the_null_device_only(host: Rig) -> None:
    found = section(host, "lpc.com1.path=/x", "lpc.com2.path=/y")
    assert judged(host, found, com1="/dev/null", com2="/dev/null") == ([], [])
    assert judged(host, found, com1="/dev/nmdm1A", com2="/dev//nmdm1A") == (
        ["com2: /dev//nmdm1A: it is lent as com1 too"],
        [],
    )


def test_one_interface_is_not_lent_twice(host: Rig) -> None:
    second = "pci.0.6.0.device=virtio-net", "pci.0.6.0.backend=tap0"
    found = section(host, *second)
    assert judged(host, found, net1="tap0") == (["net1: tap0: it is lent as net0 too"], [])
    host.host.make_tap("tap1", None)
    assert judged(host, found, net1="tap1") == ([], [])
    assert judged(host, found, net0="slirp", net1="slirp") == ([], [])
    hooks = {f"pci__0__{slot}__0__{key}": "a" for slot in (5, 6) for key in ("path", "peerhook")}
    lent = hooks | {"net0": "netgraph", "net1": "netgraph"}
    assert judged(host, found, **lent) == (["net1: netgraph: it is lent as net0 too"], [])
    assert judged(host, found, **(lent | {"pci__0__6__0__peerhook": "b"})) == ([], [])


@pytest.mark.parametrize("word", ["bootrom", "bootvars"])
@pytest.mark.parametrize("path", ["", "/dev/null"])
def test_a_boot_rom_is_a_file(host: Rig, word: str, path: str) -> None:
    found = section(host, f"lpc.bootrom={host.rom}", f"lpc.bootvars={host.rom}")
    vars_file = host.directory / "vars"
    vars_file.touch()
    lent = {"bootrom": str(host.rom), "bootvars": str(vars_file)}
    value = path or str(host.directory)
    assert judged(host, found, **(lent | {word: value})) == (
        [f"{word}: {value}: it is no file"],
        [],
    )


def test_a_boot_rom_has_to_be_there(host: Rig) -> None:
    found = section(host, f"lpc.bootrom={host.rom}", f"lpc.bootvars={host.rom}", "lpc.com1.path=/x")
    lent = {"bootrom": f"{host.rom}", "bootvars": "/nowhere/v.fd", "com1": "/nowhere/nmdm"}
    assert judged(host, found, **lent)[0] == ["bootvars: /nowhere/v.fd: there is no such file"]


def test_an_interface_has_to_be_there(host: Rig) -> None:
    assert judged(host, section(host), net0="tap9") == (
        ["net0: tap9: there is no such interface"],
        [],
    )


@pytest.mark.parametrize(
    ("lines", "reasons"),
    [
        ((), []),
        (
            ("pci.0.5.0.mtu=9000",),
            [
                "net0: mtu: the source has 9000, tap0 1500;"
                " longer packets are lost: ifconfig tap0 mtu 9000, or -f"
            ],
        ),
    ],
)
def test_an_mtu_matters_to_a_guest_that_was_told_one(
    host: Rig, lines: tuple[str, ...], reasons: list[str]
) -> None:
    assert judged(host, section(host, *lines, net0={"mtu": 9000})) == ([], reasons)


def test_netgraph_needs_its_node_and_hook_and_no_interface(host: Rig) -> None:
    found = section(host)
    assert judged(host, found, net0="netgraph") == (
        [
            "net0: netgraph needs a path: no -o pci.0.5.0.path= is given",
            "net0: netgraph needs a peerhook: no -o pci.0.5.0.peerhook= is given",
        ],
        [],
    )
    whole = {"pci__0__5__0__path": "sw:", "pci__0__5__0__peerhook": "link1"}
    assert judged(host, found, net0="netgraph", **whole) == ([], [])
    typed = {**whole, "pci__0__5__0__type": "netgraph"}
    assert judged(host, found, net0="web1", **typed) == ([], [])
    assert judged(host, found, net0="slirp") == ([], [])


def test_what_is_left_out_is_not_judged(host: Rig) -> None:
    found = section(host, disk0={"mediasize": 1 << 40})
    words = {"disk1": f"{host.directory}/b", "disk2": f"{host.directory}/cd", "net0": "tap0"}
    resolved = Wishes.parse(words, ["pci.0.3.0"]).resolve(found)
    assert backing.reasons(host.host, resolved.section, resolved.values) == ([], [])


def test_no_path_of_a_host_is_in_what_is_told(host: Rig, tmp_path: Path) -> None:
    found = backing.described(host.host, config(host))
    for facts in (*found["disks"].values(), *found["nets"].values()):
        assert all(type(fact) in (int, bool) for fact in facts.values())

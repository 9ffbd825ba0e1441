"""The edit that lets a guest of bhyve move, in bhyve_config(5) and in vm-bhyve's NAME.conf."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bhystream.backend.bhyve import config, cures, vmconf
from bhystream.backend.bhyve.cures import of_keys, translated
from bhystream.backend.process import Identity
from bhystream.backend.refusals import Refusals
from bhystream.errors import IncompatibleError, Reason
from support.man_pages import ROOT

from .bhyve_samples import CONF, OPTIONS, UUID, log_of
from .test_bhyve_vmbhyve import BHYVE, guest_in

FILE = f"cpus=1\nmemory.size=1G\nuuid={UUID}\n"
AGAIN = "in web1.conf, then vm stop web1 and vm start web1"


def refused(text: str) -> list[Reason]:
    """Return the reasons against a configuration."""
    found = Refusals()
    config.split(config.parse(text), "web1", found)
    return found.reasons


@pytest.mark.parametrize(
    ("lines", "what", "cure"),
    [
        ("pci.0.9.0.device=nvme\npci.0.9.0.path=/d", "bhyve does not save nvme@pci.0.9.0",
         "start it with pci.0.9.0.device=virtio-blk"),
        ("pci.0.9.0.device=hda\npci.0.9.0.play=/dev/dsp0", "bhyve does not save hda@pci.0.9.0",
         "start it without pci.0.9.0"),
        ("pci.0.9.0.device=passthru\npci.0.9.0.bus=1", "bhyve does not save passthru@pci.0.9.0",
         "start it without pci.0.9.0"),
        ("tpm.type=passthru\ntpm.path=/dev/tpm0", "bhyve does not save tpm",
         "start it without tpm"),
        ("lpc.pc-testdev=on", "bhyve does not save lpc.pc-testdev",
         "start it without lpc.pc-testdev"),
        ("pci.0.9.0.device=virtio-gpu\npci.0.9.0.x=1",
         "pci.0.9.0.device: 'virtio-gpu' is not allowed", "start it without pci.0.9.0"),
        ("pci.0.4.0.device=virtio-net\npci.0.4.0.backend=vale0:1",
         "pci.0.4.0.backend: 'vale0:1' cannot travel, only tap, vmnet, ngd, netgraph, slirp",
         "start it with pci.0.4.0.backend=tapN"),
        ("bogus=1", "key bogus is not known",
         "delete its line if bhyve_config(5) has no bogus, or start it without bogus"),
        ("cpus=3\nsockets=2", "2 sockets of 1 cores of 1 threads are not 3 cpus",
         "set cpus=2, or correct the others"),
        ("a=%(b)", "a: '%(b)' refers to a key that is not set",
         "write the value itself instead of a reference"),
    ],
)  # fmt: skip
def test_each_reason_names_the_key_to_edit(lines: str, what: str, cure: str) -> None:
    assert refused(f"{FILE}{lines}\n") == [f"configuration: {what}; {cure}"]


def test_all_reasons_are_found_and_no_reason_comes_from_another() -> None:
    """A device that is refused takes its keys along, of which no other device knows any."""
    text = (
        "cpus=2\nsockets=3\nmemory.size=1G\nbogus=1\n"
        "pci.0.3.0.device=nvme\npci.0.3.0.path=/a\npci.0.3.0.maxq=4\n"
        "pci.0.4.0.device=virtio-net\npci.0.4.0.backend=vale0:1\n"
        "pci.0.5.0.device=hda\npci.0.6.0.device=virtio-blk\n"
    )
    found = refused(text)
    assert [one.what.removeprefix("configuration: ") for one in found] == [
        "bhyve does not save nvme@pci.0.3.0",
        "bhyve does not save hda@pci.0.5.0",
        "3 sockets of 1 cores of 1 threads are not 2 cpus",
        "uuid is not set: the default changes with the host",
        "pci.0.6.0.ser is not set: the default changes with the path",
        "pci.0.4.0.backend: 'vale0:1' cannot travel, only tap, vmnet, ngd, netgraph, slirp",
        "key bogus is not known",
    ]
    assert all(one.cure for one in found)


def test_without_a_collection_one_error_states_everything() -> None:
    with pytest.raises(IncompatibleError, match="does not save nvme") as caught:
        config.read(f"{FILE}pci.0.3.0.device=nvme\nbogus=1\n", "web1")
    assert "key bogus is not known" in caught.value.hint
    assert len(caught.value.reasons()) == 2


def test_what_is_refused_does_not_travel_even_when_it_is_collected() -> None:
    found = Refusals()
    made = config.split(config.parse(f"{FILE}pci.0.3.0.device=nvme\ntpm.type=x\n"), "web1", found)
    assert not any(key.startswith(("pci", "tpm")) for key in made.section["keys"])
    assert found.reasons


def test_several_edits_are_one_start() -> None:
    keys = {"pci.0.3.0.device": "e1000", "pci.0.4.0.device": "fbuf"}
    assert of_keys(keys, list(keys)) == (
        "start it with pci.0.3.0.device=virtio-net and without pci.0.4.0"
    )


# vm-bhyve.

# What vm-bhyve makes of these lines, by vm::bhyve_device_disks() and its neighbours.
MANY = """loader="uefi"
disk0_type="nvme"
disk0_name="disk0.img"
disk1_type="virtio-blk"
disk1_name="disk1.img"
disk2_type="nvme"
disk2_name="disk2.img"
network0_type="e1000"
network0_switch="fast"
network1_type="virtio-net"
network1_switch="public"
passthru0="4/0/0"
passthru1="5/0/0"
graphics="yes"
xhci_mouse="yes"
sound="yes"
virt_console0="agent"
"""
MADE = (
    "-s 0,hostbridge -s 31,lpc -s 0:4:0,nvme,/d0 -s 0:5:0,virtio-blk,/d1 -s 0:6:0,nvme,/d2"
    " -s 0:7:0,e1000,vale0:1 -s 0:7:1,virtio-net,tap0 -s 0:8:0,passthru,4/0/0"
    " -s 0:9:0,passthru,5/0/0 -s 0:10:0,fbuf,tcp=0.0.0.0:5900 -s 0:11:0,xhci,tablet"
    " -s 0:12:0,hda,play=/dev/dsp0 -s 0:13:0,virtio-console,agent=/x"
)


def managed(tmp_path: Path, more: str = "") -> list[Reason]:
    """Return the reasons and the warnings about a guest of vm-bhyve, in the words of MANY."""
    guest = guest_in(tmp_path, log_of(OPTIONS + more, MADE), MANY)
    found = Refusals()
    made = guest.running(BHYVE, found)
    about = [f"pci.0.{at}.device" for at in ("7.0", "10.0", "11.0")]
    devices = Reason("x", of_keys(made.full, about), *about)
    return [
        translated(one, "web1", vmconf.parse(MANY), made.full) for one in [*found.reasons, devices]
    ]


def test_a_guest_of_vm_bhyve_gets_the_lines_of_its_conf(tmp_path: Path) -> None:
    found = {one.what.rpartition(" ")[2]: one.cure for one in managed(tmp_path)}
    assert found == {
        "nvme@pci.0.4.0": f'set disk0_type="virtio-blk" {AGAIN}',
        "nvme@pci.0.6.0": f'set disk2_type="virtio-blk" {AGAIN}',
        "passthru@pci.0.8.0": f'set passthru0="" {AGAIN}',
        "passthru@pci.0.9.0": f'set passthru1="" {AGAIN}',
        "hda@pci.0.12.0": f'set sound="no" {AGAIN}',
        "virtio-console@pci.0.13.0": f'set virt_console0="" {AGAIN}',
        "slirp": f"set network0_switch to a switch of another type than vale {AGAIN}",
        "x": f'set network0_type="virtio-net" and graphics="no" and xhci_mouse="no" {AGAIN}',
    }


def test_what_bhyve_options_made_has_to_go_from_there(tmp_path: Path) -> None:
    more = " -s 0:20:0,nvme,/d3 -o bogus=1 -f name,file -l tpm,passthru,/dev/tpm0"
    found = {one.what.removeprefix("configuration: "): one.cure for one in managed(tmp_path, more)}
    # Nobody knows now which of the three disks the two lines of NAME.conf have made.
    for slot in ("4", "6", "20"):
        cure = f"take pci.0.{slot}.0 out of bhyve_options {AGAIN}"
        assert found[f"bhyve does not save nvme@pci.0.{slot}.0"] == cure
    assert found["bhyve does not save tpm"] == f"take tpm out of bhyve_options {AGAIN}"
    [option] = [cure for what, cure in found.items() if what.startswith("option -f")]
    assert option == f"take -f out of bhyve_options {AGAIN}"
    assert found["key bogus is not known"] == (
        "delete its line if bhyve_config(5) has no bogus, or take bogus out of bhyve_options"
        f" {AGAIN}"
    )


def test_a_key_without_a_device_has_to_go_whatever_its_name(tmp_path: Path) -> None:
    for key in ("pci.0.25.0.backend", "pci.0.11.0.slot.9.device"):
        found = managed(tmp_path / key, f" -o {key}=nvme")
        [cure] = [one.cure for one in found if f"key {key} is not known" in one]
        assert cure.endswith(f"take {key} out of bhyve_options {AGAIN}")


@pytest.mark.parametrize(
    ("about", "cure"),
    [
        ("memory.wired", f'use no swap, or set wired_memory="yes" {AGAIN}'),
        ("cpus=1", f'use no swap, or set cpu="1" {AGAIN}'),
    ],
)
def test_what_can_be_done_without_a_start_stays(about: str, cure: str) -> None:
    reason = Reason("swap: x", f"use no swap, or {of_keys({}, [about])}", about)
    assert translated(reason, "web1", {}, {}) == f"swap: x; {cure}"


def test_a_cure_that_names_no_key_stays() -> None:
    reason = Reason("x", "rm /x")
    assert translated(reason, "web1", vmconf.parse(CONF), {}) is reason


def test_a_start_that_is_not_described_is_one_reason(tmp_path: Path) -> None:
    guest = guest_in(tmp_path, "")
    with pytest.raises(IncompatibleError, match="records no start"):
        guest.running(Identity(1, 1, "x"), Refusals())


def test_the_page_lists_the_edits() -> None:
    text = (ROOT / "man/bhysend-bhyve.7").read_text().split(".Ss The edits\n")[1]
    rows = re.findall(r"^\.It (\S+) Ta (.+) Ta (.+)$", text.split("\n.Sh ")[0], re.M)
    said = {device: (line, key) for device, line, key in rows}
    for device, line in cures._SWITCHES.items():
        assert said[device] == (line, "without the device")
    for device, pattern in cures._NUMBERED.items():
        new = cures._REPLACED.get(device, "")
        key = f"device={new}" if new else "without the device"
        assert said[device] == (f'{pattern.format("N")}="{new}"', key)
    assert {"vale,", "vCPUs", "memory", "others"} >= said.keys() - {
        *cures._SWITCHES,
        *cures._NUMBERED,
    }

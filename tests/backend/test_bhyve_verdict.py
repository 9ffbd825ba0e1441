"""The verdict over two bhyve hosts and a guest: the full text of each reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from bhystream.backend.bhyve import identity, verdict
from bhystream.backend.bhyve.host import Host

SYSCTLS = {
    "hw.machine": "amd64",
    "hw.model": "Intel(R) Xeon(R) E-2378",
    "hw.pagesize": "4096",
    "kern.osrelease": "15.0-RELEASE",
    "kern.osreldate": "1500068",
    "kern.build_id": "4f1c9d0e",
    "kern.hostuuid": "0c5e1c1e-1dd2-11b2-8c5c-b8cb29f1a1f0",
    "hw.vmm.maxcpu": "4",
    "machdep.tsc_freq": "2600000000",
    "vm.mincore_mapped": "0",
}
CLOCK = (
    "clock: the guest's clock falls behind by the length of the pause; let it run NTP, or see"
    " bhyrecv --advance-clock"
)
KEYS = {
    "cpus": "2",
    "pci.0.0.0.device": "hostbridge",
    "pci.0.3.0.device": "virtio-blk",
    "pci.0.4.0.device": "virtio-net",
    "pci.0.4.0.mac": "58:9c:fc:00:00:01",
    "pci.0.31.0.device": "lpc",
}


@dataclass
class StubHost:
    """The methods that the functions call of a host."""

    kind: str = "bhyve"
    sysctls: dict[str, str] = field(default_factory=lambda: dict(SYSCTLS))
    swap: int = 0
    vendor: str = "intel"
    hash: str = "9a0b"
    parent: str = ""
    knows: bool = True
    can: bool | None = True
    module: str = "77aa"

    def can_snapshot(self) -> bool | None:
        return self.can

    def module_hash(self) -> str:
        return self.module

    def parent_command(self, pid: int) -> str:
        assert pid == 1
        return self.parent

    def knows_suspending_lock(self) -> bool:
        return self.knows

    def sysctl(self, name: str) -> str | None:
        return self.sysctls.get(name)

    def swap_used_bytes(self) -> int:
        return self.swap

    def cpu_vendor(self) -> str:
        return self.vendor

    def program_hash(self) -> str:
        return self.hash


def host(
    vendor: str = "intel",
    swap: int = 0,
    parent: str = "",
    knows: bool = True,
    can: bool | None = True,
    **changes: str | None,
) -> Host:
    """Return a host with changed sysctls.

    changes: by name, with "__" for "."; None removes the sysctl.
    """
    sysctls: dict[str, str] = dict(SYSCTLS)
    for key, value in changes.items():
        name = key.replace("__", ".")
        sysctls.pop(name)
        if value is not None:
            sysctls[name] = value
    made = StubHost(sysctls=sysctls, vendor=vendor, swap=swap, parent=parent, knows=knows)
    made.can = can
    return cast(Host, made)


HERE = identity.describe(host())


def theirs(**changes: Any) -> dict[str, Any]:
    """Return a HOST section with changes, by key, with "__" for "."; None removes the key."""
    found: dict[str, Any] = dict(HERE)
    for key, value in changes.items():
        found.pop(key.replace("__", "."))
        if value is not None:
            found[key.replace("__", ".")] = value
    return found


# ---- identity


def test_a_host_describes_itself_without_its_uuid_and_configuration() -> None:
    assert identity.describe(host()) == {
        "hypervisor": "bhyve",
        "hw.machine": "amd64",
        "hw.model": "Intel(R) Xeon(R) E-2378",
        "kern.osrelease": "15.0-RELEASE",
        "kern.build_id": "4f1c9d0e",
        "hw.pagesize": 4096,
        "kern.osreldate": 1500068,
        "machdep.tsc_freq": 2600000000,
        "cpu.vendor": "intel",
        "bhyve.hash": "9a0b",
        "vmm.hash": "77aa",
    }


def test_what_a_host_does_not_have_is_left_out() -> None:
    stub = StubHost("standin", {"hw.model": " \n", "hw.machine": "amd64\n"}, vendor="", hash="")
    stub.module = ""
    assert identity.describe(cast(Host, stub)) == {"hypervisor": "standin", "hw.machine": "amd64"}


@pytest.mark.parametrize(
    ("printed", "value"),
    [
        ("4096", 4096),
        (" 0\n", 0),
        ("18446744073709551615", 2**64 - 1),
        ("", None),
        (None, None),
        ("-1", None),
        ("0x10", None),
        ("1 2", None),
        ("٤", None),
        ("9" * 21, None),
    ],
)
def test_an_integer_is_decimal_or_left_out(printed: str | None, value: int | None) -> None:
    assert identity.integer(printed) == value


# ---- two hosts


def test_two_hosts_that_are_built_alike_have_nothing_against_each_other() -> None:
    assert verdict.host_reasons({**HERE, "program": "bhysend 9", "kern.osrelease": "?"}, HERE) == (
        [],
        [],
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"hw__machine": "arm64"},
            "hw.machine: the source has 'arm64', this host 'amd64';"
            " only a host of the same architecture can take it",
        ),
        (
            {"hw__machine": None},
            "hw.machine: the source has none, this host 'amd64';"
            " only a host of the same architecture can take it",
        ),
        (
            {"hw__pagesize": 16384},
            "hw.pagesize: the source has 16384, this host 4096;"
            " only a host of the same page size can take it",
        ),
        (
            {"cpu__vendor": "amd"},
            "cpu.vendor: the source has 'amd', this host 'intel';"
            " vCPUs saved on the one cannot be restored on the other",
        ),
        (
            {"hw__pagesize": "4096"},
            "hw.pagesize: the source has '4096', this host 4096;"
            " only a host of the same page size can take it",
        ),
    ],
)
def test_what_no_force_overrules(changes: dict[str, Any], line: str) -> None:
    assert verdict.host_reasons(theirs(**changes), HERE) == ([line], [])


def test_of_another_hypervisor_nothing_else_is_compared() -> None:
    other = {"hypervisor": "standin", "hw.machine": "arm64", "hw.model": "x"}
    assert verdict.host_reasons(other, HERE) == (
        [
            "hypervisor: the source has 'standin', this host 'bhyve';"
            " only a host of the same hypervisor can take it"
        ],
        [],
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"hw__model": "Intel(R) Xeon(R) E-2124"},
            "hw.model: the source has 'Intel(R) Xeon(R) E-2124', this host 'Intel(R) Xeon(R)"
            " E-2378'; the guest may use features that this CPU lacks; -f overrules",
        ),
        (
            {"bhyve__hash": "ffff"},
            "bhyve.hash: the source has 'ffff', this host '9a0b';"
            " install the same bhyve on both hosts; -f overrules",
        ),
        (
            {"bhyve__hash": None},
            "bhyve.hash: the source has none, this host '9a0b';"
            " install the same bhyve on both hosts; -f overrules",
        ),
        (
            {"vmm__hash": "0000"},
            "vmm.hash: the source has '0000', this host '77aa';"
            " load the same vmm.ko on both hosts; -f overrules",
        ),
        (
            {"kern__build_id": "00aa"},
            "kern.build_id: the source has '00aa', this host '4f1c9d0e';"
            " install the same kernel on both hosts; -f overrules",
        ),
        (
            {"kern__build_id": None, "kern__osreldate": 1500067},
            "kern.osreldate: the source has 1500067, this host 1500068;"
            " install the same kernel on both hosts; -f overrules",
        ),
    ],
)
def test_what_a_force_overrules(changes: dict[str, Any], line: str) -> None:
    assert verdict.host_reasons(theirs(**changes), HERE) == ([], [line])


def test_one_build_of_the_kernel_may_show_two_dates() -> None:
    """A jail may show another kern.osreldate, so the build id decides."""
    assert verdict.host_reasons(theirs(kern__osreldate=1500067), HERE) == ([], [])


def test_a_vmm_that_is_in_one_kernel_is_told_by_the_kernel() -> None:
    """Nor do streams of an earlier version have a vmm.hash."""
    without = theirs(vmm__hash=None)
    assert verdict.host_reasons(without, HERE) == ([], [])
    assert verdict.host_reasons(HERE, without) == ([], [])


def test_the_date_stands_in_where_this_host_has_no_build_id() -> None:
    here = theirs(kern__build_id=None)
    assert verdict.host_reasons(HERE, here) == ([], [])
    assert verdict.host_reasons(theirs(kern__osreldate=1), here) == (
        [],
        [
            "kern.osreldate: the source has 1, this host 1500068;"
            " install the same kernel on both hosts; -f overrules"
        ],
    )


@pytest.mark.parametrize("hz", [2600000000, 2601300000, 2601300650, 2598700000])
def test_tsc_frequencies_that_ntp_can_mend_are_one(hz: int) -> None:
    assert verdict.host_reasons(theirs(machdep__tsc_freq=hz), HERE) == ([], [])


@pytest.mark.parametrize("hz", [2601300651, 2598699999, 0, -2600000000, "2600000000", True])
def test_tsc_frequencies_further_apart_are_two(hz: object) -> None:
    assert verdict.host_reasons(theirs(machdep__tsc_freq=hz), HERE) == (
        [],
        [
            f"machdep.tsc_freq: the source has {hz!r}, this host 2600000000;"
            " the guest's clock would run wrong by the difference; -f overrules"
        ],
    )


def test_a_tsc_frequency_that_one_host_has_not_counts_as_another() -> None:
    without = theirs(machdep__tsc_freq=None)
    assert verdict.host_reasons(without, HERE)[1] == [
        "machdep.tsc_freq: the source has none, this host 2600000000;"
        " the guest's clock would run wrong by the difference; -f overrules"
    ]
    assert verdict.host_reasons(HERE, without)[1] == [
        "machdep.tsc_freq: the source has 2600000000, this host none;"
        " the guest's clock would run wrong by the difference; -f overrules"
    ]
    assert verdict.host_reasons(without, without) == ([], [])


def test_a_hostile_value_is_shown_short_and_in_ascii() -> None:
    (line,) = verdict.host_reasons(theirs(hw__model=["\x1b[2J\n" * 99]), HERE)[1]
    assert line == (
        "hw.model: the source has " + ascii(["\x1b[2J\n" * 99])[:60] + ", this host"
        " 'Intel(R) Xeon(R) E-2378'; the guest may use features that this CPU lacks; -f overrules"
    )
    assert line.isascii()
    assert line.isprintable()


def test_all_that_differs_is_said_at_once() -> None:
    head = {"hypervisor": "bhyve"}
    hard, soft = verdict.host_reasons(head, HERE)
    assert [line.partition(":")[0] for line in hard + soft] == [
        "hw.machine",
        "hw.pagesize",
        "cpu.vendor",
        "hw.model",
        "kern.osreldate",
        "bhyve.hash",
        "machdep.tsc_freq",
    ]


# ---- what a host can do at all


def test_a_host_with_snapshots_can_send_and_take() -> None:
    assert verdict.ability_reasons(host()) == ([], [])
    edge = host(kern__osreldate="1400000\n", hw__machine="amd64\n")
    assert verdict.ability_reasons(edge) == ([], [])


@pytest.mark.parametrize(("value", "shown"), [("arm64", "'arm64'"), (None, "none")])
def test_only_amd64_has_snapshots(value: str | None, shown: str) -> None:
    assert verdict.ability_reasons(host(hw__machine=value)) == (
        [
            f"hw.machine: this host has {shown}, bhyve's snapshots need 'amd64';"
            " shut the guest down and move its disks"
        ],
        [],
    )


@pytest.mark.parametrize(
    ("value", "shown"), [("1399999", "1399999"), (None, "none"), ("new", "none")]
)
def test_freebsd_before_14_is_refused(value: str | None, shown: str) -> None:
    assert verdict.ability_reasons(host(kern__osreldate=value)) == (
        [
            f"kern.osreldate: this host has {shown}, 1400000 is needed;"
            " upgrade it to FreeBSD 14 or later"
        ],
        [],
    )


def test_a_vmm_without_snapshots_is_refused() -> None:
    assert verdict.ability_reasons(host(can=False)) == (
        [],
        [
            "vmm: the vmm here has no snapshots; build and install vmm.ko, bhyve and bhyvectl"
            " with WITH_BHYVE_SNAPSHOT=yes (the kernel stays), by the commands of"
            " bhysend-bhyve(7), or -f"
        ],
    )


def test_a_vmm_that_is_not_seen_is_refused_too() -> None:
    assert verdict.ability_reasons(host(can=None)) == (
        [],
        [
            "vmm: it cannot be seen whether the vmm here has snapshots;"
            " kldload vmm, sysctl debug.link_elf_obj_leak_locals=1, or -f"
        ],
    )


# ---- the guest at its source


def test_a_guest_of_virtio_devices_can_be_sent() -> None:
    assert verdict.source_reasons(host(), 1, manager=None) == ([], [])


def test_the_source_judges_its_host_too() -> None:
    hard, soft = verdict.source_reasons(
        host(hw__machine="arm64", can=False, parent="/bin/sh loop"), 1, manager=None
    )
    assert [line.partition(":")[0] for line in hard] == ["hw.machine"]
    assert [line.partition(":")[0] for line in soft] == ["vmm", "supervisor"]


# ---- the guest at its destination


NAMES = ("hostbridge@pci.0.0.0", "virtio-blk@pci.0.3.0", "virtio-net@pci.0.4.0", "lpc@pci.0.31.0")
DEVICES = (*NAMES, "atkbdc")


@pytest.mark.parametrize(("most", "ncpus"), [("4", "4"), (None, "99"), ("", "99")])
def test_a_guest_of_as_many_vcpus_as_vmm_has_can_be_taken(most: str | None, ncpus: str) -> None:
    found = config(cpus=ncpus)
    assert verdict.guest_reasons(host(hw__vmm__maxcpu=most), found) == []


def test_a_guest_of_more_vcpus_than_vmm_has_is_refused() -> None:
    assert verdict.guest_reasons(host(), config(cpus="5")) == [
        "cpus: the guest has 5, hw.vmm.maxcpu is 4 here;"
        " set hw.vmm.maxcpu=5 in loader.conf and load vmm anew"
    ]


@pytest.mark.parametrize("key", ["hw.model", "bhyve.hash", "machdep.tsc_freq", "vmm.hash"])
def test_what_both_hosts_lack_does_not_differ(key: str) -> None:
    one, other = dict(HERE), dict(HERE)
    del one[key], other[key]
    assert verdict.host_reasons(one, other) == ([], [])


@pytest.mark.parametrize(("more", "differs"), [(0, False), (1, True)])
def test_frequencies_differ_by_millionths_of_the_larger(more: int, differs: bool) -> None:
    one = {**HERE, "machdep.tsc_freq": 2_000_000_000}
    other = {**HERE, "machdep.tsc_freq": 1_999_000_000 - more}
    for pair in ((one, other), (other, one)):
        assert bool(verdict.host_reasons(*pair)[1]) == differs


# ---- warnings


def config(resources: dict[str, str] | None = None, **keys: str) -> dict[str, Any]:
    named = {key.replace("__", "."): value for key, value in keys.items()}
    return {"name": "web1", "keys": KEYS | named, "resources": resources or {}}


def test_every_guest_is_warned_of_its_clock() -> None:
    assert verdict.warnings(config(), host()) == [CLOCK]


def test_amd_is_named() -> None:
    assert verdict.warnings(config(), host("amd")) == [
        CLOCK,
        "cpu.vendor: it is 'amd' here; restores were run on an emulated AMD processor only,"
        " and on real ones Linux guests were reported to freeze after one",
    ]


def test_devices_that_bhyve_does_not_stop_are_named() -> None:
    found = config(
        pci__0__6__0__device="xhci", pci__0__5__0__device="e1000", pci__0__29__0__device="fbuf"
    )
    assert verdict.warnings(found, host()) == [
        CLOCK,
        "devices: bhyve does not stop e1000@pci.0.5.0, xhci@pci.0.6.0, fbuf@pci.0.29.0 while"
        " it saves, so the guest may lose what they do in that moment; if that matters, start it"
        " with pci.0.5.0.device=virtio-net and without pci.0.6.0 and without pci.0.29.0",
    ]


def test_what_bhyve_cannot_save_is_no_warning() -> None:
    assert verdict.warnings(config(pci__0__6__0__device="nvme"), host()) == [CLOCK]


@pytest.mark.parametrize("name", ["ahci", "virtio-blk", "virtio-net", "virtio-rnd"])
def test_a_device_that_bhyve_saves_is_no_warning(name: str) -> None:
    assert verdict.warnings(config(pci__0__6__0__device=name), host()) == [CLOCK]


def test_boot_variables_are_to_be_copied() -> None:
    found = config({"bootrom": "lpc.bootrom", "bootvars": "lpc.bootvars"})
    assert verdict.warnings(found, host()) == [
        CLOCK,
        "bootvars: the guest writes the boot variables into a file, which is in no snapshot;"
        " copy this file with the disks",
    ]
    assert verdict.warnings(config({"bootrom": "lpc.bootrom"}), host()) == [CLOCK]


def test_why_every_page_is_read_is_said() -> None:
    (_, line) = verdict.warnings(config(), host(vm__mincore_mapped="1"), is_wired=True)
    assert line.startswith("vm.mincore_mapped: it is 1 here, not 0, so every page")
    (_, line) = verdict.warnings(config(), host(swap=1))
    assert line.startswith("swap: 1 bytes are in use here, not 0, and the guest is not wired")
    assert verdict.warnings(config(), host(swap=1), is_wired=True) == [CLOCK]


# ---- room


def test_room_that_just_suffices_suffices() -> None:
    assert verdict.room_reasons(5, 5, "staging", "/tmp") == []
    assert verdict.memory_reasons(5, 5) == []


def test_too_little_room_is_refused_with_both_sizes() -> None:
    assert verdict.room_reasons(6, 5, "staging", "/var/run/bhyrecv") == [
        "staging: /var/run/bhyrecv has 5 bytes free, 6 are needed;"
        " make room there, or name another directory"
    ]


def test_too_little_memory_is_refused_with_both_sizes() -> None:
    assert verdict.memory_reasons(5, 6) == [
        "memory: this host has 5 bytes free, up to 6 are needed until the guest runs;"
        " stop another guest, or stage on a disk (BHYRECV_STAGING), or -f"
    ]


def test_a_memory_file_in_memory_counts_beside_the_guest() -> None:
    assert verdict.needed_memory_bytes(1 << 30, is_staged_in_memory=True) == 2 << 30
    assert verdict.needed_memory_bytes(1 << 30, is_staged_in_memory=False) == 1 << 30

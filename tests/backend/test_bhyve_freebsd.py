"""FreeBSD's answers read, as texts and bytes; no kernel is played here."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys
import tempfile
from pathlib import Path

import pytest

from bhystream.backend.bhyve import freebsd, freebsd_text, libc
from bhystream.backend.bhyve.freebsd import FreeBsdHost
from bhystream.backend.bhyve.freebsd_text import Mount
from bhystream.backend.bhyve.freebsd_vm import FreeBsdVm, cut, dirty_request, walk
from bhystream.backend.bhyve.host import MemoryMap
from bhystream.errors import GuestError

GIB = 1 << 30

SWAPINFO = """\
Device          1K-blocks     Used    Avail Capacity
/dev/mirror/swap   4194300        0  4194300     0%
"""

TWO_SWAPS = """\
Device          1K-blocks     Used    Avail Capacity
/dev/ada0p3       2097152      512  2096640     0%
/dev/ada1p3       2097152       16  2097136     0%
Total             4194304      528  4193776     0%
"""

MOUNTS = """\
/dev/mirror/root        /                       ufs     rw              1 1
devfs                   /dev                    devfs   rw              0 0
zroot/vm                /vm                     zfs     rw,nfsv4acls    0 0
zroot/big               /mnt/two\\040words       zfs     rw              0 0
tmpfs                   /tmp                    tmpfs   rw              0 0
"""

BRIDGE = """\
vm-public: flags=8843<UP,BROADCAST,RUNNING,SIMPLEX,MULTICAST> metric 0 mtu 1500
\tether 02:1f:9c:73:9c:00
\tid 00:00:00:00:00:00 priority 32768 hellotime 2 fwddelay 15
\tmaxage 20 holdcnt 6 proto rstp maxaddr 2000 timeout 1200
\troot id 00:00:00:00:00:00 priority 32768 ifcost 0 port 0
\tmember: tap10 flags=143<LEARNING,DISCOVER,AUTOEDGE,AUTOPTP>
\t        ifmaxaddr 0 port 4 priority 128 path cost 2000000
\tmember: igb0 flags=143<LEARNING,DISCOVER,AUTOEDGE,AUTOPTP>
\t        ifmaxaddr 0 port 1 priority 128 path cost 20000
\tgroups: bridge vm-switch
\tnd6 options=41<PERFORMNUD,NO_RADR>
"""

SYSTEM_CONF = """\
switch_list="public"
type_public="standard"
bridge_public="bridge0"
datastore_list="default big iso1 plain gone"
path_big="zfs:zroot/big"
path_iso1="iso:/isos"   # not for guests
path_plain='/plain store'
path_gone="zfs:zroot/gone"
 suspend=yes
# path_big="/other"
"""


def test_a_node_is_told_from_a_later_one_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freebsd, "_NODES", str(tmp_path))
    host = FreeBsdHost.__new__(FreeBsdHost)
    assert host.node_id("g") == ""
    node = tmp_path / "g"
    node.touch()
    before = host.node_id("g")
    assert before and host.node_id("g") == before
    (tmp_path / "later").touch()
    (tmp_path / "later").rename(node)
    assert host.node_id("g") not in ("", before)


def test_swap_in_use_is_summed_over_devices_and_not_counted_twice() -> None:
    assert freebsd_text.swap_used_bytes(SWAPINFO) == 0
    assert freebsd_text.swap_used_bytes(TWO_SWAPS) == 528 * 1024
    assert freebsd_text.swap_used_bytes(SWAPINFO.splitlines()[0] + "\n") == 0


@pytest.mark.parametrize("text", ["", "swapinfo: no\n", SWAPINFO + "/dev/x 1 y 2\n"])
def test_swap_that_cannot_be_read_is_not_called_none(text: str) -> None:
    with pytest.raises(GuestError, match="cannot read what swapinfo says"):
        freebsd_text.swap_used_bytes(text)


def test_the_mount_table_is_read_with_its_spaces() -> None:
    assert freebsd_text.mounts(MOUNTS)[2:] == [
        Mount("zroot/vm", "/vm", "zfs"),
        Mount("zroot/big", "/mnt/two words", "zfs"),
        Mount("tmpfs", "/tmp", "tmpfs"),
    ]


def test_the_members_of_a_bridge_are_read_whole() -> None:
    assert freebsd_text.members(BRIDGE) == ["tap10", "igb0"]
    assert "tap1" not in freebsd_text.members(BRIDGE)


def test_the_variables_of_a_configuration_are_read() -> None:
    found = freebsd_text.assignments(SYSTEM_CONF)
    assert found["path_big"] == "zfs:zroot/big"
    assert found["path_iso1"] == "iso:/isos"
    assert found["path_plain"] == "/plain store"
    assert found["suspend"] == "yes"


def test_datastores_are_found_as_vm_bhyve_finds_them() -> None:
    table = freebsd_text.mounts(MOUNTS)
    assert freebsd_text.store_path("zfs:zroot/vm", table) == "/vm"
    assert freebsd_text.store_path("/vm", table) == "/vm"
    assert freebsd_text.store_path("zfs:zroot", table) is None
    assert freebsd_text.store_path("iso:/isos", table) is None
    assert freebsd_text.store_path("", table) is None
    config = freebsd_text.assignments(SYSTEM_CONF)
    assert freebsd_text.more_stores(config, table) == ["/mnt/two words", "/plain store"]
    assert freebsd_text.more_stores({}, table) == []


@pytest.mark.parametrize(
    ("model", "vmx", "vendor"),
    [
        ("Intel(R) Atom(TM) CPU D525   @ 1.80GHz", "1", "intel"),
        ("Intel(R) Xeon(R) Gold 6230", None, "intel"),
        ("AMD EPYC 7402P 24-Core Processor", "0", "amd"),
        ("QEMU Virtual CPU version 2.5+", "1", "intel"),
        ("Hygon C86 7185 32-core Processor", None, "hygon"),
        ("", None, "unknown"),
    ],
)
def test_the_vendor_of_the_cpu_is_read_from_its_name(
    model: str, vmx: str | None, vendor: str
) -> None:
    assert freebsd_text.vendor(model, vmx) == vendor


@pytest.mark.parametrize(
    ("kind", "raw", "shown"),
    [
        (0x80000003, b"amd64\0", "amd64"),
        (0x3, b"", ""),
        (0x2, struct.pack("<i", -1), "-1"),
        (0x6, struct.pack("<I", 0xFFFFFFFF), "4294967295"),
        (0x9, struct.pack("<Q", 1 << 63), str(1 << 63)),
        (0x8, struct.pack("<Q", 4096), "4096"),
        (0xA, b"\1", "1"),
        (0x2, b"\1", None),
        (0x1, b"", None),
        (0x5, bytes(16), None),
    ],
)
def test_a_sysctl_is_shown_by_its_type(kind: int, raw: bytes, shown: str | None) -> None:
    assert libc.show(kind, raw) == shown


def test_only_written_pages_of_a_new_mapping_are_resident() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(64 * 4096)
        with mmap.mmap(file.fileno(), 64 * 4096, prot=mmap.PROT_READ) as mapping:
            assert libc.resident(mapping) == bytes(64)
            os.pwrite(file.fileno(), b"x", 5 * 4096)
            os.pwrite(file.fileno(), b"x", 64 * 4096 - 1)
            marks = libc.resident(mapping)
            assert [page for page, mark in enumerate(marks) if mark] == [5, 63]
            assert len(marks) == 64


def test_asking_for_residency_does_not_keep_the_mapping() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(4096)
        mapping = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
        before = sys.getrefcount(mapping)
        libc.resident(mapping)
        assert sys.getrefcount(mapping) == before
        mapping.close()


def entry(gpa: int, length: int) -> MemoryMap:
    return MemoryMap(gpa, 0, gpa, length, 7, False)


def test_the_memory_map_is_walked_to_its_end() -> None:
    maps = [entry(0, 3 * GIB), entry(0xFFE00000, 2 << 20), entry(4 * GIB, GIB)]
    asked: list[int] = []

    def next_map(gpa: int) -> MemoryMap | None:
        asked.append(gpa)
        return next((one for one in maps if one.gpa >= gpa), None)

    assert walk(next_map) == maps
    assert asked == [0, 3 * GIB, 4 * GIB, 5 * GIB]


@pytest.mark.parametrize("unsound", [entry(0, 0), entry(-4096, 4096)])
def test_a_memory_map_that_does_not_ascend_is_refused(unsound: MemoryMap) -> None:
    with pytest.raises(GuestError, match="unsound"):
        walk(lambda gpa: unsound)


def test_a_memory_map_without_end_is_refused() -> None:
    with pytest.raises(GuestError, match="unsound"):
        walk(lambda gpa: entry(gpa, 4096))


def test_the_dirty_log_is_asked_for_both_segments() -> None:
    marks = ctypes.create_string_buffer(8)
    request = dirty_request([3 * GIB, GIB], ctypes.addressof(marks))
    assert request.page_list == ctypes.addressof(marks)
    assert request.num_pages == 4 * GIB // 4096
    assert (request.lowmem.start, request.lowmem.end) == (0, 3 * GIB)
    assert (request.highmem.start, request.highmem.end) == (4 * GIB, 5 * GIB)
    small = dirty_request([GIB], ctypes.addressof(marks))
    assert (small.num_pages, small.highmem.start, small.highmem.end) == (GIB // 4096, 0, 0)


def test_the_dirty_log_is_cut_lowmem_first() -> None:
    assert cut(b"abcde", [3 * 4096, 2 * 4096]) == [b"abc", b"de"]
    assert cut(b"abc", [3 * 4096]) == [b"abc"]


def test_a_guest_that_is_not_there_is_said_so() -> None:
    with pytest.raises(GuestError, match="guest web1: there is no /nowhere/web1"):
        FreeBsdVm("web1", "/nowhere/web1")


@pytest.mark.skipif(sys.platform.startswith("freebsd"), reason="this is FreeBSD")
def test_another_system_is_no_bhyve_host() -> None:
    with pytest.raises(GuestError, match="no FreeBSD host"):
        FreeBsdHost()


def test_a_vm_that_was_destroyed_is_closed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "web1"
    node.touch()
    vm = FreeBsdVm("web1", str(node))

    def close(fd: int) -> None:
        os_close(fd)
        raise OSError(errno.ENXIO, "Device not configured")

    os_close = os.close
    monkeypatch.setattr(os, "close", close)
    vm.close()
    vm.close()


MEMORY = {
    "hw.pagesize": "4096",
    "vm.stats.vm.v_free_count": "100",
    "vm.stats.vm.v_inactive_count": "20",
}


@pytest.mark.parametrize(
    ("arc", "free_bytes"),
    [
        ({}, 120 * 4096),
        ({"size": "9000000", "c_min": "1000000"}, 120 * 4096 + 8000000),
        ({"size": "1000", "c_min": "5000"}, 120 * 4096),
    ],
)
def test_memory_that_zfs_gives_back_counts_as_free(
    monkeypatch: pytest.MonkeyPatch, arc: dict[str, str], free_bytes: int
) -> None:
    found = MEMORY | {f"kstat.zfs.misc.arcstats.{key}": value for key, value in arc.items()}
    monkeypatch.setattr(libc, "sysctl", found.get)
    assert FreeBsdHost.__new__(FreeBsdHost).free_memory_bytes() == free_bytes

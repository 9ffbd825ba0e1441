"""FreeBSD's answers are read, as texts and bytes; of the kernel only single calls are played."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.bhyve import freebsd, freebsd_text, libc, vmconf
from bhystream.backend.bhyve.freebsd import FreeBsdHost
from bhystream.backend.bhyve.freebsd_text import Mount
from bhystream.backend.bhyve.freebsd_vm import FreeBsdVm, cut, dirty_request, pieces, walk
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

SYSTEM_CONF = """\
switch_list="public"
type_public="standard"
bridge_public="bridge0"
datastore_list="default big iso1 plain gone"
path_big="zfs:zroot/big"
path_iso1="iso:/isos"   # not for guests
path_plain="/plain store"
path_plain="/not that"
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


def test_the_variables_of_a_configuration_are_read() -> None:
    found = vmconf.parse(SYSTEM_CONF)
    assert found["path_big"] == "zfs:zroot/big"
    assert found["path_iso1"] == "iso:/isos"
    assert found["path_plain"] == "/plain store"
    assert "suspend" not in found  # vm-bhyve reads only lines that begin with a letter


def test_datastores_are_found_as_vm_bhyve_finds_them() -> None:
    table = freebsd_text.mounts(MOUNTS)
    assert freebsd_text.store_path("zfs:zroot/vm", table) == "/vm"
    assert freebsd_text.store_path("/vm", table) == "/vm"
    assert freebsd_text.store_path("zfs:zroot", table) is None
    assert freebsd_text.store_path("iso:/isos", table) is None
    assert freebsd_text.store_path("", table) is None
    config = vmconf.parse(SYSTEM_CONF)
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
            assert libc.resident(mapping) == b"\1" + bytes(63)
            os.pwrite(file.fileno(), b"x", 5 * 4096)
            os.pwrite(file.fileno(), b"x", 64 * 4096 - 1)
            marks = libc.resident(mapping)
            assert [page for page, mark in enumerate(marks) if mark] == [0, 5, 63]
            assert len(marks) == 64


class Losing:
    """FreeBSD's mincore(2) in a process whose address space changes during each call.

    changes: the page of the change in each call, -1 for none; npages for the
    end, with or without a map entry after it.  resident: the resident pages.
    """

    def __init__(self, changes: list[int], resident: set[int], *, entry_behind: bool) -> None:
        self.changes = changes
        self.resident = resident
        self.entry_behind = entry_behind
        self.calls = 0

    def __call__(self, address: int, length: int, marks: Any) -> int:
        npages = length // 4096
        change = self.changes[min(self.calls, len(self.changes) - 1)]
        self.calls += 1
        for page in range(npages):
            marks[page] = 0x21 if page in self.resident else 0
            if page == change:
                # The scan goes on at the same page, and the marks before it are lost.
                ctypes.memset(marks, 0, page)
        if change == npages:
            if not self.entry_behind:
                return errno.ENOMEM
            ctypes.memset(marks, 0, npages)
        return 0


@pytest.mark.parametrize("entry_behind", [True, False])
@pytest.mark.parametrize("change", [0, 1, 2, 31, 62, 63, 64])
def test_answers_that_mincore_loses_are_asked_for_again(change: int, entry_behind: bool) -> None:
    pages = {0, 1, 5, 62, 63}
    kernel = Losing([change, change, -1], pages, entry_behind=entry_behind)
    with mmap.mmap(-1, 64 * 4096) as mapping:
        marks = libc.resident(mapping, kernel)
    assert {page for page, mark in enumerate(marks) if mark} == pages
    assert set(marks) == {0, 1}
    # A change at page 0 loses nothing, because no page lies before it.
    assert kernel.calls == (1 if change == 0 else 3)


@pytest.mark.parametrize("change", [7, 64])
def test_if_mincore_loses_answers_every_time_all_pages_count_as_resident(change: int) -> None:
    kernel = Losing([change], {0, 1}, entry_behind=False)
    with mmap.mmap(-1, 64 * 4096) as mapping:
        assert libc.resident(mapping, kernel) == b"\1" * 64
    assert kernel.calls < 100


def test_what_mincore_cannot_tell_is_an_error() -> None:
    with (
        mmap.mmap(-1, 4096) as mapping,
        pytest.raises(GuestError, match="cannot ask which pages are resident"),
    ):
        libc.resident(mapping, lambda address, length, marks: errno.EFAULT)


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


def test_a_range_is_cut_where_the_memory_map_is() -> None:
    maps = [entry(0, 2 * GIB), entry(2 * GIB, GIB), entry(4 * GIB, GIB)]
    assert pieces(maps, 0, 3 * GIB) == [(0, 2 * GIB), (2 * GIB, GIB)]
    assert pieces(maps, 4 * GIB, GIB) == [(4 * GIB, GIB)]
    assert pieces(maps, GIB, 4096) == [(GIB, 4096)]


def test_memory_domains_are_mapped_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = tmp_path / "web1"
    node.write_bytes(b"a" * 4096 + b"b" * 8192)
    maps = [entry(0, 4096), entry(4096, 8192)]
    monkeypatch.setattr(FreeBsdVm, "maps", lambda self: maps)
    asked: list[object] = []

    def map_pieces(fd: int, parts: object, *, is_writable: bool) -> mmap.mmap:
        asked.append((parts, is_writable))
        return mmap.mmap(-1, 1)

    monkeypatch.setattr(libc, "map_pieces", map_pieces)
    vm = FreeBsdVm("web1", str(node))
    vm.map(0, 12288)
    assert asked == [([(0, 4096), (4096, 8192)], False)]
    with vm.map(4096, 8192) as mapping:
        assert mapping[:] == b"b" * 8192
    vm.close()


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


# ---- mappings of several pieces


def test_pieces_of_a_file_are_mapped_behind_each_other_and_shared(tmp_path: Path) -> None:
    with (tmp_path / "node").open("w+b") as file:
        file.truncate(16 * 4096)
        os.pwrite(file.fileno(), b"two", 8 * 4096)
        pieces = [(0, 2 * 4096), (8 * 4096, 4096), (2 * 4096, 4096)]
        mapping = libc.map_pieces(file.fileno(), pieces, is_writable=True)
        assert len(mapping) == 4 * 4096 and mapping[2 * 4096 : 2 * 4096 + 3] == b"two"
        mapping[3 * 4096] = 7
        mapping[4095] = 8
        assert os.pread(file.fileno(), 1, 2 * 4096) == b"\7"
        assert os.pread(file.fileno(), 1, 4095) == b"\10"
        os.pwrite(file.fileno(), b"x", 5)
        assert mapping[5] == ord("x")
        before = sys.getrefcount(mapping)
        assert len(libc.resident(mapping)) == 4
        assert sys.getrefcount(mapping) == before
        mapping.close()


def test_pieces_are_mapped_to_be_read_only_unless_asked(tmp_path: Path) -> None:
    with (tmp_path / "node").open("w+b") as file:
        file.truncate(4096)
        mapping = libc.map_pieces(file.fileno(), [(0, 4096)], is_writable=False)
        assert memoryview(mapping).readonly
        with pytest.raises(TypeError):
            mapping[0] = 1


def test_a_piece_that_cannot_be_mapped_is_an_error(tmp_path: Path) -> None:
    with (tmp_path / "node").open("w+b") as file:
        file.truncate(8192)
        with pytest.raises(OSError, match="Invalid argument"):
            libc.map_pieces(file.fileno(), [(0, 4096), (1, 4096)], is_writable=False)

"""The host that a stand-in shows to the bhyve backend."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from bhystream.backend.bhyve.host import Host, MemoryMap
from bhystream.errors import GuestError
from bhystream.hypervisors import open_host
from bhystream.standin.kernel import StandinHost

from .rig import Rig, Spec


def test_it_is_found_by_its_environment(host: Rig) -> None:
    found: Host = open_host(host.host.environment())
    assert isinstance(found, StandinHost)
    assert found.kind == "standin"
    assert found.run_dir == host.directory / "run"
    assert found.environment() == host.host.environment()


def test_a_relative_directory_is_made_absolute(host: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(host.directory.parent)
    found = StandinHost(Path(host.directory.name))
    assert found.environment() == {"BHYSEND_VMM_DIR": str(host.directory)}


def test_sysctls_have_defaults_and_are_read_anew(host: Rig) -> None:
    assert host.host.sysctl("hw.machine") == "amd64"
    assert host.host.sysctl("vm.mincore_mapped") == "0"
    assert host.host.sysctl("no.such.sysctl") is None
    host.settings(sysctl={"hw.model": "Other", "no.such.sysctl": "1"})
    assert host.host.sysctl("hw.model") == "Other"
    assert host.host.sysctl("no.such.sysctl") == "1"


@pytest.mark.parametrize(
    ("generation", "date", "release"), [(4, "1501000", "15.1-"), (5, "1600000", "16.0-")]
)
def test_the_release_is_that_of_the_checkpoint_interface(
    host: Rig, generation: int, date: str, release: str
) -> None:
    host.settings(generation=generation)
    assert host.host.sysctl("kern.osreldate") == date
    assert (host.host.sysctl("kern.osrelease") or "").startswith(release)


def test_vmm_is_what_host_json_says(host: Rig) -> None:
    assert host.host.can_snapshot() is True and host.host.module_hash()
    for can in (False, None):
        host.settings(can_snapshot=can, module_hash="")
        assert host.host.can_snapshot() is can and host.host.module_hash() == ""


def test_a_regular_file_is_a_disk(host: Rig) -> None:
    path = host.directory / "disk"
    path.write_bytes(bytes(5120))
    found = host.host.disk(str(path))
    assert found is not None
    assert (found.size_bytes, found.sector_bytes) == (5120, 512)
    assert (found.can_delete, found.is_writable, found.is_device) == (False, True, False)
    (host.directory / "name").symlink_to("disk")
    assert host.host.disk(str(host.directory / "name")) == found
    assert host.host.disk(str(host.rom)) != found
    host.settings(disks={str(path): {"can_delete": True, "sector_bytes": 4096}})
    assert host.host.disk(str(path)) == found._replace(can_delete=True, sector_bytes=4096)


def test_what_is_no_regular_file_is_no_disk(host: Rig) -> None:
    for path in ("/dev/null", str(host.directory), str(host.directory / "none")):
        assert host.host.disk(path) is None


def test_a_tap_has_an_mtu(host: Rig) -> None:
    host.host.make_tap("tap7", None)
    host.host.make_tap("tap8", None)
    host.settings(mtus={"tap8": 9000})
    assert [host.host.mtu(tap) for tap in ("tap7", "tap8", "tap9")] == [1500, 9000, None]


def test_two_directories_are_two_hosts(host: Rig) -> None:
    with Rig() as other:
        assert host.host.sysctl("kern.hostuuid") != other.host.sysctl("kern.hostuuid")
        assert host.host.program_hash() == other.host.program_hash()


def test_what_host_json_says_is_told(host: Rig) -> None:
    host.settings(swap_used_bytes=5, free_memory_bytes=6, program_hash="seven", cpu_vendor="amd")
    found = host.host
    assert (found.swap_used_bytes(), found.free_memory_bytes()) == (5, 6)
    assert (found.program_hash(), found.cpu_vendor()) == ("seven", "amd")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"unknown": 1}', '{"generation": 3}', '{"fail": ["everything"]}']
)
def test_a_host_json_that_says_nonsense_is_refused(host: Rig, text: str) -> None:
    (host.directory / "host.json").write_text(text)
    with pytest.raises(GuestError):
        host.host.cpu_vendor()


def test_a_vm_is_created_opened_and_destroyed(host: Rig) -> None:
    kernel = host.host
    assert not kernel.exists("v")
    kernel.create("v")
    assert kernel.exists("v")
    with pytest.raises(GuestError):
        kernel.create("v")
    vm = kernel.open_vm("v")
    assert vm.maps() == ()
    vm.close()
    kernel.destroy("v")
    kernel.destroy("v")
    assert not kernel.exists("v")
    assert not list((host.directory / "vmm").iterdir())
    with pytest.raises(GuestError):
        kernel.open_vm("v")


@pytest.mark.parametrize("name", ["", "..", "a/b", "a.map", "a.dirty"])
def test_what_is_no_name_is_refused(host: Rig, name: str) -> None:
    with pytest.raises(GuestError):
        host.host.create(name)


def test_the_map_has_ram_rom_and_framebuffer(host: Rig) -> None:
    keys = {"memory.wired": "true"}
    host.start("g", Spec(memory="4G", devices=(("0.6.0", "fbuf"),), keys=keys))
    vm = host.host.open_vm("g")
    assert vm.maps() == (
        MemoryMap(0, 0, 0, 3 << 30, 7, True),
        MemoryMap(0xC0000000, 2, 0, 16 << 20, 3, False),
        MemoryMap((4 << 30) - 4096, 1, 0, 4096, 5, False),
        MemoryMap(4 << 30, 0, 4 << 30, 1 << 30, 7, True),
    )
    assert vm.topology() == (2, 1, 1)
    with pytest.raises(GuestError):
        vm.map(0xC0000000, 16 << 20)
    vm.close()
    vm.close()


def test_a_mapping_is_read_only(host: Rig) -> None:
    host.start("g")
    with host.host.open_vm("g").map(0, 64 << 20) as mapping, pytest.raises(TypeError):
        mapping[0] = 1


def test_resident_pages_are_those_with_data_and_asking_makes_none(host: Rig) -> None:
    host.start("g", Spec(memory="2G"))
    node = host.directory / "vmm" / "g"
    blocks = node.stat().st_blocks
    vm = host.host.open_vm("g")
    with vm.map(0, 2 << 30) as mapping:
        marks = vm.resident(mapping, 0)
        assert len(marks) == (2 << 30) // 4096
        assert 1024 < sum(map(bool, marks)) < 1100
    assert node.stat().st_blocks == blocks


def test_a_swapped_page_is_not_resident(host: Rig) -> None:
    host.start("g")
    vm = host.host.open_vm("g")
    with vm.map(0, 64 << 20) as mapping:
        page = vm.resident(mapping, 0).index(1, 256)
        (host.directory / "vmm" / "g.swapped").write_bytes(bytes(page) + b"\1")
        assert not vm.resident(mapping, 0)[page]
        assert any(mapping[page * 4096 : (page + 1) * 4096])


def test_a_swapped_page_of_highmem_is_not_resident(host: Rig) -> None:
    host.start("g", Spec(memory="4G"))
    vm = host.host.open_vm("g")
    with vm.map(4 << 30, 1 << 30) as mapping:
        page = vm.resident(mapping, 4 << 30).index(1)
        (host.directory / "vmm" / "g.swapped").write_bytes(bytes((3 << 18) + page) + b"\1")
        assert not vm.resident(mapping, 4 << 30)[page]


def test_mincore_says_nothing_where_it_looks_at_mapped_pages_only(host: Rig) -> None:
    host.settings(sysctl={"vm.mincore_mapped": "1"})
    host.start("g")
    vm = host.host.open_vm("g")
    with vm.map(0, 64 << 20) as mapping:
        assert vm.resident(mapping, 0) == bytes(16384)


def test_there_is_no_dirty_log_unless_the_host_keeps_one(host: Rig) -> None:
    host.start("g")
    assert host.host.open_vm("g").dirty([64 << 20, 0]) is None


def test_taps_and_bridges(host: Rig) -> None:
    kernel = host.host
    kernel.make_tap("tap7", "bridge1")
    kernel.make_tap("tap8", None)
    assert kernel.has_tap("tap7") and not kernel.has_tap("tap9")
    assert kernel.bridge_of("tap7") == "bridge1"
    assert kernel.bridge_of("tap8") is None
    assert kernel.bridge_of("tap9") is None
    with pytest.raises(GuestError):
        kernel.make_tap("tap7", None)


def test_the_datastore_is_there_if_its_directory_is(host: Rig) -> None:
    assert host.host.datastores() == [host.directory / "vm"]
    (host.directory / "vm").rmdir()
    assert host.host.datastores() == []


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no tmpfs to look at")
def test_tmpfs_is_memory_and_proc_is_not(host: Rig) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        assert host.host.is_memory(Path(made))
    assert not host.host.is_memory(Path("/proc/self"))
    assert not host.host.is_memory(Path("/nonexistent"))


def test_a_null_device_that_cannot_be_mounted_leaves_no_file(host: Rig) -> None:
    path = os.environ["PATH"]
    try:
        os.environ["PATH"] = "/nonexistent"
        with pytest.raises(GuestError):
            host.host.mount_null(host.directory)
    finally:
        os.environ["PATH"] = path
    assert not (host.directory / "null").exists()
    host.host.unmount_null(host.directory)

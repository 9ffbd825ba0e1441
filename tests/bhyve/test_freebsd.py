"""The facts about FreeBSD that the bhyve backend relies on, one test for each.

    BHYSEND_TEST_GUEST=try BHYSEND_TEST_CONFIG=/root/try.conf \\
        python -m pytest -m bhyve -v -rA tests/bhyve

Run the tests as root on a FreeBSD host with a running guest that may be lost.
The tests go from harmless to less so: some only look; some mount a devfs for a
moment; some have the guest write a checkpoint, for which the guest stands; and
some hold the guest (test_hold.py).  The report is what each test prints.

    BHYSEND_TEST_GUEST    the guest's name
    BHYSEND_TEST_CONFIG   its bhyve_config(5) file; not needed for a guest of vm-bhyve
    BHYSEND_TEST_HOLD     yes: also hold the guest
    BHYSEND_STATE_DIR     a directory, mode 0700, with space for the guest's memory
                          twice: two checkpoints write it; default /var/db/bhysend

If BHYSEND_VMM_DIR names a stand-in's directory, the tests run against the stand-in:
test_itself.py does so, to prove that the tests can pass and can fail.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bhystream.backend import programs
from bhystream.backend.bhyve import identity, libc, verdict
from bhystream.backend.bhyve import registers as reg
from bhystream.backend.bhyve.carriable import carriable
from bhystream.backend.bhyve.checkpoint import (
    Checkpoint,
    Outcome,
    RefusedError,
    UnansweredError,
    settle,
)
from bhystream.backend.bhyve.config import GuestConfig
from bhystream.backend.bhyve.host import HIGHMEM_BASE_GPA, VMM_DIR, Host
from bhystream.backend.bhyve.layout import memory_spans
from bhystream.backend.bhyve.memory import Memory
from bhystream.backend.bhyve.restoredguest import staging_root
from bhystream.backend.bhyve.snapshotfiles import Files, read_states
from bhystream.backend.process import is_alive
from bhystream.errors import GuestError
from bhystream.handover import state

IS_FREEBSD = sys.platform.startswith("freebsd")
PAGE_BYTES = 4096
LIMIT_S = 120.0
_SYSCTLS = (
    "hw.machine",
    "hw.model",
    "hw.ncpu",
    "hw.pagesize",
    "kern.osreldate",
    "kern.osrelease",
    "machdep.tsc_freq",
    "vm.mincore_mapped",
)

pytestmark = [
    pytest.mark.bhyve,
    pytest.mark.skipif(
        not IS_FREEBSD and VMM_DIR not in os.environ, reason="this is not a FreeBSD host"
    ),
]
only_freebsd = pytest.mark.skipif(not IS_FREEBSD, reason="the stand-in does not play this")


def say(*words: object) -> None:
    """Print an observation, for the report."""
    print("saw:", *words)


# ---- tests that only look


def test_this_host_can_take_snapshots(host: Host) -> None:
    for key, value in identity.describe(host).items():
        say(key, "=", value)
    assert verdict.ability_reasons(host) == ([], [])


def test_vmm_shows_its_snapshots_and_its_build(host: Host) -> None:
    say("can snapshot:", host.can_snapshot(), "vmm.ko:", host.module_hash() or "in the kernel")
    assert host.can_snapshot() is True


def test_a_file_is_a_disk_and_what_is_none_is_not(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    found = host.disk(str(path))
    say("a file of", tmp_path, "as a disk:", found)
    assert found is not None and not found.is_device
    assert (found.size_bytes, found.sector_bytes, found.is_writable) == (1 << 20, 512, True)
    for other in ("/dev/null", str(tmp_path), str(tmp_path / "none")):
        assert host.disk(other) is None


@only_freebsd
def test_a_device_is_the_disk_that_diskinfo_8_prints(host: Host) -> None:
    """The device is an md(4) of `mdconfig -t swap`, which can delete; its sectors are 4096 here."""
    unit = programs.ask("/sbin/mdconfig", "-a", "-t", "swap", "-s", "8m", "-S", "4096").strip()
    assert unit
    try:
        found = host.disk(f"/dev/{unit}")
        printed = programs.ask("/usr/sbin/diskinfo", f"/dev/{unit}").split()
        say(found, printed)
        assert found is not None and found.is_device and found.is_writable and found.can_delete
        assert [str(found.sector_bytes), str(found.size_bytes)] == printed[1:3]
    finally:
        programs.do(f"remove {unit}", "/sbin/mdconfig", "-d", "-u", unit)


@only_freebsd
def test_an_interface_has_the_mtu_that_ifconfig_8_prints(host: Host) -> None:
    printed = programs.ask("/sbin/ifconfig", "lo0")
    say(host.mtu("lo0"), printed.splitlines()[0])
    assert f" mtu {host.mtu('lo0')}" in printed
    assert host.mtu("nosuch9") is None


@only_freebsd
@pytest.mark.parametrize("name", _SYSCTLS)
def test_a_sysctl_is_read_as_sysctl_8_prints_it(host: Host, name: str) -> None:
    printed = programs.ask("/sbin/sysctl", "-n", name).strip()
    say(name, "=", printed)
    assert host.sysctl(name) == printed


def test_a_sysctl_that_does_not_exist_is_none(host: Host) -> None:
    assert host.sysctl("hw.no.such.thing") is None


def test_swap_and_free_memory_are_told(host: Host) -> None:
    say("swap used:", host.swap_used_bytes(), "memory that can be had:", host.free_memory_bytes())
    assert host.swap_used_bytes() >= 0
    assert host.free_memory_bytes() > 0


@only_freebsd
def test_the_node_is_roots_alone(guest: str) -> None:
    found = os.stat(f"/dev/vmm/{guest}")
    say(oct(found.st_mode), found.st_uid)
    assert stat.S_ISCHR(found.st_mode)
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, 0)


def test_a_vm_that_is_gone_cannot_be_opened(host: Host) -> None:
    assert not host.exists("bhytest-none")
    with pytest.raises(GuestError):
        host.open_vm("bhytest-none")


def test_a_node_is_told_from_one_that_is_made_anew(host: Host, guest: str, memory: Memory) -> None:
    """A node keeps its id, and each new node has a new id: so a record destroys only its own VM.

    The new nodes are those of an empty VM with another name.
    """
    before = host.node_id(guest)
    say(before)
    bytes(memory.views[0][:PAGE_BYTES])
    assert before == host.node_id(guest) != ""
    ids = []
    for _ in range(2):
        host.create("bhytest-new")
        try:
            ids.append(host.node_id("bhytest-new"))
        finally:
            host.destroy("bhytest-new")
        assert host.node_id("bhytest-new") == ""
    say(ids)
    assert len({before, *ids}) == 3


def test_the_memory_map_is_lowmem_from_0_and_highmem_from_4_gib(
    host: Host, guest: str, config: GuestConfig
) -> None:
    """VM_MMAP_GETNEXT has the number and the structure of ioctl.py, and comes to an end."""
    vm = host.open_vm(guest)
    try:
        maps = vm.maps()
    finally:
        vm.close()
    for one in maps:
        say(one)
    system = [one for one in maps if one.gpa in (0, HIGHMEM_BASE_GPA)]
    size = sum(one.length_bytes for one in system)
    assert size == int(config.section["keys"]["memory.size"])
    spans = [(gpa, length) for gpa, _, length in memory_spans(size)]
    assert [(one.gpa, one.length_bytes) for one in system] == spans


def test_the_topology_is_the_configurations(memory: Memory, config: GuestConfig) -> None:
    say(memory.topology)
    keys = config.section["keys"]
    assert memory.topology == tuple(int(keys[key]) for key in ("sockets", "cores", "threads"))


def test_no_vcpu_of_a_running_guest_waits_in_bhyve(memory: Memory) -> None:
    """VM_DEBUG_CPUS: a checkpoint would start a vCPU that the guest has not started."""
    waiting = sorted(memory.waiting_vcpus())
    say("waiting vCPUs:", waiting)
    assert waiting == []


def test_registers_are_read_and_say_whether_the_fpu_can_be_carried(
    host: Host, guest: str, config: GuestConfig
) -> None:
    """VM_GET_REGISTER_SET and VM_GET_SEGMENT_DESCRIPTOR cost each vCPU an exit."""
    ncpus = int(config.section["keys"]["cpus"])
    vm = host.open_vm(guest)
    try:
        for vcpu in range(ncpus):
            efer, rip, cr0 = vm.registers(vcpu, (reg.EFER, reg.RIP, reg.CR0))
            say(f"vCPU {vcpu}: EFER {efer:#x} RIP {rip:#x}", vm.descriptor(vcpu, reg.CS))
            assert cr0 & reg.CR0_PE
        reasons = carriable(vm, ncpus)
    finally:
        vm.close()
    say(reasons or "the FPU of every vCPU can be carried")


def test_a_dirty_log_is_whole_or_there_is_none(memory: Memory) -> None:
    """VM_GET_DIRTY_PAGE_LIST fails with ENOTTY on a stock kernel."""
    changed = memory.changed()
    say("no dirty log" if changed is None else f"a dirty log: {sum(1 for _ in changed)} extents")


def test_memory_is_mapped_at_the_guest_physical_address(
    host: Host, guest: str, memory: Memory
) -> None:
    """pread(2) at a guest physical address finds the bytes that the mapping has there."""
    same, count = 0, 0
    with node_of(host, guest) as fd:
        for gpa, offset, length in memory_spans(memory.size_bytes):
            view = memory.views[bool(offset)]
            for at in range(0, length, max(length // 64 // PAGE_BYTES, 1) * PAGE_BYTES):
                count += 1
                same += os.pread(fd, PAGE_BYTES, gpa + at) == bytes(view[at : at + PAGE_BYTES])
    say(f"{same} of {count} pages are the same; the guest runs, so not all have to be")
    assert same > count // 2


@contextmanager
def node_of(host: Host, guest: str) -> Iterator[int]:
    """Open the VM's node, read-only."""
    root = host.environment().get(VMM_DIR, "/dev")
    fd = os.open(f"{root}/vmm/{guest}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def test_memory_is_not_all_zero(memory: Memory) -> None:
    view = memory.views[0]
    data = sum(any(view[at : at + PAGE_BYTES]) for at in range(0, 16 << 20, PAGE_BYTES))
    say(f"{data} of the first 4096 pages have data")
    assert data > 0


def test_mincore_finds_pages_never_touched_and_they_are_zero(
    host: Host, guest: str, memory: Memory
) -> None:
    if host.sysctl("vm.mincore_mapped") != "0":
        pytest.skip("needs sysctl vm.mincore_mapped=0")
    touched = list(memory.touched())
    npages = memory.size_bytes // PAGE_BYTES
    ntouched = sum(end - first for first, end in touched)
    say(f"{ntouched} of {npages} pages touched, in {len(touched)} extents")
    assert 0 < ntouched <= npages
    ends = [end for first, end in touched if end < memory.views[0].nbytes // PAGE_BYTES]
    for page in ends[:64]:
        at = page * PAGE_BYTES
        assert not any(memory.views[0][at : at + PAGE_BYTES]), f"page {page} has data"


@only_freebsd
def test_mincore_of_our_mapping_says_nothing_where_it_looks_at_that(host: Host, guest: str) -> None:
    """With vm.mincore_mapped=1, the default, mincore(2) reports no page of a fresh mapping."""
    if host.sysctl("vm.mincore_mapped") == "0":
        pytest.skip("needs sysctl vm.mincore_mapped=1")
    vm = host.open_vm(guest)
    try:
        length = vm.maps()[0].length_bytes
        mapping = vm.map(0, length)
        marked = sum(map(bool, vm.resident(mapping, 0)))
        mapping.close()
    finally:
        vm.close()
    say(f"{marked} of {length // PAGE_BYTES} pages")
    assert marked < length // PAGE_BYTES


@only_freebsd
def test_no_answer_of_mincore_is_lost_while_a_thread_maps_memory() -> None:
    """A plain call of mincore(2) then loses answers, and bhysend would send such pages as zeros."""
    npages, is_over, nlost = 1 << 15, threading.Event(), 0

    def churn() -> None:
        while not is_over.wait(0.0005):
            mmap.mmap(-1, 1 << 20).close()

    def ask(address: int, length: int, marks: ctypes.Array[ctypes.c_char]) -> int:
        nonlocal nlost
        number = libc.mincore(address, length, marks)
        nlost += number != 0 or not all(marks.raw)
        return number

    with mmap.mmap(-1, npages * PAGE_BYTES, flags=mmap.MAP_SHARED) as mapping:
        for page in range(npages):
            mapping[page * PAGE_BYTES] = 1
        thread = threading.Thread(target=churn)
        thread.start()
        try:
            wrong = sum(libc.resident(mapping, ask) != b"\1" * npages for _ in range(20))
        finally:
            is_over.set()
            thread.join()
    say(f"{nlost} calls lost answers, {wrong} of 20 results were wrong")
    assert wrong == 0


# ---- the checkpoint socket


def test_the_socket_names_the_process_that_listens(host: Host, guest: str) -> None:
    """LOCAL_PEERCRED gives the process; ps(1) gives its start time."""
    connection = Checkpoint(host.run_dir, guest, guest)
    try:
        say(connection.identity)
        assert is_alive(connection.identity)
        words = programs.ask("/bin/ps", "-o", "args=", "-p", str(connection.identity.pid))
        say(words.strip())
        assert guest in words
    finally:
        connection.close()


def test_an_unknown_command_changes_nothing_and_tells_the_generation(
    host: Host, guest: str
) -> None:
    """G4 closes the connection, G5 answers with an error."""
    connection = Checkpoint(host.run_dir, guest, guest)
    try:
        connection.sync()
        try:
            say("G4:", connection.await_outcome(LIMIT_S))
        except RefusedError as error:
            say("G5:", error)
        assert is_alive(connection.identity)
    finally:
        connection.close()
    assert settle(host.run_dir, guest, guest, LIMIT_S)


def test_a_connection_held_open_keeps_others_waiting(host: Host, guest: str) -> None:
    """settle() relies on this: an answer proves that all earlier requests were served."""
    first = Checkpoint(host.run_dir, guest, guest)
    try:
        second = Checkpoint(host.run_dir, guest, guest)
        try:
            second.sync()
            with pytest.raises(UnansweredError):
                second.await_outcome(1.0)
            first.close()
            try:
                say(second.await_outcome(LIMIT_S))
            except RefusedError as error:
                say(error)
        finally:
            second.close()
    finally:
        first.close()


# ---- directories


def test_a_removed_directory_takes_no_file(staging: Path) -> None:
    """So a late request into a removed directory pauses nothing."""
    directory = staging / "removed"
    directory.mkdir()
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        directory.rmdir()
        with pytest.raises(FileNotFoundError) as raised:
            os.open("file", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=fd)
        say(raised.value)
    finally:
        os.close(fd)


def test_what_a_destination_makes_is_in_memory(host: Host) -> None:
    """If bhyrecv cannot write a guest's memory into its VM (-p), it puts the whole memory here."""
    root = staging_root(host, state.directory(), os.environ)
    say(root, "on a tmpfs:", host.is_memory(root))
    assert host.is_memory(root), "set BHYRECV_STAGING to a directory on a tmpfs"


def test_the_null_device_can_be_had_below_a_directory(host: Host, staging: Path) -> None:
    directory = staging / "dev"
    directory.mkdir()
    host.mount_null(directory)
    try:
        found, null = os.stat(directory / "null"), os.stat("/dev/null")
        say(oct(found.st_mode), found.st_rdev, "like", null.st_rdev)
        assert stat.S_ISCHR(found.st_mode)
        assert found.st_rdev == null.st_rdev
    finally:
        host.unmount_null(directory)
    assert not (directory / "null").exists()


# ---- checkpoints: the guest stands for a moment


def request(host: Host, guest: str, directory: Path, *, is_gone: bool = False) -> str:
    """Request a checkpoint into a directory; return the outcome.  is_gone: remove it before."""
    connection = Checkpoint(host.run_dir, guest, guest)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if is_gone:
            directory.rmdir()
        start = time.monotonic()
        connection.request(fd, "ckp")
        try:
            outcome = str(connection.await_outcome(LIMIT_S))
        except RefusedError as error:
            outcome = str(error)
        say(outcome, f"after {time.monotonic() - start:.3f} s")
        assert is_alive(connection.identity)
        assert outcome != str(Outcome.EXITED)
        return outcome
    finally:
        os.close(fd)
        connection.close()


def test_a_checkpoint_into_a_removed_directory_leaves_the_guest_alone(
    host: Host, guest: str, staging: Path
) -> None:
    directory = staging / "removed"
    directory.mkdir()
    request(host, guest, directory, is_gone=True)
    assert settle(host.run_dir, guest, guest, LIMIT_S)


def test_a_checkpoint_is_three_files_whose_meta_parses(
    host: Host, guest: str, staging: Path, memory: Memory
) -> None:
    request(host, guest, staging)
    files = Files(staging, "ckp")
    say(files.meta.read_text())
    say({path.name: path.stat().st_size for path in sorted(staging.iterdir())})
    meta, states = read_states(files, memory.size_bytes)
    assert files.memory.stat().st_size == memory.size_bytes == meta.memory_bytes
    assert sum(len(item.data) for item in states[1:]) == files.kern.stat().st_size
    say([(item.name, len(item.data)) for item in states])


def test_the_memory_file_is_lowmem_with_highmem_behind_it(
    host: Host, guest: str, staging: Path, memory: Memory
) -> None:
    """Pages that have not changed since are at the same offsets in the file and in the mapping."""
    request(host, guest, staging)
    same, count = 0, 0
    with Files(staging, "ckp").memory.open("rb") as file:
        for _, offset, length in memory_spans(memory.size_bytes):
            view = memory.views[bool(offset)]
            for at in range(0, length, max(length // 64 // PAGE_BYTES, 1) * PAGE_BYTES):
                file.seek(offset + at)
                count += 1
                same += file.read(PAGE_BYTES) == bytes(view[at : at + PAGE_BYTES])
    say(f"{same} of {count} pages are the same")
    assert same > count // 2


def test_the_memory_file_may_be_the_null_device(
    host: Host, guest: str, staging: Path, memory: Memory
) -> None:
    """bhyve follows a relative link over a mount point in capability mode, and seeks and writes."""
    directory = staging / "dev"
    directory.mkdir()
    host.mount_null(directory)
    try:
        files = Files(staging, "ckp")
        files.memory.symlink_to("dev/null")
        outcome = request(host, guest, staging)
        assert files.memory.is_symlink()
        assert stat.S_ISCHR(files.memory.stat().st_mode)
        _, states = read_states(files, memory.size_bytes)
        say(outcome, [(item.name, len(item.data)) for item in states])
    finally:
        host.unmount_null(directory)

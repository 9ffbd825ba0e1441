"""The checkpoint socket and the files of a checkpoint, on G4 and on G5."""

from __future__ import annotations

import json
import mmap
import os
import stat
from pathlib import Path

import pytest

from bhystream.backend.bhyve import nvlist
from bhystream.errors import GuestError
from bhystream.standin.guest import KERNEL_STRUCTS
from bhystream.standin.proof import DEVICE_PAGE, TIMER_PAGE
from bhystream.standin.vm import StandinVm

from .held import Hold
from .rig import Rig, Spec, assert_unbroken, await_true

_DEVICES = [
    "hostbridge@pci.0.0.0",
    "virtio-blk@pci.0.3.0",
    "virtio-net@pci.0.4.0",
    "lpc@pci.0.31.0",
    "atkbdc",
]


def goes_on(host: Rig, name: str = "g") -> bool:
    """Say whether a guest beats on without a fault."""
    console = host.guest(name).console
    console.await_sweeps(1)
    assert_unbroken(console)
    return host.host.exists(name)


def test_a_checkpoint_leaves_three_files_and_a_running_guest(host: Rig) -> None:
    host.start("g")
    assert host.checkpoint("g") == {}
    snapshot = host.snapshot("g")
    for path in (snapshot.path, snapshot.kern, snapshot.meta):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700 & ~_umask()
    assert snapshot.path.stat().st_size == 64 << 20
    assert goes_on(host)


def test_the_meta_file_is_that_of_g4(host: Rig) -> None:
    host.start("g")
    host.checkpoint("g")
    snapshot = host.snapshot("g")
    meta = snapshot.read_meta()
    assert meta["basic metadata"] == {
        "ncpus": 2,
        "vmname": "g",
        "memsize": 64 << 20,
        "memflags": 0,
    }
    assert [entry["device"] for entry in meta["kern_structs"]] == list(KERNEL_STRUCTS)
    assert [entry["device"] for entry in meta["devices"]] == _DEVICES
    at = 0
    for entry in [*meta["kern_structs"], *meta["devices"]]:
        assert set(entry) == {"device", "size", "file_offset"}
        assert entry["file_offset"] == at
        at += entry["size"]
    assert snapshot.kern.stat().st_size == at
    assert snapshot.meta.read_text() == json.dumps(meta, indent=2) + "\n"


def test_wired_memory_is_in_the_memflags(host: Rig) -> None:
    host.start("g", Spec(keys={"memory.wired": "true", "memory.guest_in_core": "true"}))
    host.checkpoint("g")
    assert host.snapshot("g").read_meta()["basic metadata"]["memflags"] == 3


def test_the_image_is_lowmem_and_highmem_behind_it(host: Rig) -> None:
    spec = Spec(memory="4G", touched="8M")
    host.start("g", spec)
    vm = host.host.open_vm("g")
    assert [(m.gpa, m.length_bytes) for m in vm.maps() if m.segid == 0] == [
        (0, 3 << 30),
        (4 << 30, 1 << 30),
    ]
    with vm.map(0, 3 << 30) as low, vm.map(4 << 30, 1 << 30) as high:
        snapshot = host.suspend("g")
        assert snapshot.path.stat().st_size == 4 << 30
        assert snapshot.path.stat().st_blocks * 512 < 64 << 20
        for mapping, base in ((low, 0), (high, (3 << 30) // 4096)):
            marks = vm.resident(mapping, 0 if base == 0 else 4 << 30)
            touched = [page for page, mark in enumerate(marks) if mark]
            assert len(touched) > 300
            for page in touched:
                assert snapshot.page(base + page) == mapping[page * 4096 : (page + 1) * 4096]


@pytest.mark.parametrize("generation", [4, 5])
def test_a_suspend_ends_the_process_and_its_vm_without_a_reply(generation: int) -> None:
    with Rig(generation=generation) as host:
        guest = host.start("g")
        host.suspend("g")
        assert guest.await_exit() == 5
        assert not host.host.exists("g")
        assert (host.directory / "run" / "g").is_socket()
        assert host.pid("g") is None


def test_a_mapping_outlives_the_vm(host: Rig) -> None:
    guest = host.start("g")
    vm = host.host.open_vm("g")
    with vm.map(0, 64 << 20) as mapping:
        snapshot = host.suspend("g")
        guest.await_exit()
        assert not host.host.exists("g")
        assert not vm.resident(mapping, 0)[-1]
        assert snapshot.path.read_bytes() == mapping[:]


def test_g4_answers_nothing(host: Rig) -> None:
    host.settings(generation=4)
    host.start("g")
    assert host.checkpoint("g") is None
    assert host.snapshot("g").read_meta()
    assert host.ask("g", cmd="ping") is None
    assert host.ask("g", cmd="checkpoint", filename="a", suspend=True) is None
    assert goes_on(host)


def test_g5_names_an_unknown_command(host: Rig) -> None:
    host.start("g")
    assert host.ask("g", cmd="ping") == {"error": "command 'ping' not found"}


def test_g5_returns_a_list_without_a_command(host: Rig) -> None:
    host.start("g")
    assert host.ask("g", word="x") == {"word": "x", "error": "missing command name"}


@pytest.mark.parametrize("missing", ["filename", "suspend", "fddir"])
def test_a_request_without_one_of_its_keys_does_nothing(host: Rig, missing: str) -> None:
    host.start("g")
    fd = os.open(host.directory / "s", os.O_RDONLY)
    pairs: dict[str, nvlist.Value] = {
        "cmd": "checkpoint",
        "filename": "g",
        "suspend": True,
        "fddir": nvlist.Descriptor(fd),
    }
    del pairs[missing]
    reply = host.ask("g", **pairs)
    os.close(fd)
    assert reply == {"error": "Invalid argument"}
    assert not list((host.directory / "s").iterdir())
    assert goes_on(host)


def test_a_broken_request_does_not_end_the_socket(host: Rig) -> None:
    host.start("g")
    with host.connect("g") as connection:
        connection.sendall(b"\0" * 19)
        assert connection.recv(1) == b""
    assert host.checkpoint("g") == {}


@pytest.mark.parametrize("suffix", ["", ".kern", ".meta"])
def test_a_file_that_does_not_open_leaves_the_guest_untouched(host: Rig, suffix: str) -> None:
    guest = host.start("g")
    (host.directory / "s" / f"g{suffix}").symlink_to("/dev/null")
    reply = host.checkpoint("g", suspend=True)
    if suffix == ".meta":  # bhyve reports no error of FILE.meta
        assert reply == {}
    else:
        assert reply is not None and "not capable" in str(reply["error"])
    what = {"": "create checkpoint", ".kern": "open kernel data", ".meta": "open vm metadata"}
    assert f"Failed to {what[suffix]}" in guest.stderr()
    assert goes_on(host)


@pytest.mark.parametrize("what", ["nothing", "a broken list"])
def test_a_connection_without_a_request_shows_in_the_log(host: Rig, what: str) -> None:
    guest = host.start("g")
    with host.connect("g") as connection:
        if what != "nothing":
            connection.sendall(b"\0" * 19)
    why = "Socket is not connected" if what == "nothing" else "Invalid argument"
    await_true(lambda: f"nvlist_recv() failed: {why}\n" in guest.stderr(), "a line in the log")
    assert host.checkpoint("g") == {}


def test_a_key_that_is_not_known_is_no_error(host: Rig) -> None:
    host.start("g")
    fds = os.pipe()
    fddir = os.open(host.directory / "s", os.O_RDONLY)
    pairs: dict[str, nvlist.Value] = {
        "cmd": "checkpoint",
        "word": "x",
        "pipe": nvlist.Descriptor(fds[1]),
        "filename": "g",
        "suspend": False,
        "fddir": nvlist.Descriptor(fddir),
    }
    assert host.ask("g", **pairs) == {}
    for fd in (fddir, fds[1]):
        os.close(fd)
    assert os.read(fds[0], 1) == b""  # the guest's copy is closed too
    os.close(fds[0])
    assert goes_on(host)


def test_a_name_of_more_than_a_component_is_refused(host: Rig) -> None:
    host.start("g")
    reply = host.checkpoint("g", filename="x" * 251)
    assert reply is not None and "File name too long" in str(reply["error"])


def test_a_fifo_is_no_memory_file(host: Rig) -> None:
    host.start("g")
    fifo = host.directory / "s" / "g"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    reply = host.checkpoint("g", suspend=True)
    os.close(reader)
    assert reply is not None and "Illegal seek" in str(reply["error"])
    assert goes_on(host)


@pytest.mark.parametrize("kind", ["virtio-rnd", "nvme"])
def test_devices_run_on_after_a_checkpoint_whether_it_failed_or_not(host: Rig, kind: str) -> None:
    host.start("g", Spec(devices=(*Spec().devices, ("0.5.0", kind))))
    assert host.checkpoint("g") == {} or kind == "nvme"
    with host.host.open_vm("g").map(0, 64 << 20) as mapping:
        for page in (TIMER_PAGE, DEVICE_PAGE + 1, DEVICE_PAGE + 2):
            await_count(mapping, page, count_of(mapping, page) + 1)
    assert goes_on(host)


def await_count(mapping: mmap.mmap, page: int, count: int) -> None:
    await_true(lambda: count_of(mapping, page) >= count, f"a change of page {page}")


def count_of(mapping: mmap.mmap, page: int) -> int:
    """Return the counter at the start of a page."""
    return int.from_bytes(mapping[page * 4096 : page * 4096 + 8], "little")


def test_a_device_takes_no_2_gib_at_once_where_it_is_clamped(host: Rig) -> None:
    staging = host.directory / "s"
    try:
        host.host.mount_null(staging)
    except GuestError as error:
        pytest.skip(str(error))
    try:
        host.settings(sysctl={"debug.devfs_iosize_max_clamp": "1"})
        host.start("g", Spec(memory="2G"))
        (staging / "g").symlink_to("null")
        reply = host.checkpoint("g", suspend=True)
        assert reply == {"error": "failed to snapshot: Invalid argument"}
        assert goes_on(host)
        host.settings(sysctl={})
        assert host.checkpoint("g") == {}
    finally:
        host.host.unmount_null(staging)


def test_memory_into_the_null_device_touches_nothing(host: Rig) -> None:
    staging = host.directory / "s"
    try:
        host.host.mount_null(staging)
    except GuestError as error:
        pytest.skip(str(error))
    try:
        guest = host.start("g", Spec(memory="6G"))
        (staging / "g").symlink_to("null")
        blocks = (host.directory / "vmm" / "g").stat().st_blocks
        assert host.checkpoint("g") == {}
        assert (host.directory / "vmm" / "g").stat().st_blocks < blocks + 64
        host.suspend("g")
        assert guest.await_exit() == 5
        assert stat.S_ISCHR((staging / "null").stat().st_mode)
        assert host.snapshot("g").read_meta()["basic metadata"]["memsize"] == 6 << 30
    finally:
        host.host.unmount_null(staging)
    assert not (staging / "null").exists()


def test_several_checkpoints_and_a_suspend_in_a_row(host: Rig) -> None:
    guest = host.start("g")
    for _ in range(20):
        assert host.checkpoint("g") == {}
    host.suspend("g")
    again = host.start("g", restore=host.snapshot("g").path)
    again.console.await_sweeps(1)
    assert_unbroken(guest.console, again.console)


def test_a_guest_that_hangs_answers_nothing_and_runs(host: Rig) -> None:
    host.start("g")
    host.settings(fail=["hang"])
    with host.connect("g") as connection:
        nvlist.send(connection, {"cmd": "ping"})
        assert goes_on(host)
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)


def test_the_dirty_log_has_every_page_that_was_written(host: Rig) -> None:
    host.settings(dirty_log=True)
    guest = host.start("g")
    vm = host.host.open_vm("g")
    with vm.map(0, 64 << 20) as mapping:
        copy = bytearray(64 << 20)
        assert follow(vm, mapping, copy) > 1024
        written = 0
        while written < 3000:
            written += follow(vm, mapping, copy)
        # The guest marks a page after writing the page, so it has to stand when it is killed.
        host.settings(fail=["hold-hang"])
        with Hold(host) as hold:
            hold.ask()
            await_true(lambda: len(host.waiting("g")) == 2, "the pause")
            guest.kill()
        follow(vm, mapping, copy)
        assert copy == mapping[:]
        assert follow(vm, mapping, copy) == 0


def follow(vm: StandinVm, mapping: mmap.mmap, copy: bytearray) -> int:
    """Copy every page that the log marks as written; return how many there were."""
    log = vm.dirty([64 << 20, 0])
    assert log is not None
    assert [len(part) for part in log] == [16384, 0]
    pages = [page for page, mark in enumerate(log[0]) if mark]
    for page in pages:
        at = page * 4096
        copy[at : at + 4096] = mapping[at : at + 4096]
    return len(pages)


def test_a_socket_answers_one_client_at_a_time(host: Rig) -> None:
    host.start("g")
    with host.connect("g") as first, host.connect("g") as second:
        nvlist.send(second, {"cmd": "ping"})
        second.settimeout(0.05)
        with pytest.raises(TimeoutError):
            second.recv(1)
        nvlist.send(first, {"cmd": "ping"})
        assert nvlist.receive(first)
        first.close()
        second.settimeout(10)
        assert nvlist.receive(second) == {"error": "command 'ping' not found"}


def _umask() -> int:
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("Umask")), 8)

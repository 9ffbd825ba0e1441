"""`-r`: refused snapshots, the values taken from a snapshot, and the order of a restore's steps."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.bhyve import powerbutton

from .rig import Guest, Rig, Snapshot, Spec, assert_unbroken, await_true


@pytest.fixture
def snapshot(host: Rig) -> Snapshot:
    """Make a suspended guest "g"."""
    guest = host.start("g")
    made = host.suspend("g")
    guest.await_exit()
    return made


def refused(host: Rig, snapshot: Snapshot, status: int, spec: Spec | None = None) -> str:
    """Restore, assert the status and that the guest never ran; return the message.

    If the stand-in left a VM, the VM is destroyed.
    """
    guest = host.launch("g", spec, snapshot.path)
    assert guest.await_exit() == status, guest.stderr()
    assert guest.console.lines() == []
    assert host.pid("g") is None
    host.host.destroy("g")
    return guest.stderr()


def edit_meta(snapshot: Snapshot, **basic: Any) -> None:
    meta = snapshot.read_meta()
    meta["basic metadata"].update(basic)
    snapshot.meta.write_text(json.dumps(meta))


_WORDS = {"": "guest RAM", ".kern": "guest kernel data", ".meta": "guest metadata"}


@pytest.mark.parametrize("suffix", ["", ".kern", ".meta"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_file_that_is_empty_or_missing_is_refused_before_a_vm_is_made(
    host: Rig, snapshot: Snapshot, suffix: str, is_there: bool
) -> None:
    path = Path(f"{snapshot.path}{suffix}")
    path.unlink()
    if is_there:
        path.touch()
    guest = host.launch("g", restore=snapshot.path)
    assert guest.await_exit() == 1
    assert f"Failed to load {_WORDS[suffix]} file." in guest.stderr()
    assert f"Failed to read checkpoint info from file: '{snapshot.path}'." in guest.stderr()
    assert not host.host.exists("g")


@pytest.mark.parametrize("change", [-4096, 4096])
def test_an_image_of_another_size_is_refused(host: Rig, snapshot: Snapshot, change: int) -> None:
    os.truncate(snapshot.path, (64 << 20) + change)
    text = refused(host, snapshot, 1)
    assert f"mem size mismatch: {64 << 20} vs {(64 << 20) + change}" in text
    assert "Failed to restore VM memory." in text


def test_a_meta_file_that_is_cut_off_is_refused(host: Rig, snapshot: Snapshot) -> None:
    snapshot.meta.write_text(snapshot.meta.read_text()[:-20])
    assert "Failed to parse metadata file" in refused(host, snapshot, 1)


@pytest.mark.parametrize(("key", "status"), [("ncpus", 1), ("memsize", 4)])
def test_a_meta_file_without_a_number_is_refused(
    host: Rig, snapshot: Snapshot, key: str, status: int
) -> None:
    edit_meta(snapshot, **{key: 0})
    refused(host, snapshot, status)


def test_a_blob_outside_of_kern_is_an_assertion(host: Rig, snapshot: Snapshot) -> None:
    os.truncate(snapshot.kern, snapshot.kern.stat().st_size - 1)
    assert "Assertion failed" in refused(host, snapshot, -6)


def test_a_device_that_is_not_in_the_snapshot_is_refused(host: Rig, snapshot: Snapshot) -> None:
    spec = Spec(devices=(*Spec().devices, ("0.9.0", "virtio-rnd")))
    text = refused(host, snapshot, 1, spec)
    assert "Failed to lookup dev: virtio-rnd@pci.0.9.0" in text
    assert "Failed to restore PCI device state." in text


def test_a_kernel_structure_that_is_missing_is_refused(host: Rig, snapshot: Snapshot) -> None:
    meta = snapshot.read_meta()
    meta["kern_structs"] = [entry for entry in meta["kern_structs"] if entry["device"] != "vlapic"]
    snapshot.meta.write_text(json.dumps(meta))
    assert "Cannot find kern struct vlapic" in refused(host, snapshot, 65)


@pytest.mark.parametrize(
    ("said", "keys"),
    [
        ({"can_delete": True}, {}),
        ({"is_writable": False}, {}),
        ({}, {"pci.0.3.0.ro": "true"}),
        ({}, {"pci.0.4.0.mtu": "1400"}),
    ],
)
def test_a_device_with_other_constants_is_refused(
    host: Rig, snapshot: Snapshot, said: dict[str, bool], keys: dict[str, str]
) -> None:
    if said:
        host.settings(disks={str(host.directory / "g-0-3-0.img"): said})
    name = "virtio-net@pci.0.4.0" if "pci.0.4.0.mtu" in keys else "virtio-blk@pci.0.3.0"
    text = refused(host, snapshot, 1, Spec(keys=keys))
    assert f"Failed to restore dev: {name} 22" in text


def test_a_disk_of_another_size_is_not_noticed(host: Rig, snapshot: Snapshot) -> None:
    (host.directory / "g-0-3-0.img").write_bytes(bytes(8192))
    host.start("g", restore=snapshot.path).console.await_sweeps(1)


def test_a_restore_that_fails_leaves_a_vm_that_no_bhyve_takes(
    host: Rig, snapshot: Snapshot
) -> None:
    host.settings(fail=["restore"])
    assert host.launch("g", restore=snapshot.path).await_exit() == 65
    assert host.host.exists("g")
    host.settings(fail=[])
    again = host.launch("g", restore=snapshot.path)
    assert again.await_exit() == 4
    assert "Device busy" in again.stderr()
    host.host.destroy("g")
    host.start("g", restore=snapshot.path).console.await_sweeps(1)


def test_a_restore_runs_a_vcpu_that_was_never_started(host: Rig) -> None:
    spec = Spec(cpus=2, keys={"standin.waiting": "1"})
    host.start("g", spec).console.await_sweeps(1)
    snapshot = host.suspend("g")
    again = host.launch("g", spec, snapshot.path)
    assert again.console.await_wrong("vcpu 1: ran without a SIPI")


def test_memory_and_vcpus_of_the_snapshot_override_those_given(
    host: Rig, snapshot: Snapshot
) -> None:
    guest = host.start("g", Spec(cpus=1, memory="128M"), snapshot.path)
    guest.console.await_sweeps(1)
    vm = host.host.open_vm("g")
    assert vm.maps()[0].length_bytes == 64 << 20
    assert vm.topology() == (2, 1, 1)


def test_the_guest_may_have_another_name(host: Rig, snapshot: Snapshot) -> None:
    assert snapshot.read_meta()["basic metadata"]["vmname"] == "g"
    host.start("other", restore=snapshot.path).console.await_sweeps(1)
    assert host.host.exists("other") and not host.host.exists("g")


def test_the_name_is_the_snapshots_where_none_is_given(host: Rig, snapshot: Snapshot) -> None:
    config = host.write_config("g", Spec(), host.directory / "console")
    guest = host.run("-k", str(config), "-r", str(snapshot.path))
    host.connect("g").close()
    assert host.host.exists("g")
    guest.kill()


def test_sigterm_ends_it_until_its_power_button_is_connected(host: Rig, snapshot: Snapshot) -> None:
    guest = host.start("g", restore=snapshot.path)
    assert not host.host.has_power_button(guest.pid)
    assert guest.power_off() == -signal.SIGTERM
    host.host.destroy("g")
    again = host.start("g", restore=snapshot.path)
    assert host.host.trace(again.pid).write_ports(powerbutton.CONNECT, 60.0)
    assert host.host.has_power_button(again.pid)
    assert again.power_off() == 1


def test_the_holes_of_an_image_stay_holes(host: Rig) -> None:
    spec = Spec(memory="8G")
    host.start("g", spec)
    snapshot = host.suspend("g")
    again = host.start("g", spec, snapshot.path)
    again.console.await_sweeps(1)
    assert (host.directory / "vmm" / "g").stat().st_blocks * 512 < 32 << 20


def test_highmem_is_read_from_behind_lowmem(host: Rig) -> None:
    spec = Spec(memory="4G", touched="8M")
    guest = host.start("g", spec)
    guest.console.await_sweeps(1)
    again = host.start("g", spec, host.suspend("g").path)
    again.console.await_sweeps(1)
    assert_unbroken(guest.console, again.console)


def test_one_snapshot_is_restored_twice(host: Rig, snapshot: Snapshot) -> None:
    for _ in range(2):
        guest = host.start("g", restore=snapshot.path)
        guest.console.await_sweeps(1)
        guest.kill()
        host.host.destroy("g")


def test_a_guest_moves_over_and_over_without_a_gap(host: Rig) -> None:
    guests = [host.start("g")]
    for _ in range(3):
        guests[-1].console.await_sweeps(1)
        guests.append(host.start("g", restore=host.suspend("g").path))
    guests[-1].console.await_sweeps(1)
    assert_unbroken(*(guest.console for guest in guests))


def test_a_restore_that_fails_before_the_socket_leaves_nothing(
    host: Rig, snapshot: Snapshot
) -> None:
    (host.directory / "run" / "g").unlink()
    host.settings(fail=["restore"])
    refused(host, snapshot, 65)
    assert not (host.directory / "run" / "g").exists()


def test_a_restore_that_fails_after_the_socket_never_ran(host: Rig, snapshot: Snapshot) -> None:
    (host.directory / "run" / "g").unlink()
    host.settings(fail=["restore-late"])
    refused(host, snapshot, 71)
    assert (host.directory / "run" / "g").is_socket()


def test_a_slow_restore_waits_with_its_socket(host: Rig, snapshot: Snapshot) -> None:
    (host.directory / "run" / "g").unlink()
    host.settings(fail=["slow-restore"])
    guest = host.launch("g", restore=snapshot.path)
    await_true(lambda: _is_restoring(host, guest), "a restore under way")
    assert not (host.directory / "run" / "g").exists()
    assert guest.console.lines() == []
    (host.directory / "release").touch()
    guest.console.await_sweeps(1)


def test_failures_to_restore_do_not_touch_a_boot(host: Rig) -> None:
    host.settings(fail=["restore", "restore-late", "slow-restore"])
    host.start("g").console.await_sweeps(1)


def test_the_image_may_be_gone_once_the_guest_runs(host: Rig, snapshot: Snapshot) -> None:
    guest = host.start("g", restore=snapshot.path)
    for path in (snapshot.path, snapshot.kern, snapshot.meta):
        path.unlink()
    guest.console.await_sweeps(1)
    opened = [os.readlink(fd) for fd in Path(f"/proc/{guest.pid}/fd").iterdir()]
    assert not any(str(snapshot.path) in path for path in opened)


def _is_restoring(host: Rig, guest: Guest) -> bool:
    """Say whether the node contains memory already: 4 MiB at least."""
    node = host.directory / "vmm" / "g"
    return node.exists() and node.stat().st_blocks * 512 >= 4 << 20

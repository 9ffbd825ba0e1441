"""`-r`: what is refused, what is taken from the snapshot, and in which order things appear."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from .rig import Guest, Rig, Snapshot, Spec, assert_unbroken, await_true


@pytest.fixture
def snapshot(host: Rig) -> Snapshot:
    """Make a suspended guest "g"."""
    guest = host.start("g")
    made = host.suspend("g")
    guest.await_exit()
    return made


def refused(host: Rig, snapshot: Snapshot, status: int, spec: Spec | None = None) -> str:
    """Restore, expect the status and no VM, and return the message."""
    guest = host.launch("g", spec, snapshot.path)
    assert guest.await_exit() == status, guest.stderr()
    assert not host.host.exists("g")
    assert guest.console.lines() == []
    assert host.pid("g") is None
    return guest.stderr()


def edit_meta(snapshot: Snapshot, **basic: Any) -> None:
    meta = snapshot.read_meta()
    meta["basic metadata"].update(basic)
    snapshot.meta.write_text(json.dumps(meta))


@pytest.mark.parametrize("suffix", ["", ".kern", ".meta"])
def test_an_empty_file_is_refused(host: Rig, snapshot: Snapshot, suffix: str) -> None:
    os.truncate(f"{snapshot.path}{suffix}", 0)
    assert "empty" in refused(host, snapshot, 1)


@pytest.mark.parametrize("suffix", ["", ".kern", ".meta"])
def test_a_missing_file_is_refused(host: Rig, snapshot: Snapshot, suffix: str) -> None:
    os.unlink(f"{snapshot.path}{suffix}")
    assert "No such file" in refused(host, snapshot, 1)


@pytest.mark.parametrize("change", [-4096, 4096])
def test_an_image_of_another_size_is_refused(host: Rig, snapshot: Snapshot, change: int) -> None:
    os.truncate(snapshot.path, (64 << 20) + change)
    assert "mem size mismatch" in refused(host, snapshot, 1)


def test_a_meta_file_that_is_cut_off_is_refused(host: Rig, snapshot: Snapshot) -> None:
    snapshot.meta.write_text(snapshot.meta.read_text()[:-20])
    refused(host, snapshot, 65)


def test_a_kern_file_that_is_cut_off_is_refused(host: Rig, snapshot: Snapshot) -> None:
    os.truncate(snapshot.kern, snapshot.kern.stat().st_size - 1)
    assert "outside" in refused(host, snapshot, 65)


def test_a_device_that_is_not_in_the_snapshot_is_refused(host: Rig, snapshot: Snapshot) -> None:
    spec = Spec(devices=(*Spec().devices, ("0.9.0", "virtio-rnd")))
    assert "virtio-rnd@pci.0.9.0" in refused(host, snapshot, 1, spec)


def test_a_kernel_structure_that_is_missing_is_refused(host: Rig, snapshot: Snapshot) -> None:
    meta = snapshot.read_meta()
    meta["kern_structs"] = [entry for entry in meta["kern_structs"] if entry["device"] != "vlapic"]
    snapshot.meta.write_text(json.dumps(meta))
    assert "vlapic" in refused(host, snapshot, 1)


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
    assert guest.power_off() == 1


def test_the_holes_of_an_image_stay_holes(host: Rig) -> None:
    spec = Spec(memory="8G")
    host.start("g", spec)
    snapshot = host.suspend("g")
    again = host.start("g", spec, snapshot.path)
    again.console.await_sweeps(1)
    assert (host.directory / "vmm" / "g").stat().st_blocks * 512 < 32 << 20


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
    refused(host, snapshot, 4)
    assert not (host.directory / "run" / "g").exists()


def test_a_restore_that_fails_after_the_socket_never_ran(host: Rig, snapshot: Snapshot) -> None:
    (host.directory / "run" / "g").unlink()
    host.settings(fail=["restore-late"])
    refused(host, snapshot, 4)
    assert (host.directory / "run" / "g").is_socket()


def test_a_slow_restore_waits_with_its_socket(host: Rig, snapshot: Snapshot) -> None:
    (host.directory / "run" / "g").unlink()
    host.settings(fail=["slow-restore"])
    guest = host.launch("g", restore=snapshot.path)
    await_true(lambda: _is_restoring(host, guest), "no restore under way")
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
    """Say whether memory is in the node."""
    node = host.directory / "vmm" / "g"
    return node.exists() and node.stat().st_blocks * 512 >= 4 << 20

"""A restore that waits in its read: the behavior of bhyve that bhyrecv's early start relies on."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import pytest

from .early import Early
from .held import Hold
from .rig import Console, Guest, Rig, Spec, assert_unbroken, await_true

_BYTES = 64 << 20
_PAGE = 4096


@dataclass
class Moved:
    """A guest that was held, copied and killed, and the files of its early start."""

    early: Early
    before: Console
    image: bytes
    kern: bytes

    def finish(self, guest: Guest) -> None:
        """Give the restore its missing pages; assert that the guest goes on without a gap."""
        self.early.release(self.kern, self.image[-_PAGE:])
        guest.console.await_sweeps(2)
        assert_unbroken(self.before, guest.console)


@pytest.fixture
def moved(host: Rig) -> Moved:
    """Rehearse, hold, copy and destroy a guest; prepare its early start under the same name."""
    guest = host.start("g")
    host.checkpoint("g")
    early = Early(host, "g", host.snapshot("g").read_meta(), _BYTES)
    guest.console.await_sweeps(1)
    with Hold(host) as hold, host.host.open_vm("g").map(0, _BYTES) as mapping:
        hold.ask()
        hold.await_held()
        image, kern = mapping[:], host.snapshot("g").kern.read_bytes()
        guest.kill()
        host.host.destroy("g")
    return Moved(early, guest.console, image, kern)


def is_held(guest: Guest, early: Early) -> bool:
    """Say whether the restored guest waits: bhyve lives, the VM has memory, nothing was printed."""
    return guest.process.poll() is None and guest.console.lines() == [] and early.is_mapped()


def test_a_restore_waits_for_its_last_page_and_then_runs_right(host: Rig, moved: Moved) -> None:
    guest = moved.early.start()
    moved.early.cut()
    moved.early.await_read()
    moved.early.write_all(moved.image)
    assert is_held(guest, moved.early)
    assert host.pid("g") is None
    moved.finish(guest)
    assert moved.early.read(moved.early.last_page) == moved.image[-_PAGE:]


def test_it_is_stopped_there_at_no_cost(host: Rig, moved: Moved) -> None:
    guest = moved.early.start()
    moved.early.cut()
    moved.early.await_read()
    os.kill(guest.pid, signal.SIGSTOP)
    moved.early.write_all(moved.image)
    moved.early.release(moved.kern, moved.image[-_PAGE:])
    assert host.pid("g") is None and guest.console.lines() == []
    os.kill(guest.pid, signal.SIGCONT)
    guest.console.await_sweeps(2)
    assert_unbroken(moved.before, guest.console)


def test_the_vm_shows_its_vcpus_waiting(host: Rig, moved: Moved) -> None:
    guest = moved.early.start()
    moved.early.cut()
    moved.early.await_read()
    vm = host.host.open_vm("g")
    assert vm.topology() == (2, 1, 1)
    assert (vm.maps()[0].gpa, vm.maps()[0].length_bytes) == (0, _BYTES)
    assert host.waiting("g") == {0, 1}
    moved.early.write_all(moved.image)
    moved.finish(guest)
    assert not host.waiting("g")


def test_what_it_opens_is_open_while_it_is_held(host: Rig, moved: Moved) -> None:
    guest = moved.early.start()
    moved.early.cut()
    moved.early.await_read()
    opened = [
        os.readlink(f"/proc/{guest.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{guest.pid}/fd")
    ]
    for path in ("g-0-3-0.img", "net/tap-g-0-4-0", guest.console.path.name):
        assert f"{host.directory}/{path}" in opened


def test_a_disk_that_is_missing_shows_before_any_memory(host: Rig, moved: Moved) -> None:
    config = host.write_config("g", Spec(), host.directory / "console")
    (host.directory / "g-0-3-0.img").unlink()
    guest = host.run("-k", str(config), "-r", str(moved.early.files.path), "g")
    assert guest.await_exit() == 4
    assert "could not open" in guest.stderr()


def test_released_before_kern_is_there_it_dies_and_never_ran(host: Rig, moved: Moved) -> None:
    guest = moved.early.start()
    moved.early.cut()
    moved.early.await_read()
    os.truncate(moved.early.files.path, _BYTES)
    assert guest.await_exit() == -signal.SIGBUS
    assert guest.console.lines() == []
    assert host.host.exists("g")


def test_cut_too_late_it_dies_and_never_ran(host: Rig, moved: Moved) -> None:
    host.settings(fail=["late-cut"])
    guest = moved.early.start()
    moved.early.cut()
    assert guest.await_exit() == -signal.SIGBUS
    assert guest.console.lines() == []


@pytest.mark.parametrize("has_virtio", [True, False])
def test_zeros_instead_of_kern_never_run(host: Rig, moved: Moved, has_virtio: bool) -> None:
    """FILE.kern is neither cut nor written, so bhyve takes its zeros for the guest's state."""
    guest = moved.early.start(Spec() if has_virtio else Spec(devices=()))
    assert guest.await_exit() == (1 if has_virtio else -signal.SIGABRT)
    assert guest.console.lines() == []


def test_what_is_written_before_it_was_read_is_lost(host: Rig, moved: Moved) -> None:
    host.settings(fail=["slow-read"])
    guest = moved.early.start()
    moved.early.cut()
    assert moved.early.read(moved.early.last_page - 1) == bytes(_PAGE)
    moved.early.write_all(moved.image)
    (host.directory / "release").touch()
    moved.early.await_read()
    assert moved.early.read(1) == bytes(_PAGE)
    moved.early.write_all(moved.image)
    moved.finish(guest)


def test_pages_are_read_in_ascending_order(host: Rig, moved: Moved) -> None:
    """So a marker in the last page but one proves that all pages before it were read."""
    early = moved.early
    middle = early.last_page // 2
    early.files.put_page(middle, b"m" * _PAGE)
    guest = early.start()
    await_true(early.is_mapped, "the memory of the VM")
    os.truncate(early.files.path, (middle + 1) * _PAGE)
    os.truncate(early.files.kern, 0)
    await_true(lambda: early.read(middle) == b"m" * _PAGE, "the read of the middle")
    assert early.read(early.last_page - 1) == bytes(_PAGE)
    early.files.put_page(middle, b"n" * _PAGE)  # too late: bhyve reads each page only once
    early.files.put_page(early.last_page - 1, early.marker)
    early.await_read()
    assert early.read(middle) == b"m" * _PAGE
    early.write_all(moved.image)
    moved.finish(guest)


def test_a_restore_that_ends_at_the_cut_is_noticed(host: Rig, moved: Moved) -> None:
    host.settings(fail=["slow-read", "short-read"])
    guest = moved.early.start()
    moved.early.cut()
    (host.directory / "release").touch()
    assert guest.await_exit() == 1
    assert host.host.exists("g")


def test_a_restore_that_ends_before_the_cut_leaves_its_vm(host: Rig, moved: Moved) -> None:
    host.settings(fail=["restore-early"])
    guest = moved.early.start()
    assert guest.await_exit() == 1
    assert moved.early.is_mapped()


def test_constants_that_differ_show_after_the_release(host: Rig, moved: Moved) -> None:
    host.settings(disks={str(host.directory / "g-0-3-0.img"): {"can_delete": True}})
    guest = moved.early.start()
    moved.early.cut()
    moved.early.await_read()
    moved.early.write_all(moved.image)
    assert is_held(guest, moved.early)
    moved.early.release(moved.kern, moved.image[-_PAGE:])
    assert guest.await_exit() == 1
    assert guest.console.lines() == []


def test_killed_while_it_is_held_it_leaves_its_vm(host: Rig, moved: Moved) -> None:
    guest = moved.early.start()
    moved.early.cut()
    moved.early.await_read()
    os.kill(guest.pid, signal.SIGSTOP)
    guest.kill()
    assert host.host.exists("g")
    host.host.destroy("g")
    again = moved.early.start()
    again.kill()


def test_a_vm_that_is_destroyed_ends_it(host: Rig, moved: Moved) -> None:
    guest = moved.early.start()
    moved.early.cut()
    moved.early.await_read()
    host.host.destroy("g")
    assert guest.await_exit() == 4

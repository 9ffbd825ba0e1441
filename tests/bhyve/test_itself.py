"""The tests of a FreeBSD host, run on the stand-in to prove that they can pass and can fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.backend.bhyve.host import VMM_DIR
from standin.rig import Rig, Spec, assert_unbroken

TESTS = [Path(__file__).with_name(name) for name in ("test_freebsd.py", "test_hold.py")]
# A test that fails may leave a state that its fixture cannot undo: then the fixture fails too.
BAD = ("FAILED", "ERROR")
NO_MOUNT = {
    "test_the_null_device_can_be_had_below_a_directory",
    "test_the_memory_file_may_be_the_null_device",
}


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as made:
        yield made


# Faults that are planted in our own code before the tests run.
REGISTER_SPOILT = """
from bhystream.backend.bhyve import fpustate
whole = fpustate.save
def save(host, name, ncpus, directory):
    saved = whole(host, name, ncpus, directory)
    vm = host.open_vm(name, is_writable=True)
    vm.set_register(1, 5, vm.registers(1, (5,))[0] + 1)
    vm.close()
    return saved
fpustate.save = save
"""
FPU_LEFT_OUT = """
from bhystream.backend.bhyve import fpustate
fpustate.save = lambda *words: ([], [])
"""
NOT_LET_GO = """
from bhystream.backend.bhyve.paused import BhyvePaused
BhyvePaused.release = lambda self: b""
"""
NOT_SENT = """
from bhystream.backend.bhyve.checkpoint import Checkpoint
whole = Checkpoint.request
Checkpoint.request = lambda self, fd, name, fifo=None: whole(self, fd, name)
"""


def start(rig: Rig, *devices: tuple[str, str], **more: str) -> Path:
    """Start a guest with a complete configuration for a move; return the configuration's path.

    devices: further devices, as in Spec.  more: standin.* keys.
    """
    disk, tap = rig.directory / "disk", "tap-g"
    disk.touch()
    rig.host.make_tap(tap, "bridge0")
    keys = {
        "uuid": "11111111-2222-3333-4444-555555555555",
        "pci.0.3.0.device": "virtio-blk",
        "pci.0.3.0.path": str(disk),
        "pci.0.3.0.ser": "A1",
        "pci.0.4.0.device": "virtio-net",
        "pci.0.4.0.backend": tap,
        "pci.0.4.0.mac": "58:9c:fc:00:00:01",
        **{f"standin.{key}": value for key, value in more.items()},
    }
    spec = Spec(devices=devices, keys=keys)
    rig.start("g", spec)
    path = rig.write_config("g", spec, rig.directory / "g-0.console")
    text = "".join(
        line for line in path.read_text().splitlines(True) if not line.startswith("standin.")
    )
    path.write_text(text)
    return path


def run(rig: Rig, config: Path, *words: str, **more: str) -> tuple[dict[str, str], str]:
    """Run TESTS; return the outcome of each test, and all output.  more: of the environment."""
    env = {
        **os.environ,
        VMM_DIR: str(rig.directory),
        "BHYSEND_TEST_GUEST": "g",
        "BHYSEND_TEST_CONFIG": str(config),
        "BHYSEND_STATE_DIR": str(rig.directory / "state"),
        **more,
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "-rA",
            "-p",
            "no:cacheprovider",
            *words,
            *map(str, TESTS),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = re.findall(r"^\S+::(\S+?)(?:\[\S+\])? (PASSED|FAILED|SKIPPED|ERROR)", done.stdout, re.M)
    return dict(found), done.stdout


@pytest.mark.parametrize("generation", [4, 5])
def test_all_that_the_stand_in_has_passes(rig: Rig, generation: int) -> None:
    rig.settings(generation=generation)
    config = start(rig)
    found, said = run(rig, config, BHYSEND_TEST_HOLD="yes")
    bad = {name for name, outcome in found.items() if outcome in BAD}
    assert bad <= (set() if os.geteuid() == 0 else NO_MOUNT), said
    assert found["test_a_held_guest_stands_saved_in_its_process"] == "PASSED", said
    assert f"saw: G{generation}:" in said
    assert_unbroken(rig.guest("g").console)
    assert list((rig.directory / "state" / "held").iterdir()) == []


def test_the_guest_is_not_held_unless_that_is_wanted(rig: Rig) -> None:
    found, said = run(rig, start(rig), "-k", "held or fifo")
    assert found["test_a_held_guest_stands_saved_in_its_process"] == "SKIPPED", said
    assert found["test_a_fifo_takes_so_many_bytes_and_no_more"] == "PASSED", said


def test_another_configuration_is_found_out(rig: Rig) -> None:
    config = start(rig)
    config.write_text(config.read_text().replace("memory.size=64M", "memory.size=128M"))
    found, _ = run(rig, config, "-k", "memory_map")
    assert found["test_the_memory_map_is_lowmem_from_0_and_highmem_from_4_gib"] == "FAILED"


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("hang", "test_a_checkpoint_is_three_files_whose_meta_parses"),
        ("no-anchor", "test_it_stands_when_all_of_ours_are_killed_and_any_process_lets_it_run"),
        ("hold-fail", "test_a_held_guest_stands_saved_in_its_process"),
        ("hold-grow", "test_a_held_guest_stands_saved_in_its_process"),
        ("held-die", "test_a_held_guest_goes_on_in_its_process"),
    ],
)
def test_a_bhyve_that_breaks_its_promise_is_found_out(rig: Rig, fault: str, name: str) -> None:
    config = start(rig)
    rig.settings(fail=[fault])
    found, said = run(rig, config, "-k", name, "--timeout", "5", BHYSEND_TEST_HOLD="yes")
    assert found[name] in BAD, said


def test_a_vmm_without_snapshots_is_found_out(rig: Rig) -> None:
    config = start(rig)
    rig.settings(can_snapshot=False)
    found, said = run(rig, config, "-k", "vmm_shows or this_host_can")
    assert [*found.values()] == ["FAILED", "FAILED"], said


def test_a_vcpu_that_was_never_started_is_found_out(rig: Rig) -> None:
    found, said = run(rig, start(rig, waiting="1"), "-k", "waits_in_bhyve")
    assert found["test_no_vcpu_of_a_running_guest_waits_in_bhyve"] == "FAILED", said


def test_a_device_that_goes_on_is_found_out(rig: Rig) -> None:
    config = start(rig, ("0.5.0", "e1000"))
    name = "test_a_held_guest_stands_saved_in_its_process"
    found, said = run(rig, config, "-k", name, BHYSEND_TEST_HOLD="yes")
    assert found[name] == "FAILED", said
    assert "a device or a vCPU goes on while the guest is held" in said


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (REGISTER_SPOILT, "test_the_fpu_is_stored_and_nothing_else_is_changed_by_it"),
        (FPU_LEFT_OUT, "test_the_fpu_is_stored_and_nothing_else_is_changed_by_it"),
        (NOT_LET_GO, "test_a_held_guest_goes_on_in_its_process"),
        (NOT_SENT, "test_it_stands_when_all_of_ours_are_killed_and_any_process_lets_it_run"),
    ],
    ids=["register", "fpu", "release", "anchor"],
)
def test_a_fault_of_ours_is_found_out(rig: Rig, fault: str, name: str) -> None:
    (rig.directory / "sitecustomize.py").write_text(fault)
    path = os.pathsep.join([str(rig.directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    config = start(rig)
    found, said = run(rig, config, "-k", name, BHYSEND_TEST_HOLD="yes", PYTHONPATH=path)
    assert found[name] in BAD, said


def test_a_guest_that_is_not_named_is_asked_for(rig: Rig) -> None:
    found, said = run(rig, start(rig), "-k", "topology", BHYSEND_TEST_GUEST="")
    assert found["test_the_topology_is_the_configurations"] == "ERROR"
    assert "set BHYSEND_TEST_GUEST to the name of a running guest" in said

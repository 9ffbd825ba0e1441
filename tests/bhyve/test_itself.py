"""The tests of a FreeBSD host, run against the stand-in: they can pass, and they can fail."""

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
NO_MOUNT = {
    "test_the_null_device_can_be_had_below_a_directory",
    "test_the_memory_file_may_be_the_null_device",
}


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as made:
        yield made


def start(rig: Rig) -> Path:
    """Start a guest whose configuration says all that may travel; return its file."""
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
    }
    spec = Spec(devices=(), keys=keys)
    rig.start("g", spec)
    path = rig.write_config("g", spec, rig.directory / "g-0.console")
    text = "".join(
        line for line in path.read_text().splitlines(True) if not line.startswith("standin.")
    )
    path.write_text(text)
    return path


def run(rig: Rig, config: Path, *words: str, **more: str) -> tuple[dict[str, str], str]:
    """Run the tests; return each test's outcome, and all that was printed."""
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
    bad = {name for name, outcome in found.items() if outcome in ("FAILED", "ERROR")}
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


def test_a_snapshot_that_is_not_made_is_found_out(rig: Rig) -> None:
    config = start(rig)
    rig.settings(fail=["hang"])
    found, _ = run(rig, config, "-k", "three_files", "--timeout", "5")
    assert found.get("test_a_checkpoint_is_three_files_whose_meta_parses") != "PASSED"


def test_a_guest_that_is_not_named_is_asked_for(rig: Rig) -> None:
    found, said = run(rig, start(rig), "-k", "topology", BHYSEND_TEST_GUEST="")
    assert found["test_the_topology_is_the_configurations"] == "ERROR"
    assert "set BHYSEND_TEST_GUEST to the name of a running guest" in said

"""Guests of the real vm-bhyve, which move between two of its names on one host.

    BHYSEND_TEST_ROM=/root/rom.bin python -m pytest -m bhyve tests/bhyve/test_vm_bhyve.py

vm-bhyve has to be configured (vm_enable and vm_dir in rc.conf, `vm init`).  The guest is the boot
ROM of rom.py, as vm-bhyve's loader uefi-custom: the test puts the ROM in its place, where no other
file may be, and makes a switch bhystest and two guests, which it removes in the end.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from .rom import BHYVECTL, program, until

pytestmark = pytest.mark.bhyve

VM = "/usr/local/sbin/vm"
NAMES = ("bhystest1", "bhystest2")
SWITCH = "bhystest"
CONF = """\
loader="uefi-custom"
cpu=1
memory=128M
uuid="0f0e0d0c-2222-3333-4444-777777777777"
network0_type="virtio-net"
network0_switch="bhystest"
network0_mac="58:9c:fc:0a:b0:01"
disk0_type="virtio-blk"
disk0_name="disk0.img"
disk0_opts="ser=BHYSTEST"
"""


def vm(*words: str) -> str:
    """Run vm-bhyve; return what it prints."""
    done = subprocess.run(
        [VM, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120.0
    )
    return done.stdout + done.stderr


class Store:
    """vm-bhyve's datastore, with the two guests."""

    def __init__(self, path: Path, directory: Path) -> None:
        """path: the datastore.  directory: of the two state directories."""
        self.path, self.directory = path, directory
        for name in NAMES:
            guest = path / name
            guest.mkdir()
            (guest / f"{name}.conf").write_text(CONF)
            with (guest / "disk0.img").open("wb") as disk:
                disk.truncate(1 << 20)
        for side in ("a", "b"):
            (directory / side).mkdir(mode=0o700)

    def state(self, name: str) -> str:
        """Return what `vm list` says of a guest: "Stopped", "Running", "Locked (HOST)"."""
        [line] = [line for line in vm("list").splitlines() if line.split()[:1] == [name]]
        return re.sub(r"Running \(.*", "Running", line.split(None, 7)[7].strip())

    def pid(self, name: str) -> int:
        found = subprocess.run(["/bin/pgrep", "-fx", f"bhyve: {name}"], capture_output=True)
        return int(found.stdout or 0)

    def lock(self, name: str) -> str:
        with suppress(FileNotFoundError):
            return (self.path / name / "run.lock").read_text().partition("\n")[0]
        return ""

    def log(self, name: str) -> str:
        return (self.path / name / "vm-bhyve.log").read_text()

    def start(self, name: str) -> None:
        print(vm("start", name))
        until(lambda: self.pid(name), "bhyve")
        until(lambda: os.path.exists(f"/var/run/bhyve/{name}"), "checkpoint socket")
        time.sleep(3.0)  # the ROM starts its vCPU

    def environment(self, side: str) -> dict[str, str]:
        return {**os.environ, "BHYSEND_STATE_DIR": f"{self.directory}/{side}"}

    def moved(self, source: str, to: str, *options: str) -> None:
        """Move a guest, and assert that vm-bhyve knows where it is."""
        receive = ["env", f"BHYSEND_STATE_DIR={self.directory}/b", *program("bhyrecv"), to]
        done = subprocess.run(
            [*program("bhysend"), "-f", *options, source, *receive],
            env=self.environment("a"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=900.0,
        )
        print(done.stderr)
        assert done.returncode == 0
        assert self.state(source).startswith("Locked")
        assert "already" in vm("start", source)
        assert self.state(to) == "Running"
        assert self.lock(to) == os.uname().nodename

    def bhysend(self, *words: str) -> int:
        """Run bhysend; return its status."""
        done = subprocess.run(
            [*program("bhysend"), *words],
            env=self.environment("a"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=900.0,
        )
        return done.returncode

    @contextmanager
    def moving(self, source: str, to: str) -> Iterator[subprocess.Popen[bytes]]:
        """Begin a slow move in three stages, and yield the first."""
        sending = [*program("bhysend"), "-f", "-B", "1M", "-a", source]
        stages: list[subprocess.Popen[bytes]] = []
        for words, side in (
            (sending, "a"),
            ([*program("bhyrecv"), to], "b"),
            ([*program("bhysend"), "-A"], "a"),
        ):
            reader = stages[-1].stdout if stages else subprocess.DEVNULL
            stages.append(
                subprocess.Popen(
                    words, env=self.environment(side), stdin=reader, stdout=subprocess.PIPE
                )
            )
        try:
            yield stages[0]
        finally:
            for stage in stages:
                assert stage.stdout
                stage.stdout.close()
            for stage in stages:
                stage.wait(900.0)

    def end(self) -> None:
        for name in NAMES:
            with suppress(FileNotFoundError):
                (self.path / name / f"{name}.conf").write_text(CONF)
            vm("poweroff", "-f", name)
            if os.path.exists(f"/dev/vmm/{name}"):
                subprocess.run([BHYVECTL, "--destroy", f"--vm={name}"], check=False)
        for name in NAMES:
            with suppress(AssertionError):
                until(lambda name=name: not self.lock(name).isalnum(), "end", 20.0)  # type: ignore[misc]
            shutil.rmtree(self.path / name, ignore_errors=True)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    rom = os.environ.get("BHYSEND_TEST_ROM")
    if not rom or not os.path.exists(VM):
        pytest.skip("needs vm-bhyve, and BHYSEND_TEST_ROM")
    path = Path(subprocess.check_output(["/bin/sh", "-c", _DATASTORE], text=True).strip())
    firmware = path / ".config" / "BHYVE_UEFI.fd"
    if firmware.exists():
        assert filecmp.cmp(firmware, rom), f"{firmware} is another file"
    else:
        shutil.copy(rom, firmware)
    vm("switch", "create", SWITCH)
    for name in NAMES:
        assert not (path / name).exists()
    made = Store(path, tmp_path)
    try:
        yield made
    finally:
        made.end()
        vm("switch", "destroy", SWITCH)


_DATASTORE = '. /etc/rc.subr; load_rc_config vm; echo "$vm_dir"'


def test_a_guest_moves_there_and_back_reboots_and_is_powered_off(store: Store) -> None:
    here, there = NAMES
    store.start(here)
    store.moved(here, there)
    assert "starting bhyve (run 1)" in store.log(there)
    first = store.pid(there)
    subprocess.run([BHYVECTL, "--force-reset", f"--vm={there}"], check=True)
    until(lambda: store.pid(there) not in (0, first), "bhyve after the reboot")
    assert "starting bhyve (run 2)" in store.log(there)
    time.sleep(3.0)  # the ROM starts its vCPU
    store.moved(there, here)
    vm("poweroff", "-f", here)
    until(lambda: store.state(here) == "Stopped", "end of the supervisor")
    assert not store.lock(here)


def test_with_a_command_at_the_pause(store: Store) -> None:
    store.start(NAMES[0])
    store.moved(*NAMES, "-p", "true")


@pytest.mark.parametrize("on_fault", ["shutdown", "restart"])
def test_a_move_that_fails_boots_nothing(store: Store, on_fault: str) -> None:
    here, there = NAMES
    conf = store.path / there / f"{there}.conf"
    conf.write_text(f'{CONF}on_fault="{on_fault}"\n')
    store.start(here)
    with store.moving(here, there) as bhysend:
        until(lambda: store.lock(there) == "waits-for-bhyrecv", "bhyve that waits")
        assert store.state(there) == "Locked (waits-for-bhyrecv)"
        assert "already" in vm("start", there)
        bhysend.terminate()
        assert bhysend.wait(900.0) == 75
    until(lambda: store.state(there) == "Stopped", "end of the supervisor")
    assert "run 2" not in store.log(there) or not store.pid(there)
    assert not os.path.exists(f"/dev/vmm/{there}")
    assert store.state(here) == "Running"
    store.moved(here, there)


def test_a_held_guest_that_a_shutdown_ends_is_not_booted(store: Store) -> None:
    """`vm stopall -f`, which rc.shutdown runs, ends bhyve by SIGTERM, and then its supervisor."""
    here = NAMES[0]
    store.start(here)
    assert store.bhysend("-f", here) == 80
    os.kill(store.pid(here), signal.SIGTERM)
    until(lambda: not store.pid(here), "end of bhyve")
    until(lambda: "stopped" in store.log(here), "end of the supervisor")
    assert store.state(here) == "Locked (held-by-bhysend)"
    vm("start", here)
    assert not store.pid(here)
    assert store.bhysend("--resume", here) == 69
    assert store.state(here) == "Locked (held-by-bhysend)"
    assert store.bhysend("--discard", here) == 0
    assert store.state(here).startswith("Locked")
    # It surely never ran elsewhere.
    (store.path / here / "run.lock").unlink()
    store.start(here)

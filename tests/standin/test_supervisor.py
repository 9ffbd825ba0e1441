"""vm-bhyve's loop around a guest."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from .rig import Rig, Spec, await_true, supervised


def arguments(host: Rig, name: str, *, has_rom: bool = True) -> list[str]:
    """Return a supervised guest's command line.  The supervisor makes the guest's tap0."""
    config = host.write_config(
        name, Spec(devices=(), has_rom=has_rom), host.directory / f"{name}-0.console"
    )
    return ["-AHP", "-k", str(config), "-s", "5:0,virtio-net,tap0"]


def log(host: Rig, name: str = "v") -> str:
    return (host.directory / "vm" / name / "vm-bhyve.log").read_text()


def is_clean(host: Rig, name: str = "v") -> bool:
    """Say whether a guest has left nothing but its logs."""
    left = {path.name for path in (host.directory / "vm" / name).iterdir()}
    return (
        left == {"vm-bhyve.log", "bhyve.log"}
        and not host.host.exists(name)
        and not host.host.has_tap("tap0")
    )


def test_a_guest_runs_with_its_tap_and_lock_until_it_is_powered_off(host: Rig) -> None:
    with supervised(host, "v", *arguments(host, "v"), tap="tap0:bridge0") as supervisor:
        supervisor.console.await_sweeps(1)
        assert host.host.bridge_of("tap0") == "bridge0"
        lock = host.directory / "vm" / "v" / "run.lock"
        assert lock.read_text().strip() == os.uname().nodename
        pid = host.pid("v")
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
        assert supervisor.await_exit() == 0
    assert is_clean(host)
    text = log(host)
    assert " [bhyve devices: -s 5:0,virtio-net,tap0]\n" in text
    assert text.index("starting bhyve (run 1)") < text.index("bhyve exited with status 1")
    assert text.endswith(": stopped\n")


def power(host: Rig, number: signal.Signals) -> int:
    """Send the guest's process a signal; return the process's id."""
    pid = host.pid("v")
    assert pid is not None
    os.kill(pid, number)
    return pid


def write_conf(host: Rig, line: str) -> None:
    directory = host.directory / "vm" / "v"
    directory.mkdir(exist_ok=True)
    (directory / "v.conf").write_text(f'loader="uefi"\n{line}\n')


def test_a_guest_that_reboots_is_started_again(host: Rig) -> None:
    with supervised(host, "v", *arguments(host, "v"), tap="tap0:bridge0") as supervisor:
        supervisor.console.await_beats(3)
        first = power(host, signal.SIGUSR1)
        await_true(lambda: host.pid("v") not in (None, first), "a second guest")
        await_true(lambda: supervisor.console.beats().count(1) == 2, "a second boot")
        assert "starting bhyve (run 2)" in log(host)


def test_on_restart_is_asked(host: Rig) -> None:
    write_conf(host, "on_restart=shutdown")
    with supervised(host, "v", *arguments(host, "v"), tap="tap0:bridge0") as supervisor:
        supervisor.console.await_beats(1)
        power(host, signal.SIGUSR1)
        assert supervisor.await_exit() == 0
    assert "exited with status 0" in log(host)


def test_a_suspend_is_a_fault_and_ends_the_loop(host: Rig) -> None:
    with supervised(host, "v", *arguments(host, "v"), tap="tap0:bridge0") as supervisor:
        supervisor.console.await_beats(1)
        host.suspend("v")
        assert supervisor.await_exit() == 0
    assert is_clean(host)
    assert "exited with status 5" in log(host)


def test_a_restart_restores_nothing(host: Rig) -> None:
    words = arguments(host, "v")
    host.host.make_tap("tap0", None)
    first = host.run(*words, "v")
    first.console.await_beats(0)
    snapshot = host.suspend("v")
    # Until the process is gone, its socket takes connections and drops them.
    assert first.await_exit() == 5
    (host.directory / "net" / "tap0").unlink()
    words += ["-r", str(snapshot.path)]
    with supervised(host, "v", *words, tap="tap0:bridge0") as supervisor:
        await_true(lambda: host.pid("v") is not None, "the restored guest")
        power(host, signal.SIGUSR1)
        await_true(lambda: "run 2" in log(host), "a second run")
        await_true(lambda: supervisor.console.beats().count(1) == 2, "a second boot")
        assert log(host).count(" -r ") == 1


def test_the_loader_makes_the_vm_of_a_guest_without_boot_rom(host: Rig) -> None:
    words = arguments(host, "v", has_rom=False)
    with supervised(host, "v", *words, tap="tap0:bridge0") as supervisor:
        supervisor.console.await_beats(1)
        power(host, signal.SIGUSR1)
        await_true(lambda: supervisor.console.beats().count(1) == 2, "a second boot")


def test_a_guest_that_is_killed_ends_the_loop(host: Rig) -> None:
    with supervised(host, "v", *arguments(host, "v"), tap="tap0:bridge0") as supervisor:
        supervisor.console.await_beats(1)
        power(host, signal.SIGKILL)
        assert supervisor.await_exit() == 0
    assert is_clean(host)
    assert "bhyve exited with status 137" in log(host)


@pytest.mark.parametrize("is_discarded", [True, False])
def test_on_fault_restart_starts_a_killed_guest_again(host: Rig, is_discarded: bool) -> None:
    """It starts when the old VM is gone; until then the next bhyve finds the VM busy."""
    write_conf(host, "on_fault=restart")
    with supervised(host, "v", *arguments(host, "v"), tap="tap0:bridge0") as supervisor:
        supervisor.console.await_beats(1)
        power(host, signal.SIGKILL)
        await_true(lambda: "run 3" in log(host), "another start")
        assert log(host).count("exited with status 4\n") >= 1
        if is_discarded:
            host.host.destroy("v")
            await_true(lambda: supervisor.console.beats().count(1) == 2, "a second boot")


@pytest.mark.parametrize("is_known", [True, False])
def test_the_suspending_lock_ends_the_loop_all_the_same(host: Rig, is_known: bool) -> None:
    """vm-bhyve knows suspending.lock from 1.7.0 on."""
    write_conf(host, "on_fault=restart")
    host.settings(knows_suspending_lock=is_known)
    with supervised(host, "v", *arguments(host, "v"), tap="tap0:bridge0") as supervisor:
        supervisor.console.await_beats(1)
        (host.directory / "vm" / "v" / "suspending.lock").touch()
        power(host, signal.SIGKILL)
        if is_known:
            assert supervisor.await_exit() == 0
            assert log(host).endswith(": suspended\n")
        else:
            await_true(lambda: "run 2" in log(host), "another start")


def test_a_lock_of_another_host_refuses_the_start(host: Rig) -> None:
    directory = host.directory / "vm" / "v"
    directory.mkdir()
    (directory / "run.lock").write_text("elsewhere\n")
    with supervised(host, "v", *arguments(host, "v")) as supervisor:
        assert supervisor.await_exit() == 1
        assert "elsewhere" in supervisor.stderr()
    assert (directory / "run.lock").exists()


def test_a_vm_that_exists_refuses_the_start(host: Rig) -> None:
    host.host.create("v")
    with supervised(host, "v", *arguments(host, "v")) as supervisor:
        assert supervisor.await_exit() == 1
    assert host.host.exists("v")


def test_a_bhyve_that_comes_first_in_path_is_run(host: Rig, tmp_path: Path) -> None:
    program = tmp_path / "bhyve"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/argv\nexit 1\n')
    program.chmod(0o755)
    before = os.environ["PATH"]
    try:
        os.environ["PATH"] = f"{tmp_path}:{before}"
        with supervised(host, "v", *arguments(host, "v"), tap="tap0:bridge0") as supervisor:
            assert supervisor.await_exit() == 0
    finally:
        os.environ["PATH"] = before
    assert (tmp_path / "argv").read_text().split() == [*arguments(host, "v"), "v"]
    assert is_clean(host)

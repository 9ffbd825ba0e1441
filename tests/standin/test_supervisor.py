"""vm-bhyve's loop around a guest."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from .rig import Rig, Spec, await_true, supervised


def arguments(host: Rig, name: str, *, has_rom: bool = True) -> list[str]:
    """Return a supervised guest's command line; it uses tap0, which the supervisor makes."""
    config = host.write_config(
        name, Spec(devices=(), has_rom=has_rom), host.directory / f"{name}-0.console"
    )
    return ["-AHP", "-k", str(config), "-s", "5:0,virtio-net,tap0"]


def log(host: Rig, name: str = "v") -> str:
    return (host.directory / "vm" / name / "vm-bhyve.log").read_text()


def is_clean(host: Rig, name: str = "v") -> bool:
    """Say whether nothing of a guest is left but its log."""
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


def test_a_suspend_with_the_lock_ends_the_loop(host: Rig) -> None:
    host.settings(suspend_status=0)
    with supervised(host, "v", *arguments(host, "v"), tap="tap0:bridge0") as supervisor:
        supervisor.console.await_beats(1)
        (host.directory / "vm" / "v" / "suspending.lock").touch()
        host.suspend("v")
        assert supervisor.await_exit() == 0
    assert is_clean(host)
    assert log(host).endswith(": suspended\n")


def test_a_suspend_of_status_0_without_the_lock_starts_the_guest_again(host: Rig) -> None:
    host.settings(suspend_status=0)
    with supervised(host, "v", *arguments(host, "v"), tap="tap0:bridge0") as supervisor:
        supervisor.console.await_beats(3)
        first = host.pid("v")
        host.suspend("v")
        await_true(lambda: host.pid("v") not in (None, first), "no second guest")
        await_true(lambda: supervisor.console.beats().count(1) == 2, "no second boot")
        assert "starting bhyve (run 2)" in log(host)


def test_a_suspend_of_status_5_ends_the_loop(host: Rig) -> None:
    with supervised(host, "v", *arguments(host, "v"), tap="tap0:bridge0") as supervisor:
        supervisor.console.await_beats(1)
        host.suspend("v")
        assert supervisor.await_exit() == 0
    assert is_clean(host)


def test_a_restart_restores_nothing(host: Rig) -> None:
    host.settings(suspend_status=0)
    words = arguments(host, "v")
    host.host.make_tap("tap0", None)
    first = host.run(*words, "v")
    first.console.await_beats(0)
    snapshot = host.suspend("v")
    # Until it is gone its socket takes connections, and lets them fall.
    assert first.await_exit() == 0
    (host.directory / "net" / "tap0").unlink()
    words += ["-r", str(snapshot.path)]
    with supervised(host, "v", *words, tap="tap0:bridge0") as supervisor:
        host.suspend("v")
        await_true(lambda: "run 2" in log(host), "no second run")
        await_true(lambda: supervisor.console.beats().count(1) == 2, "no second boot")
        assert log(host).count(" -r ") == 1


def test_the_loader_makes_the_vm_of_a_guest_without_boot_rom(host: Rig) -> None:
    host.settings(suspend_status=0, node_left=True)
    words = arguments(host, "v", has_rom=False)
    with supervised(host, "v", *words, tap="tap0:bridge0") as supervisor:
        supervisor.console.await_beats(1)
        host.suspend("v")
        await_true(lambda: supervisor.console.beats().count(1) == 2, "no second boot")


def test_a_guest_that_is_killed_ends_the_loop(host: Rig) -> None:
    with supervised(host, "v", *arguments(host, "v"), tap="tap0:bridge0") as supervisor:
        supervisor.console.await_beats(1)
        pid = host.pid("v")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert supervisor.await_exit() == 0
    assert is_clean(host)
    assert "bhyve exited with status 137" in log(host)


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

"""The stand-in's command line, its exit statuses, and the starts that it refuses."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from bhystream.errors import BhyError, UsageError
from bhystream.standin.config import parse, parse_memory

from .rig import Rig, Spec


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256", 256 << 20),
        ("1048575", 1048575 << 20),
        ("1048576", 1048576),
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("3G", 3 << 30),
        ("1048576K", 1 << 30),
        ("1T", 1 << 40),
        ("4096B", 4096),
    ],
)
def test_memory_is_parsed_as_bhyve_does(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "0", "M", "1.5G", "-1G", "1X", "5000B"])
def test_memory_of_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_memory(text)


def test_the_default_is_256_mib() -> None:
    assert parse(["g"]).memsize_bytes() == 256 << 20


def test_the_last_of_files_and_options_wins(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_text("# a comment\ncpus=3\n\nmemory.size=1G # more\n")
    config = parse(["-c", "1", "-o", "uuid=x", "-k", str(path), "-m", "2G", "-o", "uuid=y", "g"])
    assert config.keys == {"cpus": "3", "uuid": "y", "memory.size": "2G", "name": "g"}


def test_values_expand_variables() -> None:
    config = parse(["-o", "pci.0.3.0.path=/d/%(name)/%(what)", "-o", "what=disk", "g"])
    assert config.get("pci.0.3.0.path") == "/d/g/disk"


@pytest.mark.parametrize(
    ("text", "topology"),
    [
        ("2", (2, 1, 1)),
        ("cpus=4,sockets=1,cores=2,threads=2", (1, 2, 2)),
        ("cpus=4,cores=2", (2, 2, 1)),
        ("sockets=2,cores=3", (2, 3, 1)),
    ],
)
def test_a_topology_is_read(text: str, topology: tuple[int, int, int]) -> None:
    assert parse(["-c", text, "g"]).topology() == topology


def test_a_topology_that_does_not_multiply_is_refused() -> None:
    with pytest.raises(UsageError):
        parse(["-c", "cpus=3,sockets=1,cores=2,threads=1", "g"]).topology()


def test_the_options_of_vm_bhyve_make_keys() -> None:
    words = (
        "-c 1 -m 1024M -AHPw -l bootrom,/rom,/vars -U 12-34 -u -S "
        "-s 0,hostbridge -s 31,lpc -s 4:0,virtio-blk,/d0,nocache -s 4:1,ahci,hd:/d1,cd:/d2 "
        "-s 5:0,virtio-net,tap5,mac=58:9c:fc:01:e2:2f -l com1,/dev/nmdm-g.1A g"
    )
    config = parse(words.split())
    assert config.devices() == [
        ("hostbridge", "0.0.0"),
        ("virtio-blk", "0.4.0"),
        ("ahci", "0.4.1"),
        ("virtio-net", "0.5.0"),
        ("lpc", "0.31.0"),
    ]
    expected = {
        "lpc.bootrom": "/rom",
        "lpc.bootvars": "/vars",
        "lpc.com1.path": "/dev/nmdm-g.1A",
        "pci.0.4.0.path": "/d0",
        "pci.0.4.0.nocache": "true",
        "pci.0.4.1.port.0.path": "/d1",
        "pci.0.4.1.port.1.path": "/d2",
        "pci.0.5.0.backend": "tap5",
        "pci.0.5.0.mac": "58:9c:fc:01:e2:2f",
        "memory.wired": "true",
        "rtc.use_localtime": "false",
        "x86.strictmsr": "false",
        "uuid": "12-34",
    }
    assert expected.items() <= config.keys.items()


@pytest.mark.parametrize(
    "arguments",
    [
        ["-z", "g"],
        ["g", "h"],
        ["-o", "novalue", "g"],
        ["-s", "x,lpc", "g"],
        ["-s", "1", "g"],
        ["-l", "com9,/x", "g"],
        ["-k", "/nonexistent", "g"],
    ],
)
def test_a_wrong_command_line_is_refused(arguments: list[str]) -> None:
    with pytest.raises(BhyError):
        parse(arguments)


def test_usage_names_the_restore_option(host: Rig) -> None:
    guest = host.run("-h")
    assert guest.await_exit() == 0
    assert "-r snapshot" in guest.stderr()


def test_a_wrong_option_is_a_usage_error(host: Rig) -> None:
    guest = host.run("-z", "g")
    assert guest.await_exit() == 1
    assert "usage: " in guest.stderr()


def test_a_configuration_is_dumped_without_a_vm(host: Rig) -> None:
    guest = host.run("-c", "2", "-o", "config.dump=1", "g")
    assert guest.await_exit() == 1
    assert guest.stderr() == "config.dump=1\ncpus=2\nname=g\n"
    assert not host.host.exists("g")


def test_without_a_boot_rom_somebody_must_have_made_the_vm(host: Rig) -> None:
    guest = host.run("-m", "64M", "g")
    assert guest.await_exit() == 4
    assert "virtual machine cannot be booted" in guest.stderr()
    host.start("g", Spec(has_rom=False)).console.await_sweeps(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "lpc.bootrom=/nonexistent"], "bootrom"),
        (["-s", "3,virtio-blk,/nonexistent"], "/nonexistent"),
        (["-s", "3,ahci,hd:/nonexistent"], "/nonexistent"),
        (["-s", "3,virtio-net,tap99"], "tap99"),
        (["-s", "3,virtio-toaster"], "virtio-toaster"),
        (["-m", "1X"], "1X"),
    ],
)
def test_a_start_without_what_it_needs_leaves_a_vm_that_the_next_one_takes(
    host: Rig, arguments: list[str], message: str
) -> None:
    guest = host.run("-o", f"lpc.bootrom={host.rom}", *arguments, "g")
    assert guest.await_exit() == 4
    assert message in guest.stderr()
    assert host.host.exists("g") == (arguments[0] != "-m")
    host.start("g").console.await_sweeps(1)


@pytest.mark.parametrize("key", ["standin.rate=x", "standin.waiting=2", "standin.waiting=-1"])
def test_a_guest_of_no_sense_is_refused(host: Rig, key: str) -> None:
    guest = host.run("-o", f"lpc.bootrom={host.rom}", "-c", "2", "-o", key, "g")
    assert guest.await_exit() == 4
    assert repr(key.partition("=")[2]) in guest.stderr()


def test_a_second_bhyve_of_the_name_is_refused_and_harms_nothing(host: Rig) -> None:
    first = host.start("g")
    second = host.launch("g")
    assert second.await_exit() == 4
    first.console.await_sweeps(1)
    assert host.pid("g") == first.pid


def test_sigterm_is_a_power_off(host: Rig) -> None:
    guest = host.start("g")
    assert guest.power_off() == 1
    assert not host.host.exists("g")


def test_sigkill_leaves_node_and_socket(host: Rig) -> None:
    guest = host.start("g")
    guest.kill()
    assert host.host.exists("g")
    assert (host.directory / "run" / "g").is_socket()
    assert host.pid("g") is None
    host.host.destroy("g")
    host.start("g").console.await_sweeps(1)


def test_a_guest_whose_vm_is_destroyed_ends(host: Rig) -> None:
    guest = host.start("g")
    host.host.destroy("g")
    assert guest.await_exit() == 4


def test_no_argument_says_what_vm_bhyve_greps_for(host: Rig) -> None:
    guest = host.start("g")
    assert b"bhyve:" not in Path(f"/proc/{guest.pid}/cmdline").read_bytes()


def test_a_name_too_long_for_a_socket_is_cut_in_its_path(host: Rig) -> None:
    name = "n" * 120
    host.start(name).console.await_sweeps(1)
    room = 103 - len(f"{host.directory}/run/")
    assert [path.name for path in (host.directory / "run").iterdir()] == ["n" * room]


def test_no_place_for_the_socket_ends_bhyve(host: Rig) -> None:
    host.start("g").kill()
    host.host.destroy("g")
    (host.directory / "run" / "g").unlink()
    (host.directory / "run").rmdir()
    (host.directory / "run").touch()
    guest = host.launch("g")
    assert guest.await_exit() == 71
    assert "Failed to start checkpoint thread" in guest.stderr()


def test_sigusr1_has_the_guest_reboot(host: Rig) -> None:
    guest = host.start("g")
    guest.process.send_signal(signal.SIGUSR1)
    assert guest.await_exit() == 0

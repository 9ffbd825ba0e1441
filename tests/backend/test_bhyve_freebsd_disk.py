"""Disks and interfaces of FreeBSD: the ioctls that tell them are played, call by call."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path

import pytest

from bhystream.backend.bhyve import freebsd_disk
from bhystream.backend.bhyve.freebsd import FreeBsdHost
from bhystream.backend.bhyve.host import Disk
from bhystream.errors import GuestError


def test_the_ioctls_of_disks_have_the_kernels_numbers() -> None:
    assert freebsd_disk.DIOCGSECTORSIZE == 0x40046480
    assert freebsd_disk.DIOCGMEDIASIZE == 0x40086481
    assert freebsd_disk.DIOCGATTR == 0xC148648E
    assert freebsd_disk.SIOCGIFMTU == 0xC0206933
    assert ctypes.sizeof(freebsd_disk.Attribute) == 328
    assert freebsd_disk.Attribute.value.offset == 72


def geom(monkeypatch: pytest.MonkeyPatch, size: int, sector: int, can_delete: int | None) -> None:
    """Let each character device answer as a disk.  can_delete: None if it knows no attribute."""

    def ioctl(fd: int, request: int, argument: object) -> object:
        if request == freebsd_disk.DIOCGMEDIASIZE:
            return struct.pack("<q", size)
        if request == freebsd_disk.DIOCGSECTORSIZE:
            return struct.pack("<I", sector)
        assert request == freebsd_disk.DIOCGATTR and isinstance(argument, freebsd_disk.Attribute)
        assert (argument.name, argument.len) == (b"GEOM::candelete", 4)
        if can_delete is None:
            raise OSError(errno.ENOIOCTL if hasattr(errno, "ENOIOCTL") else errno.EINVAL, "")
        argument.value[0] = can_delete
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


@pytest.mark.parametrize(("attribute", "can"), [(1, True), (0, False), (None, False)])
def test_a_device_is_asked_for_size_sectors_and_deletion(
    monkeypatch: pytest.MonkeyPatch, attribute: int | None, can: bool
) -> None:
    geom(monkeypatch, 1 << 40, 4096, attribute)
    assert freebsd_disk.disk("/dev/zero") == Disk(1 << 40, 4096, can, True, is_device=True)


@pytest.mark.parametrize(("size", "sector"), [(0, 512), (512, 0)])
def test_a_device_on_which_bhyve_ends_is_no_disk(
    monkeypatch: pytest.MonkeyPatch, size: int, sector: int
) -> None:
    geom(monkeypatch, size, sector, 1)
    assert freebsd_disk.disk("/dev/zero") is None


def test_a_device_that_is_no_disk_a_directory_and_a_fifo_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/null", str(tmp_path), str(tmp_path / "fifo"), str(tmp_path / "none")):
        assert freebsd_disk.disk(path) is None


@pytest.mark.parametrize("deallocates", [1, 0, None])
def test_a_file_deletes_where_its_file_system_makes_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deallocates: int | None
) -> None:
    def fpathconf(fd: int, name: int) -> int:
        assert name == 65
        if deallocates is None:
            raise OSError(errno.EINVAL, "")
        return deallocates

    monkeypatch.setattr(os, "fpathconf", fpathconf)
    path = tmp_path / "disk"
    path.write_bytes(bytes(12345))
    found = freebsd_disk.disk(str(path))
    assert found is not None and not found.is_device
    assert (found.size_bytes, found.sector_bytes, found.can_delete) == (
        12345,
        512,
        deallocates == 1,
    )


def test_a_file_that_cannot_be_opened_to_be_written_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk"
    path.touch()

    def open_(path: str, flags: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, "")
        return os_open(path, flags)

    os_open = os.open
    monkeypatch.setattr(os, "open", open_)
    found = freebsd_disk.disk(str(path))
    assert found is not None and not found.is_writable


def test_an_mtu_is_asked_of_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    def ioctl(fd: object, request: int, argument: bytes) -> bytes:
        assert request == freebsd_disk.SIOCGIFMTU and len(argument) == 32
        if argument[:16].rstrip(b"\0") != b"tap0":
            raise OSError(errno.ENXIO, "")
        return argument[:16] + struct.pack("<i", 9000) + bytes(12)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    host = FreeBsdHost.__new__(FreeBsdHost)
    assert host.mtu("tap0") == 9000 and host.mtu("tap1") is None
    with pytest.raises(GuestError, match="no name of an interface"):
        host.mtu("../tap0")


def test_an_ng_device_is_a_node_and_no_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/ngd3")
    host = FreeBsdHost.__new__(FreeBsdHost)
    assert host.has_tap("ngd3") and not host.has_tap("ngd4")

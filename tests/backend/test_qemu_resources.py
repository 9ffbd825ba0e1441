"""What a QEMU destination lends: each resource of the right kind and size, and lent once."""

from __future__ import annotations

import copy
import os
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.files import identity, identity_of
from bhystream.backend.qemu.command import build
from bhystream.backend.qemu.resources import Resources
from bhystream.backend.qemu.source import QemuSource
from bhystream.backend.qemu.validate import validate
from bhystream.errors import IncompatibleError, UsageError
from support.waiting import until

from .qemu_rig import DEADLINE_S, Rig
from .test_qemu_hostile import GOOD

KIB = 1024


def config(*disks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the configuration of a guest with two disks of 4 KiB, two nets, two serial ports."""
    whole = copy.deepcopy(GOOD)
    props = ({"format": "raw"}, {"format": "raw"})
    whole["disks"] = [
        {"key": f"disk{at}", "id": f"d{at}", "if": "none", "empty": False, "size_bytes": 4 * KIB,
         "props": prop} | (disks[at] if at < len(disks) else {})
        for at, prop in enumerate(props)
    ]  # fmt: skip
    whole["nets"] = [
        {"key": f"net{at}", "id": f"n{at}", "kind": "netdev", "backend": "user", "props": {}}
        for at in range(2)
    ]
    whole["serials"] = [{"key": f"serial{at}", "id": "", "option": True} for at in range(2)]
    return validate(whole | changes)


@pytest.fixture
def lent(tmp_path: Path) -> dict[str, str]:
    """Return -o keys with correct values."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(4 * KIB))
    return {"disk0": f"{tmp_path}/a", "disk1": f"{tmp_path}/b", "net0": "user", "net1": "none"}


def reasons(keys: dict[str, str], whole: dict[str, Any] | None = None) -> list[str]:
    return Resources.parse(keys).reasons(whole or config())


def qcow2(path: Path, size: int) -> str:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True)
    return str(path)


def test_what_is_as_it_should_be_is_no_reason(lent: dict[str, str], tmp_path: Path) -> None:
    ports = {"serial0": f"{tmp_path}/log", "serial1": f"unix:{tmp_path}/sock"}
    assert reasons(lent | ports | {"mem": f"{tmp_path}/mem", "qmp": f"{tmp_path}/qmp"}) == []
    # Many ports may share the null device, and many memory files one directory.
    assert reasons(lent | dict.fromkeys(("serial0", "serial1"), "/dev/null")) == []
    assert reasons(lent | {"mem": str(tmp_path)}) == []


# ---- lent once


def one_text(path: Path) -> str:
    return str(path)


def hard_link(path: Path) -> str:
    os.link(path, f"{path}.hard")
    return f"{path}.hard"


def symlink(path: Path) -> str:
    os.symlink(path, f"{path}.soft")
    return f"{path}.soft"


def other_directory(path: Path) -> str:
    os.symlink(path.parent, path.parent / "again")
    return str(path.parent / "again" / path.name)


def with_protocol(path: Path) -> str:
    return f"file:{path}"


@pytest.mark.parametrize("named", [one_text, hard_link, symlink, other_directory, with_protocol])
def test_one_image_is_not_lent_twice(lent: dict[str, str], tmp_path: Path, named: Any) -> None:
    path = named(tmp_path / "a")
    [reason] = reasons(lent | {"disk1": path})
    assert reason == f"disk1: {path.removeprefix('file:')}: it is lent as disk0 too"


def test_an_image_and_a_loop_device_over_it_are_one(lent: dict[str, str]) -> None:
    made = subprocess.run(
        ["losetup", "-f", "--show", lent["disk0"]], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no loop device can be had: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        assert reasons(lent | {"disk1": device}) == [f"disk1: {device}: it is lent as disk0 too"]
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_one_device_is_one_under_all_its_nodes(tmp_path: Path) -> None:
    for kind, number in ((stat.S_IFBLK, os.makedev(7, 77)), (stat.S_IFCHR, os.makedev(1, 3))):
        nodes = [tmp_path / f"{kind}{at}" for at in range(2)]
        try:
            for node in nodes:
                os.mknod(node, kind | 0o600, number)
        except PermissionError:
            pytest.skip("device nodes are root's to make")
        assert identity_of(str(nodes[0])) == identity_of(str(nodes[1]))
    assert identity_of(str(nodes[0])) == identity(os.stat("/dev/null"))


def test_an_image_that_is_only_read_may_be_lent_twice(lent: dict[str, str]) -> None:
    both = {"disk1": lent["disk0"]}
    cd = {"props": {"format": "raw", "media": "cdrom"}}
    read_only = {"props": {"format": "raw", "readonly": "on"}}
    assert reasons(lent | both, config(cd, read_only)) == []
    assert len(reasons(lent | both, config({}, read_only))) == 1


@pytest.mark.parametrize("key", ["serial0", "mem", "qmp", "kernel"])
def test_nothing_else_is_lent_what_a_disk_is(lent: dict[str, str], key: str) -> None:
    found = reasons(lent | {key: lent["disk0"]}, config(kernel=key == "kernel"))
    assert f"{key}: {lent['disk0']}: it is lent as disk0 too" in found


@pytest.mark.parametrize("port", ["{at}/log", "unix:{at}/sock"])
def test_two_serial_ports_do_not_share(lent: dict[str, str], tmp_path: Path, port: str) -> None:
    value = port.format(at=tmp_path)
    [reason] = reasons(lent | {"serial0": value, "serial1": value})
    assert reason.endswith("it is lent as serial0 too")


def test_one_tap_is_not_lent_twice(lent: dict[str, str]) -> None:
    tap = {"net0": "tap:lo", "net1": "tap:lo"}
    assert reasons(lent | tap) == ["net1: tap:lo: it is lent as net0 too"]
    assert reasons(lent | {"net0": "user", "net1": "user"}) == []


def test_one_name_with_a_protocol_is_not_lent_twice(lent: dict[str, str]) -> None:
    name = "rbd:pool/image:key=secret"
    found = reasons(lent | {"disk0": name, "disk1": name})
    assert found == ["disk1: rbd:...: it is lent as disk0 too"]


# ---- of the right kind


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("disk0", "{at}", "is not a file and not a block device"),
        ("disk0", "/dev/null", "is not a file and not a block device"),
        ("disk0", "{at}/sock", "is not a file and not a block device"),
        ("disk0", "{at}/fifo", "is not a file and not a block device"),
        ("disk0", "{at}/none", "does not exist"),
        ("disk0", "{at}/a/x", "Not a directory"),
        ("kernel", "{at}", "is not a file"),
        ("initrd", "/dev/null", "is not a file"),
        ("serial0", "{at}", "is not a file and not a terminal"),
        ("serial0", "{at}/sock", "is not a file and not a terminal"),
        ("serial0", "unix:{at}/b2", "exists and is not a socket"),
        ("serial0", "unix:{at}", "exists and is not a socket"),
        ("serial0", "{at}/none/x", "cannot write to"),
    ],
)
def test_what_is_of_another_kind_is_refused(
    lent: dict[str, str], tmp_path: Path, key: str, value: str, why: str
) -> None:
    (tmp_path / "b2").write_bytes(b"precious")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{tmp_path}/sock")
    boot = {name: name == key for name in ("kernel", "initrd")}
    [reason] = reasons(lent | {key: value.format(at=tmp_path)}, config(**boot))
    assert reason.startswith(f"{key}: ") and why in reason


# ---- of the right size


def test_a_qcow2_image_has_the_size_that_the_guest_sees(
    lent: dict[str, str], tmp_path: Path
) -> None:
    kind = {"props": {"format": "qcow2"}, "size_bytes": 1 << 20}
    right, wrong = qcow2(tmp_path / "right", 1 << 20), qcow2(tmp_path / "wrong", 2 << 20)
    assert reasons(lent | {"disk0": right}, config(kind)) == []
    assert reasons(lent | {"disk0": wrong}, config(kind)) == [
        f"disk0: {wrong} has {2 << 20} bytes, the source's has {1 << 20}"
    ]
    (tmp_path / "cut").write_bytes(Path(right).read_bytes()[:20])
    [reason] = reasons(lent | {"disk0": f"{tmp_path}/cut"}, config(kind))
    assert "has 0 bytes" in reason


def test_a_qcow2_image_needs_what_it_lies_over(lent: dict[str, str], tmp_path: Path) -> None:
    kind = {"props": {"format": "qcow2"}, "size_bytes": 4 * KIB}
    for name in ("base", f"{tmp_path}/base", "nbd:localhost:1"):
        (tmp_path / "base").write_bytes(bytes(4 * KIB))
        over = f"{tmp_path}/over"
        create = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", name, over]
        subprocess.run([*create, str(4 * KIB)], check=True)
        assert reasons(lent | {"disk0": over}, config(kind)) == []
        (tmp_path / "base").unlink()
        found = reasons(lent | {"disk0": over}, config(kind))
        missing = [f"disk0: {over}: its backing file {tmp_path}/base does not exist"]
        assert found == ([] if name.startswith("nbd") else missing)


@pytest.mark.parametrize(("size", "is_right"), [(3585, True), (4096, True), (3584, False)])
def test_a_raw_image_counts_in_sectors(lent: dict[str, str], size: int, is_right: bool) -> None:
    os.truncate(lent["disk0"], size)
    assert (reasons(lent) == []) is is_right


def test_an_image_of_another_format_is_refused(lent: dict[str, str], tmp_path: Path) -> None:
    other = qcow2(tmp_path / "q", 4 * KIB)
    assert reasons(lent | {"disk0": other}) == [f"disk0: {other} is qcow2, the source's is raw"]
    kind = {"props": {"format": "qcow2"}}
    assert reasons(lent, config(kind)) == [f"disk0: {lent['disk0']} is raw, the source's is qcow2"]


# ---- names with a protocol


@pytest.mark.parametrize(
    "name",
    [
        "nbd:localhost:10809", "nbd:localhost:10809:exportname=x", "nbd:unix:/run/n:exportname=x",
        "nbd://host/x", "nbd+unix:///x?socket=/run/n", "rbd:pool/image", "rbd:pool/image@snap:id=x",
        "iscsi://host/iqn.x/0", "https://host/x.iso", "gluster+unix:///v/x?socket=/run/g",
        "openvstorage+tcp:host:26203/name", "ssh://host/x", "json:{\"driver\":\"nbd\"}",
    ],
)  # fmt: skip
def test_a_name_with_a_protocol_is_qemus(lent: dict[str, str], name: str) -> None:
    keys = lent | {"disk0": name}
    assert reasons(keys) == []
    argv = build(config(), Resources.parse(keys), name="g", ram_path="/r", qmp_path="/q")
    [drive] = [word for word in argv if word.startswith("if=none,id=d0,")]
    assert drive.endswith(f",file={name.replace(',', ',,')}")


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vm:1.img").touch()
    for given, absolute in (
        ("x", "{at}/x"), ("./x:y", "{at}/x:y"), ("vm:1.img", "{at}/vm:1.img"), ("file:x", "{at}/x"),
        ("host_device:/dev/x", "/dev/x"), ("nbd:unix:n:export=a", "nbd:unix:{at}/n:export=a"),
    ):  # fmt: skip
        values = Resources.parse({"disk0": given}).values
        assert values["disk0"] == absolute.format(at=tmp_path)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fat:rw:/srv", "no disk"),
        ("null-co://", "no disk"),
        ("nbd+unix:///x?socket=n", "not absolute"),
    ],
)
def test_a_name_that_cannot_be_lent_is_a_usage_error(name: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"-o disk0=.*{why}"):
        Resources.parse({"disk0": name})


@pytest.mark.guest
def test_what_is_behind_a_protocol_is_compared_when_qemu_has_it(rig: Rig) -> None:
    images = {name: Path(rig.path(name)) for name in ("here.raw", "same.raw", "large.raw")}
    for image in images.values():
        image.write_bytes(bytes((2 if image.stem == "large" else 1) << 20))
    drive = f"if=virtio,format=raw,file={images['here.raw']}"
    source = QemuSource(rig.start("here", "-drive", drive))
    for name, is_right in (("large", False), ("same", True)):
        sock = rig.path(f"{name}.nbd")
        server = subprocess.Popen(["qemu-nbd", "-f", "raw", "-k", sock, images[f"{name}.raw"]])
        try:
            until(Path(sock).exists, "the socket", DEADLINE_S)
            sink = rig.sink("there", disk0=f"nbd:unix:{sock}")
            assert sink.check(source.head()) == []
            if is_right:
                sink.open(b"")
            else:
                text = f"disk0.size_bytes: the stream says {1 << 20}, here {2 << 20}"
                with pytest.raises(IncompatibleError, match=text):
                    sink.open(b"")
            sink.abort()
        finally:
            server.kill()
            server.wait()
    source.close()

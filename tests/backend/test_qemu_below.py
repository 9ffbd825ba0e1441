"""A disk that has to lie below a directory, and images that lead to other files (--below)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.qemu import verdict
from bhystream.backend.qemu.resources import Resources

from .test_qemu_resources import KIB, config


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a directory that is ours alone; beside it lies a file that no guest may read."""
    (tmp_path / "vm").mkdir()
    for path in (tmp_path, tmp_path / "vm"):
        path.chmod(0o755)
    (tmp_path / "secret").write_bytes(bytes(4 * KIB))
    return tmp_path / "vm"


def below(store: Path, *disks: str, **properties: Any) -> list[str]:
    """Return the reasons against disks that have to lie in the store."""
    keys = {f"disk{at}": path for at, path in enumerate(disks)} | {"net0": "none", "net1": "none"}
    whole = config(*[{"props": {"format": "raw"} | properties} for _ in disks])
    whole["disks"] = whole["disks"][: len(disks)]
    return Resources.parse(keys, [str(store)]).reasons(whole)


def image(store: Path, *options: str, name: str = "image") -> str:
    """Make a qcow2 image of 4 KiB."""
    path = str(store / name)
    words = ["qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(4 * KIB)]
    subprocess.run(words, check=True)
    return path


def test_a_disk_below_the_directory_is_no_reason(store: Path) -> None:
    (store / "disk").write_bytes(bytes(4 * KIB))
    assert below(store, f"{store}/disk") == []
    assert below(store, image(store), format="qcow2") == []


def test_a_disk_elsewhere_is_refused_whatever_leads_to_it(store: Path) -> None:
    secret = f"{store.parent}/secret"
    (store / "link").symlink_to(secret)
    os.link(secret, store / "hard")
    for path, why in {
        secret: f"it does not lie below {store}",
        f"{store}/../secret": f"it does not lie below {store}",
        f"{store}/link": "it is a link",
        f"{store}/hard": "it has another name too (a hard link)",
        "nbd:localhost:1": "--below allows no disk that QEMU opens by a protocol",
        "https://host/x": "--below allows no disk that QEMU opens by a protocol",
    }.items():
        [reason] = below(store, path)
        assert reason.startswith("disk0: ") and reason.endswith(f": {why}"), reason


def test_each_disk_is_judged(store: Path) -> None:
    (store / "disk").write_bytes(bytes(4 * KIB))
    [reason] = below(store, f"{store}/disk", f"{store.parent}/secret")
    assert reason.startswith("disk1: ")


def test_an_image_that_a_guest_has_made_of_its_raw_disk_leads_nowhere(store: Path) -> None:
    """The guest wrote the header; the next stream says that the disk is qcow2."""
    (store / "disk").write_bytes(bytes(4 * KIB))
    header = Path(image(store, "-b", f"{store.parent}/secret", "-F", "raw")).read_bytes()
    (store / "disk").write_bytes(header)
    assert below(store, f"{store}/disk", format="qcow2") == [
        f"disk0: {store}/disk: --below allows no image that names another file"
    ]
    [reason] = below(store, f"{store}/disk", format="raw")
    assert "is qcow2, the source's is raw" in reason


def test_an_image_with_its_data_elsewhere_is_refused(store: Path) -> None:
    path = image(store, "-o", f"data_file={store.parent}/data,data_file_raw=on")
    assert below(store, path, format="qcow2") == [
        f"disk0: {path}: --below allows no image that names another file"
    ]


def test_an_image_of_an_old_version_has_no_features(store: Path) -> None:
    path = image(store, "-o", "compat=0.10")
    top = image(store, "-o", "compat=0.10", "-b", path, "-F", "qcow2", name="top")
    with open(path, "r+b") as file:
        file.seek(72)  # behind the header of version 2
        file.write(b"\xff" * 8)
    assert below(store, path, format="qcow2") == []
    assert "names another file" in below(store, top, format="qcow2")[0]


@pytest.mark.parametrize("mode", [0o622, 0o602])
def test_an_image_that_others_may_write_to_may_change_its_header(store: Path, mode: int) -> None:
    path = image(store)
    os.chmod(path, mode)
    if os.geteuid() == 0:
        os.chown(path, 0, 65534)
    assert below(store, path, format="qcow2") == [
        f"disk0: {path}: --below allows no qcow2 image that another user may write to"
    ]
    if os.geteuid() == 0:
        os.chmod(path, 0o600)
        os.chown(path, 65534, 0)
        assert "another user may write to" in below(store, path, format="qcow2")[0]
    (store / "disk").write_bytes(bytes(4 * KIB))
    os.chmod(store / "disk", mode)
    assert below(store, f"{store}/disk") == []  # of a raw disk every byte is the guest's


def test_without_below_an_image_may_name_another_file(store: Path) -> None:
    (store / "base").write_bytes(bytes(4 * KIB))
    path = image(store, "-b", f"{store}/base", "-F", "raw")
    whole = config({"props": {"format": "qcow2"}})
    whole["disks"] = whole["disks"][:1]
    keys = {"disk0": path, "net0": "none", "net1": "none"}
    assert Resources.parse(keys).reasons(whole) == []


def test_a_memory_file_that_another_user_could_exchange_is_refused(store: Path) -> None:
    keys = {"disk0": "/x", "mem": str(store)}
    store.chmod(0o777)
    found = verdict.resource_reasons(Resources.parse(keys), config())
    assert f"mem: another user could exchange the memory file: others may write to {store}" in found
    for safe in (0o755, 0o1777):
        store.chmod(safe)
        found = verdict.resource_reasons(Resources.parse(keys), config())
        assert not any("exchange" in reason for reason in found)

"""What is recorded of a guest, and where its snapshot is staged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest

from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.place import Place
from bhystream.errors import GuestError, UsageError

CLAMP = "debug.devfs_iosize_max_clamp"
GIB = 1 << 30


class StubHost:
    """A host that clamps what a device takes at once, and has the null device elsewhere."""

    def __init__(self, clamp: str | None) -> None:
        self._clamp = clamp

    def sysctl(self, name: str) -> str | None:
        return self._clamp if name == CLAMP else None

    def mount_null(self, directory: Path) -> None:
        (directory / "null").symlink_to("/dev/null")

    def unmount_null(self, directory: Path) -> None:
        pass


def place(base: Path, memory_bytes: int = GIB) -> Place:
    return Place(
        kind="bhyve",
        vmm_dir="",
        name="web1",
        process=None,
        staging=str(base / "staging"),
        kept=str(base / "held/1"),
        keys={},
        memory_bytes=memory_bytes,
        bridges={},
        manager="",
    )


def why_no_sink(base: Path, memory_bytes: int, clamp: str | None) -> str:
    made = place(base, memory_bytes)
    made.make_staging()
    why = made.make_sink(cast(Host, StubHost(clamp)))
    assert made.has_sink() is not bool(why)
    return why


@pytest.mark.parametrize(
    ("memory_bytes", "longest"),
    [(2 * GIB, 2 * GIB), (4 * GIB, 3 * GIB), (6 * GIB, 3 * GIB), (8 * GIB, 5 * GIB)],
)
def test_a_device_is_no_sink_for_what_bhyve_writes_at_once(
    tmp_path: Path, memory_bytes: int, longest: int
) -> None:
    assert why_no_sink(tmp_path, memory_bytes, "1") == (
        f"{CLAMP}: it is 1 here, so no device takes the {longest} bytes that bhyve writes at"
        f" once; sysctl {CLAMP}=0 lets the null device take them"
    )
    assert os.listdir(tmp_path / "staging") == []


@pytest.mark.parametrize(
    ("memory_bytes", "clamp"),
    [(2 * GIB - 4096, "1"), (8 * GIB, "0"), (8 * GIB, "0\n"), (8 * GIB, None)],
)
def test_a_device_is_a_sink_for_what_it_takes(
    tmp_path: Path, memory_bytes: int, clamp: str | None
) -> None:
    assert why_no_sink(tmp_path, memory_bytes, clamp) == ""


def test_a_staging_directory_may_be_as_long_as_bhyve_takes(tmp_path: Path) -> None:
    base = tmp_path / ("d" * (250 - len(f"{tmp_path}//staging/ckp")))
    base.mkdir()
    place(base).make_staging()
    assert (base / "staging").is_dir()


def test_a_staging_directory_too_long_for_bhyve_is_refused_before_it_is_made(
    tmp_path: Path,
) -> None:
    base = tmp_path / ("d" * (251 - len(f"{tmp_path}//staging/ckp")))
    base.mkdir()
    with pytest.raises(UsageError, match="takes no path longer than 250 bytes"):
        place(base).make_staging()
    assert os.listdir(base) == []


def test_a_record_that_lacks_a_field_is_refused(tmp_path: Path) -> None:
    record = dict(place(tmp_path).to_json())
    assert Place.from_json(record) == place(tmp_path)
    del record["keys"]
    with pytest.raises(GuestError, match="cannot read the record"):
        Place.from_json(record)

"""Files that outlive a power cut, and broken files, which did not; see cli/power_cut.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bhystream import durable
from bhystream.errors import InputOutputError, RecordError


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the names of synced files and directories, in order, with a / for each directory."""
    names: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        names.append(path.name + "/" * path.is_dir())
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    return names


def test_a_directory_is_synced_in_the_one_that_holds_it(tmp_path: Path, synced: list[str]) -> None:
    durable.make_directory(tmp_path / "a" / "b")
    assert synced == [f"{tmp_path.name}/", "a/"]
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    durable.make_directory(tmp_path / "a" / "b")
    assert len(synced) == 2


def test_a_file_in_the_place_of_a_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(FileExistsError):
        durable.make_directory(tmp_path / "a")


def test_a_file_that_goes_is_gone_for_good(tmp_path: Path, synced: list[str]) -> None:
    (tmp_path / "a").touch()
    for _ in range(2):
        durable.remove(tmp_path / "a")
        assert synced.pop() == f"{tmp_path.name}/"
    assert not (tmp_path / "a").exists()


def test_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    durable.write(tmp_path / "a", b"\xff\n")
    assert (tmp_path / "a").read_bytes() == b"\xff\n"


def test_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    assert durable.read(tmp_path / "a", dict) is None


@pytest.mark.parametrize("data", [b"", b"{", b"\0" * 40, b"\xff", b"[]", b"{}", b"3"])
def test_what_cannot_be_read_may_have_run(tmp_path: Path, data: bytes) -> None:
    def make(fields: Any) -> Any:
        return fields["a"]

    path = tmp_path / "a"
    path.write_bytes(data)
    with pytest.raises(RecordError, match=f"{path} is broken: .*; its guest may have run"):
        durable.read(path, make)


def test_a_disk_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(InputOutputError, match="cannot read"):
        durable.read(tmp_path / "a", dict)


def test_json_that_nests_deep_is_a_broken_record(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("[" * 100_000)
    with pytest.raises(RecordError, match="nests too deep"):
        durable.read(tmp_path / "a", dict)


@pytest.mark.parametrize(
    ("value", "kind", "fits"),
    [
        (1, int, True), (True, int, False), (1.0, int, False), (True, bool, True),
        ("a", str, True), (None, str, False),
        (("a",), tuple[str, ...], True), ((1,), tuple[str, ...], False),
        ("a", tuple[str, ...], False),
        ({"a": [1]}, dict[str, Any], True), ({"a": True}, dict[str, int | bool], True),
        ({"a": "b"}, dict[str, int | bool], False), ([], dict[str, Any], False),
        (None, int | None, True), ("1", int | None, False),
        ({"a": {"b": 1}}, dict[str, dict[str, int]], True),
        ({"a": 1}, dict[str, dict[str, int]], False),
    ],
)  # fmt: skip
def test_what_was_read_is_of_its_type(value: object, kind: object, fits: bool) -> None:
    assert durable.is_of(value, kind) == fits

"""Paths that others could exchange, and files below a directory: links, races, names, modes."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bhystream import beneath
from bhystream.beneath import exchangeable, fault_below

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """Return a directory that is ours alone, with a disk in a directory below it."""
    (tmp_path / "vm/web1").mkdir(parents=True)
    (tmp_path / "vm/web1/disk").write_bytes(bytes(512))
    (tmp_path / "secret").write_text("secret")
    for path in (tmp_path, tmp_path / "vm", tmp_path / "vm/web1"):
        path.chmod(0o755)
    return tmp_path / "vm"


# ---- exchangeable()


def test_what_only_we_may_write_to_is_not_exchangeable(top: Path) -> None:
    assert exchangeable(top / "web1/disk") == ""
    assert exchangeable(top / "new/er") == ""
    assert exchangeable("/") == ""


@pytest.mark.parametrize("mode", [0o777, 0o757])
def test_a_directory_of_everybody_is(top: Path, mode: int) -> None:
    top.chmod(mode)
    assert exchangeable(top / "web1/disk") == f"others may write to {top}"
    assert exchangeable(top / "new") == f"others may write to {top}"
    top.chmod(mode | stat.S_ISVTX)
    assert exchangeable(top / "web1/disk") == ""
    assert exchangeable(top / "new") == ""


@needs_root
def test_a_directory_of_a_group_is_unless_the_group_is_ours(top: Path) -> None:
    top.chmod(0o775)
    assert exchangeable(top / "web1") == ""
    os.chown(top, 0, NOBODY)
    assert exchangeable(top / "web1") == f"others may write to {top}"


@needs_root
def test_a_file_of_another_user_in_a_sticky_directory_is(top: Path) -> None:
    top.chmod(0o1777)
    os.chown(top / "web1", NOBODY, 0)
    assert exchangeable(top / "web1/disk") == f"{top}/web1 belongs to the user {NOBODY}"


@needs_root
def test_a_directory_of_another_user_is(top: Path) -> None:
    os.chown(top, NOBODY, 0)
    assert exchangeable(top / "web1") == f"{top} belongs to the user {NOBODY}"


def test_a_link_is_followed_and_what_it_leads_to_is_judged(top: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("vm/../vm/web1")
    assert exchangeable(tmp_path / "link/disk") == ""
    top.chmod(0o777)
    assert exchangeable(tmp_path / "link/disk") == f"others may write to {top}"


@needs_root
def test_a_link_that_another_user_has_made_in_a_sticky_directory_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / "link").symlink_to("/etc")
    assert exchangeable(tmp_path / "link/passwd") == ""
    os.lchown(tmp_path / "link", NOBODY, 0)
    assert "belongs to the user" in exchangeable(tmp_path / "link/passwd")


def test_links_that_never_end_are(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("a")
    assert "too many links" in exchangeable(tmp_path / "a")


# ---- fault_below()


def test_a_file_below_a_directory_has_no_fault(top: Path) -> None:
    assert fault_below(f"{top}/web1/disk", [str(top)]) == ""
    assert fault_below(f"{top}/web1/disk", ["/nowhere", f"{top}/web1"]) == ""


@pytest.mark.parametrize(
    "path",
    [
        "{top}/../secret",
        "{top}/web1/../../secret",
        "{top}2/disk",
        "{top}",
        "/etc/passwd",
        "{top}/web1/../web1/disk",
    ],
)
def test_a_path_that_leaves_the_directory_is_refused_by_its_text(top: Path, path: str) -> None:
    assert fault_below(path.format(top=top), [str(top)]) == f"it does not lie below {top}"


def test_a_directory_is_no_prefix_of_a_name(top: Path) -> None:
    other = top.with_name("vm2")
    other.mkdir()
    (other / "disk").touch()
    assert "does not lie below" in fault_below(f"{other}/disk", [str(top)])


def link(top: Path) -> Path:
    (top / "web1/soft").symlink_to(top.parent / "secret")
    return top / "web1/soft"


def link_to_its_own(top: Path) -> Path:
    (top / "web1/soft").symlink_to("disk")
    return top / "web1/soft"


def linked_directory(top: Path) -> Path:
    (top / "out").symlink_to(top.parent)
    return top / "out/secret"


def hard_link(top: Path) -> Path:
    os.link(top.parent / "secret", top / "web1/hard")
    return top / "web1/hard"


def fifo(top: Path) -> Path:
    os.mkfifo(top / "web1/fifo")
    return top / "web1/fifo"


def listener(top: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(top / "web1")
        made.bind("sock")
        os.chdir(here)
    return top / "web1/sock"


def directory(top: Path) -> Path:
    return top / "web1"


def file_as_directory(top: Path) -> Path:
    return top / "web1/disk/disk"


def missing(top: Path) -> Path:
    return top / "web1/none"


def everybodys(top: Path) -> Path:
    (top / "web1").chmod(0o777)
    return top / "web1/disk"


def everybodys_sticky(top: Path) -> Path:
    (top / "web1").chmod(0o1777)
    return top / "web1/disk"


def everybodys_top(top: Path) -> Path:
    top.chmod(0o777)
    return top / "web1/disk"


def everybodys_parent(top: Path) -> Path:
    top.parent.chmod(0o777)
    return top / "web1/disk"


TRICKS: dict[Callable[[Path], Path], str] = {
    link: "it is a link",
    link_to_its_own: "it is a link",
    linked_directory: "out is a link, or no directory",
    hard_link: "it has another name too",
    fifo: "it is no file and no device",
    listener: "it is no file and no device",
    directory: "it is no file and no device",
    file_as_directory: "disk is a link, or no directory",
    missing: "No such file",
    everybodys: "others may write to",
    everybodys_sticky: "others may write to",
    everybodys_top: "others may write to",
    everybodys_parent: "others may write to",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_a_trick_is_refused(top: Path, trick: Callable[[Path], Path]) -> None:
    assert TRICKS[trick] in fault_below(str(trick(top)), [str(top)])


@needs_root
def test_a_directory_of_another_user_below_is_refused(top: Path) -> None:
    os.chown(top / "web1", NOBODY, 0)
    assert "web1 belongs to the user" in fault_below(f"{top}/web1/disk", [str(top)])


@needs_root
def test_a_disk_may_belong_to_its_user(top: Path) -> None:
    os.chown(top / "web1/disk", NOBODY, NOBODY)
    assert fault_below(f"{top}/web1/disk", [str(top)]) == ""


def test_the_administrators_link_to_the_directory_is_followed(top: Path, tmp_path: Path) -> None:
    (tmp_path / "named").symlink_to("vm")
    assert fault_below(f"{tmp_path}/named/web1/disk", [f"{tmp_path}/named"]) == ""


def test_a_device_is_no_trick() -> None:
    assert fault_below("/dev/null", ["/dev"]) == ""


def test_what_is_exchanged_between_two_looks_is_never_followed(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory becomes a link at the worst moment: right before it is opened."""
    real = os.open

    def open_(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == "web1":
            os.rename(top / "web1", top / "gone")
            (top / "web1").symlink_to(top.parent)
            (top.parent / "disk").write_text("secret")
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", open_)
    assert fault_below(f"{top}/web1/disk", [str(top)]) == f"{top}/web1 is a link, or no directory"


def test_a_directory_that_moves_away_stays_the_one_that_was_opened(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is looked up in the descriptor: a link in the old place is not seen."""
    real = beneath._directory_fault

    def fault(at: str, found: os.stat_result) -> str:
        if at.endswith("web1"):
            os.rename(top / "web1", top / "gone")
            (top / "web1").symlink_to(top.parent)
        return real(at, found)

    (top.parent / "disk").symlink_to("secret")
    monkeypatch.setattr(beneath, "_directory_fault", fault)
    assert fault_below(f"{top}/web1/disk", [str(top)]) == ""


def test_a_thread_that_exchanges_all_the_time_never_wins(top: Path) -> None:
    """Either answer may come, but never one about the file outside."""
    (top.parent / "out").mkdir()
    os.link(top.parent / "secret", top.parent / "out/disk")  # would be told: another name
    over = threading.Event()

    def exchange() -> None:
        while not over.is_set():
            os.rename(top / "web1", top / "gone")
            (top / "web1").symlink_to(top.parent / "out")
            os.unlink(top / "web1")
            os.rename(top / "gone", top / "web1")

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        said = {fault_below(f"{top}/web1/disk", [str(top)]) for _ in range(3000)}
    finally:
        over.set()
        thread.join()
    assert not any("another name" in text for text in said), said
    assert said <= {
        "",
        f"{top}/web1 is a link, or no directory",
        "web1: No such file or directory",
    }


def test_no_descriptor_stays_open(top: Path) -> None:
    paths = [str(trick(top)) for trick in (link, linked_directory, hard_link, missing, directory)]
    before = os.listdir("/proc/self/fd")
    for path in paths:
        assert fault_below(path, [str(top)])
    assert os.listdir("/proc/self/fd") == before

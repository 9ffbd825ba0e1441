"""Snapshot files through a stream and back: nothing changes, and faulty files are refused."""

from __future__ import annotations

import errno
import filecmp
import io
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.base import Sink, Snapshot
from bhystream.backend.bhyve import snapshotfiles
from bhystream.backend.bhyve.cold import FilesSink, SnapshotSource
from bhystream.backend.bhyve.snapshotfiles import Files
from bhystream.errors import (
    EXIT_OK,
    AbortedError,
    BhyError,
    GuestError,
    IncompatibleError,
    Interrupted,
    UsageError,
)
from bhystream.guest import PAGE_BYTES, Head, Layout, Segment, State
from bhystream.report import Console
from bhystream.send import cold as cold_send
from bhystream.send.options import SendOptions
from bhystream.send.precopy import Limits
from bhystream.signals import Signals
from bhystream.stream.format import Form, Header
from bhystream.stream.verify import Ended, Pages, Walk
from support.descriptors import descriptors
from support.memory_source import rebuild

from .snapshot_files import CONFIG, DEVICES, HOST, KERNEL, MEMORY, made, names, text_of

GIB = 1 << 30
BIG = 3 * GIB + MEMORY
FPU = [State(f"fpu/{cpu}", os.urandom(900), is_optional=True) for cpu in range(2)]


def write_snapshot(files: Files, memory_bytes: int) -> Files:
    """Make a snapshot whose memory has holes, and data at both ends and at the segments' border."""
    meta, kern = made(memory_bytes)
    files.meta.write_bytes(text_of(meta))
    files.kern.write_bytes(kern)
    with open(files.memory, "wb") as file:
        file.truncate(memory_bytes)
        for offset in {0, MEMORY // 2, 3 * GIB - PAGE_BYTES, 3 * GIB, memory_bytes - PAGE_BYTES}:
            if offset < memory_bytes:
                file.seek(offset)
                file.write(os.urandom(PAGE_BYTES))
        # Data that zstd can compress.
        file.seek(MEMORY // 8)
        file.write(b"web1" * (99 * PAGE_BYTES // 4))
        # Zeros that are written, and so are no hole.
        file.seek(MEMORY // 4)
        file.write(bytes(9 * PAGE_BYTES))
    return files


@pytest.fixture
def here(tmp_path: Path) -> Files:
    """A small snapshot: lowmem only."""
    (tmp_path / "here").mkdir()
    return write_snapshot(Files(tmp_path / "here", "web1.save"), MEMORY)


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """An empty directory of the destination."""
    (tmp_path / "there").mkdir()
    return tmp_path / "there"


def send(source: Snapshot, path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """Write the stream of a snapshot to a file, as bhysend does."""
    opts = SendOptions(guest="x", **{"limits": Limits(), **options})
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        monkeypatch.setattr(cold_send, "_STDOUT", fd)
        return cold_send.send(source, opts, Console("bhysend"), Signals())
    finally:
        os.close(fd)
        source.close()


def receive(path: Path, sink: Sink, *, start: bool = True) -> Ended:
    """Build what a stream says, as bhyrecv does."""
    states: list[State] = []
    with open(path, "rb", buffering=0) as raw:
        walk = Walk(raw)
        for event in walk.events():
            match event:
                case Head():
                    reasons = sink.check(event)
                    if reasons:
                        raise IncompatibleError("; ".join(reasons))
                    layout = event.layout
                    places = sink.open(b"")
                case Pages():
                    restored(event, layout, places)
                case State():
                    states.append(event)
                case Ended():
                    sink.load(states)
                    if start:
                        sink.start()
                    return event
    raise AssertionError("no END")


def restored(event: Pages, layout: Layout, places: Any) -> None:
    base = layout.starts[event.segment]
    npages = layout.segments[event.segment].npages
    places[event.segment].place(base, npages, event.extents, event.pages)


def data(path: Path) -> list[tuple[int, bytes]]:
    """Return the pages of a sparse file that are not zero: (offset in bytes, data)."""
    found = []
    with open(path, "rb", buffering=0) as file:
        fd, at, size = file.fileno(), 0, os.stat(path).st_size
        while at < size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                break
            end = os.lseek(fd, at, os.SEEK_HOLE)
            for offset in range(at, end, PAGE_BYTES):
                page = os.pread(fd, PAGE_BYTES, offset)
                if any(page):
                    found.append((offset, page))
            at = end
    return found


@pytest.mark.parametrize("level", [None, 1], ids=["plain", "zstd"])
def test_a_small_snapshot_arrives_byte_for_byte(
    here: Files, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int | None
) -> None:
    stream = tmp_path / "s"
    assert (
        send(SnapshotSource(here.memory, None, HOST), stream, monkeypatch, level=level) == EXIT_OK
    )
    sink = FilesSink(there, "web2")
    receive(stream, sink)
    sink.abort()  # after start(), abort() does nothing
    assert names(there) == ["web2", "web2.kern", "web2.meta"]
    for suffix in ("", ".kern", ".meta"):
        made_file = there / f"web2{suffix}"
        assert filecmp.cmp(here.directory / f"web1.save{suffix}", made_file, shallow=False)
        assert stat.S_IMODE(made_file.stat().st_mode) == 0o600
        assert made_file.stat().st_nlink == 1
    assert sink.may_have_run is False


def test_a_guest_of_more_than_3_gib_arrives_and_stays_sparse(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = write_snapshot(Files(tmp_path, "big"), BIG)
    stream = tmp_path / "s"
    source = SnapshotSource(here.memory, None, HOST)
    highmem = Segment("highmem", 4 * GIB, MEMORY // PAGE_BYTES)
    assert source.head().layout.segments == (Segment("lowmem", 0, 3 * GIB // PAGE_BYTES), highmem)
    send(source, stream, monkeypatch)
    receive(stream, FilesSink(there, "big"))
    assert (there / "big").stat().st_size == BIG
    assert data(there / "big") == data(here.memory)
    assert len(data(there / "big")) == 5 + 99
    assert (there / "big").stat().st_blocks * 512 <= here.memory.stat().st_blocks * 512 < GIB


@pytest.mark.parametrize("fpu", [[], FPU], ids=["plain", "fpu"])
def test_the_stream_of_the_files_that_arrived_is_the_same_stream(
    here: Files, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fpu: list[State]
) -> None:
    if fpu:
        here.fpu.write_bytes(snapshotfiles.pack_fpu(fpu))
    monkeypatch.setattr(
        cold_send, "new_header", lambda form, features: Header(form, features, bytes(16), 7)
    )
    first, second = tmp_path / "1", tmp_path / "2"
    send(SnapshotSource(here.memory, None, HOST), first, monkeypatch)
    receive(first, FilesSink(there, "web2"))
    send(SnapshotSource(there / "web2", None, HOST), second, monkeypatch)
    states = rebuild(second.read_bytes()).states
    assert [state for state in states if state.is_optional] == fpu
    assert (there / "web2.fpu").exists() == bool(fpu)
    assert filecmp.cmp(first, second, shallow=False)


def test_the_stream_is_a_kept_one_of_a_guest_that_was_not_paused(
    here: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(SnapshotSource(here.memory, CONFIG, HOST), tmp_path / "s", monkeypatch)
    stream = (tmp_path / "s").read_bytes()
    built = rebuild(stream)
    assert Walk(io.BytesIO(stream)).header.form == Form.KEPT
    assert built.memory == here.memory.read_bytes()
    assert len(built.rounds) == 1
    assert built.head and built.ended and built.ended.time
    assert (built.ended.time.paused_at_ns, built.ended.time.paused_for_ns) == (0, 0)
    assert built.head.config == CONFIG
    assert built.head.host.items() >= HOST.items()
    assert built.head.devices == DEVICES
    assert [state.name for state in built.states] == [
        "meta",
        *(f"kern/{name}" for name in KERNEL),
        *(f"dev/{name}" for name in DEVICES),
    ]


def test_without_a_configuration_the_meta_tells_a_minimal_one(here: Files) -> None:
    source = SnapshotSource(here.memory, None, HOST)
    keys = {"cpus": "2", "memory.size": str(MEMORY)}
    assert source.head().config == {"name": "web1", "keys": keys, "resources": {}}
    assert (source.name, source.resources()) == ("web1", [])
    assert "no configuration" in source.warnings()[0]
    source.close()


def test_a_configuration_names_the_guest_and_its_resources(here: Files) -> None:
    source: Snapshot = SnapshotSource(here.memory, {**CONFIG, "name": "db7"}, HOST)
    assert (source.name, source.resources()) == ("db7", ["disk0=", "disk1="])
    assert source.warnings() == []
    source.close()
    source.close()


def test_holes_are_not_read(here: Files) -> None:
    source = SnapshotSource(here.memory, None, HOST)
    touched = list(source.touched())
    npages = sum(end - first for first, end in touched)
    assert 100 <= npages < 140
    assert all(first < end for first, end in touched)
    assert {0, MEMORY // 2 // PAGE_BYTES, MEMORY // PAGE_BYTES - 1} <= {
        page for first, end in touched for page in range(first, end)
    }
    assert [len(view) for view in source.memory()] == [MEMORY]
    source.close()


def test_a_guest_that_touched_nothing_is_one_hole(
    here: Files, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.truncate(here.memory, 0)
    os.truncate(here.memory, MEMORY)
    source = SnapshotSource(here.memory, None, HOST)
    assert list(source.touched()) == []
    send(source, tmp_path / "s", monkeypatch)
    receive(tmp_path / "s", FilesSink(there, "web1"))
    assert (there / "web1").stat().st_size == MEMORY
    assert (there / "web1").stat().st_blocks == 0


def test_an_extent_ends_at_the_border_of_a_segment(tmp_path: Path) -> None:
    here = write_snapshot(Files(tmp_path, "big"), BIG)
    source = SnapshotSource(here.memory, None, HOST)
    border = 3 * GIB // PAGE_BYTES
    touched = list(source.touched())
    assert [(first, end) for first, end in touched if first < border < end] == []
    assert (border - 1, border) in touched
    assert any(first == border for first, _ in touched)
    assert [len(view) for view in source.memory()] == [3 * GIB, MEMORY]
    source.close()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP])
def test_where_the_file_system_knows_no_holes_everything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    here = write_snapshot(Files(tmp_path, "big"), BIG)

    def refuse(fd: int, at: int, how: int) -> int:
        raise OSError(number, os.strerror(number))

    source = SnapshotSource(here.memory, None, HOST)
    monkeypatch.setattr(os, "lseek", refuse)
    border, end = 3 * GIB // PAGE_BYTES, BIG // PAGE_BYTES
    assert list(source.touched()) == [(0, border), (border, end)]
    source.close()


def test_a_memory_file_that_cannot_be_walked_is_said(
    here: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, at: int, how: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    source = SnapshotSource(here.memory, None, HOST)
    monkeypatch.setattr(os, "lseek", fail)
    with pytest.raises(GuestError, match="cannot walk the memory file: Input/output error"):
        list(source.touched())
    source.close()


def exchange(first: Path, second: Path) -> None:
    spare = first.with_name("spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def rename_guest(name: str) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        text = files.meta.read_bytes()
        files.meta.write_bytes(text.replace(b'"web1"', f'"{name}"'.encode()))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.memory.unlink(), "cannot open .*/web1.save: No such file"),
        (lambda f: f.meta.unlink(), "cannot open .*/web1.save.meta: No such file"),
        (lambda f: f.kern.unlink(), "cannot open .*/web1.save.kern: No such file"),
        (lambda f: os.truncate(f.memory, 0), "web1.save is empty"),
        (lambda f: os.truncate(f.memory, MEMORY - 1), "web1.save has 16777215 bytes .* truncated"),
        (lambda f: os.truncate(f.memory, MEMORY + 1), "web1.save has 16777217 bytes .* too long"),
        (lambda f: os.truncate(f.kern, 99), "web1.save.kern has 99 bytes .* truncated"),
        (lambda f: os.truncate(f.meta, 99), "web1.save.meta is not complete"),
        (lambda f: exchange(f.memory, f.kern), "web1.save has .* bytes where web1.save.meta says"),
        (lambda f: exchange(f.memory, f.meta), "web1.save.meta: 16777216 bytes are more than"),
        (lambda f: exchange(f.kern, f.meta), "web1.save.meta is not complete, or not bhyve's"),
        (rename_guest("a@b"), "web1.save.meta: 'a@b' is not a guest's name"),
    ],
    ids=[
        "no-memory", "no-meta", "no-kern", "empty-memory", "short-memory", "long-memory",
        "short-kern", "short-meta", "memory-kern", "memory-meta", "kern-meta", "name",
    ],
)  # fmt: skip
def test_what_is_no_snapshot_is_refused_before_a_byte_is_sent(
    here: Files, spoil: Callable[[Files], object], message: str
) -> None:
    spoil(here)
    before = descriptors()
    with pytest.raises(GuestError, match=message):
        SnapshotSource(here.memory, None, HOST)
    assert descriptors() == before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"memory.size": str(2 * MEMORY), "cpus": "2"},
            "memory.size is 33554432 in the configuration, 16777216 in meta",
        ),
        (
            {"memory.size": str(MEMORY), "cpus": "4"},
            "cpus is 4 in the configuration, 2 in meta",
        ),
        ({}, "memory.size is None in the configuration"),
    ],
)
def test_a_configuration_of_another_guest_is_refused(
    here: Files, keys: dict[str, str], message: str
) -> None:
    with pytest.raises(GuestError, match=message):
        SnapshotSource(here.memory, {**CONFIG, "keys": keys}, HOST)


def touch(path: Path) -> None:
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


@pytest.mark.parametrize("which", ["memory", "kern", "meta", "fpu"])
def test_a_snapshot_that_changes_while_it_is_sent_has_no_end(
    here: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    here.fpu.write_bytes(snapshotfiles.pack_fpu(FPU))
    source = SnapshotSource(here.memory, None, HOST)
    touch(getattr(here, which))
    with pytest.raises(GuestError, match="was written to while it was sent"):
        send(source, tmp_path / "s", monkeypatch)
    with pytest.raises(AbortedError, match="was written to while it was sent"):
        rebuild((tmp_path / "s").read_bytes())


def test_what_needs_a_running_guest_is_refused(
    here: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options in ({"answered": True}, {"command": ("ssh",)}, {"hook": "sync"}):
        with pytest.raises(UsageError):
            send(SnapshotSource(here.memory, None, HOST), tmp_path / "s", monkeypatch, **options)
        assert (tmp_path / "s").stat().st_size == 0


def test_an_interrupted_stream_has_no_end(
    here: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SnapshotSource(here.memory, None, HOST)

    def interrupt() -> Iterator[tuple[int, int]]:
        raise Interrupted("interrupted by SIGINT")

    monkeypatch.setattr(source, "touched", interrupt)
    with pytest.raises(Interrupted):
        send(source, tmp_path / "s", monkeypatch)
    with pytest.raises(AbortedError, match="interrupted by SIGINT"):
        rebuild((tmp_path / "s").read_bytes())


def test_the_end_is_reported(
    here: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    send(SnapshotSource(here.memory, None, HOST), tmp_path / "s", monkeypatch)
    out, err = capfd.readouterr()
    assert out == ""
    assert "no configuration goes with the snapshot" in err
    assert "guest web1: the snapshot is sent" in err


def test_a_truncated_stream_leaves_no_file(
    here: Files, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = tmp_path / "s"
    send(SnapshotSource(here.memory, None, HOST), stream, monkeypatch)
    os.truncate(stream, stream.stat().st_size - 1)
    sink = FilesSink(there, "web1")
    with pytest.raises(BhyError):
        receive(stream, sink)
    sink.abort()
    assert names(there) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "web1.save.fpu is empty"),
        (b"{", "web1.save.fpu is not complete, or not ours"),
        (b"[]", "web1.save.fpu is not complete, or not ours"),
        (b'{"fpu/0": 1}', "web1.save.fpu is not complete, or not ours"),
        (b'{"fpu/0": "*"}', "web1.save.fpu is not complete, or not ours"),
        (b'{"fpu/x": ""}', "web1.save.fpu: a name in it is no vCPU's"),
        (b" " * (9 << 20), "web1.save.fpu: 9437184 bytes are more than"),
    ],
)
def test_an_fpu_file_that_is_none_is_refused(
    here: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, message: str
) -> None:
    here.fpu.write_bytes(text)
    with pytest.raises(GuestError, match=message):
        send(SnapshotSource(here.memory, None, HOST), tmp_path / "s", monkeypatch)

"""The FIFO that holds a checkpoint: what it tells, and that no process of ours keeps it open."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from bhystream.backend.bhyve import fifo
from standin.rig import await_true


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckp.meta"


def writer(path: Path, text: bytes) -> threading.Thread:
    """Write as bhyve does on FreeBSD, where a pipe takes one byte if it has room for one."""

    def write() -> None:
        fd = os.open(path, os.O_WRONLY)
        for part in (text[:1], text[1:]):
            os.write(fd, part)
        os.close(fd)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_its_size_is_what_it_takes(path: Path) -> None:
    size = fifo.make(path)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    assert os.write(fd, bytes(size)) == size
    with pytest.raises(BlockingIOError):
        os.write(fd, b"x")
    os.close(fd)
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_lacks_one_byte_when_it_is_armed(path: Path) -> None:
    size = fifo.make(path)
    fd = fifo.arm(path, size)
    assert fifo.pending_in(fd) == fifo.pending(path) == size - 1
    os.close(fd)
    # The bytes in the FIFO are lost with the last open descriptor.
    assert fifo.pending(path) == 0


def test_it_is_armed_anew_as_at_first(path: Path) -> None:
    size = fifo.make(path)
    os.close(fifo.arm(path, size))
    fd = fifo.arm(path, size)
    assert fifo.pending(path) == size - 1
    again = fifo.arm(path, size)
    assert fifo.pending(path) == size - 1
    os.close(fd)
    os.close(again)


def test_one_that_takes_less_is_refused(path: Path) -> None:
    size = fifo.make(path)
    with pytest.raises(OSError, match="takes less") as caught:
        fifo.arm(path, size + 2)
    assert caught.value.errno == errno.ENOBUFS
    assert not fifo.has_reader(path)


def test_a_writer_stands_in_it_until_it_is_read(path: Path) -> None:
    size = fifo.make(path)
    text = json.dumps({"devices": ["x" * 2000]}).encode()
    anchor = fifo.arm(path, size)
    thread = writer(path, text)
    await_true(lambda: fifo.pending(path) == size, "a full FIFO")
    assert thread.is_alive()
    found, is_over = fifo.drain(path, 0.0)
    assert not is_over  # the anchor has the FIFO open to write, too
    thread.join()
    os.close(anchor)
    assert not fifo.has_reader(path)
    assert found.lstrip()[:1] == b"{"


def test_what_is_written_behind_the_filling_is_read_whole(path: Path) -> None:
    size = fifo.make(path)
    text = json.dumps({"devices": ["x" * 2000]}).encode()
    anchor = fifo.arm(path, size)
    thread = writer(path, text)
    await_true(lambda: fifo.pending(path) == size, "a full FIFO")

    def close() -> None:
        thread.join()
        os.close(anchor)

    closing = threading.Thread(target=close)
    closing.start()
    found, is_over = fifo.drain(path, 30.0)
    closing.join()
    assert is_over
    assert json.loads(found)["devices"] == ["x" * 2000]


def test_a_reader_is_seen_and_its_end_too(path: Path) -> None:
    fifo.make(path)
    assert not fifo.has_reader(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    assert fifo.has_reader(path)
    os.close(fd)
    assert not fifo.has_reader(path)


def test_what_is_not_there_holds_nobody(path: Path) -> None:
    assert fifo.pending(path) == 0
    assert not fifo.has_reader(path)
    with pytest.raises(FileNotFoundError):
        fifo.drain(path, 0.0)


def test_another_file_has_nothing_pending(path: Path) -> None:
    path.write_text("{}")
    assert fifo.pending(path) == 0


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    fifo.make(tmp_path / "other")
    path.symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic links"):
        fifo.pending(path)

"""Pages that go from standard input into the file of the guest's memory by splice(2)."""

from __future__ import annotations

import errno
import io
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.base import Target
from bhystream.errors import ChecksumError, InputOutputError, TruncatedError
from bhystream.guest import Head
from bhystream.memory.inplace import IN_PLACE_PAGES
from bhystream.memory.target import FileTarget, MappedTarget
from bhystream.recv.placing import place_by_splices
from bhystream.recv.reply import TimedInput
from bhystream.send.transfer import BATCH_PAGES
from bhystream.stream.verify import Pages, Walk
from support.streams import ANSWERED, DATA, KEPT, PLAIN, ZERO, ZSTD, Maker

pytestmark = pytest.mark.skipif(not hasattr(os, "splice"), reason="splice(2) is Linux's")

PAGE = 4096
NPAGES = 2 * IN_PLACE_PAGES + 100
OFFSET = 5 * PAGE


def pages_of(seed: int, count: int) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(PAGE) for _ in range(count)]


class File:
    """The file of one segment, full of old bytes; it begins before the segment, and ends behind."""

    def __init__(self) -> None:
        self.name = f"memory-{random.getrandbits(32):x}"
        self.fd = os.memfd_create(self.name)
        os.write(self.fd, b"\xee" * (OFFSET + (NPAGES + 1) * PAGE))

    def target(self) -> FileTarget:
        return FileTarget(self.fd, OFFSET)

    def segment(self) -> bytes:
        return os.pread(self.fd, NPAGES * PAGE, OFFSET)

    def outside(self) -> set[int]:
        before, behind = (
            os.pread(self.fd, OFFSET, 0),
            os.pread(self.fd, PAGE, OFFSET + NPAGES * PAGE),
        )
        return set(before + behind)


def open_descriptors() -> set[str]:
    """Return the open ones; the thread that writes a stream closes its own in the end."""
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def file() -> Iterator[File]:
    made = File()
    yield made
    os.close(made.fd)


@contextmanager
def written(raw: bytes, chunk: int) -> Iterator[TimedInput]:
    """Yield the reading end of a pipe, to which a thread writes in pieces of this size."""
    ends = os.pipe()

    def write() -> None:
        try:
            for at in range(0, len(raw), chunk):
                piece = raw[at : at + chunk]
                while piece:
                    piece = piece[os.write(ends[1], piece) :]
        except BrokenPipeError:
            return
        finally:
            os.close(ends[1])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield TimedInput(ends[0])
    finally:
        os.close(ends[0])
        writer.join()


def received(source: TimedInput, targets: Sequence[Target]) -> list[bool]:
    """Receive all pages as Building does; return which sections a Placer has placed."""
    walk, found = Walk(source), []
    for event in walk.events():
        match event:
            case Head():
                layout = event.layout
                placer = place_by_splices("web1", walk, source, layout, targets)
            case Pages():
                at = event.segment
                found.append(event.is_placed)
                assert len(event.pages) == (0 if event.is_placed else event.npages * PAGE)
                if not event.is_placed:
                    npages = layout.segments[at].npages
                    targets[at].place(layout.starts[at], npages, event.extents, event.pages)
    if placer:
        placer.close()
    return found


def whole(*sections: tuple[list[tuple[int, int, int]], list[bytes]], form: int = ANSWERED) -> Maker:
    """Return a stream with one round of these sections."""
    maker = Maker(form).head((b"ram", 0, NPAGES))
    for extents, pages in sections:
        maker.memory(0, extents, pages)
    return maker


def ended(maker: Maker) -> bytes:
    return maker.round_end(0, maker.data, maker.zeros, flags=1).time().end().raw


A, B, C = pages_of(1, IN_PLACE_PAGES), pages_of(2, IN_PLACE_PAGES), pages_of(3, 40)
SECTIONS = (
    ([(0, 200, DATA), (200, 30, ZERO), (230, IN_PLACE_PAGES - 200, DATA)], A),
    ([(IN_PLACE_PAGES + 30, IN_PLACE_PAGES, DATA), (2 * IN_PLACE_PAGES + 30, 30, ZERO)], B),
    ([(2 * IN_PLACE_PAGES + 60, 40, DATA)], C),
)
CONTENT = b"".join([*A[:200], bytes(30 * PAGE), *A[200:], *B, bytes(30 * PAGE), *C])


@pytest.mark.parametrize("chunk", [1 << 20, 1 << 16, 10007, 4096])
def test_long_sections_are_placed_and_the_others_too(file: File, chunk: int) -> None:
    with written(ended(whole(*SECTIONS)), chunk) as source:
        assert received(source, [file.target()]) == [True, True, False]
    assert file.segment() == CONTENT
    assert file.outside() == {0xEE}


def test_both_ways_end_in_the_same_memory(file: File) -> None:
    """The stream of a file has no pipe: it is read into a buffer."""
    target = file.target()
    for event in Walk(io.BytesIO(ended(whole(*SECTIONS)))).events():
        if isinstance(event, Pages):
            assert not event.is_placed
            target.place(0, NPAGES, event.extents, event.pages)
    assert file.segment() == CONTENT


def test_short_runs_are_not_worth_it(file: File) -> None:
    pages = pages_of(4, IN_PLACE_PAGES)
    extents = [(at, 1, at % 2) for at in range(2 * IN_PLACE_PAGES)]
    rest = [(2 * IN_PLACE_PAGES, 100, ZERO)]
    with written(ended(whole((extents, pages), (rest, []))), 1 << 16) as source:
        assert received(source, [file.target()]) == [False, False]
    assert file.segment()[:PAGE] == pages[0]


def test_frames_are_not_placed(file: File) -> None:
    maker = Maker(ANSWERED, mandatory=ZSTD).head((b"ram", 0, 2 * IN_PLACE_PAGES))
    pages = [bytes([at % 251]) * PAGE for at in range(IN_PLACE_PAGES)]
    maker.zstd([(0, IN_PLACE_PAGES, DATA)], pages)
    # zstd does not make these smaller, and bhysend has copied them too.
    maker.memory(0, [(IN_PLACE_PAGES, IN_PLACE_PAGES, DATA)], A)
    with written(ended(maker), 1 << 16) as source:
        assert received(source, [file.target()]) == [False, False]
    assert file.segment().startswith(b"".join([*pages, *A]))


@pytest.mark.parametrize("form", [PLAIN, KEPT])
def test_only_a_guest_that_stands_until_the_answer_is_spliced(file: File, form: int) -> None:
    with written(ended(whole(*SECTIONS, form=form)), 1 << 16) as source:
        assert received(source, [file.target()]) == [False] * 3
    assert file.segment() == CONTENT


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
def test_a_filter_may_forbid_the_call(
    file: File, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def splice(*args: Any, **more: Any) -> int:
        raise OSError(error, os.strerror(error))

    with written(ended(whole(*SECTIONS)), 1 << 16) as source:
        before = open_descriptors()
        monkeypatch.setattr(os, "splice", splice)
        assert received(source, [file.target()]) == [False] * 3
        assert open_descriptors() <= before
    assert file.segment() == CONTENT


def test_nothing_is_held_in_the_end(file: File) -> None:
    with written(ended(whole(*SECTIONS)), 1 << 16) as source:
        before = open_descriptors()
        assert received(source, [file.target()]) == [True, True, False]
        assert open_descriptors() <= before
    assert f"memfd:{file.name}" not in Path("/proc/self/maps").read_text()


def test_a_stream_that_cannot_be_read_is_named(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TimedInput.splice

    def splice(self: TimedInput, fd: int, nbytes: int) -> int:
        if nbytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, fd, nbytes)

    monkeypatch.setattr(TimedInput, "splice", splice)
    refused = pytest.raises(InputOutputError, match="cannot read the stream")
    with written(ended(whole(*SECTIONS)), 1 << 16) as source, refused:
        received(source, [file.target()])


def not_mapped(file: File, stack: ExitStack) -> FileTarget:
    """Return the target of a descriptor that cannot be mapped to be read."""
    fd = os.open(f"/proc/self/fd/{file.fd}", os.O_WRONLY)
    stack.callback(os.close, fd)
    return FileTarget(fd, OFFSET)


def too_short(file: File, stack: ExitStack) -> FileTarget:
    os.truncate(file.fd, OFFSET + PAGE)
    return file.target()


def odd(file: File, stack: ExitStack) -> FileTarget:
    return FileTarget(file.fd, OFFSET - 1)


def in_memory(file: File, stack: ExitStack) -> MappedTarget:
    return MappedTarget(memoryview(bytearray(NPAGES * PAGE)))


@pytest.mark.parametrize("make", [not_mapped, too_short, odd, in_memory])
def test_a_target_that_cannot_be_mapped_gets_its_pages_as_before(
    file: File, make: Callable[[File, ExitStack], Target]
) -> None:
    with ExitStack() as stack, written(ended(whole(*SECTIONS)), 1 << 16) as source:
        assert received(source, [make(file, stack)]) == [False] * 3


@pytest.mark.parametrize("bad", [0, 199, 200, IN_PLACE_PAGES - 1])
def test_a_changed_page_is_named(file: File, bad: int) -> None:
    maker = whole(SECTIONS[0])
    at = len(maker.raw) - (IN_PLACE_PAGES - bad) * PAGE
    raw = bytearray(ended(maker))
    raw[at + 77] ^= 1
    named = bad if bad < 200 else bad + 30
    message = rf"^section 5 \(MEMORY\) at offset 0x[0-9a-f]+: the bytes of page {named} are not"
    with written(bytes(raw), 1 << 16) as source, pytest.raises(ChecksumError, match=message):
        received(source, [file.target()])


@pytest.mark.parametrize("left", [1, PAGE, 100 * PAGE + 1])
def test_a_stream_that_ends_in_the_pages_is_refused(file: File, left: int) -> None:
    raw = whole(SECTIONS[0]).raw[:-left]
    message = rf"^section 5 \(MEMORY\) at offset 0x[0-9a-f]+: the stream ends {left} bytes early$"
    with written(raw, 1 << 16) as source, pytest.raises(TruncatedError, match=message):
        received(source, [file.target()])


def test_a_list_that_is_wrong_touches_no_memory(file: File) -> None:
    maker = Maker(ANSWERED).head((b"ram", 0, NPAGES))
    maker.memory(0, [(0, IN_PLACE_PAGES, DATA)], A, flip=1)
    with written(maker.raw, 1 << 16) as source, pytest.raises(ChecksumError, match="differs"):
        received(source, [file.target()])
    assert set(file.segment()) == {0xEE}


def test_memory_that_cannot_be_written_is_named(file: File) -> None:
    fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY)
    message = "^cannot write the memory of guest web1: Bad file descriptor$"
    refused = pytest.raises(InputOutputError, match=message)
    with written(ended(whole(*SECTIONS)), 1 << 16) as source, refused:
        received(source, [FileTarget(fd, OFFSET)])
    os.close(fd)


def test_every_section_counts_in_the_end(file: File) -> None:
    """Offsets, sequence numbers and digest go on behind pages that nobody has read here."""
    maker = whole(*SECTIONS)
    with written(ended(maker), 1 << 16) as source:
        walk = Walk(source)
        for event in walk.events():
            if isinstance(event, Head):
                place_by_splices("web1", walk, source, event.layout, [file.target()])
        assert walk.reader.offset_bytes == len(maker.raw)
        assert walk.reader.sequence == maker.count


def test_sections_are_long_enough_only_if_they_were_sent_in_place() -> None:
    assert BATCH_PAGES < IN_PLACE_PAGES

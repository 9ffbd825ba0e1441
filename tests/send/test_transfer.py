"""The walk over a guest's memory, from sparse files to a rebuilt copy."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bhystream import __version__
from bhystream.errors import ChecksumError, InputOutputError
from bhystream.guest import PAGE_BYTES, State
from bhystream.memory.hole import punch
from bhystream.memory.inplace import PagesInPlace
from bhystream.memory.scatter import scatter
from bhystream.send import scan, transfer
from bhystream.send.head import write_head
from bhystream.send.precopy import Round
from bhystream.send.transfer import BATCH_PAGES, Transfer
from bhystream.stream import format as fmt
from bhystream.stream.format import Feature, Form, Header, Type
from bhystream.stream.verify import Pages, Walk
from bhystream.stream.writer import Writer
from bhystream.units import NS
from support.clock import Clock
from support.memory_source import MemorySource, Rebuilt, rebuild

SIZES = (700, 1, 300, 64)
LEVELS = pytest.mark.parametrize("level", [None, 1], ids=["plain", "zstd"])


@pytest.fixture
def source() -> Iterator[MemorySource]:
    made = MemorySource(*SIZES)
    yield made
    made.close()


class Sending:
    """A transfer into a file, with the sections around it."""

    def __init__(
        self,
        path: Path,
        source: MemorySource,
        level: int | None = None,
        on_batch: Callable[[int, int], None] = lambda done, sent: None,
        last_in_place: bool = False,
    ) -> None:
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        features = Feature(0) if level is None else Feature.ZSTD
        self.writer = Writer(self._fd, Header(Form.PLAIN, features, os.urandom(16), 0x5EED))
        head = source.head()
        write_head(self.writer, head)
        self.transfer = Transfer(
            source,
            head.layout,
            self.writer,
            level=level,
            last_in_place=last_in_place,
            on_batch=on_batch,
        )

    def finish(self) -> Rebuilt:
        """Write what follows the last round; verify and rebuild."""
        self.writer.state(State("cpu", b"state"))
        self.writer.section(Type.TIME, fmt.TIME.pack(0, 0))
        self.writer.end()
        os.close(self._fd)
        return rebuild(self._path.read_bytes())


def some_page(rng: random.Random) -> bytes:
    """Return a page: random, text-like, nearly zero, or zero."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randbytes(PAGE_BYTES)
    if kind == 1:
        return (b"%016x" % rng.getrandbits(64)) * (PAGE_BYTES // 16)
    page = bytearray(PAGE_BYTES)
    if kind == 2:
        page[rng.randrange(PAGE_BYTES)] = 1
    return bytes(page)


def scribble(source: MemorySource, rng: random.Random, times: int) -> None:
    """Change memory in runs of pages at random places: whole pages, single bytes, holes."""
    for _ in range(times):
        page = rng.randrange(source.npages)
        for at in range(page, min(page + rng.choice([1, 1, 5, 100]), source.npages)):
            if rng.random() < 0.2:
                source.punch(at)
            elif rng.random() < 0.5:
                source.write(at, some_page(rng))
            else:
                source.write(at, rng.randbytes(1))


def sent_pages(found: Round) -> int:
    return found.data_pages + found.zero_pages


@LEVELS
def test_memory_arrives_byte_for_byte(
    tmp_path: Path, source: MemorySource, rng: random.Random, level: int | None
) -> None:
    scribble(source, rng, 40)
    sending = Sending(tmp_path / "s", source, level)
    found = []
    for _ in range(4):
        found.append(sending.transfer.round())
        scribble(source, rng, rng.choice([0, 3, 20]))
    found.append(sending.transfer.round(last=True))
    built = sending.finish()
    assert built.memory == source.contents()
    assert sent_pages(found[0]) == source.npages
    assert [(r.data_pages, r.zero_pages) for r in found] == [
        (r.data_pages, r.zero_pages) for r in built.rounds
    ]
    assert built.ended
    assert built.ended.end.data_pages == sum(r.data_pages for r in found)


@LEVELS
def test_a_guest_that_writes_during_the_rounds_arrives_as_it_was_paused(
    tmp_path: Path, source: MemorySource, rng: random.Random, level: int | None
) -> None:
    scribble(source, rng, 40)
    stop = threading.Event()
    steps = threading.Semaphore(0)

    def run() -> None:
        while not stop.is_set():
            scribble(source, rng, 5)
            steps.release()

    sending = Sending(tmp_path / "s", source, level)
    guest = threading.Thread(target=run)
    guest.start()
    try:
        for _ in range(6):
            assert steps.acquire(timeout=60)  # the guest has run since the last round
            sending.transfer.round()
    finally:
        stop.set()
        guest.join()
    sending.transfer.round(last=True)
    assert sending.finish().memory == source.contents()


def test_a_change_during_a_round_is_sent_in_the_next(
    tmp_path: Path, source: MemorySource, rng: random.Random
) -> None:
    # The walk has passed the page when the page changes: only the next scan finds it.
    for page in range(3 * BATCH_PAGES):
        source.write(page, rng.randbytes(PAGE_BYTES))
    armed = [True]

    def change(done: int, sent: int) -> None:
        if armed and done >= BATCH_PAGES:
            armed.clear()
            source.write(0, rng.randbytes(PAGE_BYTES))

    sending = Sending(tmp_path / "s", source, on_batch=change)
    sending.transfer.round()
    last = sending.transfer.round(last=True)
    built = sending.finish()
    assert not armed
    assert (last.data_pages, last.zero_pages) == (1, 0)
    assert built.data[1] == {0}
    assert built.memory == source.contents()


@LEVELS
def test_only_what_changed_is_sent_again(
    tmp_path: Path, source: MemorySource, rng: random.Random, level: int | None
) -> None:
    for page in range(source.npages):
        source.write(page, rng.randbytes(PAGE_BYTES))
    sending = Sending(tmp_path / "s", source, level)
    first = sending.transfer.round()
    changed = set(rng.sample(range(source.npages), 50))
    for page in changed:
        source.write(page, rng.randbytes(8))
    rewritten = rng.choice(sorted(set(range(source.npages)) - changed))
    source.write(rewritten, source.contents()[rewritten * PAGE_BYTES :][:PAGE_BYTES])
    second = sending.transfer.round()
    last = sending.transfer.round(last=True)
    built = sending.finish()
    assert (first.data_pages, first.zero_pages) == (source.npages, 0)
    assert (second.data_pages, second.zero_pages) == (50, 0)
    assert (last.data_pages, last.zero_pages) == (0, 0)
    assert built.data[1] == changed
    assert built.data[2] == built.zero[2] == set()


def test_a_dirty_log_says_what_to_look_at(
    tmp_path: Path, source: MemorySource, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the pages that the log names are compared, until the log is lost (None)."""
    for page in range(source.npages):
        source.write(page, rng.randbytes(PAGE_BYTES))
    logs: list[list[tuple[int, int]] | None] = [[], [(0, 3), (7, 8)], None]

    def changed() -> Iterator[tuple[int, int]] | None:
        log = logs.pop(0)
        return None if log is None else iter(log)

    monkeypatch.setattr(source, "changed", changed)
    sending = Sending(tmp_path / "s", source)
    first = sending.transfer.round()
    walked = sending.transfer.walked_pages
    for page in (1, 7, 9):
        source.write(page, rng.randbytes(PAGE_BYTES))
    sending.transfer.round()
    assert sending.transfer.walked_pages == walked + 4
    sending.transfer.round(last=True)
    built = sending.finish()
    assert first.data_pages == source.npages
    assert built.data[1:3] == [{1, 7}, {9}]
    assert built.memory == source.contents()


def test_a_page_that_became_a_hole_becomes_zero(tmp_path: Path, source: MemorySource) -> None:
    # One hole in an extent of data, one that is a whole segment, one in a page never written.
    source.write(10, b"a")
    source.write(11, b"b")
    source.write(12, b"c")
    source.write(700, b"d")
    sending = Sending(tmp_path / "s", source)
    sending.transfer.round()
    source.punch(11)
    source.punch(700)
    source.punch(20)
    last = sending.transfer.round(last=True)
    built = sending.finish()
    assert (last.data_pages, last.zero_pages) == (0, 2)
    assert built.zero[1] == {11, 700}
    assert built.memory == source.contents()
    assert not any(built.memory[11 * PAGE_BYTES : 12 * PAGE_BYTES])


def test_zeros_and_holes_are_stated_and_never_sent(tmp_path: Path, source: MemorySource) -> None:
    source.write(0, bytes(200 * PAGE_BYTES))
    sending = Sending(tmp_path / "s", source)
    first = sending.transfer.round()
    sending.transfer.round(last=True)
    built = sending.finish()
    assert (first.data_pages, first.zero_pages) == (0, source.npages)
    # There are four segments, and one extent in one MEMORY section for each segment.
    assert first.sent_bytes < 1024
    assert built.memory == source.contents()


@LEVELS
def test_sending_allocates_nothing_at_the_source(
    tmp_path: Path, source: MemorySource, rng: random.Random, level: int | None
) -> None:
    scribble(source, rng, 20)
    source.punch(0)
    before = source.allocated_bytes()
    assert before < source.npages * PAGE_BYTES
    sending = Sending(tmp_path / "s", source, level)
    sending.transfer.round()
    assert source.allocated_bytes() == before
    for page in range(0, source.npages, 3):
        source.punch(page)
    before = source.allocated_bytes()
    sending.transfer.round(last=True)
    assert source.allocated_bytes() == before


def test_the_measure_of_allocation_sees_a_read_of_a_hole(source: MemorySource) -> None:
    # The tests before and after this one rely on this measure.
    before = source.allocated_bytes()
    assert source.memory()[0][5 * PAGE_BYTES] == 0
    assert source.allocated_bytes() == before + PAGE_BYTES


def test_the_destination_allocates_what_holds_data_only(
    tmp_path: Path, source: MemorySource, rng: random.Random
) -> None:
    # receive() does what bhyrecv does: scatter() and punch() into empty files.
    scribble(source, rng, 30)
    sending = Sending(tmp_path / "s", source)
    sending.transfer.round()
    scribble(source, rng, 30)
    sending.transfer.round(last=True)
    sending.finish()
    sink = MemorySource(*SIZES)
    try:
        receive(tmp_path / "s", sink)
        assert sink.contents() == source.contents()
        pages = memoryview(source.contents())
        data = sum(any(pages[a : a + PAGE_BYTES]) for a in range(0, len(pages), PAGE_BYTES))
        assert sink.allocated_bytes() == data * PAGE_BYTES
    finally:
        sink.close()


def receive(path: Path, sink: MemorySource) -> None:
    with path.open("rb", buffering=0) as stream:
        for event in Walk(stream).events():
            if not isinstance(event, Pages):
                continue
            base = sum(SIZES[: event.segment])
            fd = sink.fds[event.segment]
            scatter(fd, 0, base, SIZES[event.segment], event.extents, event.pages)
            for first, count, kind in fmt.EXTENT.iter_unpack(event.extents):
                if kind == fmt.KIND_ZERO:
                    punch(fd, (first - base) * PAGE_BYTES, count * PAGE_BYTES)


def test_more_extents_than_a_section_holds(tmp_path: Path) -> None:
    # Every other page differs: an extent of one page each.
    source = MemorySource(3 * fmt.MAX_EXTENTS)
    try:
        sending = Sending(tmp_path / "s", source)
        sending.transfer.round()
        for page in range(0, source.npages, 2):
            source.write(page, b"x")
        sending.transfer.round()
        for page in range(0, source.npages, 2):
            source.punch(page)
        last = sending.transfer.round(last=True)
        assert (last.data_pages, last.zero_pages) == (0, source.npages // 2)
        assert sending.finish().memory == source.contents()
    finally:
        source.close()


def test_on_batch_counts_up_to_the_whole_guest(
    tmp_path: Path, source: MemorySource, rng: random.Random
) -> None:
    for page in range(source.npages):
        source.write(page, rng.randbytes(64))
    calls: list[tuple[int, int]] = []
    sending = Sending(tmp_path / "s", source, on_batch=lambda a, b: calls.append((a, b)))
    sending.transfer.round(last=True)
    sending.finish()
    assert calls == sorted(calls)
    assert calls[-1] == (source.npages, source.npages)
    # Each call is for a full batch, or for a batch that ends at a segment's border.
    assert all(done == sent for done, sent in calls)
    assert len(calls) == sum(-(-n // BATCH_PAGES) for n in SIZES)


def test_all_pages_that_were_looked_at_are_counted(tmp_path: Path, source: MemorySource) -> None:
    """Pages count even if nothing is written: a long last scan is progress."""
    sending = Sending(tmp_path / "s", source)
    sending.transfer.round()
    assert sending.transfer.walked_pages == source.npages
    sending.transfer.round(last=True)
    assert sending.transfer.walked_pages == 2 * source.npages
    sending.finish()


def test_bytes_and_times_of_a_round_are_measured(
    tmp_path: Path, source: MemorySource, rng: random.Random
) -> None:
    scribble(source, rng, 30)
    sending = Sending(tmp_path / "s", source)
    before = sending.writer.offset_bytes
    found = sending.transfer.round(last=True)
    assert found.sent_bytes == sending.writer.offset_bytes - before
    assert 0 < found.write_ns < found.end_ns - found.start_ns
    assert 0 < found.scan_ns < found.end_ns - found.start_ns
    sending.finish()


def test_compression_is_kept_only_where_it_pays(tmp_path: Path, rng: random.Random) -> None:
    sizes = []
    for contents in (rng.randbytes(64 * PAGE_BYTES), b"ab" * (32 * PAGE_BYTES)):
        source = MemorySource(64)
        try:
            source.write(0, contents)
            sending = Sending(tmp_path / "s", source, 1)
            sizes.append(sending.transfer.round(last=True).sent_bytes)
            assert sending.finish().memory == source.contents()
        finally:
            source.close()
    noise, text = sizes
    assert noise >= 64 * PAGE_BYTES
    assert text < 64 * PAGE_BYTES // 16


def test_a_reader_that_is_gone_is_a_pipe_error(source: MemorySource, rng: random.Random) -> None:
    for page in range(source.npages):
        source.write(page, rng.randbytes(64))
    theirs, ours = os.pipe()
    with os.fdopen(ours, "wb", buffering=0):
        writer = Writer(ours, Header(Form.PLAIN, Feature(0), bytes(16), 0))
        write_head(writer, source.head())
        sending = Transfer(source, source.layout, writer)
        os.close(theirs)
        with pytest.raises(InputOutputError, match="cannot write the stream: Broken pipe"):
            sending.round()
        assert not writer.at_border


def test_the_head_names_the_program(tmp_path: Path, source: MemorySource) -> None:
    sending = Sending(tmp_path / "s", source)
    sending.transfer.round(last=True)
    built = sending.finish()
    assert built.head
    assert built.head.host == {"hypervisor": "stand-in", "program": f"bhysend {__version__}"}
    assert built.head.layout == source.layout


# The limit of the rate, with a clock that only sleep() moves.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(transfer, "time", made)
    return made


ROUND_END_BYTES = 32 + 24


@LEVELS
@pytest.mark.parametrize("pages", [1, BATCH_PAGES - 1, 1000])
def test_the_rate_is_not_exceeded_over_a_round(
    tmp_path: Path,
    source: MemorySource,
    rng: random.Random,
    clock: Clock,
    pages: int,
    level: int | None,
) -> None:
    for page in range(pages):
        source.write(page, rng.randbytes(PAGE_BYTES))
    sending = Sending(tmp_path / "s", source, level)
    rate = 1 << 20
    found = sending.transfer.round(rate_bytes=rate)
    took_ns = found.end_ns - found.start_ns
    due_ns = (found.sent_bytes - ROUND_END_BYTES) * NS // rate
    assert abs(took_ns - due_ns) <= 1000  # rounding of each sleep
    assert clock.slept_ns == took_ns
    # The wait for -B counts as writing, and is no part of the scan.
    assert (found.write_ns, found.scan_ns) == (took_ns, 0)
    sending.transfer.round(last=True)
    assert sending.finish().memory == source.contents()


def test_without_a_limit_nothing_sleeps(
    tmp_path: Path, source: MemorySource, rng: random.Random, clock: Clock
) -> None:
    scribble(source, rng, 30)
    sending = Sending(tmp_path / "s", source)
    sending.transfer.round(last=True)
    sending.finish()
    assert clock.slept_ns == 0


def test_a_link_slower_than_the_limit_does_not_sleep(
    tmp_path: Path, source: MemorySource, rng: random.Random, clock: Clock
) -> None:
    for page in range(source.npages):
        source.write(page, rng.randbytes(PAGE_BYTES))
    clock.step_ns = NS  # each look at the clock: a batch takes seconds
    sending = Sending(tmp_path / "s", source)
    sending.transfer.round(rate_bytes=1 << 20)
    assert clock.slept_ns == 0


def test_the_brake_holds_during_the_round_not_at_its_end(
    tmp_path: Path, source: MemorySource, rng: random.Random, clock: Clock
) -> None:
    for page in range(source.npages):
        source.write(page, rng.randbytes(PAGE_BYTES))
    seen: list[tuple[int, int]] = []
    sending = Sending(
        tmp_path / "s", source, on_batch=lambda done, sent: seen.append((sent, clock.now_ns))
    )
    sending.transfer.round(rate_bytes=1 << 20)
    for sent, at_ns in seen:
        # A batch is at most two batches ahead of its turn: a border may cut one of them short.
        assert (sent - 2 * BATCH_PAGES) * PAGE_BYTES * NS <= at_ns << 20


def test_waits_for_a_cpu_are_no_part_of_the_scan(
    tmp_path: Path,
    source: MemorySource,
    rng: random.Random,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scribble(source, rng, 30)
    sending = Sending(tmp_path / "s", source, on_batch=lambda done, sent: clock.preempt(NS))
    section = sending.writer.section

    written = 0

    def slow(type_: Type, *args: Any, **given: Any) -> None:
        nonlocal written
        if type_ == Type.MEMORY:
            clock.preempt(2 * NS)
            clock.now_ns += 7
            written += 1
        section(type_, *args, **given)

    monkeypatch.setattr(sending.writer, "section", slow)
    found = sending.transfer.round(last=True)
    assert written
    assert found.end_ns - found.start_ns == written * (3 * NS + 7)
    assert (found.write_ns, found.scan_ns) == (written * (2 * NS + 7), 0)
    sending.finish()


def test_compressing_counts_as_writing(
    tmp_path: Path,
    source: MemorySource,
    rng: random.Random,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # If not, a slow level looks like a fast link, and the pause gets longer than -d.
    sending = Sending(tmp_path / "s", source, 1)
    source.write(0, rng.randbytes(PAGE_BYTES))

    class Slow:
        """A compressor that takes a second, and saves nothing."""

        def compress(self, data: memoryview) -> bytes:
            clock.now_ns += NS
            return bytes(data)

    monkeypatch.setattr(sending.transfer, "_zstd", Slow())
    found = sending.transfer.round()
    assert found.write_ns == NS == found.end_ns - found.start_ns
    assert found.scan_ns == 0


# In place.


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the sections that are written in place, by their pages."""
    found: list[int] = []

    class Counted(PagesInPlace):
        def __init__(self, segment: memoryview, base: int, extents: memoryview, npages: int):
            found.append(npages)
            super().__init__(segment, base, extents, npages)

    monkeypatch.setattr(transfer, "PagesInPlace", Counted)
    return found


@pytest.mark.skipif(not transfer.HAS_VMSPLICE, reason="vmsplice(2) is Linux's")
@pytest.mark.parametrize("live", [0, 1, 2])
def test_the_last_round_is_written_in_place(
    tmp_path: Path, source: MemorySource, rng: random.Random, in_place: list[int], live: int
) -> None:
    """Over several segments, with holes, zeros, and whatever the live rounds have left."""
    sending = Sending(tmp_path / "s", source, last_in_place=True)
    for _ in range(live):
        scribble(source, rng, 60)
        sending.transfer.round()
        assert in_place == []  # the guest runs, and may write to a page at any time
    scribble(source, rng, 400)
    last = sending.transfer.round(last=True)
    assert sum(in_place) == last.data_pages > 0
    assert sending.finish().memory == source.contents()


@pytest.mark.skipif(not transfer.HAS_VMSPLICE, reason="vmsplice(2) is Linux's")
def test_a_page_that_changes_on_the_way_is_found_by_its_hash(
    source: MemorySource, rng: random.Random
) -> None:
    """A move that fails resumes the guest while its pages may still be in a pipe."""
    read_fd, write_fd = os.pipe()
    source.write(0, rng.randbytes(PAGE_BYTES))
    writer = Writer(write_fd, Header(Form.ANSWERED, Feature(0), os.urandom(16), 0x5EED))
    head = source.head()
    write_head(writer, head)
    Transfer(source, head.layout, writer, last_in_place=True).round(last=True)
    os.close(write_fd)
    source.write(0, rng.randbytes(PAGE_BYTES))
    with os.fdopen(read_fd, "rb", buffering=0) as raw, pytest.raises(ChecksumError, match="page 0"):
        for _ in Walk(raw).events():
            pass


@pytest.mark.parametrize(("level", "is_wanted"), [(1, True), (None, False)])
def test_pages_are_copied_unless_asked_for_and_with_zstd(
    tmp_path: Path,
    source: MemorySource,
    rng: random.Random,
    in_place: list[int],
    level: int | None,
    is_wanted: bool,
) -> None:
    scribble(source, rng, 100)
    sending = Sending(tmp_path / "s", source, level, last_in_place=is_wanted)
    sending.transfer.round(last=True)
    assert in_place == []
    assert sending.finish().memory == source.contents()


def test_a_system_without_vmsplice_copies(
    tmp_path: Path,
    source: MemorySource,
    rng: random.Random,
    in_place: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer, "HAS_VMSPLICE", False)
    scribble(source, rng, 100)
    sending = Sending(tmp_path / "s", source, last_in_place=True)
    sending.transfer.round(last=True)
    assert in_place == []
    assert sending.finish().memory == source.contents()


# The last round, with several threads.


@pytest.mark.parametrize("in_place", [False, True])
def test_threads_send_what_one_thread_sends(
    tmp_path: Path,
    source: MemorySource,
    rng: random.Random,
    in_place: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scan, "PIECE_PAGES", 50)
    sending = Sending(tmp_path / "s", source, last_in_place=in_place)
    scribble(source, rng, 600)
    sending.transfer.round(nthreads=4)
    before = source.contents()
    scribble(source, rng, 300)
    for page in range(40, 90):
        source.punch(page)
    after = source.contents()
    changed = [
        at
        for at in range(0, len(after), PAGE_BYTES)
        if after[at : at + PAGE_BYTES] != before[at : at + PAGE_BYTES]
    ]
    last = sending.transfer.round(last=True, nthreads=4)
    assert last.data_pages + last.zero_pages == len(changed) > 0
    done, total = sending.transfer.work_pages
    assert done <= total
    assert sending.finish().memory == source.contents()


def mapped_pages() -> int:
    """Return how many pages of memory files this process has mapped: its RssShmem."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [found] = [line.split()[1] for line in lines if line.startswith("RssShmem:")]
    return int(found) * 1024 // PAGE_BYTES


def test_touched_pages_are_mapped_before_a_pause_and_holes_stay_holes(tmp_path: Path) -> None:
    source = MemorySource(5000, 3000)
    for page in (*range(1000, 3000), 4999, *range(5000, 6000)):
        source.write(page, b"x")
    allocated = source.allocated_bytes()
    sending = Sending(tmp_path / "stream", source)
    before = mapped_pages()
    sending.transfer.map_touched()
    assert mapped_pages() - before >= 3001
    assert source.allocated_bytes() == allocated
    assert sending.transfer.walked_pages == 0
    source.close()

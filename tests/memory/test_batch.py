"""Batch against a plain Python model of it, and against a guest that writes."""

from __future__ import annotations

import mmap
import random
import struct
import threading
from array import array
from collections.abc import Callable

import pytest
import xxhash

from bhystream.memory.batch import Batch
from bhystream.memory.page import PageHasher
from support.nogil import released

PAGE = 4096
SEED = 0x5EED_0123_4567_89AB
DATA, ZERO = 0, 1
# Which of the two is raised depends on the buffer's fault, and on its type.
WRONG_BUFFER = (ValueError, BufferError)


@pytest.fixture(scope="module")
def hasher() -> PageHasher:
    return PageHasher(SEED)


def digest(page: bytes | bytearray | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(page, seed=SEED)


ZERO_HASH = digest(bytes(PAGE))


def words(n: int, value: int = 0) -> array[int]:
    return array("Q", [value]) * n


def listed(batch: Batch) -> tuple[list[tuple[int, int, int]], list[int], bytes]:
    """Parse what a batch would write: extents, hashes, pages."""
    raw = batch.list_view()
    assert len(raw) == batch.nextents * 16 + batch.npages * 8
    middle = batch.nextents * 16
    extents = list(struct.iter_unpack("<QII", raw[:middle]))
    pages = bytes(batch.page_view())
    assert len(pages) == batch.npages * PAGE
    return extents, [value for (value,) in struct.iter_unpack("<Q", raw[middle:])], pages


class Model:
    """A model of Batch in plain Python, page by page."""

    def __init__(self, max_pages: int, max_extents: int, max_count: int) -> None:
        self.max_pages, self.max_extents, self.max_count = max_pages, max_extents, max_count
        self.clear()

    def clear(self) -> None:
        self.extents: list[list[int]] = []
        self.hashes: list[int] = []
        self.pages = b""
        self.nzero = 0
        self.overflow = False

    def append(self, page: int, kind: int) -> bool:
        if self.extents:
            first, n, last_kind = self.extents[-1]
            if last_kind == kind and first + n == page and n < self.max_count:
                self.extents[-1][1] += 1
                return True
        if len(self.extents) == self.max_extents:
            self.overflow = True
            return False
        self.extents.append([page, 1, kind])
        return True

    def collect(
        self,
        segment: memoryview | None,
        base: int,
        first: int,
        end: int,
        table: list[int],
        everything: bool,
    ) -> int:
        """Do what collect() does; for the segment None, what collect_absent() does."""
        for page in range(first, end):
            if segment is not None and len(self.hashes) == self.max_pages:
                return page
            data = bytes(PAGE) if segment is None else segment[page * PAGE : (page + 1) * PAGE]
            value = digest(data)
            if not everything and table[base + page] == value:
                continue
            kind = DATA if any(data) else ZERO
            if not self.append(base + page, kind):
                return page
            table[base + page] = value
            if kind == DATA:
                self.hashes.append(value)
                self.pages += data
            else:
                self.nzero += 1
        return end

    def compare(self, batch: Batch) -> None:
        extents, hashes, pages = listed(batch)
        assert [list(extent) for extent in extents] == self.extents
        assert hashes == self.hashes
        assert pages == self.pages
        assert (batch.npages, batch.nextents) == (len(self.hashes), len(self.extents))
        assert batch.nzero == self.nzero
        assert batch.full is (self.overflow or len(self.hashes) == self.max_pages)


def change(rng: random.Random, segment: memoryview) -> None:
    """Write to some pages: one byte, the whole page, or zeros."""
    npages = len(segment) // PAGE
    share = rng.choice((0.0, 0.1, 0.5, 1.0))
    for page in range(npages):
        if rng.random() < share:
            view = segment[page * PAGE : (page + 1) * PAGE]
            how = rng.randrange(4)
            if how == 0:
                view[rng.randrange(PAGE)] ^= 1
            elif how == 1:
                view[:] = rng.randbytes(PAGE)
            else:
                view[:] = bytes(PAGE)


@pytest.mark.parametrize("turn", range(40))
def test_rounds_agree_with_the_model(rng: random.Random, hasher: PageHasher, turn: int) -> None:
    """Three rounds run over two segments with holes, and all limits are small."""
    limits = (
        rng.choice((1, 2, 5, 100)),
        rng.choice((1, 2, 5, 100)),
        rng.choice((1, 2, 3, 2**32 - 1)),
    )
    batch, model = Batch(hasher, *limits), Model(*limits)
    sizes = rng.randint(1, 20), rng.randint(1, 20)
    shift = rng.randint(0, 9)
    segments = [memoryview(bytearray(n * PAGE + 16))[shift : shift + n * PAGE] for n in sizes]
    table = words(sum(sizes) + 2, 3)
    expected = table.tolist()
    for number in range(3):
        base = 1
        for segment, npages in zip(segments, sizes, strict=True):
            change(rng, segment)
            page = 0
            while page < npages:
                end = rng.randint(page, npages)
                absent = rng.random() < 0.3
                while True:
                    arguments = base, page, end
                    if absent:
                        after = batch.collect_absent(*arguments, table, number == 0)
                        also = model.collect(None, *arguments, expected, number == 0)
                    else:
                        after = batch.collect(segment, *arguments, table, number == 0)
                        also = model.collect(segment, *arguments, expected, number == 0)
                    assert after == also
                    model.compare(batch)
                    assert table.tolist() == expected
                    page = after
                    if page == end:
                        break
                    assert batch.full
                    batch.clear()
                    model.clear()
                    model.compare(batch)
            base += npages
        batch.clear()
        model.clear()


def test_an_empty_batch_and_empty_ranges(hasher: PageHasher) -> None:
    batch = Batch(hasher, 4, 4)
    assert listed(batch) == ([], [], b"")
    for everything in (False, True):
        assert batch.collect(b"", 0, 0, 0, words(0), everything) == 0
        assert batch.collect(b"x" * PAGE, 5, 1, 1, words(6), everything) == 1
        assert batch.collect_absent(0, 0, 0, words(0), everything) == 0
        assert batch.collect_absent(3, 4, 4, words(7), everything) == 4
    assert listed(batch) == ([], [], b"")
    assert not batch.full


def test_a_full_batch_takes_nothing_and_changes_nothing(hasher: PageHasher) -> None:
    batch = Batch(hasher, 2, 4)
    segment = b"x" * (5 * PAGE)
    table = words(5)
    assert batch.collect(segment, 0, 0, 5, table, True) == 2
    assert batch.full
    before = listed(batch)
    for everything in (False, True):
        assert batch.collect(segment, 0, 2, 5, table, everything) == 2
    assert listed(batch) == before
    assert list(table[2:]) == [0, 0, 0]


def test_exactly_full_is_done(hasher: PageHasher) -> None:
    batch = Batch(hasher, 3, 1)
    assert batch.collect(b"y" * (3 * PAGE), 0, 0, 3, words(3), True) == 3
    assert batch.full
    assert listed(batch)[0] == [(0, 3, DATA)]


def test_holes_need_no_room_for_pages(hasher: PageHasher) -> None:
    batch = Batch(hasher, 1, 2)
    table = words(9)
    assert batch.collect(b"y" * PAGE, 0, 0, 1, table, True) == 1
    assert batch.full
    assert batch.collect_absent(0, 1, 9, table, True) == 9
    assert listed(batch)[0] == [(0, 1, DATA), (1, 8, ZERO)]


def test_an_extent_too_many_leaves_the_table(hasher: PageHasher) -> None:
    batch = Batch(hasher, 9, 1)
    table = words(3)
    assert batch.collect(b"y" * PAGE + bytes(2 * PAGE), 0, 0, 3, table, True) == 1
    assert batch.full
    assert list(table[1:]) == [0, 0]
    assert batch.collect_absent(0, 1, 3, table, False) == 1
    assert list(table[1:]) == [0, 0]
    batch.clear()
    assert not batch.full
    assert batch.collect_absent(0, 1, 3, table, False) == 3
    assert listed(batch)[0] == [(1, 2, ZERO)]


def test_absent_pages_are_stated_once(hasher: PageHasher) -> None:
    batch = Batch(hasher, 1, 9)
    table = array("Q", [1, ZERO_HASH, 1, 1, ZERO_HASH, ZERO_HASH, 1, ZERO_HASH])
    assert batch.collect_absent(0, 1, 8, table, False) == 8
    assert listed(batch)[0] == [(2, 2, ZERO), (6, 1, ZERO)]
    assert batch.nzero == 3
    assert list(table) == [1] + [ZERO_HASH] * 7
    batch.clear()
    assert batch.collect_absent(0, 1, 8, table, False) == 8
    assert listed(batch)[0] == []
    assert batch.collect_absent(0, 1, 8, table, True) == 8
    assert listed(batch)[0] == [(1, 7, ZERO)]


@pytest.mark.parametrize("byte", [0, 1, 7, 8, 63, 64, 2047, 4088, 4095])
def test_one_byte_makes_a_page_not_zero(hasher: PageHasher, byte: int) -> None:
    page = bytearray(PAGE)
    page[byte] = 0x80
    for everything in (False, True):
        batch = Batch(hasher, 1, 1)
        assert batch.collect(page, 0, 0, 1, words(1), everything) == 1
        assert listed(batch) == ([(0, 1, DATA)], [digest(page)], bytes(page))


def test_pages_must_ascend(hasher: PageHasher) -> None:
    batch = Batch(hasher, 9, 9)
    table = words(9)
    batch.collect(b"z" * (4 * PAGE), 2, 1, 3, table, True)
    for first in (0, 1, 2):
        with pytest.raises(ValueError, match="must ascend"):
            batch.collect(b"z" * (4 * PAGE), 2, first, 3, table, True)
        with pytest.raises(ValueError, match="must ascend"):
            batch.collect_absent(2, first, 3, table, True)
    assert batch.collect(b"z" * (4 * PAGE), 2, 3, 4, table, True) == 4
    batch.clear()
    assert batch.collect(b"z" * (4 * PAGE), 2, 0, 4, table, True) == 4


@pytest.mark.parametrize(
    "base, first, end, nentries",
    [
        (0, -1, 1, 9),
        (0, 2, 1, 9),
        (0, 0, 3, 9),
        (-1, 0, 2, 9),
        (8, 0, 2, 9),
        (2**64 - 1, 0, 2, 9),
        (0, 0, 2, 1),
        (0, 0, 2**64, 9),
    ],
)
def test_ranges_are_checked(
    hasher: PageHasher, base: int, first: int, end: int, nentries: int
) -> None:
    batch = Batch(hasher, 9, 9)
    with pytest.raises(ValueError):
        batch.collect(bytes(2 * PAGE), base, first, end, words(nentries), True)
    # collect_absent() has no buffer, so no range can lie outside one.
    if (end, nentries) != (3, 9):
        with pytest.raises(ValueError):
            batch.collect_absent(base, first, end, words(nentries), True)


@pytest.mark.parametrize("limits", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (2**32, 1, 1), (-1, 1, 1)])
def test_limits_are_checked(hasher: PageHasher, limits: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="is not within"):
        Batch(hasher, *limits)


def test_wrong_buffers_are_refused(hasher: PageHasher) -> None:
    batch = Batch(hasher, 9, 9)
    good, table = bytes(PAGE), words(1)
    for bad in (memoryview(bytes(2 * PAGE))[::2], words(512)):
        with pytest.raises(WRONG_BUFFER):
            batch.collect(bad, 0, 0, 1, table, True)
    for wrong in (memoryview(table).toreadonly(), bytearray(8), bytes(8)):
        with pytest.raises(WRONG_BUFFER):
            batch.collect(good, 0, 0, 1, wrong, True)
        with pytest.raises(WRONG_BUFFER):
            batch.collect_absent(0, 0, 1, wrong, True)
    with pytest.raises(TypeError):
        batch.collect(None, 0, 0, 0, table, True)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Batch(None, 1, 1)  # type: ignore[arg-type]


def test_views_are_read_only_aligned_and_outlive_the_batch(hasher: PageHasher) -> None:
    batch = Batch(hasher, 3, 3)
    batch.collect(b"v" * (2 * PAGE), 0, 0, 2, words(2), True)
    pages, lists = batch.page_view(), batch.list_view()
    assert pages.readonly
    assert lists.readonly
    for owner in (pages.obj, lists.obj):
        assert isinstance(owner, mmap.mmap)
        with pytest.raises(BufferError):
            owner.close()
    del batch
    assert bytes(pages) == b"v" * (2 * PAGE)
    assert bytes(lists) == struct.pack("<QIIQQ", 0, 2, DATA, *[digest(b"v" * PAGE)] * 2)


def test_the_list_may_be_asked_for_twice(hasher: PageHasher) -> None:
    batch = Batch(hasher, 3, 3)
    table = words(4)
    batch.collect(b"v" * PAGE, 0, 0, 1, table, True)
    first = bytes(batch.list_view())
    assert bytes(batch.list_view()) == first
    batch.collect(b"v" * (4 * PAGE), 0, 2, 3, table, True)
    assert listed(batch)[0] == [(0, 1, DATA), (2, 1, DATA)]


def test_everything_states_also_what_the_table_has(hasher: PageHasher) -> None:
    segment = b"e" * PAGE + bytes(PAGE)
    table = array("Q", [digest(segment[:PAGE]), ZERO_HASH])
    batch = Batch(hasher, 2, 2)
    assert batch.collect(segment, 0, 0, 2, table, True) == 2
    assert listed(batch)[0] == [(0, 1, DATA), (1, 1, ZERO)]


def changing(batch: Batch) -> tuple[memoryview, bytes]:
    """Return a page that changes while it is copied, and what the copy will be.

    The batch must hold one page.  The page returned begins 64 bytes before the
    place of the batch's next page, so the copy, 64 bytes at a time, meets what
    it has itself just written.
    """
    owner = memoryview(batch.page_view().obj)
    live = owner[PAGE - 64 : 2 * PAGE - 64]
    return live, bytes(live[:64]) * 64


def test_a_page_that_changes_back_before_it_is_copied_is_not_sent(
    hasher: PageHasher,
) -> None:
    batch = Batch(hasher, 2, 2)
    table = words(2)
    batch.collect(bytes(range(256)) * 16, 0, 0, 1, table, True)
    live, copy = changing(batch)
    before = table[1] = digest(copy)
    assert digest(live) != before
    assert batch.collect(live, 1, 0, 1, table, False) == 1
    assert listed(batch)[0] == [(0, 1, DATA)]
    assert table[1] == before


@pytest.mark.parametrize("everything", [False, True])
def test_the_copy_is_hashed_and_not_the_live_page(hasher: PageHasher, everything: bool) -> None:
    batch = Batch(hasher, 2, 2)
    table = words(2)
    batch.collect(bytes(range(256)) * 16, 0, 0, 1, table, True)
    live, copy = changing(batch)
    assert batch.collect(live, 1, 0, 1, table, everything) == 1
    _, hashes, pages = listed(batch)
    assert pages[PAGE:] == copy
    assert hashes[1] == table[1] == digest(copy)


class Writer(threading.Thread):
    """A guest: writes one of several images over its memory until told to stop.

    One image is all zeros, and each image comes twice, so that pages also change back.
    """

    def __init__(self, segment: memoryview, images: list[bytes]) -> None:
        super().__init__()
        self.segment, self.images = segment, images
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            for image in self.images:
                self.segment[:] = image


def test_hash_and_bytes_agree_while_the_guest_writes(
    rng: random.Random, hasher: PageHasher
) -> None:
    npages = 48
    segment = memoryview(bytearray(npages * PAGE))
    images = [rng.randbytes(len(segment)), bytes(len(segment)), rng.randbytes(len(segment))]
    table, replica = words(npages), bytearray(len(segment))
    batch = Batch(hasher, npages, npages)

    def do_round(everything: bool) -> int:
        before = table.tolist()
        assert batch.collect(segment, 0, 0, npages, table, everything) == npages
        extents, hashes, data = listed(batch)
        index = 0
        for first, n, kind in extents:
            for page in range(first, first + n):
                at = slice(page * PAGE, (page + 1) * PAGE)
                replica[at] = bytes(PAGE)
                if kind == DATA:
                    replica[at] = data[index * PAGE : (index + 1) * PAGE]
                    assert hashes[index] == table[page]
                    index += 1
                # The page sent has the table's hash, and was needed.
                assert digest(replica[at]) == table[page]
                assert everything or table[page] != before[page]
        batch.clear()
        return index

    writer = Writer(segment, [*images, images[0], images[2]])
    writer.start()
    try:
        sent = sum(do_round(number == 0 or number % 5 == 0) for number in range(1500))
    finally:
        writer.stop.set()
        writer.join()
    assert sent > npages
    do_round(False)
    assert replica == segment


def test_a_batch_is_not_for_two_threads(hasher: PageHasher) -> None:
    npages = 1 << 14
    segment = memoryview(mmap.mmap(-1, npages * PAGE))
    table = words(npages, ZERO_HASH)
    batch = Batch(hasher, 1, 1)
    probes: dict[str, Callable[[], object]] = {
        "clear": batch.clear,
        "list_view": batch.list_view,
        "page_view": batch.page_view,
        "collect": lambda: batch.collect(segment, 0, 0, 0, table, True),
        "collect_absent": lambda: batch.collect_absent(0, 0, 0, table, True),
    }
    refused: set[str] = set()
    for _ in range(20):  # the thread may have finished too early to be seen
        thread = threading.Thread(target=lambda: batch.collect(segment, 0, 0, npages, table, False))
        thread.start()
        while thread.is_alive():
            for name, probe in probes.items():
                try:
                    probe()
                except ValueError as error:
                    assert str(error) == "the batch is in use by another thread"
                    refused.add(name)
        thread.join()
        if len(refused) == len(probes):
            break
    assert refused == set(probes)
    batch.clear()


def test_the_gil_is_released(hasher: PageHasher) -> None:
    npages = 1 << 14
    segment = memoryview(mmap.mmap(-1, npages * PAGE))
    table = words(1 << 21, ZERO_HASH)
    batch = Batch(hasher, 1, 1)
    assert released(lambda: batch.collect(segment, 0, 0, npages, table, False))
    assert released(lambda: batch.collect_absent(0, 0, len(table), table, False))


# In place.


@pytest.mark.parametrize("everything", [True, False])
def test_in_place_it_lists_what_it_would_copy(hasher: PageHasher, everything: bool) -> None:
    rng = random.Random(11)
    npages = 500
    memory = bytearray(npages * PAGE)
    for page in range(npages):
        if rng.random() < 0.6:
            memory[page * PAGE : (page + 1) * PAGE] = rng.randbytes(PAGE)
    before = words(npages, ZERO_HASH)
    for page in range(npages):
        if rng.random() < 0.3:
            before[page] = digest(memory[page * PAGE : (page + 1) * PAGE])
    tables = [before[:], before[:]]
    batches = [Batch(hasher, 64, 1000), Batch(hasher, 64, 1000, in_place=True)]
    assert [batch.in_place for batch in batches] == [False, True]
    at = 0
    while at < npages:
        ends = [
            batch.collect(memory, 0, at, npages, table, everything)
            for batch, table in zip(batches, tables, strict=True)
        ]
        assert ends[0] == ends[1] > at
        assert bytes(batches[0].list_view()) == bytes(batches[1].list_view())
        assert (batches[0].npages, batches[0].nzero) == (batches[1].npages, batches[1].nzero)
        at = ends[0]
        for batch in batches:
            batch.clear()
    assert tables[0] == tables[1] != before


def test_in_place_there_are_no_copies(hasher: PageHasher) -> None:
    batch = Batch(hasher, 64, 64, in_place=True)
    with pytest.raises(ValueError, match="the pages of this batch are where they were"):
        batch.page_view()


def test_in_place_only_pages_of_zeros_are_zero(hasher: PageHasher) -> None:
    memory, table = bytearray(2 * PAGE), words(2)
    batch = Batch(hasher, 64, 64, in_place=True)
    batch.collect(memory, 0, 0, 2, table, True)
    assert (batch.npages, batch.nzero) == (0, 2)
    memory[PAGE + 4095] = 1
    batch.clear()
    batch.collect(memory, 0, 0, 2, table, True)
    assert (batch.npages, batch.nzero) == (1, 1)


# Marked pages.


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("max_pages", [1, 7, 64])
def test_marked_pages_are_added_and_no_other(
    hasher: PageHasher, in_place: bool, max_pages: int
) -> None:
    rng = random.Random(13)
    npages, origin, base = 300, 17, 40
    memory = bytearray(rng.randbytes(npages * PAGE))
    for page in range(60, 75):
        memory[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    marked = {page for page in range(origin, npages) if rng.random() < 0.5 or 100 <= page < 240}
    bits = words((npages - origin + 63) // 64)
    for page in marked:
        bits[(page - origin) >> 6] |= 1 << ((page - origin) & 63)
    table = words(base + npages, 1)
    batch = Batch(hasher, max_pages, 1000, in_place=in_place)
    found: set[int] = set()
    at = origin
    while at < npages:
        at = batch.collect(memory, base, at, npages, table, True, bits, origin)
        raw = bytes(batch.list_view())
        hashes = iter(struct.iter_unpack("<Q", raw[batch.nextents * 16 :]))
        for first, count, kind in struct.iter_unpack("<QII", raw[: batch.nextents * 16]):
            for page in range(first - base, first - base + count):
                found.add(page)
                digested = digest(memory[page * PAGE : (page + 1) * PAGE])
                assert table[base + page] == digested
                assert (kind == ZERO) == (60 <= page < 75)
                assert kind == ZERO or next(hashes) == (digested,)
        assert batch.npages <= max_pages
        batch.clear()
    assert found == marked
    assert [page for page in range(npages) if table[base + page] != 1] == sorted(marked)


def test_bits_that_do_not_cover_the_pages_are_refused(hasher: PageHasher) -> None:
    batch, memory, table = Batch(hasher, 64, 64), bytearray(130 * PAGE), words(130)
    for first, end, nwords, origin in ((0, 130, 2, 0), (5, 10, 1, 6), (0, 1, 1, -1)):
        with pytest.raises(ValueError, match="are not marked from"):
            batch.collect(memory, 0, first, end, table, True, words(nwords), origin)

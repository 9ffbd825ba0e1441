"""Batch against a plain Python model of it, and against a guest that writes."""

from __future__ import annotations

import mmap
import random
import struct
import threading
from collections.abc import Callable

import pytest
import xxhash

from bhystream.memory.batch import Batch
from bhystream.memory.page import PageHasher, PageHashes, find_changed
from support.nogil import released

from .pages import DATA, PAGE, WRONG_BUFFER, ZERO, all_bits, bits, hashes_in, table_of, words

SEED = 0x5EED_0123_4567_89AB


@pytest.fixture(scope="module")
def hasher() -> PageHasher:
    return PageHasher(SEED)


def digest(page: bytes | bytearray | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(page, seed=SEED)


ZERO_HASH = digest(bytes(PAGE))


def listed(batch: Batch) -> tuple[list[tuple[int, int, int]], list[int], bytes]:
    """Parse what a batch would write: extents, hashes, pages."""
    raw = batch.list_view()
    assert len(raw) == batch.nextents * 16 + batch.npages * 8
    middle = batch.nextents * 16
    extents = list(struct.iter_unpack("<QII", raw[:middle]))
    pages = b"" if batch.in_place else bytes(batch.page_view())
    assert len(pages) == (0 if batch.in_place else batch.npages * PAGE)
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
        segment: memoryview,
        base: int,
        first: int,
        end: int,
        table: list[int],
        touched: set[int],
        everything: bool,
        absent: bool,
    ) -> int:
        """Do what collect() does."""
        for page in range(first, end):
            data: bytes | memoryview = bytes(PAGE)
            if base + page in touched:
                if len(self.hashes) == self.max_pages:
                    return page
                data = segment[page * PAGE : (page + 1) * PAGE]
            elif not absent:
                continue
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
        assert batch.in_place or pages == self.pages
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


def some_runs(rng: random.Random, npages: int) -> set[int]:
    """Return pages in runs of random lengths, often longer than a word of a bitmap."""
    found: set[int] = set()
    at, longest = 0, rng.choice((1, 5, 300))
    while at < npages:
        end = at + rng.randint(1, longest)
        found.update(range(at, min(end, npages)))
        at = end + rng.randint(1, longest)
    return found


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("turn", range(40))
def test_rounds_agree_with_the_model(
    rng: random.Random, hasher: PageHasher, turn: int, in_place: bool
) -> None:
    """Several rounds run over two segments, and all limits are small.

    A page that was not touched counts as zero, whatever its memory holds: it is not read.
    """
    limits = (
        rng.choice((1, 2, 5, 100)),
        rng.choice((1, 2, 5, 100)),
        rng.choice((1, 2, 3, 2**32 - 1)),
    )
    batch, model = Batch(hasher, *limits, in_place), Model(*limits)
    sizes = rng.choice((3, 20, 64, 200)), rng.choice((1, 20, 300))
    shift = rng.randint(0, 9)
    segments = [memoryview(bytearray(n * PAGE + 16))[shift : shift + n * PAGE] for n in sizes]
    table = PageHashes(hasher, sum(sizes) + 2)
    expected = [ZERO_HASH] * len(table)
    for number in range(4):
        everything, absent = number == 0, number == 0 or rng.random() < 0.7
        touched = some_runs(rng, len(table))
        bitmap = bits(len(table), touched)
        base = 1
        for segment, npages in zip(segments, sizes, strict=True):
            change(rng, segment)
            page = 0
            while page < npages:
                end = rng.randint(page, npages)
                while True:
                    after = batch.collect(
                        segment, base, page, end, table, bitmap, everything, absent=absent
                    )
                    also = model.collect(
                        segment, base, page, end, expected, touched, everything, absent
                    )
                    assert after == also
                    model.compare(batch)
                    assert hashes_in(table) == expected
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
        for touched in (words(1), words(1, 2**64 - 1)):
            table = PageHashes(hasher, 7)
            assert batch.collect(b"", 0, 0, 0, table, touched, everything) == 0
            assert batch.collect(b"x" * PAGE, 5, 1, 1, table, touched, everything) == 1
            assert batch.collect(b"", 0, 0, 0, PageHashes(hasher, 0), words(0), everything) == 0
    assert listed(batch) == ([], [], b"")
    assert not batch.full


def test_a_full_batch_takes_nothing_and_changes_nothing(hasher: PageHasher) -> None:
    batch = Batch(hasher, 2, 4)
    segment = b"x" * (5 * PAGE)
    table, touched = PageHashes(hasher, 5), all_bits(5)
    assert batch.collect(segment, 0, 0, 5, table, touched, True) == 2
    assert batch.full
    before = listed(batch)
    for everything in (False, True):
        assert batch.collect(segment, 0, 2, 5, table, touched, everything) == 2
    assert listed(batch) == before
    assert hashes_in(table)[2:] == [ZERO_HASH] * 3


def test_exactly_full_is_done(hasher: PageHasher) -> None:
    batch = Batch(hasher, 3, 1)
    table = PageHashes(hasher, 3)
    assert batch.collect(b"y" * (3 * PAGE), 0, 0, 3, table, all_bits(3), True) == 3
    assert batch.full
    assert listed(batch)[0] == [(0, 3, DATA)]


def test_holes_need_no_room_for_pages(hasher: PageHasher) -> None:
    batch = Batch(hasher, 1, 2)
    segment = b"y" * (9 * PAGE)
    touched = bits(9, [0, 8])
    assert batch.collect(segment, 0, 0, 9, PageHashes(hasher, 9), touched, True) == 8
    assert batch.full
    assert listed(batch)[0] == [(0, 1, DATA), (1, 7, ZERO)]


def test_an_extent_too_many_leaves_the_table(hasher: PageHasher) -> None:
    batch = Batch(hasher, 9, 1)
    memory = b"w" * (3 * PAGE)
    table = table_of(hasher, memory)
    before = hashes_in(table)
    now = b"y" * PAGE + bytes(2 * PAGE)
    assert batch.collect(now, 0, 0, 3, table, all_bits(3), True) == 1
    assert batch.full
    assert hashes_in(table)[1:] == before[1:]
    assert batch.collect(now, 0, 1, 3, table, bits(3, [0]), False) == 1
    assert hashes_in(table)[1:] == before[1:]
    batch.clear()
    assert not batch.full
    assert batch.collect(now, 0, 1, 3, table, bits(3, [0]), False) == 3
    assert listed(batch)[0] == [(1, 2, ZERO)]


def test_absent_pages_are_stated_once(hasher: PageHasher) -> None:
    batch = Batch(hasher, 1, 9)
    x = b"x" * PAGE
    memory = x + bytes(PAGE) + x + x + bytes(2 * PAGE) + x + bytes(PAGE)
    table, nothing = table_of(hasher, memory), words(1)
    assert batch.collect(memory, 0, 1, 8, table, nothing, False, absent=False) == 8
    assert listed(batch)[0] == []
    assert batch.collect(memory, 0, 1, 8, table, nothing, False) == 8
    assert listed(batch)[0] == [(2, 2, ZERO), (6, 1, ZERO)]
    assert batch.nzero == 3
    assert hashes_in(table) == [digest(x)] + [ZERO_HASH] * 7
    batch.clear()
    assert batch.collect(memory, 0, 1, 8, table, nothing, False) == 8
    assert listed(batch)[0] == []
    assert batch.collect(memory, 0, 1, 8, table, nothing, True) == 8
    assert listed(batch)[0] == [(1, 7, ZERO)]


def test_pages_come_and_go_in_a_large_guest(hasher: PageHasher) -> None:
    """A page is absent, touched, absent, zero and touched in turn, among many never touched."""
    npages = 3 << 18
    memory = memoryview(mmap.mmap(-1, npages * PAGE))
    table = PageHashes(hasher, npages)
    batch = Batch(hasher, 8, 64)
    pages = [0, 63, 64, 4095, 4096, (1 << 18) - 1, 1 << 18, npages - 1]

    def found(touched: list[int], everything: bool = False) -> list[tuple[int, int, int]]:
        batch.clear()
        bitmap = bits(npages, touched)
        assert batch.collect(memory, 0, 0, npages, table, bitmap, everything) == npages
        return listed(batch)[0]

    assert found([], True) == [(0, npages, ZERO)]
    for page in pages:
        memory[page * PAGE] = page % 251 + 1
    assert found([]) == []
    data = [(0, 1, DATA), (63, 2, DATA), (4095, 2, DATA), ((1 << 18) - 1, 2, DATA)]
    data.append((npages - 1, 1, DATA))
    assert found(pages) == data
    assert found(pages) == []
    assert [table[page] for page in pages] == [
        digest(memory[page * PAGE : (page + 1) * PAGE]) for page in pages
    ]
    assert found(pages[:2]) == [(first, n, ZERO) for first, n, _ in [(64, 1, 0), *data[2:]]]
    assert found(pages[:2]) == []
    memory[0] = 0
    assert found(pages[:2]) == [(0, 1, ZERO)]
    assert found(pages) == [(64, 1, DATA), *data[2:]]
    assert found([]) == [(first, n, ZERO) for first, n, _ in data[1:]]
    assert {table[page] for page in pages} == {ZERO_HASH}


@pytest.mark.parametrize("first", [0, 1, 62, 63, 64, 65])
def test_no_page_is_passed_over_from_any_page_on(hasher: PageHasher, first: int) -> None:
    """The table takes memory for 64 pages at once: those before it have none here."""
    page = 64
    memory = bytes(page * PAGE) + b"p" * PAGE + bytes(PAGE)
    table, batch = table_of(hasher, memory), Batch(hasher, 9, 9)
    assert batch.collect(memory, 0, first, 66, table, words(2), False) == 66
    assert listed(batch)[0] == ([(page, 1, ZERO)] if first <= page else [])


@pytest.mark.parametrize("byte", [0, 1, 7, 8, 63, 64, 2047, 4088, 4095])
def test_one_byte_makes_a_page_not_zero(hasher: PageHasher, byte: int) -> None:
    page = bytearray(PAGE)
    page[byte] = 0x80
    for everything in (False, True):
        batch = Batch(hasher, 1, 1)
        assert batch.collect(page, 0, 0, 1, PageHashes(hasher, 1), words(1, 1), everything) == 1
        assert listed(batch) == ([(0, 1, DATA)], [digest(page)], bytes(page))


def test_pages_must_ascend(hasher: PageHasher) -> None:
    batch = Batch(hasher, 9, 9)
    table, touched = PageHashes(hasher, 9), all_bits(9)
    batch.collect(b"z" * (4 * PAGE), 2, 1, 3, table, touched, True)
    for first in (0, 1, 2):
        for some in (touched, words(1)):
            with pytest.raises(ValueError, match="must ascend"):
                batch.collect(b"z" * (4 * PAGE), 2, first, 3, table, some, True)
    assert batch.collect(b"z" * (4 * PAGE), 2, 3, 4, table, touched, True) == 4
    batch.clear()
    assert batch.collect(b"z" * (4 * PAGE), 2, 0, 4, table, touched, True) == 4


@pytest.mark.parametrize(
    "base, first, end, nentries, nwords",
    [
        (0, -1, 1, 9, 1),
        (0, 2, 1, 9, 1),
        (0, 0, 3, 9, 1),
        (-1, 0, 2, 9, 1),
        (8, 0, 2, 9, 1),
        (2**64 - 1, 0, 2, 9, 1),
        (0, 0, 2, 1, 1),
        (0, 0, 2**64, 9, 1),
        (0, 0, 2, 9, 0),
        (63, 0, 2, 99, 1),
    ],
)
def test_ranges_are_checked(
    hasher: PageHasher, base: int, first: int, end: int, nentries: int, nwords: int
) -> None:
    batch = Batch(hasher, 9, 9)
    table = PageHashes(hasher, nentries)
    with pytest.raises(ValueError, match="pages"):
        batch.collect(bytes(2 * PAGE), base, first, end, table, words(nwords), True)


@pytest.mark.parametrize("limits", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (2**32, 1, 1), (-1, 1, 1)])
def test_limits_are_checked(hasher: PageHasher, limits: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="is not within"):
        Batch(hasher, *limits)


def test_wrong_buffers_are_refused(hasher: PageHasher) -> None:
    batch = Batch(hasher, 9, 9)
    good, table = bytes(PAGE), PageHashes(hasher, 1)
    for bad in (memoryview(bytes(2 * PAGE))[::2], words(512)):
        with pytest.raises(WRONG_BUFFER):
            batch.collect(bad, 0, 0, 1, table, words(1), True)
    for wrong in (bytearray(8), memoryview(words(3))[::2]):
        with pytest.raises(WRONG_BUFFER):
            batch.collect(good, 0, 0, 1, table, wrong, True)
    with pytest.raises(TypeError):
        batch.collect(None, 0, 0, 0, table, words(1), True)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        batch.collect(good, 0, 0, 1, words(1), words(1), True)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Batch(None, 1, 1)  # type: ignore[arg-type]


def test_views_are_read_only_aligned_and_outlive_the_batch(hasher: PageHasher) -> None:
    batch = Batch(hasher, 3, 3)
    batch.collect(b"v" * (2 * PAGE), 0, 0, 2, PageHashes(hasher, 2), all_bits(2), True)
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
    table = PageHashes(hasher, 4)
    batch.collect(b"v" * PAGE, 0, 0, 1, table, all_bits(4), True)
    first = bytes(batch.list_view())
    assert bytes(batch.list_view()) == first
    batch.collect(b"v" * (4 * PAGE), 0, 2, 3, table, all_bits(4), True)
    assert listed(batch)[0] == [(0, 1, DATA), (2, 1, DATA)]


def test_everything_states_also_what_the_table_has(hasher: PageHasher) -> None:
    segment = b"e" * PAGE + bytes(PAGE)
    batch = Batch(hasher, 2, 2)
    table = table_of(hasher, segment)
    assert batch.collect(segment, 0, 0, 2, table, all_bits(2), True) == 2
    assert listed(batch)[0] == [(0, 1, DATA), (1, 1, ZERO)]


def changing(batch: Batch) -> tuple[memoryview, bytes]:
    """Return a page that changes while it is copied, and what the copy will be.

    The batch must hold one page.  The page returned begins 64 bytes before the
    place of the batch's next page, so the copy, 64 bytes at a time, meets what
    it has itself just written.  When it is copied, it is what the copy is.
    """
    owner = memoryview(batch.page_view().obj)
    live = owner[PAGE - 64 : 2 * PAGE - 64]
    return live, bytes(live[:64]) * 64


def changing_behind(batch: Batch) -> tuple[memoryview, bytes]:
    """Return a page that changes where it was copied already, and what the copy will be.

    The batch must hold one page of at least three.  The page returned begins 64 bytes
    behind the place of the batch's next page, so the copy overwrites what it has just
    read.  When it is copied, it is something else.
    """
    owner = memoryview(batch.page_view().obj)
    live = owner[PAGE + 64 : 2 * PAGE + 64]
    live[:] = b"".join(n.to_bytes(8, "little") for n in range(PAGE // 8))
    return live, bytes(live)


def test_a_page_that_changes_back_before_it_is_copied_is_not_sent(
    hasher: PageHasher,
) -> None:
    batch = Batch(hasher, 2, 2)
    page = bytes(range(256)) * 16
    batch.collect(page, 0, 0, 1, PageHashes(hasher, 1), all_bits(1), True)
    live, copy = changing(batch)
    table = table_of(hasher, page + copy)
    assert digest(live) != table[1]
    assert batch.collect(live, 1, 0, 1, table, all_bits(2), False) == 1
    assert listed(batch)[0] == [(0, 1, DATA)]
    assert table[1] == digest(copy)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("make", [changing, changing_behind])
def test_the_copy_is_hashed_and_not_the_live_page(
    hasher: PageHasher, everything: bool, make: Callable[[Batch], tuple[memoryview, bytes]]
) -> None:
    batch = Batch(hasher, 3, 2)
    table, touched = PageHashes(hasher, 2), all_bits(2)
    batch.collect(bytes(range(256)) * 16, 0, 0, 1, table, touched, True)
    live, copy = make(batch)
    assert batch.collect(live, 1, 0, 1, table, touched, everything) == 1
    assert (live == copy) == (make is changing)
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
    table, replica = PageHashes(hasher, npages), bytearray(len(segment))
    touched = all_bits(npages)
    batch = Batch(hasher, npages, npages)

    def do_round(everything: bool) -> int:
        before = hashes_in(table)
        assert batch.collect(segment, 0, 0, npages, table, touched, everything) == npages
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
    table, touched = PageHashes(hasher, npages), all_bits(npages)
    batch = Batch(hasher, 1, 1)
    probes: dict[str, Callable[[], object]] = {
        "clear": batch.clear,
        "list_view": batch.list_view,
        "page_view": batch.page_view,
        "collect": lambda: batch.collect(segment, 0, 0, 0, table, touched, True),
    }
    refused: set[str] = set()
    for _ in range(20):  # the thread may have finished too early to be seen
        thread = threading.Thread(
            target=lambda: batch.collect(segment, 0, 0, npages, table, touched, False)
        )
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
    table, touched = PageHashes(hasher, npages), all_bits(npages)
    batch = Batch(hasher, 1, 1)
    assert released(lambda: batch.collect(segment, 0, 0, npages, table, touched, False))


# In place.


def test_in_place_there_are_no_copies(hasher: PageHasher) -> None:
    batch = Batch(hasher, 64, 64, in_place=True)
    with pytest.raises(ValueError, match="the pages of this batch are where they were"):
        batch.page_view()


def test_in_place_only_pages_of_zeros_are_zero(hasher: PageHasher) -> None:
    memory, table, touched = bytearray(2 * PAGE), PageHashes(hasher, 2), all_bits(2)
    batch = Batch(hasher, 64, 64, in_place=True)
    batch.collect(memory, 0, 0, 2, table, touched, True)
    assert (batch.npages, batch.nzero) == (0, 2)
    memory[PAGE + 4095] = 1
    batch.clear()
    batch.collect(memory, 0, 0, 2, table, touched, True)
    assert (batch.npages, batch.nzero) == (1, 1)


def test_in_place_is_said(hasher: PageHasher) -> None:
    assert [Batch(hasher, 1, 1, in_place=way).in_place for way in (False, True)] == [False, True]


# Marked pages.


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("max_pages", [1, 7, 64])
def test_marked_pages_are_added_and_absent_ones_and_no_other(
    rng: random.Random, hasher: PageHasher, in_place: bool, max_pages: int
) -> None:
    """find_changed() marks the pages of a piece, which begins anywhere."""
    npages, origin, base = 300, 17, 40
    before = bytearray(rng.randbytes(npages * PAGE))
    before[200 * PAGE : 230 * PAGE] = bytes(30 * PAGE)
    table = table_of(hasher, bytes(base * PAGE) + before)
    memory = bytearray(before)
    memory[60 * PAGE : 75 * PAGE] = bytes(15 * PAGE)
    for page in {*range(100, 180), *(rng.randrange(npages) for _ in range(60))}:
        memory[page * PAGE] ^= 1
    touched = some_runs(rng, npages)
    expected: dict[int, int | None] = {}  # the hash of each page that is stated
    for page in range(origin, npages):
        at = slice(page * PAGE, (page + 1) * PAGE)
        now = memory[at] if page in touched else bytes(PAGE)
        if now != before[at]:
            expected[page] = digest(now) if any(now) else None
    bitmap = bits(base + npages, [base + page for page in touched])
    marks = words((npages - origin + 63) // 64)
    find_changed(hasher, memory, base, origin, npages, table, bitmap, marks)
    batch = Batch(hasher, max_pages, 1000, in_place=in_place)
    found: dict[int, int | None] = {}
    at_page = origin
    while at_page < npages:
        at_page = batch.collect(
            memory, base, at_page, npages, table, bitmap, False, bits=marks, origin=origin
        )
        listed_extents, hashes, _ = listed(batch)
        left = iter(hashes)
        for first, count, kind in listed_extents:
            for page in range(first - base, first - base + count):
                found[page] = next(left) if kind == DATA else None
        assert batch.npages <= max_pages
        batch.clear()
    assert found == expected
    for page, value in expected.items():
        assert table[base + page] == (ZERO_HASH if value is None else value)


def test_a_marked_page_is_not_compared_again(hasher: PageHasher) -> None:
    """So what was marked is added, even if the table has it."""
    memory = b"m" * (3 * PAGE)
    table, batch = table_of(hasher, memory), Batch(hasher, 9, 9)
    batch.collect(memory, 0, 0, 3, table, all_bits(3), False, bits=bits(3, [1]))
    assert listed(batch)[0] == [(1, 1, DATA)]


def test_bits_that_do_not_cover_the_pages_are_refused(hasher: PageHasher) -> None:
    batch, memory, table = Batch(hasher, 64, 64), bytearray(130 * PAGE), PageHashes(hasher, 130)
    touched = words(3)
    for first, end, nwords, origin in ((0, 130, 2, 0), (5, 10, 1, 6), (0, 1, 1, -1)):
        marks = words(nwords)
        with pytest.raises(ValueError, match="are not marked from"):
            batch.collect(memory, 0, first, end, table, touched, True, bits=marks, origin=origin)

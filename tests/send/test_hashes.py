"""HASHES: the hash of every page of a paused guest, computed anew."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from bhystream.guest import PAGE_BYTES
from bhystream.send.transfer import Transfer
from bhystream.stream import format as fmt
from bhystream.stream.verify import Hashes, Walk
from support.memory_source import MemorySource

from .test_transfer import Sending, scribble

SIZES = (700, 1, 300, 64)
ZERO_PAGE = bytes(PAGE_BYTES)


@pytest.fixture
def source() -> Iterator[MemorySource]:
    made = MemorySource(*SIZES)
    yield made
    made.close()


def hashed(path: Path, sending: Sending) -> list[Hashes]:
    """Finish the stream, and return its HASHES, copied."""
    sending.finish()
    found = []
    for event in Walk(io.BytesIO(path.read_bytes())).events():
        if isinstance(event, Hashes):
            views = (memoryview(bytes(event.extents)), memoryview(bytes(event.hashes)))
            found.append(Hashes(event.segment, *views, event.is_last))
    return found


def by_page(found: list[Hashes], seed: int) -> list[int]:
    """Return the hash of every page, which all are stated once."""
    zero = xxhash.xxh3_64_intdigest(ZERO_PAGE, seed)
    hashes: list[int] = []
    for event in found:
        given = iter(event.hashes.cast("Q"))
        for first, count, kind in fmt.EXTENT.iter_unpack(event.extents):
            assert first == len(hashes)
            hashes += [zero if kind else next(given) for _ in range(count)]
    return hashes


def wrong(found: list[Hashes], source: MemorySource, seed: int) -> list[int]:
    """Return the pages that have another hash than the source's, the last page if one is missing.

    A comparison of the lists themselves would have pytest look for the longest common parts of
    thousands of numbers, if CI is set.
    """
    memory, hashes = source.contents(), by_page(found, seed)
    if len(hashes) * PAGE_BYTES != len(memory):
        return [len(hashes)]
    pages = (memory[at : at + PAGE_BYTES] for at in range(0, len(memory), PAGE_BYTES))
    there = [xxhash.xxh3_64_intdigest(page, seed) for page in pages]
    return [number for number, hash_ in enumerate(hashes) if hash_ != there[number]]


def send(path: Path, source: MemorySource) -> Sending:
    """Send two rounds."""
    sending = Sending(path, source)
    sending.transfer.round()
    sending.transfer.round(last=True)
    return sending


@pytest.mark.parametrize(
    ("extents", "hashes"), [(fmt.MAX_EXTENTS, fmt.MAX_HASHES), (fmt.MAX_EXTENTS, 7), (3, 5)]
)
def test_each_page_has_its_hash(
    tmp_path: Path,
    source: MemorySource,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
    extents: int,
    hashes: int,
) -> None:
    """In a few sections, or in many."""
    scribble(source, rng, 40)
    sending = send(tmp_path / "s", source)
    with monkeypatch.context() as patch:
        patch.setattr(fmt, "MAX_EXTENTS", extents)
        patch.setattr(fmt, "MAX_HASHES", hashes)
        sending.transfer.hashes()
    found = hashed(tmp_path / "s", sending)
    assert wrong(found, source, 0x5EED) == []
    assert [event.is_last for event in found] == [False] * (len(found) - 1) + [True]
    assert all(len(event.extents) <= 16 * extents for event in found)
    assert all(len(event.hashes) <= 8 * hashes for event in found)


def test_a_guest_that_has_touched_nothing_has_hashes_too(
    tmp_path: Path, source: MemorySource
) -> None:
    sending = send(tmp_path / "s", source)
    sending.transfer.hashes()
    found = hashed(tmp_path / "s", sending)
    assert sum(len(event.hashes) for event in found) == 0
    assert [event.segment for event in found] == [0, 1, 2, 3]
    assert found[-1].is_last


def test_a_page_that_the_rounds_have_missed_has_the_hash_of_what_it_holds(
    tmp_path: Path, source: MemorySource, rng: random.Random
) -> None:
    """The table still has the hash of the page as it was sent."""
    scribble(source, rng, 40)
    source.write(710, b"as it was sent")
    sending = send(tmp_path / "s", source)
    source.write(710, b"changed since")
    sending.transfer.hashes()
    assert wrong(hashed(tmp_path / "s", sending), source, 0x5EED) == []


def test_a_page_that_was_never_touched_stays_so(tmp_path: Path, source: MemorySource) -> None:
    source.write(1, b"x")
    source.write(1000, b"y")
    before = source.allocated_bytes()
    sending = send(tmp_path / "s", source)
    sending.transfer.hashes()
    assert source.allocated_bytes() == before
    sending.finish()


def test_what_interrupts_a_section_ends_the_hashes(tmp_path: Path, source: MemorySource) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, sent: int) -> None:
        assert sent == 0
        passed.append(done)
        raise Stop

    passed: list[int] = []
    sending = Sending(tmp_path / "s", source)
    made = Transfer(source, source.layout, sending.writer, on_batch=stop)
    with pytest.raises(Stop):
        made.hashes()
    assert passed == [700]
    os.close(sending._fd)

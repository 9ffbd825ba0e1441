"""The bitmap's loops against a bitmap of Python booleans."""

from __future__ import annotations

import os
import random
from array import array

import pytest

from bhystream.memory.bitmap import count, walk
from support.nogil import released

# Which of the two depends on what the buffer is wrong in, and whose it is.
WRONG_BUFFER = (ValueError, BufferError)


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("BHYSTREAM_SEED") or random.randrange(2**32))
    print(f"BHYSTREAM_SEED={seed}")
    return random.Random(seed)


def pack(bits: list[bool]) -> array[int]:
    words = array("Q", bytes(8 * ((len(bits) + 63) // 64)))
    for page, bit in enumerate(bits):
        if bit:
            words[page // 64] |= 1 << page % 64
    return words


def reference(bits: list[bool], first: int, end: int) -> list[tuple[int, int]]:
    extents: list[tuple[int, int]] = []
    for page in range(first, end):
        if bits[page]:
            start = extents.pop()[0] if extents and extents[-1][1] == page else page
            extents.append((start, page + 1))
    return extents


def walk_all(words: array[int], first: int, end: int, room: int) -> list[tuple[int, int]]:
    """Walk in calls of at most `room` extents, checking what each returns."""
    extents: list[tuple[int, int]] = []
    page = first
    while True:
        out = array("Q", [2**64 - 1] * (2 * room + 2))
        n, page = walk(words, page, end, memoryview(out)[: 2 * room])
        assert out[2 * n :] == array("Q", [2**64 - 1] * (2 * room + 2 - 2 * n))
        extents += zip(out[0 : 2 * n : 2], out[1 : 2 * n : 2], strict=True)
        if page == end:
            return extents
        assert n == room


def random_bits(rng: random.Random, npages: int) -> list[bool]:
    """Return runs of random length, so that both long and short ones occur."""
    bits: list[bool] = []
    longest = rng.choice((1, 3, 64, 200, 3000))
    bit = rng.random() < 0.5
    while len(bits) < npages:
        bits += [bit] * rng.randint(1, longest)
        bit = not bit
    return bits[:npages]


@pytest.mark.parametrize("turn", range(60))
def test_walk_and_count_agree_with_the_reference(rng: random.Random, turn: int) -> None:
    npages = 64 * rng.choice((1, 2, 9, 10, 11, 40, 100))
    bits = random_bits(rng, npages)
    words = pack(bits)
    for _ in range(20):
        first = rng.randint(0, npages)
        end = rng.choice((rng.randint(first, npages), npages, first))
        expected = reference(bits, first, end)
        assert walk_all(words, first, end, rng.choice((1, 2, 7, 1000))) == expected
        assert count(words, first, end) == sum(bits[first:end])


@pytest.mark.parametrize("page", [0, 1, 62, 63, 64, 65, 575, 576, 577, 640, 1279])
def test_one_bit_is_found_from_everywhere(page: int) -> None:
    words = pack([p == page for p in range(1280)])
    for first in range(1280):
        expected = [(page, page + 1)] if first <= page else []
        assert walk_all(words, first, 1280, 1) == expected
        assert walk_all(words, 0, first, 1) == ([(page, page + 1)] if first > page else [])
        assert count(words, first, 1280) == len(expected)


def test_full_and_empty_maps() -> None:
    full = array("Q", [2**64 - 1] * 33)
    assert walk_all(full, 0, 33 * 64, 4) == [(0, 33 * 64)]
    assert walk_all(full, 5, 2000, 4) == [(5, 2000)]
    assert count(full, 5, 2000) == 1995
    empty = array("Q", bytes(33 * 8))
    assert walk_all(empty, 0, 33 * 64, 4) == []
    assert count(empty, 0, 33 * 64) == 0


def test_no_words_hold_no_pages() -> None:
    out = array("Q", [7, 7])
    assert walk(array("Q"), 0, 0, out) == (0, 0)
    assert count(array("Q"), 0, 0) == 0
    assert list(out) == [7, 7]


def test_out_filled_by_the_last_extent_leaves_nothing() -> None:
    words = pack([page in (3, 100) for page in range(640)])
    out = array("Q", bytes(32))
    assert walk(words, 0, 640, out) == (2, 640)
    assert list(out) == [3, 4, 100, 101]


def test_a_full_out_names_the_next_set_page() -> None:
    words = pack([page in (3, 600) for page in range(640)])
    assert walk(words, 0, 640, array("Q", bytes(16))) == (1, 600)


@pytest.mark.parametrize("shift", range(1, 8))
def test_misaligned_words(rng: random.Random, shift: int) -> None:
    bits = random_bits(rng, 6400)
    words = pack(bits)
    room = bytearray(len(words) * 8 + 8)
    room[shift : shift + len(words) * 8] = words.tobytes()
    odd = memoryview(room)[shift : shift + len(words) * 8].cast("Q")
    target = memoryview(bytearray(6408 * 8 + 8))[shift : shift + 6408 * 8].cast("Q")
    n, page = walk(odd, 0, 6400, target)
    assert page == 6400
    pairs = target.tolist()[: 2 * n]
    assert list(zip(pairs[::2], pairs[1::2], strict=True)) == reference(bits, 0, 6400)
    assert count(odd, 0, 6400) == sum(bits)


@pytest.mark.parametrize(
    "first, end", [(-1, 5), (0, 129), (6, 5), (129, 129), (0, 2**64), (-(2**70), 2**70)]
)
def test_bad_ranges_are_refused(first: int, end: int) -> None:
    words, out = array("Q", [1, 1]), array("Q", [0, 0])
    with pytest.raises(ValueError, match="are not within 2 words"):
        walk(words, first, end, out)
    with pytest.raises(ValueError, match="are not within 2 words"):
        count(words, first, end)


@pytest.mark.parametrize("nwords", [0, 1, 3, 5])
def test_out_must_hold_pairs(nwords: int) -> None:
    with pytest.raises(ValueError, match="do not hold pairs"):
        walk(array("Q", [1]), 0, 64, array("Q", bytes(8 * nwords)))


def test_wrong_buffers_are_refused() -> None:
    words, out = array("Q", [1, 1]), array("Q", [0, 0])
    for bad in (array("I", [1, 1]), b"12345678", memoryview(array("Q", [1, 1, 1, 1]))[::2]):
        with pytest.raises(WRONG_BUFFER):
            walk(bad, 0, 1, out)
        with pytest.raises(WRONG_BUFFER):
            count(bad, 0, 1)
        with pytest.raises(WRONG_BUFFER):
            walk(words, 0, 1, bad)
    with pytest.raises(WRONG_BUFFER):
        walk(words, 0, 1, memoryview(out).toreadonly())
    with pytest.raises(TypeError):
        walk(None, 0, 1, out)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        count(words, "0", 1)  # type: ignore[arg-type]


def test_the_gil_is_released() -> None:
    words = array("Q", bytes(8)) * (1 << 21)
    dense = array("Q", [0x5555555555555555]) * (1 << 18)
    out = array("Q", bytes(16))
    room = array("Q", bytes(16)) * (1 << 23)
    assert released(lambda: walk(words, 0, len(words) * 64, out))
    assert released(lambda: walk(dense, 0, len(dense) * 64, room))
    assert released(lambda: count(words, 0, len(words) * 64))

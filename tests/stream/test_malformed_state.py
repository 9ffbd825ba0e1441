"""A malformed stream for each rule of bhystream(5): REHEARSAL, and the three types of states."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable

import pytest
import xxhash

from bhystream.errors import FormatError
from support.both import Make, refused, refused_last, where
from support.streams import (
    IDENT,
    REHEARSAL,
    SEED,
    STATE,
    STATE_OPTIONAL,
    STATE_ZEROS,
    Maker,
    before,
    state,
    state_zeros,
)

RESERVED = "reserved field is not zero"
PLACE = "the section may not stand here"


def test_an_empty_rehearsal_is_refused() -> None:
    maker = before(REHEARSAL).add(REHEARSAL)
    refused_last(maker, FormatError, "it is empty", "length is too short")


def test_a_rehearsal_comes_once_and_before_any_memory() -> None:
    maker = before(REHEARSAL).add(REHEARSAL, b"{}").add(REHEARSAL, b"{}")
    refused_last(maker, FormatError, "it may not follow REHEARSAL", PLACE)
    maker = before(REHEARSAL).memory(0, [(0, 1, 1)]).add(REHEARSAL, b"{}")
    refused_last(maker, FormatError, "it may not follow MEMORY", PLACE)
    maker = Maker().host().add(REHEARSAL, b"{}")
    refused_last(maker, FormatError, "it may not follow HOST", PLACE)


# One part of a state.

BAD_NAME = "the name is not 1 to 255 printable characters"
FILLED = "filling of the state name is not zero"
COUNT = "length does not fit a name of {} characters and a count"
TOO_MUCH = "all states together have more than 134217728 bytes"


@pytest.mark.parametrize(
    ("payload", "message", "why"),
    [
        (state(b"", 0, bytes(8)), BAD_NAME, "state name is not 1 to 255 bytes"),
        (state(b"n" * 256, 0, b"1"), BAD_NAME, "state name is not 1 to 255 bytes"),
        (state(b"n", 0, b"", length=2**16 - 1), BAD_NAME, "state name is not 1 to 255 bytes"),
        (state(b"n", 0, b"1", zero=1), RESERVED, RESERVED),
        (state(b"n" * 8, 0, b"", length=9), BAD_NAME, "wrong length"),
        (state(b"n" * 9, 0, b"")[:-1], BAD_NAME, "wrong length"),
        (state(b"a b", 0, b"1"), BAD_NAME, "bad state name"),
        (state(b"a\0", 0, b"1"), BAD_NAME, "bad state name"),
        (state(b"a\x7f", 0, b"1"), BAD_NAME, "bad state name"),
        (state(b"\xe4", 0, b"1"), BAD_NAME, "bad state name"),
        (state(b"n\0\0\0\0\0\0\1", 0, b"1", length=1), "padding after the name is not zero",
         FILLED),
        (state(b"n\1\0\0\0\0\0\0", 0, b"1", length=1), "padding after the name is not zero",
         FILLED),
        (state(b"n", 0, bytes(1048577)), "a part has more than 1048576 bytes",
         "part of a state is too long"),
        (state(b"n", 1, b"1"), "state n: part 1, but part 0 is next", "wrong part of a state"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [STATE, STATE_OPTIONAL])
def test_bad_state_is_refused(kind: int, payload: bytes, message: str, why: str) -> None:
    maker = before(kind).add(kind, payload, flags=1)
    refused_last(maker, FormatError, message, why)


@pytest.mark.parametrize(
    ("payload", "message", "why"),
    [
        (state_zeros(b"", 0, 1) + bytes(8), BAD_NAME, "state name is not 1 to 255 bytes"),
        (state_zeros(b"n" * 256, 0, 1), BAD_NAME, "state name is not 1 to 255 bytes"),
        (state_zeros(b"n", 0, 1, length=2**16 - 1), BAD_NAME, "state name is not 1 to 255 bytes"),
        (state_zeros(b"n", 0, 1, zero=1), RESERVED, RESERVED),
        (state_zeros(b"n" * 8, 0, 1, length=17), BAD_NAME, "wrong length"),
        (state_zeros(b"a b", 0, 1), BAD_NAME, "bad state name"),
        (state_zeros(b"n\0\0\0\0\0\0\1", 0, 1, length=1), "padding after the name is not zero",
         FILLED),
        (state_zeros(b"n", 0, 1) + bytes(8), COUNT.format(1), "wrong length"),
        (state_zeros(b"n", 0, 1) + bytes(1), COUNT.format(1), "wrong length"),
        (state(b"n" * 9, 0, bytes(7)), COUNT.format(9), "wrong length"),
        (state(b"n" * 9, 0, b""), COUNT.format(9), "wrong length"),
        (state_zeros(b"n", 1, 1), "state n: part 1, but part 0 is next", "wrong part of a state"),
        (state_zeros(b"n", 0, 0), "state n: part 0 is empty", "empty part of a state"),
        (state_zeros(b"n", 0, 134217729), TOO_MUCH, "states are too long"),
        (state_zeros(b"n", 0, 2**64 - 1), TOO_MUCH, "states are too long"),
    ],
)  # fmt: skip
def test_bad_zeros_of_a_state_are_refused(payload: bytes, message: str, why: str) -> None:
    maker = before(STATE_ZEROS).add(STATE_ZEROS, payload, flags=1)
    refused_last(maker, FormatError, message, why)


def test_zeros_are_refused_without_room_for_them() -> None:
    maker = (
        before(STATE).state_zeros(b"n", 0, 1 << 20).state_zeros(b"n", 1, (127 << 20) + 1, flags=1)
    )
    tracemalloc.start()
    try:
        refused_last(maker, FormatError, TOO_MUCH, "states are too long")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


# Parts of states in their order.


def a_part(*, last: bool = False) -> Maker:
    return before(STATE).state(b"a", 0, b"1", flags=last)


def an_optional_part(*, last: bool = False) -> Maker:
    return before(STATE_OPTIONAL).state_optional(b"a", 0, b"1", flags=last)


@pytest.mark.parametrize(
    ("make", "message", "why"),
    [
        (lambda: a_part().state(b"b", 0, b"2"), "state b: part 0, but part 1 is next",
         "state is incomplete"),
        (lambda: a_part().state(b"b", 1, b"2"), "state b begins before a is complete",
         "state is incomplete"),
        (lambda: a_part().state(b"a", 0, b"2"), "state a: part 0, but part 1 is next",
         "wrong part of a state"),
        (lambda: a_part().state(b"a", 2, b"2"), "state a: part 2, but part 1 is next",
         "wrong part of a state"),
        (lambda: a_part(last=True).state(b"a", 1, b"2", flags=1),
         "state a: part 1, but part 0 is next", "state name comes back"),
        (lambda: a_part(last=True).state(b"a", 0, b"2", flags=1),
         "state a comes again, or is one too many", "state name comes back"),
        (lambda: a_part(last=True).state(b"b", 0, b"2", flags=1).state(b"a", 0, b"3"),
         "state a comes again, or is one too many", "state name comes back"),
        (lambda: a_part().state(b"a", 1, b"", flags=1), "state a: part 1 is empty",
         "empty part of a state"),
        (lambda: a_part().state(b"a", 1, b""), "state a: part 1 is empty",
         "empty part of a state"),
        (lambda: before(STATE).state(b"a", 0, b""), "state a: part 0 is empty",
         "empty part of a state"),
        (lambda: a_part().time(), "state a is not complete", PLACE),
        (lambda: a_part(last=True).state(b"b", 0, b"2").time(), "state b is not complete", PLACE),
        # A part of zeros obeys the same rules.
        (lambda: a_part().state_zeros(b"b", 0, 2), "state b: part 0, but part 1 is next",
         "state is incomplete"),
        (lambda: a_part().state_zeros(b"b", 1, 2), "state b begins before a is complete",
         "state is incomplete"),
        (lambda: a_part().state_zeros(b"a", 0, 2), "state a: part 0, but part 1 is next",
         "wrong part of a state"),
        (lambda: a_part().state_zeros(b"a", 1, 0, flags=1), "state a: part 1 is empty",
         "empty part of a state"),
        (lambda: a_part(last=True).state_zeros(b"a", 0, 2),
         "state a comes again, or is one too many", "state name comes back"),
        (lambda: a_part().state_zeros(b"a", 1, 2).time(), "state a is not complete", PLACE),
        (lambda: a_part().state_zeros(b"a", 1, 2).state(b"a", 1, b"3"),
         "state a: part 1, but part 2 is next", "wrong part of a state"),
        (lambda: a_part().state_zeros(b"a", 1, 2, flags=1).state(b"a", 2, b"3"),
         "state a: part 2, but part 0 is next", "state name comes back"),
        # Optional states follow the others, have to be complete, and have other names.
        (lambda: a_part().state_optional(b"b", 0, b"2"), "state b: part 0, but part 1 is next",
         "state is incomplete"),
        (lambda: a_part().state_optional(b"a", 1, b"2"),
         "state a: part 1 is optional, and part 0 is not", "state is incomplete"),
        (lambda: a_part(last=True).state_optional(b"a", 0, b"2"),
         "state a comes again, or is one too many", "state name comes back"),
        (lambda: an_optional_part(last=True).state_optional(b"a", 0, b"2"),
         "state a comes again, or is one too many", "state name comes back"),
        (lambda: an_optional_part().state_optional(b"b", 1, b"2"),
         "state b begins before a is complete", "state is incomplete"),
        (lambda: an_optional_part().state_optional(b"a", 1, b"", flags=1),
         "state a: part 1 is empty", "empty part of a state"),
        (lambda: before(STATE_OPTIONAL).state_optional(b"a", 0, b""), "state a: part 0 is empty",
         "empty part of a state"),
        (lambda: an_optional_part().time(), "state a is not complete", PLACE),
        (lambda: an_optional_part().state_zeros(b"a", 1, 2),
         "it may not follow STATE_OPTIONAL", PLACE),
        (lambda: an_optional_part(last=True).state(b"b", 0, b"2"),
         "it may not follow STATE_OPTIONAL", PLACE),
    ],
)  # fmt: skip
def test_parts_of_states_do_not_mix(make: Make, message: str, why: str) -> None:
    refused_last(make(), FormatError, message, why)


def many(
    maker: Maker, count: int, payload: Callable[[int], bytes], flags: int, kind: int = STATE
) -> bytes:
    """Add many sections of states in linear time; the maker's digest leaves them out."""
    raw = bytearray(maker.raw)
    for at in range(count):
        one = payload(at)
        head = struct.pack("<IIQQ", kind, flags, len(one), maker.count + at)
        checksum = xxhash.xxh3_64_intdigest(IDENT + head + one, seed=SEED)
        maker.last = (maker.count + at, kind, len(raw))
        raw += head + struct.pack("<Q", checksum) + one
    return bytes(raw)


@pytest.mark.parametrize("kind", [STATE, STATE_OPTIONAL])
def test_the_number_of_states_is_capped(kind: int) -> None:
    maker = before(kind)
    raw = many(maker, 4097, lambda at: state(b"s%d" % at, 0, b""), 1, kind)
    message = "state s4096 comes again, or is one too many"
    refused(raw, where(maker), FormatError, message, "more than 4096 states")


def test_the_length_of_all_states_is_capped() -> None:
    maker = before(STATE)
    part = bytes(1 << 20)
    raw = many(maker, 129, lambda at: state(b"big", at, part if at < 128 else b"1" * 8), 0)
    refused(raw, where(maker), FormatError, TOO_MUCH, "states are too long")


def test_zeros_are_under_the_cap_of_all_states() -> None:
    maker = before(STATE).state_zeros(b"a", 0, 134217727, flags=1).state(b"b", 0, b"12")
    refused_last(maker, FormatError, TOO_MUCH, "states are too long")


def test_the_length_of_all_optional_states_is_capped() -> None:
    maker = before(STATE_OPTIONAL)
    part = bytes(1 << 20)
    raw = many(
        maker, 5, lambda at: state(b"big", at, part if at < 4 else b"1" * 8), 0, STATE_OPTIONAL
    )
    message = "all optional states together have more than 4194304 bytes"
    refused(raw, where(maker), FormatError, message, "optional states are too long")

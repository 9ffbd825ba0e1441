"""The reader of what the boot ROM of tests/guest prints notices every fault of a move."""

from __future__ import annotations

import pytest

from guest.rom import Beat, assert_unbroken, beats_of

SAID = (
    b"beat 0 bad 0 clock 10 tsc 1000\n"
    b"beat 1 bad 0 clock 40 tsc 2000\n"
    b"beat 2 bad 0 clock 72 tsc 30a0\n"
)


def test_whole_beats_are_read() -> None:
    assert beats_of(SAID + b"beat 3 bad 0 clock")[2:] == [Beat(2, 0, 0x72, 0x30A0)]
    assert_unbroken(SAID)


@pytest.mark.parametrize(
    ("what", "instead"),
    [
        (b"beat 1 bad 0 clock 40 tsc 2000\n", b""),
        (b"beat 1", b"beat 0"),
        (b"beat 2 bad 0", b"beat 2 bad 1"),
        (b"beat 2 bad 0", b"page 7 is wrong\nbeat 2 bad 0"),
        (b"clock 72", b"clock 3f"),
        (b"tsc 30a0", b"tsc 1fff"),
    ],
    ids=["missing", "twice", "bad", "named", "clock", "tsc"],
)
def test_what_is_wrong_is_noticed(what: bytes, instead: bytes) -> None:
    with pytest.raises(AssertionError):
        assert_unbroken(SAID.replace(what, instead))

"""The golden streams: both readers agree on them, and refuse every cut and every change.

A refusal names the section that the cut or the changed byte lies in, and its offset.
"""

from __future__ import annotations

import hashlib
import io
import random
import struct
from pathlib import Path

import pytest

from bhystream.errors import AbortedError, BhyError
from spec_reader import Refused, read
from support.both import LARGEST_CAP, Input, Recorder, agree
from support.make_golden import (
    NONCE,
    PAUSED_AT,
    PAUSED_FOR,
    PLAN,
    STREAMS,
    ZERO_STATES,
    make,
    page,
    text_pages,
)

DATA = Path(__file__).parents[1] / "data"
FROZEN = {
    "aborted": "a4181e2d45fad890ae9f6d5d92b473440325ef561d2a4fcd1b57e85854947674",
    "answered": "d8c0d4c8ba037fa1df1b49a3aa90b26c99722f52ad14e4312510ee785297fbbc",
    "dry-run": "27f2a8395163155d19634e84eaeeb1ab17202d955208b696f713fd94e0eaeeb8",
    "kept": "2067449e0d6b84cd8b233a0b0503dcbe707d61375671a5210ba1338f3d5fc6c0",
    "plain": "57a3b9b7bfb8475c18b1d4feb3a91b958920bf5f82ffd778944712faaab1c212",
    "rehearsed": "eb934b7a1ad5c1c4510b11896fb70c15a855c29b16fe2bc0f84d5256698c2d98",
    "verified": "d0ccda42759ef8e6e5c30e38935f741af8ab09726164fe38c8e75c4119bfe7b3",
    "zstd": "415021dbb240186ef2531373a1ee5ac3ba072905fcfa1de127befec2570f4b49",
}
SOUND = [name for name in STREAMS if name != "aborted"]
MEMORY = {
    "dry-run": {},
    "plain": {0: page(0), 3: page(3)},
    "kept": {7: page(7)},
    "zstd": {0: text_pages()[0], 1: text_pages()[1], 4: page(4)},
    "answered": {},
    "rehearsed": {},
    "verified": {3: page(3), 6: page(6)},
}
STATES = {
    "dry-run": {},
    "plain": {"cpu0": b"first second third", "rtc": b"\0\xff"},
    "kept": {"machine": b""},
    "zstd": {"machine": bytes(100)},
    "answered": {"machine": b"state"},
    "rehearsed": ZERO_STATES,
    "verified": {"machine": b"state"},
}
OPTIONAL_STATES = {"rehearsed": {"fpu/0": b"xmm0xmm1", "fpu/1": bytes(4096)}}
HEADER_BYTES = 72
AFTER_END = 3  # sections of the answered stream: PAD, GO, PAD


def stored(name: str) -> bytes:
    return (DATA / f"{name}.bhys").read_bytes()


def borders(raw: bytes) -> list[int]:
    """Return the offset of each section, and the offset of the end."""
    found = [HEADER_BYTES]
    while found[-1] < len(raw):
        (length,) = struct.unpack_from("<Q", raw, found[-1] + 8)
        found.append(found[-1] + 32 + length + -length % 8)
    assert found[-1] == len(raw)
    return found


def place(offsets: list[int], at: int) -> tuple[str, str]:
    """Return how a message about the byte at `at` begins, and the offset that the message names."""
    if at < HEADER_BYTES:
        return "header", " at offset 0x0: "
    number = max(n for n, start in enumerate(offsets) if start <= at)
    return f"section {number}", f" at offset 0x{offsets[number]:x}: "


@pytest.mark.parametrize("name", STREAMS)
def test_golden_stream_is_frozen(name: str) -> None:
    assert hashlib.sha256(stored(name)).hexdigest() == FROZEN[name]


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "zstd"])
def test_writer_still_writes_the_golden_stream(name: str) -> None:
    # zstd is left out: another version of the library may make another frame.
    assert make(name) == stored(name)


@pytest.mark.parametrize("name", SOUND)
def test_both_readers_agree_on_what_it_holds(name: str) -> None:
    recorder, found = agree(stored(name))
    assert recorder.memory == MEMORY[name]
    assert found.states == STATES[name]
    assert found.optional_states == OPTIONAL_STATES.get(name, {})
    assert found.rehearsal == (PLAN if name == "rehearsed" else None)
    times = {"dry-run": None, "kept": (0, 0)}
    assert found.time == times.get(name, (PAUSED_AT, PAUSED_FOR))
    assert found.nonce == (NONCE if name == "answered" else None)
    assert recorder.started == (name != "dry-run")


def test_aborted_stream_is_refused_with_the_senders_words() -> None:
    recorder = Recorder(Input(stored("aborted")))
    with pytest.raises(AbortedError, match="it changes too fast") as caught:
        recorder.run()
    assert caught.value.status == 69
    assert not recorder.started


def refuse(raw: bytes, started: bool, start: str, offset: str) -> None:
    """Assert that a broken stream is refused with its place, and whether a guest was started."""
    recorder = Recorder(Input(raw))
    with pytest.raises(BhyError) as caught:
        recorder.run()
    text = str(caught.value)
    assert caught.value.status == 65, text
    assert text.startswith(start) and offset in text, (start, offset, text)
    assert recorder.started == started, text
    assert recorder.input.largest <= LARGEST_CAP, text


@pytest.mark.parametrize("name", STREAMS)
def test_every_cut_is_refused(name: str) -> None:
    raw = stored(name)
    offsets = borders(raw)
    # After END the source may still give up: a stream that ends there is sound, and starts nothing.
    sound = offsets[-1 - AFTER_END : -1] if name == "answered" else []
    go_ends = offsets[-2] if name == "answered" else len(raw)
    for cut in range(len(raw)):
        if cut in sound:
            assert Recorder(Input(raw[:cut])).run().started == (cut >= go_ends)
            continue
        refuse(raw[:cut], cut >= go_ends, *place(offsets, cut))
        if cut % 53 == 0:
            with pytest.raises(Refused):
                read(io.BytesIO(raw[:cut]))


@pytest.mark.parametrize("name", STREAMS)
def test_every_changed_byte_is_refused(name: str) -> None:
    raw = stored(name)
    offsets = borders(raw)
    go_ends = offsets[-2] if name == "answered" else len(raw)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    values = random.Random(seed)
    broken = bytearray(raw)
    for at in range(len(raw)):
        broken[at] ^= values.randrange(1, 256)
        refuse(bytes(broken), at >= go_ends, *place(offsets, at))
        if at % 53 == 0:
            with pytest.raises(Refused):
                read(io.BytesIO(broken))
        broken[at] = raw[at]

"""The golden streams: both readers agree on them, and refuse every cut and every change."""

from __future__ import annotations

import hashlib
import io
import random
from pathlib import Path

import pytest

from bhystream.errors import AbortedError, BhyError
from bhystream.format import Type
from bhystream.reader import Reader
from both import LARGEST_CAP, Input, Recorder, agree
from make_golden import STREAMS, make
from spec_reader import Refused, read

DATA = Path(__file__).parent / "data"
FROZEN = {
    "aborted": "a4181e2d45fad890ae9f6d5d92b473440325ef561d2a4fcd1b57e85854947674",
    "answered": "d8c0d4c8ba037fa1df1b49a3aa90b26c99722f52ad14e4312510ee785297fbbc",
    "dry-run": "27f2a8395163155d19634e84eaeeb1ab17202d955208b696f713fd94e0eaeeb8",
    "kept": "2067449e0d6b84cd8b233a0b0503dcbe707d61375671a5210ba1338f3d5fc6c0",
    "plain": "57a3b9b7bfb8475c18b1d4feb3a91b958920bf5f82ffd778944712faaab1c212",
    "zstd": "415021dbb240186ef2531373a1ee5ac3ba072905fcfa1de127befec2570f4b49",
}
SOUND = [name for name in STREAMS if name != "aborted"]


def stored(name: str) -> bytes:
    return (DATA / f"{name}.bhys").read_bytes()


@pytest.mark.parametrize("name", STREAMS)
def test_golden_stream_is_frozen(name: str) -> None:
    assert hashlib.sha256(stored(name)).hexdigest() == FROZEN[name]


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "zstd"])
def test_writer_still_writes_the_golden_stream(name: str) -> None:
    # Not for zstd: another version of the library may find another frame.
    assert make(name) == stored(name)


@pytest.mark.parametrize("name", SOUND)
def test_both_readers_agree(name: str) -> None:
    recorder, _ = agree(stored(name))
    assert recorder.started == (name != "dry-run")


def test_aborted_stream_is_refused_with_the_senders_words() -> None:
    with pytest.raises(AbortedError, match="it changes too fast") as caught:
        Recorder(Input(stored("aborted"))).run()
    assert caught.value.status == 69


def refusal(raw: bytes) -> tuple[BhyError | None, Recorder | None]:
    """Read a broken stream; return the error, or None, and the destination."""
    source = Input(raw)
    recorder = None
    error = None
    try:
        recorder = Recorder(source)
        recorder.run()
    except BhyError as caught:
        error = caught
    assert source.largest <= LARGEST_CAP
    return error, recorder


def go_ends(name: str) -> int:
    """Return where GO ends, from where on a destination may have started."""
    if name != "answered":
        return 1 << 32
    reader = Reader(Input(stored(name)))
    while (section := reader.next()) is not None:
        if section.type == Type.GO:
            break
    return reader.offset_bytes


def borders_after_end(raw: bytes) -> set[int]:
    """Return where an answered stream may end soundly: at any border after END."""
    reader = Reader(Input(raw))
    found: set[int] = set()
    ended = False
    while (section := reader.next()) is not None:
        ended = ended or section.type == Type.END
        if ended:
            found.add(reader.offset_bytes)
    return found


@pytest.mark.parametrize("name", STREAMS)
def test_every_cut_is_refused(name: str) -> None:
    raw = stored(name)
    sound = {len(raw)}
    started_at = go_ends(name)
    if name == "answered":
        # After END the source may still give up: sound, and not started.
        sound |= borders_after_end(raw)
    for cut in range(len(raw)):
        error, recorder = refusal(raw[:cut])
        assert cut >= started_at or recorder is None or not recorder.started, cut
        if cut in sound:
            assert error is None, cut
            continue
        assert error is not None, cut
        assert error.status == 65, cut
        assert "at offset 0x" in str(error), (cut, str(error))


@pytest.mark.parametrize("name", STREAMS)
def test_every_changed_byte_is_refused(name: str) -> None:
    raw = stored(name)
    started_at = go_ends(name)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    values = random.Random(seed)
    for at in range(len(raw)):
        broken = bytearray(raw)
        broken[at] ^= values.randrange(1, 256)
        error, recorder = refusal(bytes(broken))
        assert error is not None, at
        assert error.status == 65, (at, str(error))
        assert "at offset 0x" in str(error), (at, str(error))
        assert at >= started_at or recorder is None or not recorder.started, at
        if at % 61 == 0:
            with pytest.raises(Refused):
                read(io.BytesIO(bytes(broken)))

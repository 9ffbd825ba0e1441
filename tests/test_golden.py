"""The golden streams: both readers agree on them, and refuse every cut and every change."""

from __future__ import annotations

import hashlib
import io
import random
from pathlib import Path

import pytest

from bhystream.errors import AbortedError, BhyError
from both import LARGEST_CAP, Input, Recorder, agree
from make_golden import STREAMS, make, page
from spec_reader import Refused, read

DATA = Path(__file__).parent / "data"
FROZEN = {
    "aborted": "099949d9460b2df37d900e0b311fdd267d1351de163c2fc20c701ed88b9bad3a",
    "answered": "662a1f777c523ef3a88a2e50e1d6509319d6a274f7c246d4706270dc471c691f",
    "dry-run": "d049f4a8f5a66f8a13a3f488c2d70a849c77f1e56050de02e6a4fd9bab6836ff",
    "kept": "032d1577b413e3ab59db05a4c02d0037539f6a7043f7e257a4695e3802447c03",
    "plain": "3d2eacf5633b5ec73fde5fe64e5f63aebd254252f81d5892b53f6602aeb4c8a0",
    "zstd": "d8034b5b7a7d0a5f003c0a5fe9ff9e302068758450aa58fb416139064d81c480",
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
    expected = {} if name == "dry-run" else {1: None, 2: page("b"), 7: page("d")}
    assert recorder.memory == {p: data for p, data in expected.items() if data}
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


def trailer_end(name: str) -> int:
    """Return where the answered stream may end soundly: after END, PAD and GO."""
    raw = stored(name)
    # END has 32 + 64 bytes, PAD 32 + 8, GO 32 + 16.
    return len(raw) - 48 - 40


@pytest.mark.parametrize("name", STREAMS)
def test_every_cut_is_refused(name: str) -> None:
    raw = stored(name)
    sound = {len(raw)}
    if name == "answered":
        # After END the source may still give up: sound, and not started.
        sound |= {trailer_end(name), trailer_end(name) + 40}
    for cut in range(len(raw)):
        error, recorder = refusal(raw[:cut])
        assert recorder is None or not recorder.started, cut
        if cut in sound:
            assert error is None, cut
            continue
        assert error is not None, cut
        assert error.status == 65, cut
        assert "at offset 0x" in str(error), (cut, str(error))


@pytest.mark.parametrize("name", STREAMS)
def test_every_changed_byte_is_refused(name: str) -> None:
    raw = stored(name)
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
        assert recorder is None or not recorder.started, at
        if at % 61 == 0:
            with pytest.raises(Refused):
                read(io.BytesIO(bytes(broken)))

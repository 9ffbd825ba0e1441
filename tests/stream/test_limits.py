"""bhystream(5), LIMITS: the page has the numbers of the code, and each number is the limit.

The limits of one hypervisor are tried in tests/backend, the caps of the sections in
test_malformed.py, and those of the answers in tests/handover.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from bhystream import strict_json
from bhystream.backend.bhyve import keys, snapshot
from bhystream.backend.bhyve import validate as bhyve
from bhystream.backend.qemu import validate as qemu
from bhystream.errors import AbortedError, FormatError, TruncatedError
from bhystream.guest import GUEST_NAME, MAX_GUEST_PAGES
from bhystream.handover import answers
from bhystream.stream import disks
from bhystream.stream import format as fmt
from spec_reader import Refused, read
from support.both import Input, Recorder
from support.limits import memory_bytes, of_page
from support.streams import (
    ABORT,
    CONFIG,
    DEVICES,
    DISKS,
    HASHES,
    HOST,
    LAYOUT,
    MEMORY,
    STATE,
    ZERO,
    ZSTD,
    Maker,
    abort,
    before,
    hashes,
    layout,
    memory_list,
    page,
    state,
)
from support.streams import disks as packed

SAID = of_page()


def longest(matches: Callable[[str], object], one: str = "a") -> int:
    """Return the length of the longest text of one character that matches."""
    return max(count for count in range(1, 2000) if matches(one * count))


def test_the_page_has_the_numbers_of_the_code() -> None:
    assert {
        "segments": fmt.MAX_SEGMENTS,
        "bytes in a segment's name": fmt.LAYOUT_SEGMENT.size - 16,
        "pages in all segments": MAX_GUEST_PAGES,
        "characters in the guest's name": longest(GUEST_NAME.fullmatch),
        "devices": fmt.MAX_DEVICES,
        "characters in a name of a device, a hypervisor or a program": fmt.MAX_NAME_CHARS,
        "JSON values within one another": strict_json.MAX_DEPTH,
        "extents in a MEMORY section": fmt.MAX_EXTENTS,
        "pages in a MEMORY section": fmt.MAX_MEMORY_PAGES,
        "extents in a HASHES section": fmt.MAX_EXTENTS,
        "hashes in a HASHES section": fmt.MAX_HASHES,
        "bytes in the window of a zstd frame": fmt.MAX_WINDOW_BYTES,
        "states": fmt.MAX_STATES,
        "optional states": fmt.MAX_STATES,
        "bytes in a state's name": fmt.MAX_STATE_NAME_BYTES,
        "bytes in a part of a state": fmt.MAX_STATE_PART_BYTES,
        "bytes in all states": fmt.MAX_STATE_BYTES,
        "bytes in all optional states": fmt.MAX_OPTIONAL_STATE_BYTES,
        "disks with samples": disks.MAX_DISKS,
        "samples of a disk": disks.MAX_SAMPLES,
        "bytes in a sample": disks.MAX_SAMPLE_BYTES,
        "bytes in the text of ABORT": fmt.MAX_ABORT_TEXT_BYTES,
        "bytes in an answer": answers.MAX_LINE_BYTES,
        "bytes before the first answer": answers.MAX_NOISE_BYTES,
        "keys in CONFIG": keys.MAX_KEYS,
        "resources in CONFIG": bhyve._MAX_RESOURCES,
        "words in a key": longest(lambda text: keys.KEY.fullmatch(text[:-1]), "a."),
        "characters in a word of a key": longest(keys.KEY.fullmatch),
        "characters in a value": longest(keys.VALUE.fullmatch),
        "bytes in the state meta and in REHEARSAL": snapshot.MAX_META_BYTES,
        "states that meta lists in one array": snapshot.MAX_ITEMS,
        "bytes in a state that meta lists": snapshot.MAX_BLOB_BYTES,
        "entries in a list or an object of CONFIG": qemu._MAX_LIST,
        "features of the processor": qemu._MAX_FEATURES,
        "bytes of memory in CONFIG": qemu._MAX_GUEST_BYTES,
    } == SAID
    assert fmt.CAPS[fmt.Type.REHEARSAL] == SAID["bytes in the state meta and in REHEARSAL"]


def test_the_page_of_bhyrecv_has_the_sum_of_the_memory() -> None:
    text = (Path(__file__).parents[2] / "man" / "bhyrecv.8").read_text()
    states = SAID["bytes in all states"] + SAID["bytes in all optional states"]
    assert f"takes at most {memory_bytes() >> 20} MiB of private memory" in text
    assert f"the states in the stream:\n{states >> 20} MiB at the most." in text


def named(kind: int, value: object) -> Maker:
    return before(kind).add(kind, json.dumps(value).encode())


def host(**more: object) -> Maker:
    return named(HOST, {"hypervisor": "qemu", "program": "test 1", **more})


def nested(depth: int) -> Maker:
    value: object = 1
    for _ in range(depth - 1):  # HOST itself is the first
        value = [value]
    return host(x=value)


def extents(count: int) -> Maker:
    maker = Maker().head((b"ram", 0, 2 * count))
    # A page in the middle of zeros, so that no two extents can be one.
    pages = [(at, 1, at % 2) for at in range(min(count, 2 * 1024))]
    rest = [(at, 1, ZERO) for at in range(len(pages), count)]
    raw = memory_list(0, [*pages, *rest], [page(1)] * ((len(pages) + 1) // 2))
    body = page(1) * ((len(pages) + 1) // 2)
    return maker.add(MEMORY, raw + body, covered=len(raw))


def hashed_in_extents(count: int) -> Maker:
    maker = Maker().head((b"ram", 0, count + 1)).memory(0, [(0, count + 1, ZERO)])
    maker.round_end(0, 0, count + 1, flags=1)
    return maker.hashes([(at, 1, ZERO) for at in range(count)])


def hashed(count: int) -> Maker:
    maker = Maker().head((b"ram", 0, count + 1)).memory(0, [(0, count + 1, ZERO)])
    maker.round_end(0, 0, count + 1, flags=1)
    return maker.add(HASHES, hashes([(0, count, 0)], [page(1)] * count))


def zstd_window(window: int) -> Maker:
    """Add a frame that says that it needs this window: 8 bits of exponent and eighths."""
    exponent = window.bit_length() - 11
    eighths = (window - (1 << exponent + 10)) >> exponent + 7
    eighths += (window & ((1 << exponent + 7) - 1)) > 0  # what cannot be said is rounded up
    frame = zstandard.compress(page(1))
    # Descriptor: a content size of 2 bytes, a window, no checksum; then both, and the blocks.
    assert frame[4] & 0x20 and frame[4] >> 6 == 1
    raw = frame[:4] + bytes([0x40, exponent << 3 | eighths]) + frame[5:]
    return Maker(mandatory=ZSTD).head((b"ram", 0, 1)).zstd([(0, 1, 0)], [page(1)], raw)


def states(count: int, *, optional: bool = False) -> Maker:
    maker = before(STATE)
    add = maker.state_optional if optional else maker.state
    for at in range(count):
        add(b"s%d" % at, 0, b"x", flags=1)
    return maker


def optional_bytes(count: int) -> Maker:
    maker = before(STATE)
    for part, first in enumerate(range(0, count, 1 << 20)):
        maker.state_optional(b"s", part, bytes(min(1 << 20, count - first)))
    return maker


def segments(count: int) -> Maker:
    raw = layout(*((b"s%d" % at, at * 4096, 1) for at in range(count)))
    return before(LAYOUT).add(LAYOUT, raw)


def sampled(*given: tuple[bytes, list[tuple[int, int, int]]]) -> Maker:
    return before(DISKS).add(DISKS, packed(*((name, 1 << 30, each) for name, each in given)))


TRIED: dict[str, Callable[[int], Maker]] = {
    "segments": segments,
    "pages in all segments": lambda n: before(LAYOUT).layout((b"a", 0, n - 7), (b"b", 1 << 49, 7)),
    "characters in the guest's name": lambda n: named(CONFIG, {"name": "n" * n}),
    "devices": lambda n: named(DEVICES, ["d"] * n),
    "characters in a name of a device, a hypervisor or a program": lambda n: host(program="p" * n),
    "JSON values within one another": nested,
    "extents in a MEMORY section": extents,
    "pages in a MEMORY section": lambda n: (
        Maker().head((b"ram", 0, n)).memory(0, [(0, n, 0)], [page(1)] * n)
    ),
    "extents in a HASHES section": hashed_in_extents,
    "hashes in a HASHES section": hashed,
    "bytes in the window of a zstd frame": zstd_window,
    "states": states,
    "optional states": lambda n: states(n, optional=True),
    "bytes in a state's name": lambda n: before(STATE).state(b"n" * n, 0, b"x", flags=1),
    "bytes in a part of a state": lambda n: before(STATE).add(STATE, state(b"n", 0, bytes(n))),
    "bytes in all states": lambda n: before(STATE).state_zeros(b"n", 0, n),
    "bytes in all optional states": optional_bytes,
    "disks with samples": lambda n: sampled(*((b"d%d" % at, [(0, 512, 0)]) for at in range(n))),
    "samples of a disk": lambda n: sampled((b"d", [(512 * at, 512, 0) for at in range(n)])),
    "bytes in a sample": lambda n: sampled((b"d", [(0, n if n % 512 == 0 else n + 511, 0)])),
    "bytes in the text of ABORT": lambda n: before(ABORT).add(ABORT, abort(b"x" * n)),
}


@pytest.mark.parametrize("what", TRIED)
def test_so_much_is_taken_and_no_more(what: str) -> None:
    for number, is_taken in ((SAID[what], True), (SAID[what] + 1, False)):
        maker = TRIED[what](number)
        raw, last = maker.raw, maker.last[0]
        # The bytes end with the section in question: a reader that takes it wants more.
        expected = AbortedError if what == "bytes in the text of ABORT" else TruncatedError
        with pytest.raises(expected if is_taken else FormatError):
            Recorder(Input(raw)).run()
        assert refused_at(raw) == last if not is_taken else refused_at(raw) != last


def refused_at(raw: bytes) -> int | None:
    """Return the section that the reader made from the page alone refuses."""
    try:
        read(io.BytesIO(raw))
    except Refused as error:
        return error.section_number
    return None

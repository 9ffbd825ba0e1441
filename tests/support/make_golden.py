"""Make the golden streams of tests/data with the project's own writer.

    PYTHONPATH=lib python tests/support/make_golden.py [directory]

Everything in the streams is fixed: ids, seeds, times, page bytes.  So they change only if the
format or the writer does, and a change of the format needs a new golden stream, a new digest in
test_golden.py, and a new text in the function that makes the stream.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import xxhash

from bhystream.guest import PAGE_BYTES, Layout, Segment, State
from bhystream.stream import format as fmt
from bhystream.stream.format import Feature, Form, Header, Type
from bhystream.stream.writer import Writer
from bhystream.strict_json import pack_json

DATA = Path(__file__).parents[1] / "data"
NONCE = bytes(range(0xA0, 0xB0))
PAUSED_AT, PAUSED_FOR = 1_700_000_000_000_000_000, 12_345_678

# A frame of two pages, the first of one repeated text and the second of two bytes.  libzstd 1.5.7
# made the frame at level 3.  Another version may make another frame of them, so this one is kept.
FRAME = bytes.fromhex(
    "28b52ffd60001f8d010024025468652067756573742773206d656d6f72792c207061676520616674"
    "65722e2000010300fbcff918fb4879ac85e204"
)


PLAN = b'{"devices": [{"device": "vga", "size": 8195}]}'
# Blocks of 4096 zero bytes are a count in the stream.
ZERO_STATES = {
    "vga": bytes(8192) + b"end",
    "ram": bytes(4096) + b"\x01".rjust(4096, b"\0") + bytes(4096) + bytes(8),
    "rom": bytes(3 * 4096),
    "short": bytes(4095),
}


def page(number: int) -> bytes:
    """Return 4096 bytes that look random and never change."""
    return random.Random(number).randbytes(PAGE_BYTES)


def text_pages() -> list[bytes]:
    """Return what FRAME decompresses to."""
    text = b"The guest's memory, page after page. " * 111
    return [text[:PAGE_BYTES], b"\x00\x01" * (PAGE_BYTES // 2)]


NO_FEATURES = Feature(0)


def begin(fd: int, number: int, form: Form, features: Feature = NO_FEATURES) -> Writer:
    """Write a header whose id and seed follow from the number of the stream."""
    made = random.Random(1000 + number)
    return Writer(fd, Header(form, features, made.randbytes(16), made.getrandbits(64)))


def head(writer: Writer, *segments: Segment) -> None:
    """Write HOST to HEAD_END."""
    host = {
        "hypervisor": "qemu",
        "hypervisor_version": "8.2.2",
        "program": "bhysend 0.1.0",
        "hw.machine": "amd64",
        "host_id": "d1a2c0de-0000-4000-8000-000000000001",
    }
    config = {"name": "web1", "smp": 2, "machine": "pc-q35-8.2", "note": "Grüße"}
    writer.section(Type.HOST, pack_json(host))
    writer.section(Type.LAYOUT, fmt.pack_layout(Layout(segments or (Segment("ram", 0, 8),))))
    writer.section(Type.CONFIG, pack_json(config))
    writer.section(Type.DEVICES, pack_json(["serial", "virtio-net", "rtc"]))
    writer.section(Type.HEAD_END)


def memory(
    writer: Writer,
    extents: list[tuple[int, int, int]],
    pages: list[bytes] | None = None,
    frame: bytes = b"",
) -> None:
    """Write MEMORY; extents: (first, count, kind)."""
    pages = pages or []
    payload = fmt.MEMORY_HEAD.pack(writer.rounds, len(extents), len(pages), 0)
    payload += b"".join(fmt.EXTENT.pack(*extent) for extent in extents)
    for one in pages:
        payload += xxhash.xxh3_64_intdigest(one, writer.header.seed).to_bytes(8, "little")
    flags = fmt.FLAG_ZSTD if frame else 0
    writer.section(Type.MEMORY, payload, flags=flags, body=frame or b"".join(pages))


def hashes(writer: Writer, extents: list[tuple[int, int, int]], pages: list[bytes]) -> None:
    """Write HASHES; extents: as for memory(); pages: those of the DATA extents."""
    payload = fmt.HASHES_HEAD.pack(len(extents), len(pages))
    payload += b"".join(fmt.EXTENT.pack(*extent) for extent in extents)
    for one in pages:
        payload += xxhash.xxh3_64_intdigest(one, writer.header.seed).to_bytes(8, "little")
    writer.section(Type.HASHES, payload)


def time(writer: Writer, at_ns: int = PAUSED_AT, for_ns: int = PAUSED_FOR) -> None:
    """Write TIME."""
    writer.section(Type.TIME, fmt.TIME.pack(at_ns, for_ns))


def dry_run(fd: int) -> None:
    """Write the smallest stream, a dry run."""
    writer = begin(fd, 1, Form.PLAIN, Feature.NO_MEMORY)
    head(writer)
    writer.end()


def plain(fd: int) -> None:
    """Write a move with two segments, three rounds and two states."""
    writer = begin(fd, 2, Form.PLAIN)
    head(writer, Segment("ram", 0, 12), Segment("rom", None, 2))
    memory(writer, [(0, 1, 0), (1, 8, 1), (9, 1, 0), (10, 2, 1)], [page(0), page(9)])
    memory(writer, [(12, 2, 1)])
    writer.section(Type.PAD, bytes(range(13)))
    writer.round_end(2, 12, last=False)
    # Page 9 becomes zero.
    memory(writer, [(3, 1, 0), (9, 1, 1)], [page(3)])
    writer.section(0x8000_0ABC, b"of a later version", flags=0x55)
    writer.round_end(1, 1, last=False)
    memory(writer, [(13, 1, 1)])
    writer.round_end(0, 1, last=True)
    # This does what Writer.state() does, but with parts much smaller than 1 MiB.
    parts = (b"first ", b"second ", b"third")
    for at, part in enumerate(parts):
        last = fmt.FLAG_LAST if at == len(parts) - 1 else 0
        writer.section(Type.STATE, fmt.pack_state("cpu0", at, part), flags=last)
        writer.state_bytes += len(part)
    writer.state(State("rtc", b"\x00\xff"))
    time(writer)
    writer.end()


def kept(fd: int) -> None:
    """Write a checkpoint of a guest that was not running, all in one round."""
    writer = begin(fd, 3, Form.KEPT)
    head(writer)
    memory(writer, [(0, 7, 1), (7, 1, 0)], [page(7)])
    writer.round_end(1, 7, last=True)
    writer.state(State("machine", b""))
    time(writer, 0, 0)
    writer.end()


def zstd(fd: int) -> None:
    """Write a stream with a compressed section, and one that is not."""
    writer = begin(fd, 4, Form.PLAIN, Feature.ZSTD)
    head(writer)
    memory(writer, [(0, 2, 0), (2, 6, 1)], text_pages(), FRAME)
    writer.round_end(2, 6, last=False)
    memory(writer, [(4, 1, 0)], [page(4)])
    writer.round_end(1, 0, last=True)
    writer.state(State("machine", bytes(100)))
    time(writer)
    writer.end()


def answered(fd: int) -> None:
    """Write a stream whose destination waits for GO, and gets it."""
    writer = begin(fd, 5, Form.ANSWERED)
    head(writer)
    memory(writer, [(0, 8, 1)])
    writer.round_end(0, 8, last=True)
    writer.state(State("machine", b"state"))
    time(writer)
    writer.end()
    writer.section(Type.PAD, bytes(9))
    writer.section(Type.GO, NONCE)
    writer.section(Type.PAD)


def rehearsed(fd: int) -> None:
    """Write a stream with all that a destination needs to start its hypervisor early.

    It has REHEARSAL, states with zeros before, between and after other bytes, a
    state of zeros alone, and two states that a reader may leave out.
    """
    writer = begin(fd, 7, Form.PLAIN)
    head(writer)
    writer.section(Type.REHEARSAL, PLAN)
    memory(writer, [(0, 8, 1)])
    writer.round_end(0, 8, last=True)
    for name, data in ZERO_STATES.items():
        writer.state(State(name, data))
    # This does what Writer.state() does, but with parts much smaller than 1 MiB.
    for at, part in enumerate((b"xmm0", b"xmm1")):
        writer.section(Type.STATE_OPTIONAL, fmt.pack_state("fpu/0", at, part), flags=at)
        writer.section(Type.PAD, bytes(3))
    # The zeros of an optional state stay in its parts.
    writer.state(State("fpu/1", bytes(4096), is_optional=True))
    time(writer)
    writer.end()


def verified(fd: int) -> None:
    """Write a stream with the hashes of all pages, in two segments, after two rounds."""
    writer = begin(fd, 8, Form.PLAIN)
    head(writer, Segment("ram", 0, 6), Segment("rom", None, 2))
    memory(writer, [(0, 1, 0), (1, 5, 1)], [page(0)])
    memory(writer, [(6, 1, 0), (7, 1, 1)], [page(6)])
    writer.round_end(2, 6, last=False)
    memory(writer, [(0, 1, 1), (3, 1, 0)], [page(3)])
    writer.round_end(1, 1, last=True)
    # Page 0 is zero by now: a writer may list its hash as well.
    hashes(writer, [(0, 1, 0), (1, 2, 1), (3, 1, 0), (4, 2, 1)], [bytes(PAGE_BYTES), page(3)])
    writer.section(Type.PAD, bytes(5))
    hashes(writer, [(6, 1, 0), (7, 1, 1)], [page(6)])
    writer.state(State("machine", b"state"))
    time(writer)
    writer.end()


def aborted(fd: int) -> None:
    """Write a stream that its sender gave up in round 0."""
    writer = begin(fd, 6, Form.PLAIN)
    head(writer)
    memory(writer, [(0, 5, 1)])
    writer.section(Type.ABORT, fmt.pack_abort(75, "interrupted: it changes too fast"))


STREAMS: dict[str, Callable[[int], None]] = {
    "dry-run": dry_run,
    "plain": plain,
    "kept": kept,
    "zstd": zstd,
    "answered": answered,
    "aborted": aborted,
    "rehearsed": rehearsed,
    "verified": verified,
}


def make(name: str) -> bytes:
    """Return the bytes of one golden stream."""
    with tempfile.TemporaryFile() as file:
        STREAMS[name](file.fileno())
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        return file.read()


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    for name in STREAMS:
        (directory / f"{name}.bhys").write_bytes(make(name))

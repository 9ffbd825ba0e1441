"""The annotated dump in bhystream(5) is that of the dry-run golden stream, byte by byte.

python tests/stream/test_dump.py    prints the dump as it has to stand in the page
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import xxhash

ROOT = Path(__file__).parents[2]
STREAM = ROOT / "tests/data/dry-run.bhys"
PAGE = ROOT / "man/bhystream.5"
NAMES = {1: "HOST", 2: "LAYOUT", 3: "CONFIG", 4: "DEVICES", 5: "HEAD_END", 11: "END"}
Field = tuple[int, str]  # the number of bytes, and the note about them

HEADER: list[Field] = [
    (8, "magic"), (8, "version {}, form {}"), (8, "mandatory features {}"),
    (8, "optional features {}"), (16, "stream id"), (8, "seed"), (8, "reserved"), (8, "checksum"),
]  # fmt: skip
SECTION: list[Field] = [(8, ""), (8, "length {}"), (8, "sequence {}"), (8, "checksum")]
LAYOUT: list[Field] = [
    (8, "page size {}, count {}"), (16, "name"), (16, ""), (8, "gpa {}"), (8, "npages {}"),
]  # fmt: skip
END: list[Field] = [
    (8, "what {}, rounds {}"), (8, "sections {}"), (8, "offset {}"), (8, "data pages {}"),
    (8, "zero pages {}"), (8, "state bytes {}"), (16, "digest"),
]  # fmt: skip


def line(at: int, raw: bytes, note: str) -> str:
    """Return one line: the offset, at most 16 bytes, and the note about them."""
    return f"{at:03x}  {raw.hex(' '):<47}  {note}".rstrip()


def fields(raw: bytes, at: int, of: list[Field]) -> Iterator[str]:
    """Yield a line for each field; the field's numbers fill the {} of its note."""
    for size, note in of:
        part = raw[at : at + size]
        kind = "<Q" if note.count("{}") == 1 else "<II"
        yield line(at, part, note.format(*struct.unpack(kind, part)) if "{}" in note else note)
        at += size


def dump(raw: bytes) -> Iterator[str]:
    """Yield the lines of a dry run's dump."""
    yield from fields(raw, 0, HEADER)
    at = sum(size for size, _ in HEADER)
    while at < len(raw):
        kind, flags, length, _ = struct.unpack_from("<IIQQ", raw, at)
        yield ""
        head = [(8, f"type {NAMES[kind]}, flags {flags}"), *SECTION[1:]]
        yield from fields(raw, at, head)
        at += 32
        end = at + length
        if kind in (2, 11):
            yield from fields(raw, at, LAYOUT if kind == 2 else END)
            at = end
        while at < end:
            part = raw[at : min(at + 16, end)]
            yield line(at, part, part.decode("ascii"))
            at += len(part)
        if padding := -length % 8:
            yield line(at, raw[at : at + padding], "padding")
            at += padding


def of_the_page() -> list[str]:
    """Return the dump in the page, without mdoc's escapes."""
    text = PAGE.read_text().split(".Ss A stream, byte by byte\n")[1]
    text = text.split(".Bd -literal\n")[1].split(".Ed\n")[0]
    return text.replace("\\e", "\\").splitlines()


def test_the_page_shows_the_golden_stream() -> None:
    assert of_the_page() == list(dump(STREAM.read_bytes()))


def test_the_bytes_of_the_page_are_the_stream() -> None:
    """The notes do not count: a reader may type in the bytes alone."""
    raw = b""
    for one in filter(None, of_the_page()):
        found = re.match(r"([0-9a-f]{3})  ((?:[0-9a-f]{2} ?){1,16})(?:  |$)", one)
        assert found, one
        assert int(found[1], 16) == len(raw)
        raw += bytes.fromhex(found[2])
    assert raw == STREAM.read_bytes()


def test_the_checksums_cover_what_the_page_says() -> None:
    text = PAGE.read_text().split(".Ss A stream, byte by byte\n")[1].split(".Bd")[0]
    spans = [(int(a, 16), int(b, 16) + 1) for a, b in re.findall(r"\((\w+) to (\w+)\)", text)]
    sums = re.findall(r"\b[0-9a-f]{3}\b", text.split("checksums at")[1])
    raw = STREAM.read_bytes()
    seed = int.from_bytes(raw[0x30:0x38], "little")
    covered = b"".join(raw[first:end] for first, end in spans)
    assert xxhash.xxh3_64_digest(covered, seed=seed) == raw[0x60:0x68][::-1]
    covered = b"".join(raw[int(at, 16) : int(at, 16) + 8] for at in sums)
    assert xxhash.xxh3_128_digest(covered, seed=seed) == raw[0x270:]


if __name__ == "__main__":
    for one in dump(STREAM.read_bytes()):
        print(one.replace("\\", "\\e"))

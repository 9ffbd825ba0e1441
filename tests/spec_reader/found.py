"""What a stream holds, and the exceptions for a stream that breaks a rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

PAGE: Final = 4096
PLAIN, KEPT, ANSWERED = 1, 2, 3
ZSTD, NO_MEMORY = 1, 2


class Refused(Exception):
    """The stream breaks a rule of bhystream(5).

    `section_number` is the expected sequence number, None for the stream's header; `type_name` is
    None for the stream's header and for an incomplete section header; `offset` is that of the
    section's header, in bytes.
    """

    def __init__(
        self, section_number: int | None, type_name: str | None, offset: int, why: str
    ) -> None:
        where = "header" if section_number is None else f"section {section_number}"
        name = "" if type_name is None else f" ({type_name})"
        super().__init__(f"{where}{name} at offset {offset:#x}: {why}")
        self.section_number = section_number
        self.type_name = type_name
        self.offset = offset
        self.why = why


class Wrong(Exception):
    """A broken rule; `walk.Reader.run` adds the place."""


def need(condition: bool, why: str) -> None:
    if not condition:
        raise Wrong(why)


@dataclass(frozen=True)
class Header:
    form: int
    mandatory: int
    optional: int
    stream_id: bytes
    seed: int
    checksum: bytes


class Segment(NamedTuple):
    """`first` is the page number of the first page; `gpa` is None if it is not stated."""

    name: str
    gpa: int | None
    first: int
    npages: int


class Round(NamedTuple):
    data_pages: int
    zero_pages: int
    last: bool


class Time(NamedTuple):
    paused_at_ns: int
    paused_for_ns: int


class Sample(NamedTuple):
    offset: int
    length: int
    hash: int


class Disk(NamedTuple):
    name: str
    size: int
    samples: tuple[Sample, ...]


class Abort(NamedTuple):
    status: int
    text: str


@dataclass
class Stream:
    """What a sound stream holds.

    `memory` maps a page number to its 4096 bytes after all rounds; a page of zeros is absent.
    `hashes` has (page, 1, hash) for each page of a DATA extent of HASHES, and (first, count, None)
    for each ZERO extent.
    `what` and `digest` are END's, None in a stream that ends with ABORT.  `skipped` holds the
    types of the unknown optional sections.  `sections` counts all sections, also END, GO, ABORT.
    """

    header: Header
    host: dict[str, Any] | None = None
    layout: list[Segment] = field(default_factory=list)
    config: dict[str, Any] | None = None
    devices: list[str] = field(default_factory=list)
    memory: dict[int, bytes] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    hashes: list[tuple[int, int, int | None]] = field(default_factory=list)
    rehearsal: bytes | None = None
    states: dict[str, bytes] = field(default_factory=dict)
    optional_states: dict[str, bytes] = field(default_factory=dict)
    time: Time | None = None
    disks: list[Disk] = field(default_factory=list)
    what: int | None = None
    digest: bytes | None = None
    nonce: bytes | None = None
    abort: Abort | None = None
    skipped: list[int] = field(default_factory=list)
    sections: int = 0

    @property
    def npages(self) -> int:
        return sum(segment.npages for segment in self.layout)

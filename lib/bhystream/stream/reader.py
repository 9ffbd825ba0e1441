"""Sections read from a descriptor: exact reads, caps, checksums, order.

This is the lower half of a strict reader.  It turns bytes into sections whose
frame has been checked: each is complete, of a type that may stand here, within
its cap, in sequence, padded with zeros, and has the right checksum.  The upper
half, verify.py, checks the contents.

Memory is bounded by the caps of bhystream(5): two buffers, for the list of a
MEMORY section (or any other payload) and for its page bytes, are reused from
section to section.  A length is compared with its cap before a byte is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn, Protocol

import xxhash

from bhystream.errors import ChecksumError, FormatError, StreamError, TruncatedError, from_oserror
from bhystream.guest import PAGE_BYTES
from bhystream.stream import format as fmt
from bhystream.stream.format import Feature, Form, Header, Type


class RawInput(Protocol):
    """The input of a Reader: recv's TimedInput, io.FileIO over a descriptor, or io.BytesIO."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill up to len(buffer) bytes; return how many, 0 at the end."""


# The types that may follow each type.  PAD, ABORT and unknown optional sections
# are not in the table: see _misplaced().
HEAD = (Type.HOST, Type.LAYOUT, Type.CONFIG, Type.DEVICES, Type.HEAD_END)
_ROUNDS = frozenset({Type.MEMORY, Type.ROUND_END})
_STATES = frozenset({Type.STATE, Type.STATE_ZEROS, Type.STATE_OPTIONAL, Type.TIME})
_NEXT: dict[int | None, frozenset[Type]] = {
    None: frozenset({Type.HOST}),
    **{a: frozenset({b}) for a, b in pairwise(HEAD)},
    Type.HEAD_END: _ROUNDS | {Type.REHEARSAL},
    Type.REHEARSAL: _ROUNDS,
    Type.MEMORY: _ROUNDS,
    Type.ROUND_END: _ROUNDS,
    Type.HASHES: _STATES | {Type.HASHES},
    Type.STATE: _STATES,
    Type.STATE_ZEROS: _STATES,
    Type.STATE_OPTIONAL: frozenset({Type.STATE_OPTIONAL, Type.TIME}),
    Type.TIME: frozenset({Type.DISKS, Type.END}),
    Type.DISKS: frozenset({Type.END}),
    Type.END: frozenset(),
    Type.GO: frozenset(),
}
_HASHED_PAGE_BYTES = fmt.HASH_BYTES + PAGE_BYTES


@dataclass(slots=True)
class Section:
    """One section.

    payload: the payload; in a MEMORY section only its head, extents and
    hashes.  body: the page bytes or the zstd frame of a MEMORY section; empty in
    other sections, and if a Taker has taken the bytes.  Both are views of the reader's
    buffers, valid until its next read.
    """

    type: int
    flags: int
    sequence: int
    offset_bytes: int
    payload: memoryview
    body: memoryview
    checksum: int


class Body:
    """The page bytes of one MEMORY section, which are still in the input.

    left_bytes: how many are.
    """

    def __init__(self, reader: Reader, section: Section, left_bytes: int) -> None:
        self._reader = reader
        self._section = section
        self.left_bytes = left_bytes

    def take(self, read: Callable[[int], int]) -> int:
        """Let read() have bytes of the input; return how many it has taken, at least 1.

        read(nbytes): takes at most so many of the input's next bytes; returns how many, 0 at
        the end.  Raises TruncatedError at the end of the input, InputOutputError if read()
        raises OSError, and what else read() raises.
        """
        count = self._reader.take_body(self._section, read, self.left_bytes)
        self.left_bytes -= count
        return count


# Takes all bytes of a Body.
Taker = Callable[[Body], None]


def place(sequence: int, type_: int | None, offset_bytes: int) -> str:
    """Name a section as every message about a stream does."""
    name = "" if type_ is None else f" ({fmt.type_name(type_)})"
    return f"section {sequence}{name} at offset 0x{offset_bytes:x}"


class Reader:
    """The sections of one stream, in order.

    The input stays the caller's: the reader never closes it.  A reader that has
    raised an error must not be used any more.
    """

    def __init__(
        self, raw: RawInput, on_list: Callable[[Section], Taker | None] = lambda section: None
    ) -> None:
        """Read the header.  Raises StreamError; InputOutputError if a read fails.

        on_list(section): called in each MEMORY section without ZSTD as soon as the frame, the
        checksum and the flags are checked, before the page bytes are read.  What it returns
        takes the bytes; if that is None, the body has them.  Both may raise.
        """
        self._raw = raw
        self._on_list = on_list
        self.offset_bytes = 0
        self.sequence = 0
        self._last: int | None = None
        self._last_round_seen = False
        self._list = memoryview(bytearray(1 << 17))
        self._body = memoryview(b"")
        self._head = memoryview(bytearray(fmt.SECTION.size))
        self.header, checksum = self._read_header()
        self.digest = xxhash.xxh3_128(seed=self.header.seed)
        self.digest.update(checksum)

    def _read_header(self) -> tuple[Header, bytes]:
        """Return the header, and its checksum as it was sent."""
        data = memoryview(bytearray(fmt.HEADER.size))
        got = self._fill(data)
        magic = bytes(data[: min(got, len(fmt.MAGIC))])
        try:
            if got and magic != fmt.MAGIC[:got]:
                fmt.unpack_header(bytes(data))
            if got < len(data):
                raise TruncatedError(f"the stream ends after {got} bytes of {len(data)}")
            checksum = bytes(data[64:])
            expected = xxhash.xxh3_64_intdigest(data[:64], 0)
            if expected != int.from_bytes(checksum, "little"):
                raise ChecksumError("checksum differs")
            header, _ = fmt.unpack_header(bytes(data))
        except StreamError as error:
            raise type(error)(f"header at offset 0x0: {error}") from None
        return header, checksum

    def next(self) -> Section | None:
        """Read and check one section; None at the end of the input.

        Raises StreamError with the section and its offset; InputOutputError if a
        read fails.  None does not say that the stream is complete; END says that.
        """
        start = self.offset_bytes
        got = self._fill(self._head)
        if got == 0:
            return None
        if got < len(self._head):
            self._refuse(TruncatedError, None, start, "its header is cut short")
        type_, flags, length, sequence, checksum = fmt.SECTION.unpack(self._head)
        self._check_frame(type_, length, sequence, start)
        section = Section(type_, flags, sequence, start, self._list[:0], self._body[:0], checksum)
        if type_ == Type.MEMORY:
            self._read_memory(section, length)
        else:
            section.payload = self._buffer(length)
            self._read_exactly(section.payload, section)
        self._read_padding(section, length)
        if type_ != Type.MEMORY or flags & fmt.FLAG_ZSTD:
            self._check_checksum(section)
            self._check_flags(section)
        self._advance(section)
        return section

    def refuse(self, section: Section, why: str) -> NoReturn:
        """Raise FormatError about a section."""
        self._refuse(FormatError, section.type, section.offset_bytes, why, section.sequence)

    def _refuse(
        self,
        error: type[StreamError],
        type_: int | None,
        offset_bytes: int,
        why: str,
        sequence: int | None = None,
    ) -> NoReturn:
        number = self.sequence if sequence is None else sequence
        raise error(f"{place(number, type_, offset_bytes)}: {why}")

    def _check_frame(self, type_: int, length: int, sequence: int, start: int) -> None:
        """Check what the section header says, before anything else is read."""
        limit = fmt.cap(type_)
        if limit is None:
            self._refuse(FormatError, type_, start, "a mandatory section that is not known here")
        why = self._misplaced(type_)
        if why:
            self._refuse(FormatError, type_, start, why)
        if length > limit:
            self._refuse(FormatError, type_, start, f"length {length} is over the cap of {limit}")
        if sequence != self.sequence:
            self._refuse(FormatError, type_, start, f"sequence number is {sequence}")

    def _misplaced(self, type_: int) -> str:
        """Say why a section of this type may not stand here; "" if it may."""
        if type_ == self._last and type_ == Type.MEMORY:
            return ""  # nearly every section
        ended = self._last in (Type.END, Type.GO)
        answered = self.header.form == Form.ANSWERED
        if type_ == Type.ABORT:
            return "it follows END" if ended else ""
        if type_ == Type.PAD or type_ not in fmt.CAPS:
            if self._last is None:
                return "it stands before HOST"
            if ended and not (answered and type_ == Type.PAD):
                return "it follows END"
            return ""
        if type_ in self._allowed():
            return ""
        before = "the header" if self._last is None else Type(self._last).name
        return f"it may not follow {before}"

    def _allowed(self) -> frozenset[Type]:
        """Return the types that may come now, by the last section that the table knows."""
        if self._last == Type.HEAD_END and self.header.features & Feature.NO_MEMORY:
            return frozenset({Type.END})
        if self._last == Type.ROUND_END and self._last_round_seen:
            return _STATES | {Type.HASHES}
        if self._last == Type.END and self._awaits_go():
            return frozenset({Type.GO})
        return _NEXT[self._last]

    def _awaits_go(self) -> bool:
        dry_run = self.header.features & Feature.NO_MEMORY
        return self.header.form == Form.ANSWERED and not dry_run

    def _advance(self, section: Section) -> None:
        """Count a section that has passed every check of the frame."""
        self.sequence += 1
        if section.type in fmt.CAPS and section.type != Type.PAD:
            self._last = section.type
        if section.type == Type.ROUND_END:
            self._last_round_seen = bool(section.flags & fmt.FLAG_LAST)
        if section.type != Type.END:
            self.digest.update(section.checksum.to_bytes(8, "little"))

    def _read_memory(self, section: Section, length: int) -> None:
        """Read a MEMORY section: its head and list first, then the body.

        verify.py checks the list's contents, before it looks at a page.
        """
        body_bytes = length - self._read_list(section, length)
        if not section.flags & fmt.FLAG_ZSTD:
            self._check_checksum(section)
            self._check_flags(section)
            if take := self._on_list(section):
                return take(Body(self, section, body_bytes))
        if len(self._body) < body_bytes:
            self._body = memoryview(bytearray(max(body_bytes, 1 << 20)))
        section.body = self._body[:body_bytes]
        self._read_exactly(section.body, section)
        return None

    def _read_list(self, section: Section, length: int) -> int:
        """Read the payload of a MEMORY section, up to the page bytes; return its bytes."""
        least = fmt.MEMORY_HEAD.size
        if length < least:
            self.refuse(section, "length is too small")
        if not section.flags & fmt.FLAG_ZSTD:
            # No section of this length has a shorter list: mostly this is all of the list.
            least = max(least, length - length // _HASHED_PAGE_BYTES * PAGE_BYTES)
        got = self._fill(self._list[:least], fmt.MEMORY_HEAD.size)
        if got < fmt.MEMORY_HEAD.size:
            self._refuse_cut(section, least - got)
        list_bytes = self._counted_bytes(section, length)
        section.payload = self._list[:list_bytes]
        if got < list_bytes:
            self._read_exactly(section.payload[got:], section)
        return list_bytes

    def _counted_bytes(self, section: Section, length: int) -> int:
        """Cap the counts of a MEMORY section, and compare them with its length.

        Returns how many bytes stand before the page bytes.
        """
        nextents: int
        npages: int
        _, nextents, npages, reserved = fmt.MEMORY_HEAD.unpack_from(self._list)
        if reserved:
            self.refuse(section, "reserved field is not zero")
        if not 1 <= nextents <= fmt.MAX_EXTENTS:
            self.refuse(section, f"{nextents} extents are not 1 to {fmt.MAX_EXTENTS}")
        if npages > fmt.MAX_MEMORY_PAGES:
            self.refuse(section, f"{npages} pages are more than {fmt.MAX_MEMORY_PAGES}")
        list_bytes = fmt.MEMORY_HEAD.size + nextents * fmt.EXTENT.size + npages * fmt.HASH_BYTES
        body_bytes, whole = length - list_bytes, npages * PAGE_BYTES
        compressed = section.flags & fmt.FLAG_ZSTD
        if not (0 < body_bytes < whole if compressed else body_bytes == whole):
            self.refuse(section, f"length {length} does not fit {npages} pages")
        return list_bytes

    def take_body(self, section: Section, read: Callable[[int], int], left_bytes: int) -> int:
        """Let read() have some of the bytes that are left, as Body.take() says."""
        try:
            count = read(left_bytes)
        except OSError as error:
            raise from_oserror(error, "read the stream") from error
        if not count:
            self._refuse_cut(section, left_bytes)
        self.offset_bytes += count
        return count

    def _check_flags(self, section: Section) -> None:
        flags = section.flags
        if flags & ~fmt.FLAGS.get(section.type, 0) and section.type in fmt.CAPS:
            self.refuse(section, f"flags 0x{flags:x} are not known")
        compressed = section.type == Type.MEMORY and flags & fmt.FLAG_ZSTD
        if compressed and not self.header.features & Feature.ZSTD:
            self.refuse(section, "compressed, but the header does not have ZSTD")

    def _check_checksum(self, section: Section) -> None:
        state = xxhash.xxh3_64(self.header.stream_id, seed=self.header.seed)
        state.update(self._head[: fmt.CHECKED_HEADER_BYTES])
        state.update(section.payload)
        if section.type == Type.MEMORY and section.flags & fmt.FLAG_ZSTD:
            state.update(section.body)
        if state.intdigest() != section.checksum:
            self._refuse(ChecksumError, section.type, section.offset_bytes, "checksum differs")

    def _read_padding(self, section: Section, length: int) -> None:
        nbytes = fmt.padding_bytes(length)
        if not nbytes:
            return
        padding = memoryview(bytearray(nbytes))
        self._read_exactly(padding, section)
        if any(padding):
            self.refuse(section, "padding is not zero")

    def _buffer(self, length: int) -> memoryview:
        """Return a view of `length` bytes, which the cap has bounded."""
        if len(self._list) < length:
            self._list = memoryview(bytearray(length))
        return self._list[:length]

    def _read_exactly(self, view: memoryview, section: Section) -> None:
        got = self._fill(view)
        if got < len(view):
            self._refuse_cut(section, len(view) - got)

    def _refuse_cut(self, section: Section, missing_bytes: int) -> NoReturn:
        why = f"the stream ends {missing_bytes} bytes early"
        self._refuse(TruncatedError, section.type, section.offset_bytes, why)

    def _fill(self, view: memoryview, enough_bytes: int | None = None) -> int:
        """Read until the view is full, or has enough, or the input ends; return the bytes."""
        got, enough = 0, len(view) if enough_bytes is None else enough_bytes
        try:
            while got < enough:
                count = self._raw.readinto(view[got:] if got else view)
                if count is None:
                    raise BlockingIOError(11, "the descriptor does not block")
                if count == 0:
                    break
                got += count
        except OSError as error:
            raise from_oserror(error, "read the stream") from error
        finally:
            self.offset_bytes += got
        return got

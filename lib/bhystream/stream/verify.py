"""A strict walk of a stream: what the sections say, and whether their counts agree.

This is the upper half of the reader, and the only one: `bhyrecv` builds a guest
from what this walk yields, and `bhyrecv -n` walks to the end and builds nothing.
So there is no lenient path.  The walk shares only format.py with the writer.  A
Contents checks what a hypervisor demands of its own sections; the walk calls
the Contents (understand()), and adds the place to an error.

Each event is yielded after every check that bhystream(5) demands of its
section.  Page bytes are checked against their hashes in a buffer that nothing
else writes, so the guest's memory gets the bytes that were hashed; or a Placer has
put them into the guest's memory already, and has checked them there.
Each whole state is an event: a caller that builds a guest keeps
the states, a caller that only verifies has one at a time in memory.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, Protocol

import zstandard

from bhystream.errors import (
    AbortedError,
    ChecksumError,
    FormatError,
    IncompatibleError,
    TruncatedError,
)
from bhystream.guest import PAGE_BYTES, Head, Layout, State
from bhystream.memory.page import PageHasher, check_pages
from bhystream.stream import disks, extents
from bhystream.stream import format as fmt
from bhystream.stream.contents import Contents
from bhystream.stream.disks import Disk
from bhystream.stream.format import End, Feature, Form, Header, RoundEnd, Time, Type
from bhystream.stream.reader import HEAD, Body, RawInput, Reader, Section, Taker, place


@dataclass(frozen=True)
class Pages:
    """The checked contents of one MEMORY section.

    segment: index of the segment that all extents lie in.  extents: the packed
    extents, 16 bytes each, as in the section.  npages: how many pages the DATA extents
    have.  pages: their bytes.  is_placed: a Placer has placed all extents, and pages is
    empty.  Both views are valid until the next event.
    """

    segment: int
    extents: memoryview
    npages: int
    pages: memoryview
    is_placed: bool


class Placer(Protocol):
    """Puts page bytes where they belong, from where the stream is read."""

    def takes(self, segment: int, extents: memoryview, npages: int) -> bool:
        """Say whether place() is to be called for these extents; the arguments are of Pages."""

    def place(self, segment: int, extents: memoryview, hashes: memoryview, body: Body) -> int:
        """Place the extents, checked, with all bytes of the body, and compare with the hashes.

        hashes: 8 bytes for each DATA page.  Returns the index, among the DATA pages, of the
        first one that has not its hash in the memory; -1 if there is none.  Raises BhyError.
        """


@dataclass(frozen=True)
class Rehearsal:
    """The plan of the state to come, which the source sends before any memory."""

    plan: bytes


@dataclass(frozen=True)
class Hashes:
    """The checked contents of one HASHES section.

    segment, extents: as in Pages.  hashes: one of 8 bytes for each page of the DATA
    extents.  is_last: the list ends with the guest's last page, so all pages are stated.
    """

    segment: int
    extents: memoryview
    hashes: memoryview
    is_last: bool


@dataclass(frozen=True)
class Disks:
    """The samples of the guest's disks."""

    disks: tuple[Disk, ...]


@dataclass(frozen=True)
class Ended:
    """END, verified: nothing before it is missing or changed."""

    end: End
    time: Time | None


@dataclass(frozen=True)
class Pad:
    """A PAD section, which has no contents: the source waits for an answer."""


@dataclass(frozen=True)
class Go:
    """GO, with the nonce that the destination has sent in READY."""

    nonce: bytes


Item = Header | Head | Rehearsal | Pages | RoundEnd | Hashes | Pad | State | Disks | Ended | Go


class _Listed(NamedTuple):
    """The list of the MEMORY section that is being read, checked."""

    segment: int
    extents: memoryview
    npages: int
    hashes: memoryview


@dataclass
class _States:
    """The states of one kind: the names of the whole ones, and the bytes of all parts so far."""

    what: str
    max_bytes: int
    whole: set[str] = field(default_factory=set)
    nbytes: int = 0


@dataclass
class _Tally:
    """What has been counted so far, to compare with what the stream says."""

    round: int = 0
    cursor: int = 0
    data_pages: int = 0
    zero_pages: int = 0
    all_data_pages: int = 0
    all_zero_pages: int = 0
    rounds: int = 0
    hashed_pages: int = 0
    needed: _States = field(default_factory=lambda: _States("states", fmt.MAX_STATE_BYTES))
    optional: _States = field(
        default_factory=lambda: _States("optional states", fmt.MAX_OPTIONAL_STATE_BYTES)
    )
    parts: int = 0
    # A list of parts could take far more memory than their bytes, since a part
    # may be one byte.  Unlike a bytearray, BytesIO returns its bytes without a copy.
    open_bytes: io.BytesIO = field(default_factory=io.BytesIO)
    open_state: str = ""
    open_kind: _States | None = None
    time: Time | None = None


class Walk:
    """One stream, walked from front to end.

    Iterate over events() once.  `reader` shows how far the walk has come.  `hasher` has the
    stream's seed.
    """

    def __init__(self, raw: RawInput) -> None:
        """Read the header.  Raises StreamError, InputOutputError."""
        self.reader = Reader(raw, self._begin_memory)
        self.header = self.reader.header
        self.hasher = PageHasher(self.header.seed)
        self._zstd = zstandard.ZstdDecompressor()
        self._head: dict[str, Any] = {}
        self._layout = Layout(())
        self._tally = _Tally()
        self._ended = False
        self._contents: Contents | None = None
        self._placer: Placer | None = None
        self._listed = _Listed(-1, memoryview(b""), 0, memoryview(b""))
        self._places: dict[int, tuple[int, int, int]] = {}
        self._takers: dict[int, Callable[[Section], Item | None]] = {
            Type.PAD: lambda section: Pad(),
            Type.MEMORY: self._take_memory,
            Type.ROUND_END: self._take_round_end,
            Type.REHEARSAL: self._take_rehearsal,
            Type.HASHES: self._take_hashes,
            Type.STATE: self._take_state,
            Type.STATE_ZEROS: self._take_state_zeros,
            Type.STATE_OPTIONAL: self._take_state,
            Type.TIME: self._take_time,
            Type.DISKS: lambda section: Disks(disks.unpack(bytes(section.payload))),
            Type.END: self._take_end,
            Type.GO: self._take_go,
            Type.ABORT: self._take_abort,
        }

    def events(self) -> Iterator[Item]:
        """Yield the header, the head, and one event for each section or state that follows.

        Ends after END in the plain and kept forms, without looking at what
        follows, and at the end of the input in the answered form.  Raises
        StreamError with the section and its offset, AbortedError with the sender's
        words, InputOutputError if a read fails.
        """
        yield self.header
        while True:
            section = self.reader.next()
            if section is None:
                break
            self._places[section.type] = (section.sequence, section.type, section.offset_bytes)
            try:
                event = self._take(section)
            except FormatError as error:
                self.reader.refuse(section, str(error))
            if event is not None:
                yield event
            if isinstance(event, Ended) and self.header.form != Form.ANSWERED:
                return
        if not self._ended:
            where = place(self.reader.sequence, None, self.reader.offset_bytes)
            raise TruncatedError(f"{where}: the stream ends here, without an END section")

    def understand(self, contents: Contents, head: Head) -> None:
        """Check the head by a hypervisor's rules, and each later section when it comes.

        Raises IncompatibleError with the section and its offset; the later
        sections are then not checked by those rules.
        """
        checks: dict[Type, Callable[[], None]] = {
            Type.CONFIG: lambda: contents.config(head.config),
            Type.LAYOUT: lambda: contents.layout(head.layout),
            Type.DEVICES: lambda: contents.devices(head.devices),
        }
        for type_, check in checks.items():
            try:
                check()
            except IncompatibleError as error:
                raise IncompatibleError(f"{self.place(type_)}: {error}", error.hint) from None
        self._contents = contents

    def place_by(self, placer: Placer) -> None:
        """Let a placer have the page bytes from the next section on."""
        self._placer = placer

    def place(self, type_: Type) -> str:
        """Name the last section of a type, which was read before, as messages do."""
        return place(*self._places[type_])

    def expect_end_of_input(self) -> None:
        """Read on after END, up to the end of the input.

        Raises StreamError if anything follows that may not, InputOutputError.
        """
        while self.reader.next() is not None:
            pass

    def _take(self, section: Section) -> Item | None:
        """Check the contents of one section; return its event, if it has one.

        Raises FormatError without a place.  Unknown optional sections have no
        event.
        """
        if section.type in HEAD:
            return self._take_head(section)
        take = self._takers.get(section.type)
        return take(section) if take else None

    def _take_head(self, section: Section) -> Head | None:
        data = bytes(section.payload)
        match section.type:
            case Type.HOST:
                self._head["host"] = fmt.unpack_host(data)
            case Type.LAYOUT:
                self._layout = fmt.unpack_layout(data)
            case Type.CONFIG:
                self._head["config"] = fmt.unpack_config(data)
            case Type.DEVICES:
                self._head["devices"] = fmt.unpack_devices(data)
            case Type.HEAD_END:
                return Head(layout=self._layout, **self._head)
        return None

    def _take_rehearsal(self, section: Section) -> Rehearsal:
        if not section.payload:
            raise FormatError("it is empty")
        plan = bytes(section.payload)
        if self._contents:
            self._contents.plan(plan)
        return Rehearsal(plan)

    def _begin_memory(self, section: Section) -> Taker | None:
        """Check the list before the pages are read; return what takes them, if a placer does."""
        try:
            listed = self._listed = self._check_list(section)
        except FormatError as error:
            self.reader.refuse(section, str(error))
        placer = self._placer
        if not placer or not placer.takes(listed.segment, listed.extents, listed.npages):
            return None

        def take(body: Body) -> None:
            bad = placer.place(listed.segment, listed.extents, listed.hashes, body)
            self._require_hashed(section, listed, bad)

        return take

    def _take_memory(self, section: Section) -> Pages:
        listed, pages = self._listed, section.body
        if section.flags & fmt.FLAG_ZSTD:
            listed = self._check_list(section)
            pages = memoryview(self._decompress(section.body, listed.npages))
        is_placed = bool(listed.npages) and not len(pages)  # a Taker leaves no body
        if not is_placed:
            self._require_hashed(section, listed, check_pages(self.hasher, pages, listed.hashes))
        return Pages(listed.segment, listed.extents, listed.npages, pages, is_placed)

    def _require_hashed(self, section: Section, listed: _Listed, bad: int) -> None:
        """Raise ChecksumError if a DATA page of the section has not its hash: the bad one."""
        if bad >= 0:
            page = extents.nth_page(listed.extents, bad)
            where = place(section.sequence, section.type, section.offset_bytes)
            raise ChecksumError(f"{where}: the bytes of page {page} are not what was sent")

    def _check_list(self, section: Section) -> _Listed:
        """Check and count the extents of a MEMORY section."""
        round_, nextents, npages, _ = fmt.MEMORY_HEAD.unpack_from(section.payload)
        tally, start = self._tally, fmt.MEMORY_HEAD.size
        if round_ != tally.round:
            raise FormatError(f"round {round_}, but round {tally.round} is under way")
        hashes_at = start + nextents * fmt.EXTENT.size
        listed = section.payload[start:hashes_at]
        gapless = "" if tally.round else "round 0"
        found = extents.count(self._layout, listed, tally.cursor, gapless)
        if found.data_pages != npages:
            raise FormatError(f"{npages} pages, but the extents hold {found.data_pages}")
        tally.cursor = found.end
        tally.data_pages += found.data_pages
        tally.zero_pages += found.zero_pages
        return _Listed(found.segment, listed, npages, section.payload[hashes_at:])

    def _decompress(self, frame: memoryview, npages: int) -> bytes:
        """Return the pages of one zstd frame.

        The frame's own header is checked first: decompress() allocates the
        content size that the header claims, and ignores the window size of a
        frame whose content fits in that.
        """
        size = npages * PAGE_BYTES
        try:
            claims = zstandard.get_frame_parameters(frame)
            if claims.content_size != size:
                raise FormatError(f"the zstd frame does not state {size} bytes")
            if claims.window_size > fmt.MAX_WINDOW_BYTES:
                raise FormatError(f"the zstd frame needs a window of {claims.window_size} bytes")
            return self._zstd.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise FormatError(f"the zstd frame is broken: {error}") from None

    def _take_round_end(self, section: Section) -> RoundEnd:
        _exact(section.payload, fmt.ROUND_END.size)
        round_, reserved, data, zero = fmt.ROUND_END.unpack(section.payload)
        tally = self._tally
        if reserved:
            raise FormatError("reserved field is not zero")
        if round_ != tally.round:
            raise FormatError(f"round {round_}, but round {tally.round} is under way")
        if (data, zero) != (tally.data_pages, tally.zero_pages):
            raise FormatError(
                f"counts {data} data and {zero} zero pages, but the round had "
                f"{tally.data_pages} and {tally.zero_pages}"
            )
        if round_ == 0 and tally.cursor != self._layout.npages:
            raise FormatError(f"round 0 leaves out page {tally.cursor}")
        tally.all_data_pages += data
        tally.all_zero_pages += zero
        tally.rounds += 1
        tally.round += 1
        tally.cursor = tally.data_pages = tally.zero_pages = 0
        return RoundEnd(round_, data, zero, bool(section.flags & fmt.FLAG_LAST))

    def _take_hashes(self, section: Section) -> Hashes:
        start = fmt.HASHES_HEAD.size
        if len(section.payload) < start:
            raise FormatError("length is too small")
        nextents, nhashes = fmt.HASHES_HEAD.unpack_from(section.payload)
        if not 1 <= nextents <= fmt.MAX_EXTENTS:
            raise FormatError(f"{nextents} extents are not 1 to {fmt.MAX_EXTENTS}")
        if nhashes > fmt.MAX_HASHES:
            raise FormatError(f"{nhashes} hashes are more than {fmt.MAX_HASHES}")
        hashes_at = start + nextents * fmt.EXTENT.size
        _exact(section.payload, hashes_at + nhashes * fmt.HASH_BYTES)
        listed = section.payload[start:hashes_at]
        found = extents.count(self._layout, listed, self._tally.hashed_pages, "HASHES")
        if found.data_pages != nhashes:
            raise FormatError(f"{nhashes} hashes, but the extents hold {found.data_pages} pages")
        self._tally.hashed_pages = found.end
        is_last = found.end == self._layout.npages
        return Hashes(found.segment, listed, section.payload[hashes_at:], is_last)

    def _take_state(self, section: Section) -> State | None:
        name, part, data = fmt.unpack_state(bytes(section.payload))
        if not data and (part or not section.flags & fmt.FLAG_LAST):
            raise FormatError(f"state {name}: part {part} is empty")
        self._begin_part(section, name, part, len(data))
        self._tally.open_bytes.write(data)
        return self._end_part(section, name)

    def _take_state_zeros(self, section: Section) -> State | None:
        name, part, count = fmt.unpack_state_zeros(bytes(section.payload))
        if not count:
            raise FormatError(f"state {name}: part {part} is empty")
        self._begin_part(section, name, part, count)
        # A write past the end makes BytesIO fill the gap with zeros, without a copy of them.
        self._tally.open_bytes.seek(count - 1, io.SEEK_CUR)
        self._tally.open_bytes.write(b"\0")
        return self._end_part(section, name)

    def _kind(self, section: Section) -> _States:
        is_optional = section.type == Type.STATE_OPTIONAL
        return self._tally.optional if is_optional else self._tally.needed

    def _begin_part(self, section: Section, name: str, part: int, nbytes: int) -> None:
        """Check that this part may come now, and count its bytes before they are kept."""
        tally, kind = self._tally, self._kind(section)
        if part != tally.parts:
            raise FormatError(f"state {name}: part {part}, but part {tally.parts} is next")
        if part and name != tally.open_state:
            raise FormatError(f"state {name} begins before {tally.open_state} is complete")
        if part and kind is not tally.open_kind:
            raise FormatError(f"state {name}: part {part} is optional, and part 0 is not")
        known = name in tally.needed.whole or name in tally.optional.whole
        if known or len(kind.whole) == fmt.MAX_STATES:
            raise FormatError(f"state {name} comes again, or is one too many")
        kind.nbytes += nbytes
        if kind.nbytes > kind.max_bytes:
            raise FormatError(f"all {kind.what} together have more than {kind.max_bytes} bytes")
        tally.open_state, tally.open_kind = name, kind
        tally.parts += 1

    def _end_part(self, section: Section, name: str) -> State | None:
        """Return the state if this was its last part."""
        tally = self._tally
        if not section.flags & fmt.FLAG_LAST:
            return None
        self._kind(section).whole.add(name)
        state = State(name, tally.open_bytes.getvalue(), section.type == Type.STATE_OPTIONAL)
        tally.open_bytes = io.BytesIO()
        tally.parts = 0
        if self._contents:
            self._contents.state(state)
        return state

    def _take_time(self, section: Section) -> None:
        _exact(section.payload, fmt.TIME.size)
        if self._tally.parts:
            raise FormatError(f"state {self._tally.open_state} is not complete")
        if self._tally.hashed_pages not in (0, self._layout.npages):
            raise FormatError(f"HASHES leaves out page {self._tally.hashed_pages}")
        time = Time(*fmt.TIME.unpack(section.payload))
        if time.paused_for_ns and not time.paused_at_ns:
            raise FormatError("the pause has a duration, but no time")
        self._tally.time = time

    def _take_end(self, section: Section) -> Ended:
        _exact(section.payload, fmt.END.size)
        end = End._make(fmt.END.unpack(section.payload))
        tally = self._tally
        expected = End(
            what=fmt.end_flags(self.header.form, self.header.features),
            rounds=tally.rounds,
            sections=section.sequence,
            offset_bytes=section.offset_bytes,
            data_pages=tally.all_data_pages,
            zero_pages=tally.all_zero_pages,
            state_bytes=tally.needed.nbytes,
            digest=self.reader.digest.digest(),
        )
        for name in End._fields:
            said, counted = getattr(end, name), getattr(expected, name)
            if said != counted:
                shown = (said.hex(), counted.hex()) if name == "digest" else (said, counted)
                where = place(section.sequence, section.type, section.offset_bytes)
                raise ChecksumError(f"{where}: {name} is {shown[0]}, but counted {shown[1]}")
        if self._contents and not self.is_dry_run:
            self._contents.end()
        self._ended = True
        return Ended(end, tally.time)

    def _take_go(self, section: Section) -> Go:
        _exact(section.payload, fmt.NONCE_BYTES)
        return Go(bytes(section.payload))

    def _take_abort(self, section: Section) -> NoReturn:
        status, text = fmt.unpack_abort(bytes(section.payload))
        raise AbortedError(f"the source gave up (status {status}): {text}")

    @property
    def is_dry_run(self) -> bool:
        """Say whether the stream has only a head."""
        return bool(self.header.features & Feature.NO_MEMORY)


def _exact(data: memoryview, size: int) -> None:
    if len(data) != size:
        raise FormatError(f"length is {len(data)}, not {size}")

"""Both readers over one stream: the package's Walk, and the one made from the page alone.

`Recorder` is a destination that builds nothing: it keeps what Walk yields, and notes a start when
bhyrecv(8) would start the guest.  `Input` serves the bytes and notes the largest read that was
asked for, which shows if a reader believes a length in the stream too early.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest

from bhystream.errors import AbortedError, BhyError, StreamError
from bhystream.guest import Head, State
from bhystream.memory.extent import EXTENT
from bhystream.stream.format import Form, Header, RoundEnd
from bhystream.stream.verify import Disks, Ended, Go, Hashes, Item, Pages, Rehearsal, Walk
from spec_reader import Refused, Stream, read
from support.streams import NAMES, Maker

PAGE = 4096
LARGEST_CAP = 4268048  # the cap of MEMORY: no read may ask for more


class Input:
    """Bytes as Walk reads them; `step` caps one read, as a pipe does."""

    def __init__(self, raw: bytes, step: int = 1 << 62) -> None:
        self._raw = memoryview(raw)
        self._step = step
        self.offset = 0
        self.largest = 0

    def readinto(self, buffer: memoryview, /) -> int:
        self.largest = max(self.largest, len(buffer))
        part = self._raw[self.offset : self.offset + min(len(buffer), self._step)]
        buffer[: len(part)] = part
        self.offset += len(part)
        return len(part)


class Recorder:
    """A destination that keeps what a stream says.

    memory: the pages that are not zero, as a dict of page number to bytes.  hashes: as in
    spec_reader.Stream.  started: END allowed
    the start, or GO came in the answered form.
    """

    def __init__(self, source: Input) -> None:
        self.input = source
        self.started = False
        self.header: Header | None = None
        self.head: Head | None = None
        self._npages = 0
        self.memory: dict[int, bytes] = {}
        self.rounds: list[RoundEnd] = []
        self.rehearsal: Rehearsal | None = None
        self.hashes: list[tuple[int, int, int | None]] = []
        self.states: list[State] = []
        self.disks: Disks | None = None
        self.ended: Ended | None = None
        self.go: Go | None = None

    def run(self) -> Recorder:
        """Read to the end of the input.  Raises BhyError."""
        walk = Walk(self.input)
        for event in walk.events():
            self._take(event)
        if walk.header.form != Form.ANSWERED:
            walk.expect_end_of_input()
        return self

    def _take(self, event: Item) -> None:
        match event:
            case Header() | Head():
                self._begin(event)
            case Rehearsal():
                assert self.rehearsal is None and not self.rounds
                self.rehearsal = event
            case Pages():
                self._place(event)
            case RoundEnd():
                self.rounds.append(event)
            case Hashes():
                assert self.rounds[-1].is_last and not self.states
                self._note(event)
            case State():
                assert self.ended is None
                self.states.append(event)
            case Disks():
                assert self.disks is None and self.ended is None
                self.disks = event
            case Ended():
                self.ended = event
                self.started = bool(event.end.what & 1)
            case Go():
                self.go = event
                self.started = True

    def _begin(self, event: Header | Head) -> None:
        if isinstance(event, Header):
            self.header = event
        else:
            self.head, self._npages = event, event.layout.npages

    def _note(self, event: Hashes) -> None:
        given = iter(event.hashes.cast("Q"))
        for first, count, kind in EXTENT.iter_unpack(event.extents):
            if kind:
                self.hashes.append((first, count, None))
            else:
                self.hashes += [(at, 1, next(given)) for at in range(first, first + count)]
        assert next(given, None) is None
        assert event.is_last == (first + count == self._npages)

    def _place(self, event: Pages) -> None:
        at = 0
        for first, count, kind in EXTENT.iter_unpack(event.extents):
            if kind:
                for number in [one for one in self.memory if first <= one < first + count]:
                    del self.memory[number]
                continue
            for number in range(first, first + count):
                page = bytes(event.pages[at : at + PAGE])
                at += PAGE
                self.memory.pop(number, None)
                if any(page):
                    self.memory[number] = page


def where(maker: Maker) -> str:
    """Name the section that a maker added last, as messages do."""
    number, kind, offset = maker.last
    name = "" if kind is None else f" ({NAMES.get(kind, f'type 0x{kind:08x}')})"
    return f"section {number}{name} at offset 0x{offset:x}"


def refused(
    raw: bytes, place: str, error: type[BhyError], message: str, why: str, *, started: bool = False
) -> None:
    """Assert that both readers refuse a stream, for the reason given, at `place`.

    error, message: of Walk, exactly; a final "..." stands for the words of a library.  why: of
    spec_reader.  started: a sound END came before.
    """
    recorder = Recorder(Input(raw))
    with pytest.raises(error) as caught:
        recorder.run()
    text, expected = str(caught.value), f"{place}: {message}"
    if message.endswith("..."):
        text, expected = text[: len(expected) - 3], expected[:-3]
    assert text == expected, str(caught.value)
    assert type(caught.value) is error
    assert caught.value.status == 65
    assert recorder.started == started
    assert recorder.input.largest <= LARGEST_CAP
    with pytest.raises(Refused) as found:
        read(io.BytesIO(raw))
    assert str(found.value) == f"{place}: {why}"


def refused_last(
    maker: Maker, error: type[BhyError], message: str, why: str, *, started: bool = False
) -> None:
    """Assert that both readers refuse the section that was added last."""
    refused(maker.raw, where(maker), error, message, why, started=started)


def agree(raw: bytes) -> tuple[Recorder, Stream]:
    """Read a sound stream with both readers; assert that they agree on everything."""
    walked, found = Recorder(Input(raw)).run(), read(io.BytesIO(raw))
    assert walked.header is not None and walked.head is not None and walked.ended is not None
    header, head, end = walked.header, walked.head, walked.ended.end
    checks: list[tuple[object, object]] = [
        (header.form, found.header.form),
        (header.features, found.header.mandatory),
        (header.stream_id, found.header.stream_id),
        (header.seed, found.header.seed),
        (head.host, found.host),
        (head.config, found.config),
        (list(head.devices), found.devices),
        ([(s.name, s.gpa, s.npages) for s in head.layout.segments],
         [(s.name, s.gpa, s.npages) for s in found.layout]),
        (walked.memory, found.memory),
        ([(one.data_pages, one.zero_pages) for one in walked.rounds],
         [(one.data_pages, one.zero_pages) for one in found.rounds]),
        (walked.hashes, found.hashes),
        (walked.disks.disks if walked.disks else (), tuple(found.disks)),
        (walked.rehearsal.plan if walked.rehearsal else None, found.rehearsal),
        ([(one.name, one.data, one.is_optional) for one in walked.states],
         [(*one, False) for one in found.states.items()]
         + [(*one, True) for one in found.optional_states.items()]),
        (_time(walked.ended), found.time),
        (end.what, found.what),
        (end.digest, found.digest),
        (end.rounds, len(found.rounds)),
        (end.data_pages, sum(one.data_pages for one in found.rounds)),
        (end.zero_pages, sum(one.zero_pages for one in found.rounds)),
        (end.state_bytes, sum(len(one) for one in found.states.values())),
        (walked.go.nonce if walked.go else None, found.nonce),
    ]  # fmt: skip
    for one, other in checks:
        assert one == other
    return walked, found


def compare(
    raw: bytes, bound: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Recorder | None:
    """Read any stream with both readers; assert that they agree, also on the section that is wrong.

    bound: Walk reads within it.  Returns what a sound stream holds, None for any other stream.  An
    error of Walk names the place, and no broken or aborted stream has an end that may be believed.
    """
    recorder, error = Recorder(Input(raw)), None
    try:
        with bound():
            recorder.run()
    except BhyError as caught:
        error = caught
    assert recorder.input.largest <= LARGEST_CAP
    try:
        found = read(io.BytesIO(raw))
    except Refused as refused:
        assert isinstance(error, StreamError), f"only the page refuses it: {refused}"
        place = str(refused).removesuffix(f": {refused.why}")
        assert str(error).startswith(f"{place}: "), f"{error} is not {refused}"
        end = recorder.ended.end.sections if recorder.ended else None
        number = refused.section_number
        assert end is None or (number is not None and number > end), f"it has ended: {refused}"
        return None
    if found.abort is not None:
        assert isinstance(error, AbortedError) and not recorder.ended, error
        return None
    assert error is None, f"only Walk refuses it: {error}"
    return agree(raw)[0]


def _time(ended: Ended) -> tuple[int, int] | None:
    return (ended.time.paused_at_ns, ended.time.paused_for_ns) if ended.time else None


Make = Callable[[], Maker]

"""Walk over sound streams: what it yields, also at the limits of bhystream(5).

The test_malformed files have what Walk refuses.
"""

from __future__ import annotations

import json
import random
import tracemalloc

import pytest
import zstandard

from bhystream.errors import BhyError
from bhystream.guest import Head, State
from bhystream.stream.format import Form, Header, RoundEnd
from bhystream.stream.verify import Ended, Go, Pad, Pages, Rehearsal, Walk
from support.both import LARGEST_CAP, Input, Make, Recorder, agree
from support.streams import (
    ANSWERED,
    CONFIG,
    DATA,
    DEVICES,
    GO,
    HEAD_END,
    HOST,
    KEPT,
    LAYOUT,
    MEMORY,
    NO_GPA,
    NO_MEMORY,
    NONCE,
    OPTIONAL,
    PAD,
    PAUSED_AT,
    PLAIN,
    REHEARSAL,
    ZERO,
    ZSTD,
    Extent,
    Maker,
    layout,
    memory_list,
    page,
)


def test_events_come_in_the_order_of_the_stream() -> None:
    maker = Maker(ANSWERED).full().end().add(GO, NONCE)
    walk = Walk(Input(maker.raw))
    assert not walk.is_dry_run
    found = [type(event) for event in walk.events()]
    assert found == [Header, Head, Pages, Pages, RoundEnd, State, Ended, Go]
    assert walk.reader.offset_bytes == len(maker.raw)
    assert walk.reader.sequence == maker.count


def test_pages_name_their_segment() -> None:
    maker = Maker().head((b"a", 0, 1), (b"b", NO_GPA, 2), (b"c", 1 << 40, 3))
    for extent in ((0, 1, ZERO), (1, 1, ZERO), (2, 1, ZERO), (3, 3, ZERO)):
        maker.memory(0, [extent])
    maker.round_end(0, 0, 6).memory(1, [(5, 1, ZERO)]).round_end(1, 0, 1, flags=1).time().end()
    events = list(Walk(Input(maker.raw)).events())
    assert [event.segment for event in events if isinstance(event, Pages)] == [0, 1, 1, 2, 2]


def test_a_pad_is_an_event_wherever_it_stands() -> None:
    """The source waits for an answer about the sections before the PAD."""
    maker = Maker(ANSWERED)
    maker.host().add(PAD, b"x").layout().config().devices().add(HEAD_END).add(PAD)
    maker.round_0().add(PAD, bytes(1048576)).time().end().add(PAD, b"1").add(GO, NONCE).add(PAD)
    found = [type(event) for event in Walk(Input(maker.raw)).events()]
    assert found == [
        *[Header, Pad, Head, Pad],
        *[Pages, Pages, RoundEnd, Pad],
        *[Ended, Pad, Go, Pad],
    ]


def test_a_pad_has_no_contents_and_others_that_are_skipped_have_no_event() -> None:
    raw = Maker(ANSWERED).host().add(PAD, b"x").add(OPTIONAL, b"y").raw
    events = Walk(Input(raw)).events()
    assert next(events) is not None
    assert next(events) == Pad()
    with pytest.raises(BhyError, match="without an END section"):
        next(events)


def test_the_sequence_at_a_pad_is_that_of_all_before_it() -> None:
    maker = Maker(ANSWERED).head().add(PAD, b"x").add(PAD, b"y")
    walk = Walk(Input(maker.raw))
    seen = []
    with pytest.raises(BhyError, match="without an END section"):
        for event in walk.events():
            if isinstance(event, Pad):
                seen.append(walk.reader.sequence - 1)
    assert seen == [5, 6]


@pytest.mark.parametrize("form", [PLAIN, KEPT])
def test_a_form_without_answers_is_not_read_beyond_end(form: int) -> None:
    maker = Maker(form).full().end()
    source = Input(maker.raw + b"more")
    events = list(Walk(source).events())
    assert isinstance(events[-1], Ended)
    assert source.offset == len(maker.raw)


def test_a_rehearsal_is_an_event_before_any_memory() -> None:
    plan = bytes(range(256)) * 4096  # as long as allowed; Walk does not read the contents
    maker = Maker().head().add(PAD).add(REHEARSAL, plan).round_0().time().end()
    events = list(Walk(Input(maker.raw)).events())
    assert [type(event) for event in events] == [
        *[Header, Head, Pad, Rehearsal],
        *[Pages, Pages, RoundEnd, Ended],
    ]
    assert events[3] == Rehearsal(plan)
    assert agree(maker.raw)[1].rehearsal == plan


def test_optional_states_come_behind_the_others() -> None:
    maker = Maker().head().round_0().state(b"s", 0, b"1", flags=1)
    maker.state_optional(b"fpu/0", 0, b"2").state_optional(b"fpu/0", 1, b"3", flags=1)
    raw = maker.state_optional(b"fpu/1", 0, b"", flags=1).time().end().raw
    recorder = agree(raw)[0]
    assert recorder.states == [
        State("s", b"1"),
        State("fpu/0", b"23", is_optional=True),
        State("fpu/1", b"", is_optional=True),
    ]
    assert recorder.ended is not None and recorder.ended.end.state_bytes == 1


def test_the_contents_of_a_small_stream() -> None:
    recorder, _ = agree(Maker().full().end().raw)
    assert recorder.header is not None and recorder.header.form is Form.PLAIN
    assert recorder.memory == {0: page(1), 1: page(2), 6: page(3)}
    assert recorder.started
    assert recorder.ended is not None and recorder.ended.time is not None
    assert recorder.ended.time.paused_at_ns == PAUSED_AT
    assert [(one.name, one.data) for one in recorder.states] == [("cpu0", b"abc")]


def test_a_dry_run_has_a_head_only() -> None:
    for form in (PLAIN, KEPT, ANSWERED):
        raw = Maker(form, NO_MEMORY).head().end().raw
        recorder, _ = agree(raw)
        assert Walk(Input(raw)).is_dry_run
        assert not recorder.started
        assert recorder.ended is not None and recorder.ended.time is None


def test_the_answered_form_starts_with_go_only() -> None:
    maker = Maker(ANSWERED).full().end()
    assert not agree(maker.raw)[0].started
    maker.add(PAD, bytes(3))
    assert not agree(maker.raw)[0].started
    recorder, _ = agree(maker.add(GO, NONCE).add(PAD, bytes(3)).raw)
    assert recorder.started
    assert recorder.go == Go(NONCE)


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_short_reads_are_joined(step: int) -> None:
    assert Recorder(Input(Maker().full().end().raw, step)).run().started


def test_a_read_that_fails_is_an_error_of_the_pipe() -> None:
    class Broken(Input):
        def readinto(self, buffer: memoryview, /) -> int:
            if self.offset >= 100:
                raise OSError(5, "Input/output error")
            return super().readinto(buffer[:50])

    with pytest.raises(BhyError, match="cannot read the stream: Input/output error") as caught:
        Recorder(Broken(Maker().full().end().raw)).run()
    assert caught.value.status == 74


def test_a_descriptor_that_does_not_block_is_an_error_of_the_pipe() -> None:
    class Empty(Input):
        def readinto(self, buffer: memoryview, /) -> int:
            return None  # type: ignore[return-value]

    with pytest.raises(BhyError, match="cannot read the stream: ") as caught:
        Recorder(Empty(b"")).run()
    assert caught.value.status == 74


# At the limits.


def padded() -> Maker:
    """Return a stream with PAD and unknown optional sections wherever they may stand."""
    maker = Maker()
    maker.host()
    for step in (maker.layout, maker.config, maker.devices, lambda: maker.add(HEAD_END)):
        noise(maker)
        step()
    noise(maker).memory(0, [(0, 7, ZERO)])
    noise(maker).round_end(0, 0, 7, flags=1)
    noise(maker).state(b"dev", 0, b"1")
    noise(maker).state(b"dev", 1, b"2", flags=1).time()
    return noise(maker).end()


def noise(maker: Maker) -> Maker:
    maker.add(PAD, b"noise").add(OPTIONAL, b"new", flags=0xFFFFFFFF)
    return maker.add(0xFFFFFFFF).add(0x80000000, bytes(9))


def longest_head() -> Maker:
    nested = '{"hypervisor":"' + "q" * 128 + '","program":"p","a":' + "[" * 15 + "]" * 15
    nested += f',"b":[{-(2**63)},{2**63 - 1},-0],"c":"[[[[[[[[[[[[[[[[[[[\\"[","d":"\\ud83d\\ude00"'
    nested += ',"e":{"e":{"e":1}},"f":[true,false,null]}'
    maker = Maker(mandatory=NO_MEMORY).add(HOST, nested.encode() + b" " * (65536 - len(nested)))
    segments = [(b"s%d" % at, (64 - at) * 4096, 1) for at in range(63)]
    maker.add(LAYOUT, layout((b"x" * 31, NO_GPA, 2**36 - 63), *segments))
    maker.add(CONFIG, json.dumps({"name": "_" + "x-." * 21}).encode())
    names = ["d" * 128, "\xa0", " ", *["e"] * 1022]
    return maker.add(DEVICES, json.dumps(names[:1024]).encode()).add(HEAD_END).end()


def addresses() -> Maker:
    """Return a stream with segments that touch, descend, or end at 2^64."""
    top = 2**64 - 4096
    segments = [(b"c", top - 4096, 1), (b"d", top, 1), (b"b", 4096, 3), (b"a", 0, 1)]
    maker = Maker(mandatory=NO_MEMORY).host().layout(*segments, (b"u", NO_GPA, 1))
    return maker.config().devices().add(HEAD_END).end()


def longest_sections() -> Maker:
    segments = [(b"big", 0, 4096), *((b"s%d" % at, NO_GPA, 1) for at in range(63))]
    maker = Maker().head(*segments).add(PAD, bytes(1048576))
    extents: list[Extent] = [(at, 1, ZERO) for at in range(3072)]
    extents += [(3072 + at, 1, DATA) for at in range(1024)]
    maker.memory(0, extents, [page(7)] * 1024)
    for at in range(63):
        maker.memory(0, [(4096 + at, 1, ZERO)])
    maker.round_end(0, 1024, 3135, flags=1)
    maker.state(b"n" * 255, 0, bytes(1048576), flags=1)
    return maker.time().end()


def largest_guest() -> Maker:
    step = 2**32 - 1
    extents = [(at, min(step, 2**36 - at), ZERO) for at in range(0, 2**36, step)]
    maker = Maker().head((b"ram", 0, 2**36)).memory(0, extents)
    return maker.round_end(0, 0, 2**36, flags=1).time().end()


def states() -> Maker:
    maker = Maker().head().round_0()
    for length in (1, 7, 8, 9, 255):
        maker.state(b"n" * length, 0, b"", flags=1)
    return maker.state(b"!~", 0, b"1").state(b"!~", 1, b"2", flags=1).time(1, 2**64 - 1).end()


def zeros() -> Maker:
    """Return a stream with zeros as any part of a state, as a whole state, and up to the cap."""
    maker = Maker().head().round_0().state_zeros(b"n" * 255, 0, 1, flags=1)
    maker.state_zeros(b"a", 0, 2).state(b"a", 1, b"1").state_zeros(b"a", 2, 3).state_zeros(
        b"a", 3, 4, flags=1
    )
    maker.state(b"b", 0, b"1").add(PAD).state_zeros(b"b", 1, 1 << 21).state(b"b", 2, b"\0", flags=1)
    return maker.state_zeros(b"c", 0, 134217728 - maker.state_bytes, flags=1).time().end()


def optional_states() -> Maker:
    """Return a stream with 4096 optional states of 4 MiB in all, and 4096 other states."""
    maker = Maker().head().round_0()
    for at in range(4096):
        maker.state(b"s%d" % at, 0, b"", flags=1)
    for at in range(4):
        maker.state_optional(b"n" * 255, at, bytes(1048576), flags=at == 3)
    for at in range(4095):
        maker.state_optional(b"o%d" % at, 0, b"", flags=1)
    return maker.time().end()


def rounds() -> Maker:
    """Return a stream with a page stated again, empty rounds, and a page that becomes zero."""
    maker = Maker().head().round_0(flags=0).round_end(1, 0, 0)
    maker.memory(2, [(0, 1, ZERO), (3, 1, DATA)], [page(9)]).memory(2, [(6, 1, DATA)], [page(0)])
    maker.round_end(2, 2, 1).memory(3, [(3, 1, DATA)], [page(8)]).round_end(3, 1, 0)
    return maker.round_end(4, 0, 0, flags=1).time(0, 0).end()


def compressed() -> Maker:
    pages = [page(1), page(2)]
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(b"".join(pages))
    maker = Maker(mandatory=ZSTD).head().zstd([(0, 2, DATA), (2, 4, ZERO)], pages, frame)
    maker.memory(0, [(6, 1, DATA)], [page(3)])
    return maker.round_end(0, 3, 4, flags=1).time().end()


def longest_frame() -> Maker:
    """Return a stream with a frame one byte shorter than its page: a raw block and an RLE block."""
    raw = random.Random(0).randbytes(4081)
    frame = b"\x28\xb5\x2f\xfd\x60" + (4096 - 256).to_bytes(2, "little")
    frame += (len(raw) << 3).to_bytes(3, "little") + raw
    rest = 4096 - len(raw)
    frame += (rest << 3 | 3).to_bytes(3, "little") + b"\0"
    assert len(frame) == 4095
    maker = Maker(mandatory=ZSTD).head().zstd([(0, 1, DATA)], [raw + bytes(rest)], frame)
    return maker.memory(0, [(1, 6, ZERO)]).round_end(0, 1, 6, flags=1).time().end()


SOUND: list[Make] = [
    padded, longest_head, addresses, longest_sections, largest_guest, states, zeros,
    optional_states, rounds, compressed,
    longest_frame, lambda: Maker(optional=2**64 - 1).full().end(),
    lambda: Maker(ANSWERED, NO_MEMORY).head().end().add(PAD),
]  # fmt: skip


@pytest.mark.parametrize("make", SOUND)
def test_both_readers_agree(make: Make) -> None:
    recorder, _ = agree(make().raw)
    assert recorder.input.largest <= LARGEST_CAP


def test_rounds_and_sections_that_are_skipped_have_no_largest_number() -> None:
    maker = Maker().head().round_0(flags=0)
    for number in range(1, 5000):
        maker.add(OPTIONAL, b"new").add(PAD).round_end(number, 0, 0, flags=number == 4999)
    recorder, _ = agree(maker.time().end().raw)
    assert len(recorder.rounds) == 5000


def test_what_the_rounds_leave() -> None:
    assert agree(rounds().raw)[0].memory == {1: page(2), 3: page(8)}
    assert agree(compressed().raw)[0].memory == {0: page(1), 1: page(2), 6: page(3)}


def test_state_parts_are_joined() -> None:
    assert agree(states().raw)[1].states["!~"] == b"12"


def test_memory_does_not_grow_with_the_guest_or_the_stream() -> None:
    maker = Maker().head((b"ram", 0, 2**36))
    pieces = [maker.raw]
    for number in range(40):
        maker.raw = b""
        maker.memory(0, [(number * 2**30, 2**30, ZERO)]).add(PAD, bytes(1 << 20))
        pieces.append(maker.raw)
    raw = b"".join(pieces)
    tracemalloc.start()
    try:
        with pytest.raises(BhyError, match="without an END section"):
            Recorder(Input(raw)).run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_a_count_of_zeros_takes_no_more_memory_than_the_cap_of_all_states() -> None:
    maker = Maker().head().round_0().state_zeros(b"s", 0, 64 << 20)
    maker.state_zeros(b"s", 1, 64 << 20, flags=1)
    raw = maker.state_zeros(b"t", 0, 1).raw
    tracemalloc.start()
    try:
        with pytest.raises(BhyError, match="all states together have more than"):
            Recorder(Input(raw)).run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The growing state, with an eighth more than it needs, and the copy that is kept.
    assert peak < 300 << 20


def test_sections_of_random_lengths() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    maker = Maker().head((b"ram", 0, 64))
    final: dict[int, bytes] = {}
    for number in range(8):
        at = data = zeros = 0
        while at < 64:
            count = rng.randint(1, min(9, 64 - at))
            skip = number > 0 and rng.random() < 0.5
            if not skip and rng.random() < 0.5:
                maker.memory(number, [(at, count, ZERO)])
                zeros += count
                final.update(dict.fromkeys(range(at, at + count), bytes(4096)))
            elif not skip:
                pages = [page(rng.randrange(256)) for _ in range(count)]
                maker.memory(number, [(at, count, DATA)], pages)
                data += count
                final.update(zip(range(at, at + count), pages, strict=True))
            maker.add(PAD, rng.randbytes(rng.randrange(20)))
            at += count
        maker.round_end(number, data, zeros, flags=number == 7)
    for number in range(10):
        maker.state(b"s%d" % number, 0, rng.randbytes(rng.randrange(50)), flags=1)
    recorder, _ = agree(maker.time().end().raw)
    assert recorder.memory == {at: one for at, one in final.items() if any(one)}


def test_a_list_of_the_right_length_is_not_read_beyond_its_counts() -> None:
    # 4096 extents and 1024 hashes: the longest list.
    extents = [(at, 1, DATA if at < 1024 else ZERO) for at in range(4096)]
    payload = memory_list(0, extents, [page(1)] * 1024)
    assert len(payload) + 1024 * 4096 == LARGEST_CAP
    maker = Maker().head((b"ram", 0, 4096)).add(MEMORY, payload, length=LARGEST_CAP)
    source = Input(maker.raw)
    with pytest.raises(BhyError, match="ends 4194304 bytes early"):
        Recorder(source).run()
    assert source.largest == 1024 * 4096


def test_a_device_may_be_named_more_than_once() -> None:
    maker = Maker(PLAIN, NO_MEMORY).host().layout().config()
    maker.add(DEVICES, b'["uart", "uart", "rtc"]').add(HEAD_END)
    recorder, _ = agree(maker.end().raw)
    assert recorder.head is not None and recorder.head.devices == ("uart", "uart", "rtc")


def test_the_ends_of_the_range_of_a_json_number_belong_to_it() -> None:
    config = b'{"name": "web1", "no": -0, "least": -9223372036854775808, '
    config += b'"most": 9223372036854775807}'
    maker = Maker(PLAIN, NO_MEMORY).host().layout().add(CONFIG, config).devices()
    recorder, _ = agree(maker.add(HEAD_END).end().raw)
    assert recorder.head is not None
    least, most = -(2**63), 2**63 - 1
    assert recorder.head.config == {"name": "web1", "no": 0, "least": least, "most": most}

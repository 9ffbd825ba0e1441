"""What bhyrecv does with its sink while a stream arrives, and what it says about the guest."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bhystream import hypervisors
from bhystream.backend.base import Target
from bhystream.errors import BhyError, ChecksumError, GuestError
from bhystream.guest import PAGE_BYTES, Head, Json, State
from bhystream.handover import state
from bhystream.handover.answers import unpack
from bhystream.memory.extent import EXTENT
from bhystream.memory.inplace import IN_PLACE_PAGES
from bhystream.memory.page import PageHasher
from bhystream.memory.target import Differing, FileTarget
from bhystream.recv import reply
from bhystream.recv.arrival import Arrival
from bhystream.recv.incoming import Incoming
from bhystream.recv.options import Options
from bhystream.recv.receiving import RecvJob
from bhystream.recv.reply import Reply, Silence, TimedInput
from bhystream.report import Console
from bhystream.signals import Signals
from bhystream.stream.format import Form
from bhystream.stream.verify import Walk
from support.scheduling import OTHER, URGENT, policy
from support.streams import ANSWERED, DATA, ZERO, Maker

GOLDEN = Path(__file__).parents[1] / "data"
WAITS = 5


class Nowhere:
    """A target that keeps nothing."""

    def place(self, base_page: int, npages: int, extents: memoryview, pages: memoryview) -> None:
        """Drop the pages."""

    def differing(
        self,
        hasher: PageHasher,
        base_page: int,
        extents: memoryview,
        hashes: memoryview,
        on_step: Callable[[], None],
    ) -> Differing:
        """Say of every page that it differs."""
        on_step()
        first, count, _ = EXTENT.unpack_from(extents)
        return Differing(count, first)


class Sink:
    """base.Sink without a hypervisor.

    dies: require_alive() finds that it has ended.  targets: for the pages.
    """

    def __init__(self, *, dies: bool = False) -> None:
        self.may_have_run = False
        self.notices: Sequence[str] = ["its clock chip is not set"]
        self.on_wait: Callable[[], None] = lambda: None
        self.dies = dies
        self.stops = False
        self.asked = 0
        self.done: list[str] = []
        self.targets: Sequence[Target] = ()

    def check(self, head: Head) -> list[str]:
        self.segments = len(head.layout.segments)
        return []

    def description(self, head: Head) -> Sequence[str]:
        return ()

    def disks(self) -> dict[str, str]:
        return {}

    def late_reasons(self) -> list[str]:
        return []

    def open(self, plan: bytes) -> Sequence[Target]:
        for _ in range(WAITS):
            self.on_wait()
        if self.stops:
            raise GuestError("stop here")
        return self.targets or [Nowhere()] * self.segments

    def require_alive(self) -> None:
        self.asked += 1
        if self.dies:
            raise GuestError("bhyve -r: it has ended")

    def load(self, states: Sequence[State]) -> None:
        self.done.append("load")

    def advance_clocks(self, ns: int) -> int:
        return 0

    def start(self) -> None:
        self.done.append("start")

    def settle(self) -> None:
        self.done.append("settle")

    def leave_paused(self) -> None:
        raise AssertionError

    def record(self) -> Json:
        return {}

    def abort(self) -> None:
        self.done.append("abort")


@pytest.fixture
def back(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The way back: the reading end of a pipe."""
    theirs, ours = os.pipe()
    monkeypatch.setattr(reply, "_STDOUT", ours)
    monkeypatch.setattr(reply, "_SEEN_NS", 0)
    yield theirs
    os.close(theirs)
    os.close(ours)


def incoming_of(
    stream: str | int, sink: Sink, base: Path, monkeypatch: pytest.MonkeyPatch
) -> Incoming:
    """Return what receives a golden stream, or one from a descriptor."""
    monkeypatch.setattr(hypervisors, "open_sink", lambda *_: (sink, "web1", "web1"))
    monkeypatch.setattr(hypervisors, "open_contents", lambda *_: None)
    fd = stream if isinstance(stream, int) else os.open(GOLDEN / stream, os.O_RDONLY)
    source = TimedInput(fd)
    walk = Walk(source)
    is_answered = walk.header.form == Form.ANSWERED
    answers = Reply(base, walk.header.stream_id.hex()) if is_answered else Silence()
    records = state.Records(base, "destination")
    console = Console("bhyrecv")
    return Incoming(RecvJob(Options(), walk, source, base, console, Signals(), records, answers))


def test_a_source_hears_that_its_destination_waits_for_a_hypervisor(
    base: Path, back: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bhyrecv reads nothing then; bhysend would take silence for a pipeline that keeps bytes."""
    sink = Sink()
    incoming = incoming_of("answered.bhys", sink, base, monkeypatch)
    with pytest.raises(GuestError, match="stop here"):
        sink.stops = True
        incoming.run()
    said = [unpack(line) for line in os.read(back, 1 << 16).splitlines(keepends=True)]
    words = [answer.word for answer in said]
    at = words.index("ACCEPT")
    assert words[: at + 1] == ["HELLO", "ACCEPT"]
    # The first SEEN is for the head; then one for each wait, with the section being acted on.
    assert words[at + 1 :] == ["SEEN"] * (1 + WAITS)
    assert len({answer.args for answer in said[at + 2 :]}) == 1
    incoming.close()


def test_a_hypervisor_that_has_ended_is_seen_at_the_end_of_a_round(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Sink(dies=True)
    incoming = incoming_of("plain.bhys", sink, base, monkeypatch)
    with pytest.raises(GuestError, match="it has ended"):
        incoming.run()
    assert sink.done == []
    incoming.close()


def test_a_hypervisor_is_not_asked_in_the_pause(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Sink()
    incoming = incoming_of("plain.bhys", sink, base, monkeypatch)
    incoming.run()
    # Two rounds while the guest ran, and one in the pause.
    assert (sink.asked, sink.done) == (2, ["load", "start", "settle"])
    incoming.close()


def test_what_the_operator_has_to_know_of_a_start_is_said(
    base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sink = Sink()
    incoming = incoming_of("plain.bhys", sink, base, monkeypatch)
    incoming.run()
    assert sink.done == ["load", "start", "settle"]
    assert "guest web1: its clock chip is not set\n" in capfd.readouterr().err
    incoming.close()


def test_what_the_guest_can_wait_for_comes_after_the_news_that_it_runs(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source counts the pause up to RUNNING."""
    sink = Sink()
    monkeypatch.setattr(Arrival, "say_running", lambda self: sink.done.append("RUNNING"))
    incoming = incoming_of("plain.bhys", sink, base, monkeypatch)
    incoming.run()
    assert sink.done == ["load", "start", "RUNNING", "settle"]
    incoming.close()


@pytest.mark.parametrize(("stream", "expected"), [("answered.bhys", URGENT), ("plain.bhys", OTHER)])
def test_a_load_is_urgent_if_the_source_waits_for_it(
    stream: str, expected: int, base: Path, back: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who receives from a file has no paused guest that waits."""
    sink, policies = Sink(), []
    monkeypatch.setattr(Sink, "load", lambda self, states: policies.append(policy(0)))
    incoming = incoming_of(stream, sink, base, monkeypatch)
    with suppress(BhyError):  # the golden GO is for another READY
        incoming.run()
    assert (policies, policy(0)) == ([expected], OTHER)
    incoming.close()


def test_memory_that_is_the_sources_is_started(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sink = Sink()
    with (tmp_path / "memory").open("w+b") as file:
        os.truncate(file.fileno(), 8 * PAGE_BYTES)
        sink.targets = [FileTarget(file.fileno(), 0), FileTarget(file.fileno(), 6 * PAGE_BYTES)]
        incoming_of("verified.bhys", sink, base, monkeypatch).run()
    assert sink.done == ["load", "start", "settle"]
    assert "its memory is compared with the source's" in capfd.readouterr().err


@pytest.mark.skipif(not hasattr(os, "splice"), reason="splice(2) is Linux's")
def test_long_sections_of_a_pipe_go_into_the_file_without_a_copy(
    base: Path, back: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = IN_PLACE_PAGES
    pages = [bytes([1 + at % 251]) * PAGE_BYTES for at in range(count)]
    maker = Maker(ANSWERED).head((b"ram", 0, count + 1))
    maker.memory(0, [(0, count + 1, ZERO)]).round_end(0, 0, count + 1)
    maker.memory(1, [(0, count, DATA)], pages).round_end(1, count, 0, flags=1)
    raw = maker.time().end().raw
    ends, sink = os.pipe(), Sink()

    def write() -> None:
        os.write(ends[1], raw)
        os.close(ends[1])

    writer = threading.Thread(target=write)
    writer.start()
    placed: list[int] = []
    real = FileTarget.place_spliced

    def place_spliced(self: FileTarget, *args: Any) -> int:
        placed.append(args[1])
        return real(self, *args)

    monkeypatch.setattr(FileTarget, "place_spliced", place_spliced)
    with (tmp_path / "memory").open("w+b") as file:
        os.truncate(file.fileno(), (count + 1) * PAGE_BYTES)
        sink.targets = [FileTarget(file.fileno(), 0)]
        incoming = incoming_of(ends[0], sink, base, monkeypatch)
        with pytest.raises(GuestError, match="without GO"):
            incoming.run()
        incoming.close()
        assert file.read() == b"".join(pages) + bytes(PAGE_BYTES)
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    writer.join()
    os.close(ends[0])
    assert sum(placed) == count * PAGE_BYTES
    assert sink.done == ["load"]


def test_memory_that_differs_is_not_even_loaded(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sections are compared first, so that all pages are counted."""
    sink = Sink()
    incoming = incoming_of("verified.bhys", sink, base, monkeypatch)
    with pytest.raises(ChecksumError, match=r"\(HASHES\) at offset 0x.*: page 0, .*; 2 of 8 pages"):
        incoming.run()
    assert sink.done == []


def test_a_signal_ends_a_comparison_that_takes_long(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same way a source hears that bhyrecv is at work: see on_wait in incoming.py."""
    sink = Sink()
    incoming = incoming_of("verified.bhys", sink, base, monkeypatch)

    def check() -> None:
        asked.append(1)
        if len(asked) > WAITS:
            raise GuestError("stop here")

    asked: list[int] = []
    monkeypatch.setattr(incoming._job.signals, "check", check)
    with pytest.raises(GuestError, match="stop here"):
        incoming.run()
    assert sink.done == []


def test_without_hashes_nothing_says_that_memory_was_compared(
    base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    incoming_of("plain.bhys", Sink(), base, monkeypatch).run()
    assert "compared" not in capfd.readouterr().err

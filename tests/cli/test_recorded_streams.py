"""A recorded stream of the answered form in place of the live stream: it starts nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bhystream.stream.format import Type
from bhystream.stream.reader import Reader

from . import kinds
from .pipeline import Ended, Pipeline, report, run
from .tap import Tap
from .test_answered import THIRD, handed_over
from .travel import Host, Stable, Traveller

Recorded = tuple[Host, Path, int]


@pytest.fixture(scope="module")
def records() -> dict[str, Recorded]:
    """Make the store in which recorded() keeps its streams, by kind."""
    return {}


@pytest.fixture
def recorded(
    kind: str,
    stable: Stable,
    records: dict[str, Recorded],
    tmp_path_factory: pytest.TempPathFactory,
) -> Recorded:
    """Record an answered stream with its GO on the way; return it and the offset where GO ends."""
    if kind not in records:
        records[kind] = record(kinds.small(kind, stable), tmp_path_factory.mktemp("recorded"))
    return records[kind]


def record(guest: Traveller, directory: Path) -> Recorded:
    host = Host(directory)
    to, path, tap = guest.next(), host.directory / "recorded.bhys", Tap("GO")
    commands = (guest.send("-a"), ["tee", str(path)], tap.argv, guest.receive(to), THIRD)
    with Pipeline(*commands, env=host.env) as pipeline:
        tap.reached()
        tap.go()
        ended = pipeline.wait()
    handed_over(host, guest, to, ended)
    return host, path, end_of_go(path)


def end_of_go(path: Path) -> int:
    """Return where GO ends: bhysend may have pressed GO through the pipeline with PAD."""
    with path.open("rb", buffering=0) as raw:
        reader = Reader(raw)
        while (section := reader.next()) is not None:
            if section.type == Type.GO:
                return reader.offset_bytes
    raise AssertionError(f"{path} has no GO")


def replayed(host: Host, path: Path, guest: Traveller) -> Ended:
    """Give a stream from a file to a new bhyrecv, and assert that bhyrecv starts nothing."""
    to = guest.next()
    with path.open("rb") as file:
        [ended] = run(guest.receive(to), env=host.env, stdin=file)
    to.assert_nothing_left()
    assert "nothing was started here" in ended.stderr
    return ended


def test_a_recorded_stream_is_verified(recorded: Recorded, host: Host, small: Traveller) -> None:
    first, path, size = recorded
    to, command = small.next(), small.receive(small.next(), "-n")
    with path.open("rb") as file:
        [ended] = run(command, env=host.env, stdin=file)
    assert ended.status == 0, report(ended)
    assert "the stream is sound" in ended.stderr
    assert "it is a move in the answered form, which starts nothing again" in ended.stderr
    assert b" ACCEPT\n" not in ended.output
    with path.open("rb") as file:
        [ended] = run(command, env=first.env, stdin=file)
    assert ended.status == 76, report(ended)
    assert "the stream is sound" in ended.stderr
    assert "was started on this host before" in ended.stderr
    broken = host.directory / "broken.bhys"
    broken.write_bytes(path.read_bytes()[: size - 1])
    with broken.open("rb") as file:
        [ended] = run(command, env=host.env, stdin=file)
    assert ended.status != 0 and "sound" not in ended.stderr, report(ended)
    to.assert_nothing_left()


def test_a_recorded_stream_is_refused_where_it_ran(recorded: Recorded, small: Traveller) -> None:
    first, path, _ = recorded
    ended = replayed(first, path, small)
    assert ended.status == 76, report(ended)
    assert "was started on this host before" in ended.stderr
    assert "an earlier bhyrecv has started the guest of this stream" in ended.stderr
    assert small.is_well()


def test_a_recorded_go_starts_nothing(recorded: Recorded, host: Host, small: Traveller) -> None:
    _, path, _ = recorded
    ended = replayed(host, path, small)
    assert ended.status == 76, report(ended)
    assert re.search(r"section \d+ \(GO\) at offset 0x[0-9a-f]+: GO has another", ended.stderr)
    assert b" READY " in ended.output
    assert ended.output.splitlines()[-1].split()[2] == b"FAILED"
    again = replayed(host, path, small)
    assert again.status == 76, report(again)
    assert "an earlier bhyrecv" not in again.stderr
    assert "was dead on this host before" in again.stderr
    assert small.is_well()


def test_an_answered_stream_from_a_file_starts_nothing(
    recorded: Recorded, host: Host, small: Traveller
) -> None:
    _, path, size = recorded
    cut = host.directory / "cut.bhys"
    cut.write_bytes(path.read_bytes()[: size - 1])
    ended = replayed(host, cut, small)
    assert ended.status in (65, 69), report(ended)
    assert small.is_well()

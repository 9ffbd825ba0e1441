"""bhysend -n over sparse files: what bhysend finds and says, and that bhysend changes nothing."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.errors import EXIT_OK, InputOutputError
from bhystream.guest import PAGE_BYTES
from bhystream.report import Console
from bhystream.send import dryrun
from bhystream.send.dryrun import Survey, places, survey
from bhystream.send.options import SendOptions
from bhystream.send.precopy import Limits
from bhystream.signals import Signals
from bhystream.units import NS
from support.clock import Clock
from support.memory_source import MemorySource, rebuild

SIZES = (500, 100, 400)
NPAGES = sum(SIZES)


@pytest.fixture
def source() -> Iterator[MemorySource]:
    made = MemorySource(*SIZES)
    yield made
    made.close()


def dry_run(source: MemorySource, limits: Limits, console: Console, *, machine: bool) -> int:
    opts = SendOptions(guest="qemu:/g", limits=limits, machine=machine, dry_run=True)
    return dryrun.run(source, opts, Path("/nonexistent"), console, Signals())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of a dry run: it passes, and the guest runs, only in sleep()."""
    made = Clock(now_ns=12345)
    monkeypatch.setattr(dryrun, "time", made)
    return made


def fill(source: MemorySource, mark: bytes) -> None:
    for page in range(NPAGES):
        source.write(page, mark)


def test_a_survey_counts_pages(source: MemorySource, clock: Clock, rng: random.Random) -> None:
    data = set(rng.sample(range(NPAGES), 200))
    zeros = set(rng.sample(sorted(set(range(NPAGES)) - data), 50))
    for page in data:
        source.write(page, b"\1")
    for page in zeros:
        source.write(page, bytes(PAGE_BYTES))
    changed = set(rng.sample(sorted(data), 30))

    def run() -> None:
        for page in changed:
            source.write(page, b"\2")

    clock.on_sleep = run
    extents = sum(page - 1 not in changed for page in changed)
    found = survey(source, source.head())
    assert found == Survey(NPAGES, 250, 200, 30, extents, NS, 0)
    assert found.dirty_bytes == 30 * PAGE_BYTES


def test_the_whole_guest_changing_is_one_place(source: MemorySource, clock: Clock) -> None:
    clock.on_sleep = lambda: fill(source, b"\1")
    found = survey(source, source.head())
    assert (found.data_pages, found.changed_pages, found.changed_extents) == (0, NPAGES, 1)


def test_places_are_runs_of_ones(rng: random.Random) -> None:
    for nwords in (0, 1, 2, 7, 64):
        for share in (0.0, 0.01, 0.5, 0.99, 1.0):
            bits = [rng.random() < share for _ in range(64 * nwords)]
            whole = sum(bit << at for at, bit in enumerate(bits)).to_bytes(8 * nwords, "little")
            runs = sum(bit and not (at and bits[at - 1]) for at, bit in enumerate(bits))
            assert places(memoryview(whole)) == runs


def test_every_other_page_is_a_place(clock: Clock) -> None:
    source = MemorySource(6000)

    def run() -> None:
        for page in range(0, 6000, 2):
            source.write(page, b"\1")

    clock.on_sleep = run
    try:
        assert survey(source, source.head()).changed_extents == 3000
    finally:
        source.close()


def test_the_scans_themselves_count_as_exposure(
    source: MemorySource, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pages change also while the first scan is under way.
    touched = source.touched

    def slow() -> Iterator[tuple[int, int]]:
        clock.now_ns += NS // 4
        return touched()

    monkeypatch.setattr(source, "touched", slow)
    found = survey(source, source.head())
    assert (found.exposure_ns, found.scan_ns) == (NS + NS // 4, NS // 4)


def test_a_dry_run_touches_nothing(
    source: MemorySource,
    clock: Clock,
    rng: random.Random,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    # pause() of MemorySource raises, so the dry run does not call it.
    for page in rng.sample(range(NPAGES), 100):
        source.write(page, rng.randbytes(100))
    blocks, memory = source.allocated_bytes(), source.contents()
    assert dry_run(source, Limits(), Console("bhysend"), machine=False) == EXIT_OK
    assert dry_run(source, Limits(), Console("bhysend"), machine=True) == EXIT_OK
    assert source.allocated_bytes() == blocks
    assert source.contents() == memory


def test_into_a_pipe_goes_a_stream_with_a_head_and_no_memory(
    source: MemorySource, clock: Clock, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    source.write(3, b"secret")
    dry_run(source, Limits(), Console("bhysend"), machine=False)
    out, err = capfdbinary.readouterr()
    built = rebuild(out)
    assert built.head
    assert built.head.layout == source.layout
    assert built.head.config == {"name": "stand-in"}
    assert built.rounds == []
    assert b"secret" not in out
    assert err.startswith(b"bhysend: guest stand-in: ")


def test_each_stream_is_another(
    source: MemorySource, clock: Clock, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    streams = []
    for _ in range(2):
        dry_run(source, Limits(), Console("bhysend"), machine=False)
        streams.append(capfdbinary.readouterr().out)
    assert streams[0] != streams[1]


def test_a_terminal_gets_the_report_only(
    source: MemorySource,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    far, near = os.openpty()
    monkeypatch.setattr(dryrun, "_STDOUT", near)
    dry_run(source, Limits(), Console("bhysend"), machine=False)
    os.set_blocking(far, False)
    with pytest.raises(BlockingIOError):
        os.read(far, 1)
    os.close(near)
    os.close(far)
    assert "it can be moved from here" in capfd.readouterr().err


def report_of(
    source: MemorySource, limits: Limits, capfdbinary: pytest.CaptureFixture[bytes]
) -> list[list[str]]:
    dry_run(source, limits, Console("bhysend"), machine=True)
    out, err = capfdbinary.readouterr()
    assert err == b""
    assert out.endswith(b"\n")
    return [line.split("\t") for line in out.decode().splitlines()]


def test_the_machines_report_can_be_parsed(
    source: MemorySource, clock: Clock, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    for page in range(100, 300):
        source.write(page, b"\1")
    clock.on_sleep = lambda: source.write(150, b"\2")
    rows = report_of(source, Limits(), capfdbinary)
    assert {row[0]: row[1] for row in rows if row[0] != "link"} == {
        "name": "stand-in",
        "hypervisor": "stand-in",
        "pages": "1000",
        "touched_pages": "200",
        "data_pages": "200",
        "dirty_bytes_per_second": "4096",
        "scan_ns": "0",
    }
    links = [row[1:] for row in rows if row[0] == "link"]
    assert [(name, int(rate)) for name, rate, *_ in links] == [
        ("1 Gbit/s", 125_000_000),
        ("10 Gbit/s", 1_250_000_000),
        ("25 Gbit/s", 3_125_000_000),
    ]
    for _, _, rounds, copy_ns in links:
        assert int(rounds) == 2
        assert int(copy_ns) >= 0


def test_the_machines_report_says_what_does_not_converge(
    source: MemorySource, clock: Clock, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    fill(source, b"\1")
    clock.on_sleep = lambda: fill(source, b"\2")
    rows = report_of(source, Limits(rate_bytes=100_000), capfdbinary)
    assert [row for row in rows if row[0] == "link"] == [["link", "-B", "100000", "-1", "-1"]]


def test_non_convergence_is_said(
    source: MemorySource, clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(source, b"\1")
    clock.on_sleep = lambda: fill(source, b"\2")
    console = Console("bhysend")
    dry_run(source, Limits(rate_bytes=100_000), console, machine=False)
    err = capfd.readouterr().err
    assert "at -B (97.7 KiB/s): it changes too fast for -d 300 ms" in err
    # A guest that changes too fast can still be moved, if the pause may be long.
    forced = Limits(rate_bytes=100_000, finish=True, time_ns=600 * NS)
    for limits, rounds in ((forced, 15), (Limits(rounds=0, rate_bytes=100_000), 0)):
        fill(source, b"\1")
        dry_run(source, limits, console, machine=False)
        err = capfd.readouterr().err
        assert f": {rounds} rounds, pause 40.96 s and 0.0 ms for the last scan" in err


def test_the_report_for_people(
    source: MemorySource, clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    for page in range(256):
        source.write(page, b"\1" if page < 128 else b"\0")
    clock.on_sleep = lambda: source.write(7, b"\2")
    dry_run(source, Limits(rate_bytes=1 << 20), Console("bhysend"), machine=False)
    lines = [line.removeprefix("bhysend: ") for line in capfd.readouterr().err.splitlines()]
    assert lines == [
        "guest stand-in: 3.9 MiB of memory, 1.0 MiB touched, 512.0 KiB to send",
        "guest stand-in: changes 4.0 KiB/s, in 1 place; a scan takes 0.0 ms",
        "guest stand-in: at -B (1.0 MiB/s): 2 rounds, pause 0.0 ms and 0.0 ms for the last scan, "
        "and what the state and the destination take",
        "guest stand-in: the destination needs: -o disk0= -o net0=",
        "guest stand-in: it can be moved from here; nothing was changed",
    ]


def test_a_report_that_cannot_be_written_is_no_success(
    source: MemorySource, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        monkeypatch.setattr(dryrun, "_STDOUT", full)
        for machine in (False, True):
            with pytest.raises(InputOutputError, match="No space left"):
                dry_run(source, Limits(), Console("bhysend"), machine=machine)
    finally:
        os.close(full)

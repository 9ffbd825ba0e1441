"""bhysend -n over sparse files: what bhysend finds and says, and that bhysend changes nothing."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.backend.refusals import Refusals
from bhystream.errors import EXIT_OK, GuestError, InputOutputError, Reason
from bhystream.guest import Fixed
from bhystream.report import Console
from bhystream.send import dryrun, survey
from bhystream.send.options import SendOptions
from bhystream.send.precopy import Limits, Outlook
from bhystream.send.prediction import ASSUMED, EARLIER, UNKNOWN, Foretold, Prediction
from bhystream.send.stopwatch import Parts
from bhystream.signals import Signals
from bhystream.units import NS
from support.clock import Clock
from support.man_pages import section
from support.memory_source import MemorySource, rebuild

SIZES = (500, 100, 400)
NPAGES = sum(SIZES)


FIXED = Fixed(state_ns=8_000_000, load_ns=10_000_000)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemorySource]:
    made = MemorySource(*SIZES)
    monkeypatch.setattr(made, "fixed", lambda: FIXED)
    yield made
    made.close()


def dry_run(
    source: MemorySource,
    limits: Limits,
    console: Console,
    *,
    machine: bool,
    base: Path = Path("/nonexistent"),
    hook: str | None = None,
) -> int:
    opts = SendOptions(guest="qemu:/g", limits=limits, machine=machine, dry_run=True, hook=hook)
    return dryrun.run(source, opts, base, console, Signals())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of a dry run: it passes, and the guest runs, only in sleep()."""
    made = Clock(now_ns=12345)
    monkeypatch.setattr(survey, "time", made)
    return made


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
    assert {row[0]: row[1] for row in rows if len(row) == 2} == {
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
    assert [row for row in rows if row[0] == "pause"] == [
        ["pause", "state", "8000000", "assumed"],
        ["pause", "scan", "0", "measured"],
        ["pause", "answers", "-1", "unknown"],
    ]


def test_the_machines_report_says_what_does_not_converge(
    source: MemorySource, clock: Clock, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    source.fill(b"\1")
    clock.on_sleep = lambda: source.fill(b"\2")
    rows = report_of(source, Limits(rate_bytes=100_000), capfdbinary)
    assert [row for row in rows if row[0] == "link"] == [["link", "-B", "100000", "-1", "-1"]]


def test_non_convergence_is_said(
    source: MemorySource, clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    source.fill(b"\1")
    clock.on_sleep = lambda: source.fill(b"\2")
    console = Console("bhysend")
    dry_run(source, Limits(rate_bytes=100_000), console, machine=False)
    err = capfd.readouterr().err
    assert "at -B (97.7 KiB/s): it changes too fast for -d 300 ms" in err
    assert "too many last pages at -B" in err
    # A guest that changes too fast can still be moved, if the pause may be long.
    forced = Limits(rate_bytes=100_000, finish=True, time_ns=600 * NS)
    for limits, rounds in ((forced, 15), (Limits(rounds=0, rate_bytes=100_000), 0)):
        source.fill(b"\1")
        dry_run(source, limits, console, machine=False)
        err = capfd.readouterr().err
        assert f": {rounds} rounds, and 40.96 s for the last pages" in err
        assert "last pages 40.96 s at -B" in err


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
        "guest stand-in: at -B (1.0 MiB/s): 2 rounds, and 0.0 ms for the last pages",
        "guest stand-in: the destination needs: -o disk0= -o net0=",
        "guest stand-in: it can be moved from here; nothing was changed",
        "guest stand-in: the pause: state 8.0 ms (assumed), last scan 0.0 ms (grows with the"
        " memory), last pages 0.0 ms at -B, answers unknown (no destination was asked)",
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


# What the pause will be made of.

KIND = "stand-in"
HOOK = "zfs send secret"


def learned(base: Path, where: str = "hv2", hook: str | None = None) -> None:
    """Note a move whose state took 7.9 ms, whose scan took twice as long, and so on."""
    made = Prediction(lambda: FIXED, base, KIND, where, hook, 1 << 20, is_early=FIXED.is_early)
    made.parts(Outlook(1, 10**6, 4 * 10**6 * made.nthreads), 10**6)
    made.learn(Parts(7_900_000, 10_000_000, 12 * NS, 90_000_000))


def parts_of(
    source: MemorySource, capfd: pytest.CaptureFixture[str], base: Path, hook: str | None = None
) -> str:
    """Return the last line of the report."""
    dry_run(source, Limits(rate_bytes=1 << 20), Console("x"), machine=False, base=base, hook=hook)
    *_, last = capfd.readouterr().err.splitlines()
    return last.removeprefix("x: guest stand-in: the pause: ")


def test_the_pause_is_what_it_was_in_earlier_moves(
    source: MemorySource, clock: Clock, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    clock.step_ns = (
        2 * 10**6 * Prediction(lambda: FIXED, tmp_path, KIND, "", None, 1, is_early=False).nthreads
    )
    assert parts_of(source, capfd, tmp_path).startswith(
        "state 8.0 ms (assumed), last scan 2.0 ms (grows with the memory), "
    )
    learned(tmp_path)
    # What the estimate of that move was does not matter to the state: none is known here.
    assert parts_of(source, capfd, tmp_path) == (
        "state 7.9 ms (as in earlier moves), last scan 4.0 ms (as in earlier moves, grows with the"
        " memory), last pages 0.0 ms at -B, answers unknown (no destination was asked)"
    )


def test_a_scan_that_waits_for_a_cpu_does_not_make_the_pause_longer(
    source: MemorySource,
    clock: Clock,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    touched = source.touched

    def slow() -> Iterator[tuple[int, int]]:
        clock.preempt(NS // 4)
        return touched()

    monkeypatch.setattr(source, "touched", slow)
    assert "last scan 0.0 ms" in parts_of(source, capfd, tmp_path)
    dry_run(source, Limits(), Console("x"), machine=False, base=tmp_path)
    assert "a scan takes 250 ms" in capfd.readouterr().err


def test_a_hook_is_known_after_its_first_run(
    source: MemorySource, clock: Clock, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    unknown = parts_of(source, capfd, tmp_path, HOOK)
    assert unknown.endswith(", -p unknown (it has not run yet)")
    learned(tmp_path, hook=HOOK)
    known = parts_of(source, capfd, tmp_path, HOOK)
    assert known.endswith(", -p 12.00 s (as in earlier moves, beside the last pages)")
    assert "-p" not in parts_of(source, capfd, tmp_path)


def test_a_destination_that_is_asked_answers_as_before(tmp_path: Path) -> None:
    """Two trips and the load are assumed of a destination to which no guest was moved yet."""
    for where, answers in (("hv3", Foretold("answers", 2 * 5 + 10_000_000, ASSUMED)),
                           ("hv2", Foretold("answers", 90_000_000, EARLIER)),
                           ("", Foretold("answers", -1, UNKNOWN))):  # fmt: skip
        learned(tmp_path)
        made = Prediction(
            lambda: FIXED, tmp_path, KIND, where, None, 1 << 20, is_early=FIXED.is_early
        )
        assert made.foretell(100, 5)[2] == answers


def test_snapshot_files_have_no_pause(
    source: MemorySource,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    monkeypatch.setattr(source, "fixed", lambda: None)
    dry_run(source, Limits(), Console("bhysend"), machine=False)
    assert b"the pause" not in capfdbinary.readouterr().err
    assert not any(row[0] == "pause" for row in report_of(source, Limits(), capfdbinary))


# The rows of warnings and of reasons against the guest.


def test_warnings_are_rows_with_their_cures(
    source: MemorySource,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    warnings = [Reason("clock: it falls behind", "let it run NTP"), Reason("fpu: a\tb\n\x1b")]
    monkeypatch.setattr(source, "warnings", lambda: warnings)
    rows = report_of(source, Limits(), capfdbinary)
    assert [row for row in rows if row[0] == "warning"] == [
        ["warning", "clock: it falls behind", "let it run NTP"],
        ["warning", "fpu: a\\x09b\\x0a\\x1b", ""],
    ]


def test_each_reason_is_a_row(capfd: pytest.CaptureFixture[str]) -> None:
    found = Refusals("guest web1")
    found.add(GuestError("guest web1: it is paused", "let it run\nor not"))
    found.extend([Reason("uuid: none", "set uuid"), Reason("a\tb")])
    error = found.merged()
    assert error is not None
    dryrun.refuse(error)
    assert capfd.readouterr().out.splitlines() == [
        "refusal\tit is paused\tlet it run; or not",
        "refusal\tuuid: none\tset uuid",
        "refusal\ta\\x09b\t",
    ]


@pytest.mark.parametrize("text", ["guest web1: it has ended", "guest qemu:/run/web1.qmp: no"])
def test_one_error_is_one_row_without_the_guest(
    text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    dryrun.refuse(GuestError(text))
    assert capfd.readouterr().out == f"refusal\t{text.partition(': ')[2]}\t\n"


def test_a_refusal_that_cannot_be_written_is_a_refusal_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(dryrun, "_STDOUT", full.fileno())
        dryrun.refuse(GuestError("guest web1: it has ended"))


def test_the_page_lists_every_row_with_its_fields(
    source: MemorySource,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    monkeypatch.setattr(source, "warnings", lambda: [Reason("a", "b")])
    rows = report_of(source, Limits(), capfdbinary)
    dryrun.refuse(GuestError("a", "b"))
    rows += [line.split("\t") for line in capfdbinary.readouterr().out.decode().splitlines()]
    text = section("bhysend.8", "REPORT FOR PROGRAMS")
    said = re.findall(r"^\.It Li (\S+) Ar (.+)$", text, re.M)
    assert {row[0]: len(row) - 1 for row in rows} == {
        word: len(fields.split()) for word, fields in said
    }
    assert set(re.findall(r"^\.Li (\w+)", text, re.M)) >= {*dryrun._PARTS, *dryrun._BASES}

"""What the programs print: numbers for people and machines, on a standard error that may be odd."""

from __future__ import annotations

import os
import signal
import struct
import sys
import syslog
import termios
import threading
from fcntl import F_SETPIPE_SZ, fcntl, ioctl
from typing import BinaryIO

import pytest

from bhystream import report
from bhystream.errors import GuestError, InternalError
from bhystream.report import Console, Progress, printable
from bhystream.units import NS, duration, size
from support.clock import Clock
from support.waiting import wait_until_full


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0.0 ms"),
        (1_500_000, "1.5 ms"),
        (43_000_000, "43 ms"),
        (1_520_000_000, "1.52 s"),
        (119 * NS, "119.00 s"),
        (125 * NS, "2 m 05 s"),
        (7200 * NS, "120 m 00 s"),
    ],
)
def test_durations(ns: int, text: str) -> None:
    assert duration(ns) == text


def test_what_comes_from_a_stream_is_safe_for_a_terminal() -> None:
    assert printable("web1 \u00e9") == "web1 \u00e9"
    assert printable(b"d\xe0t\xff".decode(errors="surrogateescape")) == "d\\xe0t\\xff"
    assert printable("\x1b[2J\n\r\t\x00\x7f\u202e") == "\\x1b[2J\\x0a\\x0d\\x09\\x00\\x7f\\x202e"


def test_lines_name_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    Console("bhysend").say("a\nb")
    Console("bhyrecv", show_host=True).say("c")
    assert capsys.readouterr().err == f"bhysend: a\\x0ab\nbhyrecv({os.uname().nodename}): c\n"


def test_an_error_is_one_line_and_its_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert Console("bhysend").fail(GuestError("it broke", "first\n\nsecond")) == 69
    assert capsys.readouterr().err == "bhysend: it broke\nbhysend: first\nbhysend: second\n"


def test_a_fault_of_ours_comes_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise InternalError("oops")
    except InternalError as error:
        assert Console("bhysend").fail(error) == 70
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("bhysend: oops\n")


# A standard error that is not what it should be.


def test_a_signal_that_reports_while_a_line_is_written_does_no_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs, ours = os.pipe()
    fcntl(ours, F_SETPIPE_SZ, 4096)
    taken = threading.Event()
    out: list[bytes] = []

    def drain() -> None:
        wait_until_full(theirs)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        taken.wait(20)
        while part := os.read(theirs, 1 << 16):
            out.append(part)

    def report(*_: object) -> None:
        console.say("from the signal")
        taken.set()

    reader = threading.Thread(target=drain)
    before = signal.signal(signal.SIGUSR1, report)
    with os.fdopen(ours, "w") as err:
        monkeypatch.setattr(sys, "stderr", err)
        console = Console("bhysend")
        reader.start()
        try:
            console.say("x" * 20_000)
            console.say("last")
        finally:
            monkeypatch.undo()
            signal.signal(signal.SIGUSR1, before)
    reader.join()
    os.close(theirs)
    assert taken.is_set()
    lines = b"".join(out).splitlines()
    assert [len(line) for line in lines if b"from the signal" not in line] == [20_009, 13]


def test_a_reader_of_standard_error_that_is_gone_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    with open(ours, "w", buffering=1) as err:
        monkeypatch.setattr(sys, "stderr", err)
        console = Console("bhysend")
        console.say("a")
        console.raw("b")
        console.draw("c")
        console.clear()
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), ours)


def test_a_standard_error_that_was_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    # A closed descriptor 2, as Python handles it.
    monkeypatch.setattr(sys, "stderr", None)
    console = Console("bhysend")
    console.say("a")
    console.draw("b")
    console.clear()
    assert not console.is_terminal()
    assert console.fail(GuestError("c")) == 69


def expect(terminal: BinaryIO, text: bytes) -> None:
    assert terminal.read(len(text)) == text


def test_the_line_of_progress_has_the_width_of_its_own_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Standard output is a pipe while a guest is sent, so its width must not count.
    far, near = os.openpty()
    mode = termios.tcgetattr(near)
    mode[1] &= ~termios.OPOST
    termios.tcsetattr(near, termios.TCSANOW, mode)
    ioctl(near, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 41, 0, 0))
    with os.fdopen(near, "w") as err, os.fdopen(far, "rb") as terminal:
        monkeypatch.setattr(sys, "stderr", err)
        console = Console("bhysend")
        assert console.is_terminal()
        assert console.columns == 40 - len("bhysend: ")
        console.draw("a" * 100)
        expect(terminal, b"\rbhysend: " + b"a" * 31)
        console.draw("b")
        expect(terminal, b"\rbhysend: b" + b" " * 30)
        console.say("c")
        expect(terminal, b"\r" + b" " * 40 + b"\rbhysend: c\n")
        ioctl(near, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
        console.draw("d" * 100)
        expect(terminal, b"\rbhysend: " + b"d" * 70)


# Progress.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(report, "time", made)
    return made


def progress(*, verbose: bool = False, machine: bool = False) -> Progress:
    made = Progress(Console("bhysend"), "web1", 1000, verbose=verbose, machine=machine)
    made.round, made.done_pages, made.sent_pages, made.sent_bytes = 2, 250, 100, 5 << 20
    return made


def test_the_machines_line_has_the_fields_of_the_page(clock: Clock) -> None:
    made = progress()
    assert made.fields(clock.now_ns + 77) == "progress\tround\t2\t250\t1000\t100\t5242880\t77\t-1"
    made.predicted_ns = 5
    assert made.fields(clock.now_ns).endswith("\t0\t5")


def test_the_line_for_people(clock: Clock) -> None:
    made = progress()
    made.predicted_ns = 43_000_000
    made.work_done, made.work_total = 100, 400
    assert made.line(clock.now_ns + NS) == (
        "guest web1: round 2: 25%, 5.0 MiB/s, 3.00 s left, pause 43 ms; "
        "400.0 KiB in it, 5.0 MiB in all, 1.00 s"
    )


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (80, "guest web1: round 2: 25%, 5.0 MiB/s, 3.00 s left, pause 43 ms [####............]"),
        (70, "guest web1: round 2: 25%, 5.0 MiB/s, 3.00 s left, pause 43 ms [#.....]"),
        (68, "guest web1: round 2: 25%, 5.0 MiB/s, 3.00 s left, pause 43 ms [#...]"),
        (67, "guest web1: round 2: 25%, 5.0 MiB/s, 3.00 s left, pause 43 ms"),
        (60, "web1: round 2: 25%, 5.0 MiB/s, 3.00 s left, pause 43 ms"),
        (61, "guest web1: round 2: 25%, 5.0 MiB/s, 3.00 s left, pause 43 ms"),
    ],
)
def test_the_bar_takes_what_the_measures_leave(clock: Clock, columns: int, line: str) -> None:
    made = progress()
    made.predicted_ns = 43_000_000
    made.work_done, made.work_total = 100, 400
    assert made.short_line(clock.now_ns + NS, columns) == line
    assert len(line) <= columns


def test_a_long_name_leaves_room_for_the_measures(clock: Clock) -> None:
    made = progress()
    made.guest = "a" * 64
    made.predicted_ns = 12_340_000_000
    made.work_done, made.work_total, made.phase = 1, 100, "paused, round"
    line = made.short_line(clock.now_ns + NS, 80 - len("bhysend: ") - 1)
    assert len(line) <= 70
    assert line.endswith("a..: paused, round 2: 1%, 5.0 MiB/s, 99.00 s left, pause 12.34 s")


def test_work_is_counted_and_not_a_place_in_memory(clock: Clock) -> None:
    """Half of the memory may be a hole, which takes no time; only -P shows the place."""
    made = progress()
    made.done_pages, made.work_done, made.work_total = 999, 1, 2
    assert made.share == 0.5
    assert "999" in made.fields(clock.now_ns).split("\t")
    made.enter("round", 3)
    assert (made.share, made.done_pages, made.sent_pages) == (0.0, 0, 0)


def test_without_work_that_is_known_nothing_is_said_of_it(clock: Clock) -> None:
    made = progress()
    assert made.short_line(clock.now_ns + NS, 200) == "guest web1: round 2: 5.0 MiB/s"


def test_a_line_of_nothing_divides_by_nothing(clock: Clock) -> None:
    made = Progress(Console("bhysend"), "web1", 0)
    assert made.share == 0.0
    assert "round 0: 0.0" not in made.line(clock.now_ns)
    made.work_total = 1
    assert " 0%" in made.line(clock.now_ns)


@pytest.mark.parametrize(
    ("settings", "begin"),
    [
        ({"verbose": True}, "bhysend: guest web1: round 2"),
        ({"machine": True}, "progress\tround\t2"),
        ({"machine": True, "verbose": True}, "progress\tround\t2"),
    ],
)
def test_a_line_a_second(
    clock: Clock, capsys: pytest.CaptureFixture[str], settings: dict[str, bool], begin: str
) -> None:
    made = progress(**settings)
    for clock.now_ns in range(0, 5 * NS, NS // 4):
        made.tick()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith(begin) for line in lines)


def test_without_v_or_p_there_is_no_progress(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    made = progress()
    clock.now_ns = 10 * NS
    made.tick()
    assert capsys.readouterr().err == ""
    made.report()
    assert capsys.readouterr().err.startswith("bhysend: guest web1: round 2")


def test_the_log_is_of_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(syslog, "syslog", lambda _, text: lines.append(text))
    Console("bhysend").log("a\nb")
    Console("bhysend").fail(GuestError("c\nd", "not this"))
    assert lines == ["a\\x0ab", "c\\x0ad"]

"""Whether the host is busy: what Linux counts of the main thread, and that it is of late."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bhystream.send import hostload
from bhystream.send.hostload import HostLoad

MS = 1_000_000


@pytest.fixture
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "schedstat"
    monkeypatch.setattr(hostload, "SCHEDSTAT", path)
    return path


def say(counts: Path, ran_ms: int, waited_ms: int) -> None:
    counts.write_text(f"{ran_ms * MS} {waited_ms * MS} 17\n")


def test_a_thread_that_waits_for_a_cpu_has_a_busy_host(counts: Path) -> None:
    say(counts, 1000, 299)
    assert not HostLoad().is_busy()
    say(counts, 1000, 301)
    assert HostLoad().is_busy()


def test_a_long_move_is_judged_by_its_end(counts: Path) -> None:
    load = HostLoad()
    say(counts, 60_000, 0)
    assert not load.is_busy()
    say(counts, 60_100, 150)  # too short a time: the minute before counts too
    assert not load.is_busy()
    say(counts, 60_200, 300)  # 0.5 s since the minute
    assert load.is_busy()
    say(counts, 60_300, 320)
    assert load.is_busy()  # 0.2 s of running since the call before the last, and 0.17 s of waiting
    say(counts, 60_700, 320)
    assert not load.is_busy()


@pytest.mark.parametrize("text", [b"", b"1", b"one two 3", b"\xff 1 2", b"9" * 5000 + b" 1 1"])
def test_no_count_is_no_load(counts: Path, text: bytes) -> None:
    assert not HostLoad().is_busy()
    counts.write_bytes(text)
    assert not HostLoad().is_busy()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts this")
def test_linux_counts_what_the_main_thread_runs() -> None:
    """The file has the form that is read here: it grows by the CPU time of this thread."""
    code = (
        "import time; from bhystream.send.hostload import SCHEDSTAT;"
        "ran = lambda: int(SCHEDSTAT.read_bytes().split()[0]);"
        "a, b = ran(), time.thread_time_ns();\n"
        "while time.thread_time_ns() - b < 100_000_000: pass\n"
        "print((ran() - a) / (time.thread_time_ns() - b))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, check=True)
    assert 0.8 < float(done.stdout) < 1.2

"""A hypervisor that we have started is stopped, or ends before it can be stopped."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.launch import Child


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    made = Child(["/bin/sleep", "1000"], str(tmp_path / "log"))
    yield made
    if not made.has_ended():
        os.kill(made.pid, signal.SIGKILL)
    assert made.ends_within(60)


def test_a_child_is_stopped_and_goes_on(child: Child) -> None:
    assert child.stop(60)
    child.go_on()
    assert child.status is None
    assert child.stop(60)


def test_a_child_heeds_the_signals_that_we_ignore(tmp_path: Path) -> None:
    """A hypervisor that ignored TERM could not be shut down together with its host."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        one = Child(["/bin/sleep", "1000"], str(tmp_path / "log"))
        try:
            status = Path(f"/proc/{one.pid}/status").read_text()
            [ignored] = re.findall(r"^SigIgn:\s*([0-9a-f]+)$", status, re.MULTILINE)
            assert not int(ignored, 16) & sum(1 << (number - 1) for number in numbers)
        finally:
            one.kill()
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in numbers)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_child_of_another_thread_starts_with_signals_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        made: list[Child] = []
        words = ["/bin/sleep", "1000"]
        thread = threading.Thread(target=lambda: made.append(Child(words, str(tmp_path / "log"))))
        thread.start()
        thread.join()
        made[0].kill()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_child_that_ends_while_it_is_to_be_stopped_is_not(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child ends after poll() and before waitid()."""
    real = os.waitid

    def waitid(*args: Any) -> Any:
        os.kill(child.pid, signal.SIGKILL)
        real(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        return real(*args)

    monkeypatch.setattr(os, "waitid", waitid)
    assert not child.stop(60)

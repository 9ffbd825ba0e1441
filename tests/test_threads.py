"""Threads beside the main thread."""

from __future__ import annotations

import signal
import threading

import pytest

from bhystream import threads
from bhystream.errors import Interrupted
from bhystream.signals import Signals
from support.processes import blocked


def test_a_thread_takes_no_signals_and_the_main_thread_takes_them_as_before() -> None:
    before = blocked(threading.main_thread().native_id)
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    threads.start(thread)
    try:
        taken = {signal.SIGALRM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
        assert taken <= blocked(thread.native_id)
        assert blocked(threading.main_thread().native_id) == before
    finally:
        over.set()
        thread.join()


def test_an_interrupt_raises_before_a_start_or_after_it_but_not_within() -> None:
    steps = []

    class Slow(threading.Thread):
        def start(self) -> None:
            # To the main thread: other tests may have left threads that would take it.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            steps.append("half")
            super().start()
            steps.append("started")

    thread = Slow(target=lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Interrupted), Signals().interruptible():
            threads.start(thread)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert steps == ["half", "started"]
    thread.join()

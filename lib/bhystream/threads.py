"""Threads beside the main thread, which alone takes signals."""

from __future__ import annotations

import signal
import threading


def start(thread: threading.Thread) -> None:
    """Start a thread that takes no signals: they have to interrupt the main thread's write(2).

    No signal handler raises in the middle of the start, which would leave the thread half
    made; it may raise after the start.  Raises RuntimeError if the system has no thread left.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

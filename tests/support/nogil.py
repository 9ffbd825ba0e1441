"""Find out whether a call releases the GIL."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


def released(call: Callable[[], object]) -> bool:
    """Say whether another thread could run while `call` did.

    The interpreter is told never to take the GIL from a thread, so this thread
    gets it back only if `call` releases it.  The test is tried several times,
    because on a busy machine this thread may wake up too late.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        return any(_seen_running(call) for _ in range(20))
    finally:
        sys.setswitchinterval(interval)


def _seen_running(call: Callable[[], object]) -> bool:
    started = threading.Lock()
    started.acquire()
    done: list[bool] = []

    def run() -> None:
        started.release()
        call()
        done.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    started.acquire()
    seen = not done
    thread.join()
    return seen

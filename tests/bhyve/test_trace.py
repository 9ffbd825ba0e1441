"""ptrace(2) of a process with many threads, as a bhyve with disks is: it survives the trace's end.

    python -m pytest -m bhyve tests/bhyve/test_trace.py

FreeBSD only, as root; no guest is needed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from bhystream.backend.bhyve import powerbutton
from bhystream.backend.bhyve.freebsd_trace import Trace

pytestmark = [
    pytest.mark.bhyve,
    pytest.mark.skipif(not sys.platform.startswith("freebsd"), reason="needs FreeBSD's ptrace(2)"),
]
# Threads that are in and out of system calls all the time, and one that seeks in a file.
_BUSY = """
import os, sys, threading, time
def work():
    while True:
        time.sleep(0.0003)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
file = os.open("/dev/zero", os.O_RDONLY)
print(flush=True)
while True:
    os.lseek(file, 0, 0)
    time.sleep(0.0003)
"""
_TRIES = 100
_LATE_TRIES = 20


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", _BUSY], stdout=subprocess.PIPE) as made:
        try:
            assert made.stdout
            made.stdout.readline()
            yield made
        finally:
            made.kill()


def test_no_thread_keeps_a_trap(child: subprocess.Popen[bytes]) -> None:
    for tried in range(_TRIES):
        trace = Trace(child.pid)
        is_stopped = trace.run_until(lambda: True, 60.0)
        trace.let_go()
        time.sleep(0.01)
        assert (child.poll(), is_stopped) == (None, True), f"trace {tried}"


def test_a_child_that_runs_when_the_time_is_over_is_let_go_too(
    child: subprocess.Popen[bytes],
) -> None:
    """No thread of the child asks for VM_RUN, so the child runs when the time is over."""
    for tried in range(_LATE_TRIES):
        trace = Trace(child.pid)
        assert trace.run_until(lambda: True, 60.0)
        assert not trace.write_ports(powerbutton.CONNECT, 0.1)
        trace.let_go()
        time.sleep(0.01)
        words = ["/bin/ps", "-o", "state=", "-p", str(child.pid)]
        state = subprocess.run(words, capture_output=True, text=True).stdout
        assert child.poll() is None, f"trace {tried}"
        assert not set("TX") & set(state), f"trace {tried}: stopped, or traced: {state}"

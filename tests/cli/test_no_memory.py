"""A program without memory, at any point of its work: one message, one status, the guest here."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

from bhystream.errors import EXIT_HELD, EXIT_OK
from cli.pipeline import BHYSEND, Ended, Words, report, run
from cli.travel import Host, Traveller

_MIB = 1 << 20
_STEP_BYTES = 6 * _MIB
# What the interpreter takes before a program of ours can say anything.
_START = """
import re
from bhystream.start import run
with open("/proc/self/status") as status:
    print(re.search(r"^VmPeak:\\s+(\\d+) kB$", status.read(), re.M)[1])
"""

# A failure, and how many bytes a program can get only after it.
_FAIL = """
import mmap, re, resource
from bhystream import errors
errors.keep_reserve()
with open("/proc/self/status") as status:
    has = int(re.search(r"^VmSize:\\s+(\\d+) kB$", status.read(), re.M)[1])
resource.setrlimit(resource.RLIMIT_AS, (has << 10, has << 10))
try:
    mmap.mmap(-1, 1 << 21)
except OSError as raised:
    print(errors.as_error(raised))
    mmap.mmap(-1, 1 << 21)
"""


def limits() -> Iterator[int]:
    """Yield ever more bytes of address space, from what a program needs to begin."""
    command = [sys.executable, "-P", "-X", "utf8", "-c", _START]
    said = subprocess.run(command, capture_output=True, check=True, text=True)
    limit = int(said.stdout) * 1024 + 2 * _MIB
    while True:
        yield limit
        limit += _STEP_BYTES


def limited(limit: int, command: Words) -> list[str]:
    return ["prlimit", f"--as={limit}:{limit}", *map(str, command)]


def check(ended: Ended) -> None:
    """Assert that a program has failed in an orderly way, and promises that nothing has moved."""
    assert 64 <= ended.status <= 77, report(ended)
    assert "Traceback" not in ended.stderr, report(ended)
    assert "internal error" not in ended.stderr, report(ended)


def test_a_program_that_fails_gets_memory_for_its_end() -> None:
    ended = subprocess.run([sys.executable, "-P", "-c", _FAIL], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("cannot go on: Cannot allocate memory\n", "")


def test_a_bhyrecv_without_memory_starts_nothing(host: Host, small: Traveller) -> None:
    """The last limit is one with which only the hypervisor fails, because it needs more."""
    tried = 0
    for limit in limits():
        tried += 1
        to = small.next()
        sent, received = run(small.send(), limited(limit, small.receive(to)), env=host.env)
        if sent.status == EXIT_HELD:
            host.act(BHYSEND, "--resume", host.rows()[0].guest)
        if "memory" not in received.stderr:
            break
        check(received)
        to.assert_nothing_left()
        small.run_on(host, sweeps=1)
    assert tried > 3, report(sent, received)
    assert re.search("ended with status|was killed by", received.stderr), report(sent, received)
    small.run_on(host, sweeps=1)
    small.move(host, sweeps=1)


def test_a_bhysend_without_memory_leaves_the_guest_where_it_is(
    host: Host, small: Traveller
) -> None:
    tried = 0
    for limit in limits():
        tried += 1
        to = small.next()
        sent, received = run(limited(limit, small.send()), small.receive(to), env=host.env)
        if sent.status in (EXIT_OK, EXIT_HELD):
            break
        check(sent)
        assert "memory" in sent.stderr, report(sent, received)
        to.assert_nothing_left()
        small.run_on(host, sweeps=1, is_tidy=False)
    assert tried > 3, report(sent, received)
    small.settle(host, to)

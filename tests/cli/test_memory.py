"""How much memory bhysend takes, and that bhysend leaves the guest's memory as it is.

The guest has 4 GiB and only its firmware, which runs and touches nothing any more.  The test fills
every fourth page from outside, so the lists of pages are as long as they can be: no two pages that
are sent, and no two pages that are left out, share an extent.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest import Guest, Spec, ram

from .pipeline import BHYRECV, BHYSEND, Pipeline, report, run
from .qemu import Firmware
from .travel import Host

pytestmark = pytest.mark.guest

MIB = 1 << 20
PAGE = 4096
GUEST_BYTES = 4 << 30
# bhysend's budget: a fixed part, and the table of hashes.
LIMIT_BYTES = 64 * MIB + 8 * (GUEST_BYTES // PAGE)
# The firmware lives below this address.
FREE_FROM = 16 * MIB


@pytest.fixture(scope="module")
def large() -> Iterator[Guest]:
    with Firmware(Spec("q35", memory_mib=GUEST_BYTES // MIB, name="large")) as guest:
        block = os.urandom(PAGE)
        with ram.opened(guest.ram_path, os.O_RDWR) as fd:
            for offset in range(FREE_FROM, GUEST_BYTES, 4 * PAGE):
                os.pwrite(fd, block, offset)
        yield guest


def resident_bytes(pid: int) -> int:
    """Return a process's resident bytes without shared memory files, which are the guest's memory.

    Source: proc_pid_status(5), RssAnon and RssFile; the guest's pages are in RssShmem.
    """
    text = Path(f"/proc/{pid}/status").read_text()
    return sum(int(kib) << 10 for kib in re.findall(r"^Rss(?:Anon|File):\s+(\d+) kB", text, re.M))


def test_its_memory_stays_within_its_bounds(host: Host, large: Guest) -> None:
    """Look at bhysend's memory after each MiB of the stream.

    The stream stands still meanwhile, because a pipe takes one MiB; so only the memory for one MiB
    of stream can grow and shrink unseen.  In addition, prlimit(1) makes every private byte over
    the limit an error, whether the test sees that byte or not.
    """
    read_end, write_end = os.pipe()
    command = ["prlimit", f"--data={LIMIT_BYTES}", *BHYSEND, f"qemu:{large.qmp_path}"]
    peak = total = 0
    with Pipeline(command, env=host.env, stdout=write_end) as pipeline:
        os.close(write_end)
        with open(read_end, "rb", buffering=0) as stream:
            while data := stream.read(MIB):
                if total // MIB != (total + len(data)) // MIB:
                    peak = max(peak, resident_bytes(pipeline[0].pid))
                total += len(data)
        [sent] = pipeline.wait()
    assert sent.status == 80, report(sent)
    host.act(BHYSEND, "--resume", "large")
    print(f"bhysend: {peak / MIB:.1f} MiB at most, limit {LIMIT_BYTES / MIB:.0f} MiB")
    assert total > GUEST_BYTES // 4
    assert 8 * (GUEST_BYTES // PAGE) < peak <= LIMIT_BYTES


@pytest.mark.parametrize("options", [("-n",), ("-k",), ("-k", "-z", "1")], ids="".join)
def test_what_the_guest_never_touched_stays_unallocated(
    options: tuple[str, ...], host: Host, large: Firmware
) -> None:
    before = ram.allocated_bytes(large.ram_path)
    with open(os.devnull, "wb") as nowhere:
        [sent] = run([*BHYSEND, *options, f"qemu:{large.qmp_path}"], env=host.env, stdout=nowhere)
    assert sent.status == 0, report(sent)
    assert (GUEST_BYTES - FREE_FROM) // 4 <= before < GUEST_BYTES // 2
    assert ram.allocated_bytes(large.ram_path) == before
    assert large.status() == "running"


def test_a_destination_allocates_what_was_sent(host: Host, large: Guest) -> None:
    path = host.directory / "ram"
    command = [*BHYRECV, "-u", "-o", f"mem={path}", "large"]
    ended = run([*BHYSEND, f"qemu:{large.qmp_path}"], command, env=host.env)
    try:
        assert [one.status for one in ended] == [80, 0], report(*ended)
        # The files have the same bytes and the same holes.
        subprocess.run(["cmp", large.ram_path, path], check=True)
        assert ram.allocated_bytes(path) <= ram.allocated_bytes(large.ram_path)
        host.act(BHYSEND, "--resume", "large")
    finally:
        host.run(*BHYRECV, "--discard", "large")

"""The private memory of both programs while they move a guest, against what they may take.

RssAnon of /proc/PID/status is read as often as possible while the programs run; the guest's own
memory is shared, and counts as RssShmem.  The allowance is 64 MiB, and 8 bytes for each page of
the guest; the figure is the largest of all turns.  Two guests move: the proof guest, and a large
guest that has only its firmware, and of which every 256th page was filled from outside, so that
no two touched pages are neighbours.
Source: proc_pid_status(5).
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from cli.pipeline import BHYRECV, BHYSEND, Pipeline, Words, report
from cli.qemu import Firmware
from cli.travel import Host
from guest import Guest, Spec, ram

from .qemu_rows import travelling
from .rows import Row

_MIB = 1 << 20
_PAGE = 4096
_FIXED = 64 * _MIB
_STEP = 256  # pages
_FREE_FROM = 16 * _MIB  # the firmware lives below
_POLL_S = 0.001
_ANON = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)


class Peak:
    """The largest RssAnon of one process, from now until stop()."""

    def __init__(self, pid: int) -> None:
        self._seen = 0
        self._path = Path(f"/proc/{pid}/status")
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Look no more; return the largest value seen, in bytes."""
        self._is_over.set()
        self._thread.join()
        return self._seen

    def _watch(self) -> None:
        with suppress(OSError):  # the process has ended
            while not self._is_over.wait(_POLL_S):
                for kib in _ANON.findall(self._path.read_text()):
                    self._seen = max(self._seen, int(kib) << 10)


def measure(large_gib: int, turns: int) -> list[Row]:
    """Return the rows of both programs, for both guests."""
    return [*_proof(turns), *_large(large_gib, turns)]


def _proof(turns: int) -> list[Row]:
    found = []
    with travelling(Spec()) as (host, guest):
        for _ in range(turns):
            to = guest.next()
            found.append(_peaks(host, guest.send(), guest.receive(to)))
            guest.settle(host, to)
        guest.prove(1)
        return _rows("512 MiB, live", guest.npages, found)


def _large(gib: int, turns: int) -> list[Row]:
    found = []
    size = gib << 30
    spec = Spec(memory_mib=gib << 10, name="large")
    with Firmware(spec) as guest, tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        host, block = Host(Path(directory)), os.urandom(_PAGE)
        with ram.opened(guest.ram_path, os.O_RDWR) as fd:
            for offset in range(_FREE_FROM, size, _STEP * _PAGE):
                os.pwrite(fd, block, offset)
        for _ in range(turns):
            found.append(_sent_and_dropped(host, guest))
    return _rows(f"{gib} GiB, sparse", size // _PAGE, found)


def _sent_and_dropped(host: Host, guest: Guest) -> list[int]:
    """Move the guest without starting it; let it run on here, and end it there."""
    name = guest.spec.name
    try:
        return _peaks(host, [*BHYSEND, f"qemu:{guest.qmp_path}"], [*BHYRECV, "-u", name])
    finally:
        host.run(*BHYRECV, "--discard", name)
        host.run(*BHYSEND, "--resume", name)


def _peaks(host: Host, send: Words, receive: Words) -> list[int]:
    """Run both programs as a plain pipeline; return the peak of each."""
    with Pipeline(send, receive, env=host.env) as pipeline:
        peaks = [Peak(stage.pid) for stage in pipeline.stages]
        ended = pipeline.wait()
        found = [peak.stop() for peak in peaks]
    if [each.status for each in ended] != [80, 0]:
        raise SystemExit(report(*ended))
    return found


def _rows(what: str, npages: int, found: list[list[int]]) -> list[Row]:
    allowed = _FIXED + 8 * npages
    rows = []
    for program, seen in zip(("bhysend", "bhyrecv"), zip(*found, strict=True), strict=True):
        runs = [one / allowed for one in seen]
        note = f"{max(seen) / _MIB:.1f} of {allowed / _MIB:.0f} MiB"
        name = f"RssAnon of {program}, {what}: against the allowance"
        rows.append(Row(name, max(runs), 1, runs, at_most=True, note=note))
    return rows

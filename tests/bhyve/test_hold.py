"""The facts that a hold relies on: about the FIFO, without a guest, and about the held guest.

With BHYSEND_TEST_HOLD=yes (the other variables: test_freebsd.py) the guest is held again and
again, and each time let go: it stands for some seconds, in its own process, which stays the same.

If a test was killed, the guest may be left held.  To let the guest run, read its FIFO:

    cat /var/db/bhysend/held/*/ckp.meta > /dev/null
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from bhystream.backend.base import Paused
from bhystream.backend.bhyve import fifo, fpustate
from bhystream.backend.bhyve import registers as reg
from bhystream.backend.bhyve.checkpoint import Checkpoint, settle
from bhystream.backend.bhyve.config import GuestConfig
from bhystream.backend.bhyve.fpu import STATE_PREFIX
from bhystream.backend.bhyve.host import VMM_DIR, Host
from bhystream.backend.bhyve.memory import Memory
from bhystream.backend.bhyve.paused import PausedRecord, open_paused
from bhystream.backend.bhyve.snapshot import parse
from bhystream.backend.process import is_alive, is_same
from bhystream.errors import StaleError
from bhystream.guest import State

from .conftest import Trial, rehearsed
from .rom import until

IS_FREEBSD = sys.platform.startswith("freebsd")
PAGE_BYTES = 4096
LIMIT_S = 60.0
# A size between those of two small guests' FILE.meta: a write of that many bytes begins in a
# FIFO that lacks one byte.
META_BYTES = 1169
CHILD = Path(__file__).with_name("child.py")

pytestmark = [
    pytest.mark.bhyve,
    pytest.mark.skipif(
        not IS_FREEBSD and VMM_DIR not in os.environ, reason="this is not a FreeBSD host"
    ),
]
only_freebsd = pytest.mark.skipif(not IS_FREEBSD, reason="pipes differ on Linux")


def say(*words: object) -> None:
    """Print an observation, for the report."""
    print("saw:", *words)


# ---- the FIFO


def test_a_fifo_takes_so_many_bytes_and_no_more(staging: Path) -> None:
    path = staging / "fifo"
    full_bytes = fifo.make(path)
    say("a FIFO takes", full_bytes, "bytes")
    fd = fifo.arm(path, full_bytes)
    try:
        assert fifo.pending_in(fd) == full_bytes - 1
        assert os.write(fd, b"1") == 1
        assert fifo.pending_in(fd) == fifo.pending(path) == full_bytes
        with pytest.raises(BlockingIOError):
            os.write(fd, b"2")
    finally:
        os.close(fd)


@only_freebsd
def test_a_write_of_a_meta_file_begins_in_the_last_byte_and_a_small_one_does_not(
    staging: Path,
) -> None:
    """Otherwise bhysend would not see a full FIFO, and the operator would have to end the hold."""
    path = staging / "fifo"
    full_bytes = fifo.make(path)
    fd = fifo.arm(path, full_bytes)
    try:
        with pytest.raises(BlockingIOError):
            os.write(fd, bytes(fifo.ATOMIC_BYTES))
        assert fifo.pending_in(fd) == full_bytes - 1
        assert os.write(fd, bytes(META_BYTES)) == 1
        assert fifo.pending_in(fd) == full_bytes
    finally:
        os.close(fd)


def test_what_is_in_a_fifo_ends_with_the_last_who_has_it_open(staging: Path) -> None:
    """So a full FIFO proves that bhyve is alive."""
    path = staging / "fifo"
    os.close(fifo.arm(path, fifo.make(path)))
    assert fifo.pending(path) == 0


def test_a_fifo_tells_whether_anybody_has_it_open_to_read(staging: Path) -> None:
    """open(2) fails with ENXIO if no process has the FIFO open for reading."""
    path = staging / "fifo"
    full_bytes = fifo.make(path)
    assert not fifo.has_reader(path)
    fd = fifo.arm(path, full_bytes)
    assert fifo.has_reader(path)
    os.close(fd)
    assert not fifo.has_reader(path)


def test_a_fifo_on_its_way_through_a_socket_has_a_reader(staging: Path) -> None:
    """So a FIFO in bhyve's queue is seen; when the socket is closed, the FIFO has no reader."""
    path = staging / "fifo"
    fd = fifo.arm(path, fifo.make(path))
    here, there = socket.socketpair()
    try:
        socket.send_fds(here, [b"x"], [fd])
    finally:
        os.close(fd)
        here.close()
    assert fifo.has_reader(path)
    there.close()
    until(lambda: not fifo.has_reader(path), "end of what was in the socket", LIMIT_S)


def test_a_fifo_is_read_until_nobody_has_it_open_to_write(staging: Path) -> None:
    path = staging / "fifo"
    full_bytes = fifo.make(path)
    fd = fifo.arm(path, full_bytes)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY)
    os.close(fd)

    def write() -> None:
        os.write(writer, bytes(META_BYTES))
        os.close(writer)

    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write)
        found, is_over = fifo.drain(path, LIMIT_S)
        written.result()
    os.close(reader)
    assert (len(found), is_over) == (full_bytes - 1 + META_BYTES, True)


# ---- the held guest


def digest(memory: Memory) -> str:
    """Return a hash of all the memory that the guest has ever touched."""
    found = xxhash.xxh3_128()
    base, index = 0, 0
    for first, end in memory.touched():
        while first - base >= len(memory.views[index]) // PAGE_BYTES:
            base += len(memory.views[index]) // PAGE_BYTES
            index += 1
        found.update(memory.views[index][(first - base) * PAGE_BYTES : (end - base) * PAGE_BYTES])
    return found.hexdigest()


def goes_on(memory: Memory) -> None:
    """Wait until the guest has changed its memory."""
    before = digest(memory)
    until(lambda: digest(memory) != before, "change of its memory", LIMIT_S)


def runs_on(host: Host, guest: str, memory: Memory, record: PausedRecord) -> None:
    """Assert that the guest runs in the same process as before, and that the hold left nothing."""
    assert is_alive(record.process)
    connection = Checkpoint(host.run_dir, guest, guest)
    try:
        assert is_same(connection.identity, record.process)
    finally:
        connection.close()
    assert settle(host.run_dir, guest, guest, LIMIT_S)
    assert memory.waiting_vcpus() == frozenset()
    goes_on(memory)
    assert not Path(record.directory).exists()


def stands(memory: Memory, paused: Paused) -> None:
    """Assert that the guest is held: for a second its memory stays the same, and no vCPU runs."""
    paused.require_paused()
    assert not paused.runs()
    sockets, cores, threads = memory.topology
    assert memory.waiting_vcpus() == frozenset(range(sockets * cores * threads))
    before = digest(memory)
    time.sleep(1.0)
    assert digest(memory) == before, "a device or a vCPU goes on while the guest is held"
    paused.require_paused()


def test_a_rehearsal_ends_by_itself_and_says_what_a_hold_will_save(
    trial: Trial, host: Host, guest: str, memory: Memory
) -> None:
    say([(item.state_name, item.size_bytes) for item in trial.plan.items])
    say(f"to save, and to load elsewhere: {trial.source.fixed()}")
    say("the memory file is the null device:", trial.directory.has_sink())
    assert trial.plan.memory_bytes == memory.size_bytes
    assert trial.plan.vmname == guest
    trial.found_again().resume()
    runs_on(host, guest, memory, trial.record)


def test_a_held_guest_stands_saved_in_its_process(trial: Trial, memory: Memory) -> None:
    start_ns = time.monotonic_ns()
    paused = trial.source.pause()
    say(f"held, with its state, after {(time.monotonic_ns() - start_ns) / 1e6:.0f} ms")
    stands(memory, paused)
    assert is_alive(trial.record.process)
    assert trial.directory.files.kern.stat().st_size == trial.plan.kern_bytes
    assert fifo.has_reader(trial.directory.files.meta), "bhyve has closed the FIFO that it was sent"
    names = [one.name for one in paused.states() if not one.is_optional]
    say(names)
    assert names == ["meta", *(item.state_name for item in trial.plan.items)]


def test_a_held_guest_goes_on_in_its_process(
    trial: Trial, host: Host, guest: str, memory: Memory
) -> None:
    paused = trial.source.pause()
    paused.resume()
    assert paused.runs()
    runs_on(host, guest, memory, trial.record)


def test_the_throttle_stops_every_vcpu_and_lets_it_run(
    trial: Trial, host: Host, guest: str, memory: Memory
) -> None:
    sockets, cores, threads = memory.topology
    for _ in range(3):
        trial.source.suspend_vcpus()
        assert memory.waiting_vcpus() == frozenset(range(sockets * cores * threads))
        trial.source.resume_vcpus()
        assert memory.waiting_vcpus() == frozenset()
        goes_on(memory)
    paused = trial.source.pause()  # a throttled guest can still be paused, and resumed
    stands(memory, paused)
    paused.resume()
    runs_on(host, guest, memory, trial.record)


def test_whoever_finds_a_throttled_guest_lets_it_run(
    trial: Trial, host: Host, guest: str, memory: Memory
) -> None:
    trial.source.suspend_vcpus()
    trial.found_again().resume()
    runs_on(host, guest, memory, trial.record)


def test_another_process_finds_it_and_lets_it_run(
    trial: Trial, host: Host, guest: str, memory: Memory
) -> None:
    trial.source.pause()
    stands(memory, trial.found_again())
    done = child("resume", json.dumps(trial.record.to_json()))
    assert done.returncode == 0, done.stderr
    runs_on(host, guest, memory, trial.record)


def child(*words: str) -> subprocess.CompletedProcess[str]:
    """Run child.py until it ends."""
    done = subprocess.run(
        [sys.executable, str(CHILD), *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    print(done.stderr, end="")
    return done


def test_it_stands_when_all_of_ours_are_killed_and_any_process_lets_it_run(
    may_hold: None, host: Host, guest: str, config_path: str | None, memory: Memory
) -> None:
    """bhyve keeps the FIFO that it was sent open; without a reader, the write would kill bhyve."""
    done = child("hold", guest, *([config_path] if config_path else []))
    record = PausedRecord.from_json(json.loads(done.stdout))
    paused = open_paused(record.to_json(), lambda _: host)
    try:
        assert done.returncode == -signal.SIGKILL
        stands(memory, paused)
    finally:
        paused.resume()
    runs_on(host, guest, memory, record)


def test_cat_lets_it_run_and_that_is_seen(
    trial: Trial, host: Host, guest: str, memory: Memory
) -> None:
    paused = trial.source.pause()
    meta = trial.directory.files.meta
    text = subprocess.run(
        ["/bin/cat", str(meta)], stdout=subprocess.PIPE, timeout=LIMIT_S, check=True
    ).stdout.lstrip()
    say(text.decode())
    assert parse(text) == trial.plan
    with pytest.raises(StaleError):
        paused.require_paused()
    paused.resume()
    runs_on(host, guest, memory, trial.record)


def everything_of(host: Host, guest: str, ncpus: int) -> list[tuple[object, ...]]:
    """Return every vCPU's registers, hidden parts of segments, and pending event."""
    numbers = (*range(reg.TR + 1), reg.EFER, reg.CR2)
    vm = host.open_vm(guest)
    try:
        return [
            (
                *vm.registers(vcpu, numbers),
                *(vm.descriptor(vcpu, one) for one in (*reg.SEGMENTS, reg.GDTR, reg.IDTR)),
                vm.pending_event(vcpu),
            )
            for vcpu in range(ncpus)
        ]
    finally:
        vm.close()


def test_the_fpu_is_stored_and_nothing_else_is_changed_by_it(
    trial: Trial, host: Host, guest: str, config: GuestConfig, memory: Memory
) -> None:
    """pause() stores the FPU; a second save in the same hold stores the same, changing nothing."""
    ncpus = int(config.section["keys"]["cpus"])
    paused = trial.source.pause()
    first = fpu_of(paused.states())
    say({name: len(data) for name, data in first.items()}, paused.reasons)
    wanted = [f"{STATE_PREFIX}{vcpu}" for vcpu in range(ncpus)]
    assert [*first] == wanted or paused.reasons, "an FPU is missing, and no reason is given"
    registers, before = everything_of(host, guest, ncpus), digest(memory)
    again, reasons = fpustate.save(host, guest, ncpus, trial.directory)
    assert everything_of(host, guest, ncpus) == registers
    assert digest(memory) == before
    assert fpu_of(again) == first
    assert [*reasons] == [*paused.reasons]
    assert not trial.directory.journal.exists()


def fpu_of(states: Sequence[State]) -> dict[str, bytes]:
    return {one.name: one.data for one in states if one.name.startswith(STATE_PREFIX)}


def test_two_holds_save_the_same_kinds_of_state(
    trial: Trial, host: Host, guest: str, config_path: str | None, memory: Memory
) -> None:
    first = trial.source.pause()
    first.resume()
    runs_on(host, guest, memory, trial.record)
    with rehearsed(host, guest, config_path) as again:
        assert again.plan == trial.plan
        second = again.source.pause()
        shapes = [
            [(one.name, len(one.data)) for one in paused.states()] for paused in (first, second)
        ]
        say(shapes[1], second.reasons)
        assert [shape for shape in shapes[0] if not shape[0].startswith(STATE_PREFIX)] == [
            shape for shape in shapes[1] if not shape[0].startswith(STATE_PREFIX)
        ]
        assert [*fpu_of(first.states())] == [*fpu_of(second.states())]
        second.resume()
        runs_on(host, guest, memory, again.record)

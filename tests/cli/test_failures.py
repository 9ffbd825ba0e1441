"""Moves that fail before their end, in each phase and by each fault.

In every case the guest runs on at the source with no heartbeat missing and no page wrong, the
destination has nothing left of the move, and a second attempt succeeds.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from guest import ram
from support.processes import is_gone, process_state
from support.waiting import until

from . import kinds
from .kinds import ANY, G4, QEMU, matrix
from .pipeline import BHYSEND, Pipeline, report, run
from .qemu import QemuTraveller, qemu_place
from .standin import StandinTraveller
from .tap import ANY_ROUND, Tap
from .travel import Host, Site, Traveller, keeper_of, limited

# After two live rounds comes the pause, whatever the guest does.
ROUNDS = ("-f", "-r", "2")


@dataclass(frozen=True)
class Phase:
    """The point at which the stream is stopped.

    gated: a command at the pause keeps END back until the receiver is gone.  Otherwise the rest of
    the stream would fit into a buffer, and the sender would be done before it could notice.
    """

    section: str
    round: int = ANY_ROUND
    nth: int = 0
    gated: bool = False


LAST_STATE = "the last state"

PHASES = {
    "head": Phase("CONFIG"),
    "round-0": Phase("MEMORY", 0, 9),
    "round-1": Phase("MEMORY", 1),
    "last-round": Phase("MEMORY", 2, gated=True),
    "state": Phase("STATE", gated=True),
    "before-END": Phase(LAST_STATE, gated=True),
}


@dataclass(frozen=True)
class Attempt:
    """A move whose stream stands still in the middle of a section."""

    pipeline: Pipeline
    tap: Tap
    to: Site


def receiver_killed(attempt: Attempt) -> None:
    attempt.pipeline[2].kill()
    attempt.pipeline[2].await_end()
    attempt.tap.close()


def receiver_interrupted(attempt: Attempt) -> None:
    # bhyrecv may not have begun, or may still work on earlier bytes; it ends at its next read.
    receiver = attempt.pipeline[2]
    until(lambda: receiver.catches(signal.SIGTERM), "the start of bhyrecv")
    receiver.kill(signal.SIGTERM)
    receiver.await_end()
    attempt.tap.close()


def pipe_closed(attempt: Attempt) -> None:
    attempt.tap.close()


def stream_damaged(attempt: Attempt) -> None:
    attempt.tap.flip()


def sender_interrupted(attempt: Attempt) -> None:
    attempt.pipeline[0].kill(signal.SIGINT)
    attempt.pipeline[0].await_end()
    attempt.tap.go()


def sender_killed(attempt: Attempt) -> None:
    attempt.pipeline[0].kill()
    attempt.pipeline[0].await_end()
    attempt.tap.go()


@dataclass(frozen=True)
class Fault:
    """A fault, and the statuses with which both programs may end."""

    act: Callable[[Attempt], None]
    sent: int
    received: tuple[int, ...]


FAULTS = {
    "receiver-killed": Fault(receiver_killed, 74, (-signal.SIGKILL,)),
    "receiver-interrupted": Fault(receiver_interrupted, 74, (75,)),
    "pipe-closed": Fault(pipe_closed, 74, (65,)),
    "receiver-refuses": Fault(stream_damaged, 74, (65,)),
    # Between two sections bhysend can still send ABORT, and bhyrecv's status is then that of a
    # guest that the source has given up.
    "sender-interrupted": Fault(sender_interrupted, 75, (65, 69)),
    "sender-killed": Fault(sender_killed, -signal.SIGKILL, (65,)),
}


def tap_in(where: Phase, guest: Traveller) -> Tap:
    """Return a tap that stops in a phase.

    Behind the last state bhysend waits for the command at the pause, before TIME and END.
    """
    if where.section != LAST_STATE:
        return Tap(where.section, where.round, where.nth)
    if isinstance(guest, StandinTraveller):  # the FPU of each vCPU, and the clock
        return Tap("STATE_OPTIONAL", nth=guest.spec.guest.cpus)
    return Tap("STATE")


def ran_on(host: Host, guest: Traveller, *, is_tidy: bool = True) -> None:
    """Assert that the guest goes on where it was, and that no process works on it any more."""
    guest.run_on(host, sweeps=1, is_tidy=is_tidy)
    assert host.files("destination") == []


# For QEMU, each phase and each fault once: the engine knows no hypervisor.
COVERED = [
    ("head", "receiver-interrupted"),
    ("round-0", "receiver-killed"),
    ("round-1", "sender-interrupted"),
    ("last-round", "receiver-refuses"),
    ("last-round", "receiver-killed"),
    ("state", "sender-killed"),
    ("state", "pipe-closed"),
    ("before-END", "sender-killed"),
]


@pytest.mark.parametrize(
    "kind, phase, fault", matrix([(phase, fault) for phase in PHASES for fault in FAULTS], COVERED)
)
def test_the_guest_runs_on(
    phase: str, fault: str, host: Host, small: Traveller, gate: tuple[Path, int]
) -> None:
    where, what = PHASES[phase], FAULTS[fault]
    to, tap = small.next(), tap_in(where, small)
    hook = ("-p", f"read -r line < {gate[0]}") if where.gated else ()
    # The memory that a killed bhyrecv leaves has no name, unless an option gives it a name.
    memory = () if fault == "receiver-killed" else small.named_memory(to)
    commands = (small.send(*ROUNDS, *hook), tap.argv, small.receive(to, *memory))
    with Pipeline(*commands, env=host.env, narrow=True) as pipeline, to.reaped():
        tap.reached()
        what.act(Attempt(pipeline, tap, to))
        if where.gated and pipeline[0].process.poll() is None:
            pipeline[1].await_end()
            os.write(gate[1], b"\n")
        sent, _, received = pipeline.wait()
        assert sent.status == what.sent, report(sent, received)
        assert received.status in what.received, report(sent, received)
        if fault == "receiver-killed":
            to.forsake()
        if fault == "sender-killed" and where.gated:
            until(lambda: "bhysend is gone; the guest runs on" in pipeline[0].stderr, "the keeper")
    to.assert_nothing_left()
    if sent.status > 0:
        assert "it runs here" in sent.stderr
    if received.status > 0:
        assert "nothing was started here" in received.stderr
    ran_on(host, small, is_tidy=(phase, fault) != ("head", "sender-killed"))
    small.move(host, sweeps=1)


@pytest.mark.parametrize(
    "kind, phase",
    [
        pytest.param("qemu", phase, marks=pytest.mark.guest)
        for phase in ("round-0", "round-1", "last-round", "state", "before-END")
        if kinds.EVERY or phase in ("round-0", "before-END")
    ],
)
def test_a_destination_that_dies_is_held_against_nobody(
    phase: str, host: Host, small: Traveller, gate: tuple[Path, int]
) -> None:
    where = PHASES[phase]
    to, tap = qemu_place(small.next()), tap_in(where, small)
    hook = ("-p", f"read -r line < {gate[0]}") if where.gated else ()
    commands = (small.send(*ROUNDS, *hook), tap.argv, small.receive(to, "-o", f"mem={to.ram}"))
    with Pipeline(*commands, env=host.env, narrow=True) as pipeline, to.reaped():
        tap.reached()
        # The file exists, and bhyrecv fills it.
        until(lambda: to.ram.exists() and ram.allocated_bytes(to.ram) > 0, "memory")
        [pid] = to.hypervisors()
        os.kill(pid, signal.SIGKILL)
        until(lambda: is_gone(pid), "the end of QEMU")
        tap.go()
        if where.gated:
            os.write(gate[1], b"\n")
        sent, _, received = pipeline.wait()
    assert received.status == 69, report(sent, received)
    assert "nothing was started here" in received.stderr
    to.assert_nothing_left()
    # bhysend cannot know of the failure unless its write fails while it still sends.
    assert sent.status in (74, 80), report(sent, received)
    if sent.status == 80:
        host.act(BHYSEND, "--resume", "proof")
    ran_on(host, small)
    small.move(host, sweeps=1)


@pytest.mark.parametrize("kind", [QEMU, G4])
def test_without_its_keeper_a_paused_guest_waits_for_the_operator(
    host: Host, small: Traveller, gate: tuple[Path, int]
) -> None:
    """If bhysend and the keeper are killed, nothing is lost, and nothing happens by itself."""
    tap = tap_in(PHASES["before-END"], small)
    commands = (small.send("-p", f"read -r line < {gate[0]}"), tap.argv)
    with Pipeline(*commands, env=host.env, narrow=True) as pipeline:
        tap.reached()
        os.kill(keeper_of(pipeline[0].pid), signal.SIGKILL)
        pipeline[0].kill()
        pipeline[0].await_end()
        tap.close()
    host.await_unlocked()
    [row] = host.rows()
    assert (row.guest, row.phase) == ("proof", "paused")
    assert small.place.is_held(host)
    refused = host.run(*BHYSEND, "--discard", "proof")
    assert refused.status == 69, report(refused)
    assert "this may be the only copy" in refused.stderr
    assert small.place.is_held(host)
    host.act(BHYSEND, "--resume", "proof")
    ran_on(host, small)


def test_what_cannot_be_recorded_is_not_done(host: Host, small: Traveller) -> None:
    """bhysend may write no byte into a file: it cannot record the pause, and so does not pause.

    bhysend's standard error is a file here too, so the test reads the message from the stream.
    """
    to = small.next()
    sent, received = run(["prlimit", "--fsize=0", *small.send()], small.receive(to), env=host.env)
    assert (sent.status, received.status) == (74, 69), report(sent, received)
    assert "the source gave up (status 74): cannot record the guest" in received.stderr
    to.assert_nothing_left()
    ran_on(host, small)


def test_a_hold_that_cannot_be_recorded_is_none(
    host: Host, small: Traveller, gate: tuple[Path, int]
) -> None:
    """bhysend may write no byte from the pause on: END is not written, and the guest runs on."""
    to, tap = small.next(), tap_in(PHASES["before-END"], small)
    commands = (
        small.send("-p", f"read -r line < {gate[0]}"),
        tap.argv,
        small.receive(to, *small.named_memory(to)),
    )
    with Pipeline(*commands, env=host.env, narrow=True) as pipeline:
        tap.reached()
        limit = host.run("prlimit", "--fsize=0", "--pid", str(pipeline[0].pid))
        assert limit.status == 0, report(limit)
        tap.go()
        os.write(gate[1], b"\n")
        sent, _, received = pipeline.wait()
        assert sent.status == 74, report(sent, received)
        assert received.status in (65, 69), report(sent, received)
    to.assert_nothing_left()
    ran_on(host, small)


@ANY
@pytest.mark.parametrize("form", [(), ("-k",)], ids=["plain", "kept"])
def test_the_limit_of_time_reaches_a_write_that_nobody_reads(
    form: tuple[str, ...], host: Host, small: Traveller
) -> None:
    read_end, write_end = os.pipe()
    try:
        [sent] = run(small.send("-T", "2s", *form), env=host.env, stdout=write_end)
    finally:
        os.close(read_end)
        os.close(write_end)
    assert sent.status == 75, report(sent)
    assert "-T 2.00 s is over;" in sent.stderr
    assert "it runs on here; allow more with -d, -r or -T" in sent.stderr
    ran_on(host, small)


@ANY
def test_the_limit_of_time_reaches_a_write_that_hardly_anybody_reads(
    host: Host, small: Traveller
) -> None:
    trickle = "import os, time\nwhile os.read(0, 4096): time.sleep(0.1)"
    command = [sys.executable, "-c", trickle]
    with Pipeline(small.send("-T", "2s"), command, env=host.env, narrow=True) as pipeline:
        sent = pipeline[0].await_end()
    assert sent.status == 75, report(sent)
    assert "-T 2.00 s is over;" in sent.stderr
    ran_on(host, small)


@ANY
def test_a_section_under_way_is_ended_when_the_time_is_over(host: Host, small: Traveller) -> None:
    """bhysend tells the destination why, although a slow pipe is nearly always inside a section."""
    slow = "import os, time\nwhile d := os.read(0, 8192): os.write(1, d); time.sleep(0.004)"
    to = small.next()
    commands = (small.send("-T", "2s"), [sys.executable, "-c", slow], small.receive(to))
    with Pipeline(*commands, env=host.env, narrow=True) as pipeline:
        sent, _, got = pipeline.wait()
    assert (sent.status, got.status) == (75, 69), report(sent, got)
    assert "the source gave up (status 75)" in got.stderr
    to.assert_nothing_left()
    ran_on(host, small)


@ANY
def test_a_forced_guest_does_not_wait_for_a_reader_that_is_none(
    host: Host, small: Traveller
) -> None:
    read_end, write_end = os.pipe()
    words = limited(small.send("-f", "-T", "1s"), "send.rounds.STALL_SECONDS=1")
    try:
        [sent] = run(words, env=host.env, stdout=write_end)
    finally:
        os.close(read_end)
        os.close(write_end)
    assert sent.status == 74, report(sent)
    assert "-T 1.00 s is over, and nothing was taken from the stream for 1 s" in sent.stderr
    ran_on(host, small)


@ANY
def test_a_full_file_system_stops_a_move(host: Host, small: Traveller) -> None:
    with open("/dev/full", "wb") as full:
        [sent] = run(small.send(), env=host.env, stdout=full)
    assert sent.status == 74, report(sent)
    assert "No space left on device" in sent.stderr
    ran_on(host, small)


@pytest.mark.parametrize("kind", [QEMU])
@pytest.mark.parametrize("options", [(), ("-u",)], ids=["started", "left-paused"])
def test_an_interrupt_during_the_load_starts_nothing(
    options: tuple[str, ...], host: Host, small: Traveller
) -> None:
    """bhyrecv's status must say where the guest is, even if a signal comes during the load.

    QEMU is stopped meanwhile, and does not go on, so bhyrecv does not wait for QEMU.
    """
    to, tap = small.next(), Tap("TIME")
    commands = (small.send(), tap.argv, small.receive(to, *options))
    with Pipeline(*commands, env=host.env) as pipeline:
        tap.reached()
        # At the end of each round bhyrecv asks QEMU whether it is alive.
        await_all_read(pipeline[2].pid)
        [pid] = to.hypervisors()
        os.kill(pid, signal.SIGSTOP)
        tap.go()
        sent = pipeline[0].await_end()
        pipeline[1].await_end()
        await_all_read(pipeline[2].pid)
        for _ in range(2):
            pipeline[2].kill(signal.SIGINT)
        received = pipeline[2].await_end()
    assert (sent.status, received.status) == (80, 75), report(sent, received)
    assert "interrupted by SIGINT" in received.stderr
    assert "nothing was started here" in received.stderr
    to.assert_nothing_left()
    host.act(BHYSEND, "--resume", "proof")
    ran_on(host, small)
    small.move(host, sweeps=1)


def await_all_read(pid: int) -> None:
    """Wait until a process has read all of its standard input, and sleeps, waiting for another.

    No process may still write into the pipe.
    """
    fd = os.open(f"/proc/{pid}/fd/0", os.O_RDONLY | os.O_NONBLOCK)
    try:
        until(lambda: fcntl.ioctl(fd, termios.FIONREAD, bytes(4)) == bytes(4), "an empty pipe")
        until(lambda: process_state(pid) == "S", "a process that sleeps")
    finally:
        os.close(fd)


# Two programs at once.


@pytest.fixture
def twin() -> Iterator[QemuTraveller]:
    """A guest with two QMP sockets."""
    second = Path(f"/dev/shm/bhyc-{os.getpid()}-second.qmp")
    guest = QemuTraveller(replace(kinds.SMALL, extra=("-qmp", f"unix:{second},server=on,wait=off")))
    try:
        yield guest
    finally:
        guest.close()
        second.unlink(missing_ok=True)


@pytest.mark.guest
def test_a_second_bhysend_is_refused_and_the_first_unharmed(
    host: Host, twin: QemuTraveller
) -> None:
    second = twin.spec.extra[1].removeprefix("unix:").removesuffix(",server=on,wait=off")
    to, tap = twin.next(), Tap("MEMORY", 0, nth=9)
    with Pipeline(twin.send(), tap.argv, twin.receive(to), env=host.env, narrow=True) as pipeline:
        tap.reached()
        [taken] = run(twin.send(), env=host.env)
        assert taken.status == 69, report(taken)
        assert f"another client holds {twin.at.qmp}" in taken.stderr
        [locked] = run([*BHYSEND, f"qemu:{second}"], env=host.env)
        assert locked.status == 69, report(locked)
        assert "another bhysend or bhyrecv works on it" in locked.stderr
        assert taken.output == locked.output == b""
        tap.go()
        sent, _, received = pipeline.wait()
    assert (sent.status, received.status) == (80, 0), report(sent, received)
    twin.settle(host, to)
    twin.prove()


def test_a_second_bhyrecv_for_one_place_is_refused(host: Host, small: Traveller) -> None:
    path = host.directory / "small.bhys"
    with path.open("wb") as file:
        [kept] = run(small.send("-k"), env=host.env, stdout=file)
    assert kept.status == 0, report(kept)
    to, tap = small.next(), Tap("MEMORY", 0, nth=9)
    with Pipeline(small.send(), tap.argv, small.receive(to), env=host.env) as pipeline:
        tap.reached()
        until(lambda: host.is_locked() and to.is_building(), "the first bhyrecv")
        with path.open("rb") as file:
            [second] = run(small.receive(to), env=host.env, stdin=file)
        assert second.status == 69, report(second)
        tap.go()
        sent, _, received = pipeline.wait()
    assert (sent.status, received.status) == (80, 0), report(sent, received)
    small.settle(host, to)
    small.prove()

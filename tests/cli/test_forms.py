"""The forms of a move, and where the guest is after each: real guests, real programs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from guest.qmp import run_command
from support.waiting import until

from . import kinds
from .kinds import ANY, G4, G5, QEMU, matrix
from .pipeline import BHYRECV, BHYSEND, Ended, Pipeline, report, run
from .qemu import QemuTraveller
from .tap import Tap
from .travel import Host, Site, Stable, Traveller, fifo

# A second QMP socket shows what the guest does while bhysend uses the first.
SECOND = Path(f"/dev/shm/bhyc-{os.getpid()}-seen.qmp")
SEEN = replace(kinds.SMALL, extra=("-qmp", f"unix:{SECOND},server=on,wait=off"))


@pytest.fixture(params=[QEMU, G5, G4])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stream_id(path: Path) -> str:
    """Return the id in the header of a stream."""
    return path.read_bytes()[32:48].hex()


def kept(host: Host, guest: Traveller, *options: str) -> Path:
    """Keep a checkpoint in a file; the guest runs on."""
    path = host.directory / "kept.bhys"
    with path.open("wb") as file:
        [sent] = run(guest.send("-k", *options), env=host.env, stdout=file)
    assert sent.status == 0, report(sent)
    assert "kept, it runs on here" in sent.stderr
    return path


def received(host: Host, path: Path, guest: Traveller, to: Site, *options: str) -> Ended:
    """Receive a stream from a file."""
    with path.open("rb") as file:
        [ended] = run(guest.receive(to, *options), env=host.env, stdin=file)
    return ended


def sent_away(host: Host, guest: Traveller, *options: str) -> Ended:
    """Send a guest to no destination; the guest is held afterwards."""
    [sent, _] = run(guest.send(*options), ["cat"], env=host.env)
    assert sent.status == 80, report(sent)
    return sent


def ran_on(host: Host, guest: Traveller) -> None:
    """Assert that the guest runs where it was, unharmed, and that nothing is recorded."""
    guest.run_on(host)
    assert not host.is_locked()


# Warm, kept, held.


def test_warm(host: Host, small: Traveller) -> None:
    sent, _ = small.move(host, send=("-r", "0"))
    assert "held here; 1 round," in sent.stderr


def test_kept_runs_on_and_its_stream_runs_later(host: Host, small: Traveller) -> None:
    path = kept(host, small)
    ran_on(host, small)
    to = small.next()
    with to.reaped():
        ended = received(host, path, small, to)
        assert ended.status == 0, report(ended)
        to.await_sweeps(2)
        numbers = to.beats()
        first = numbers[0]
        # The copy goes on from the moment of the checkpoint, as the source did.
        assert 1 < first <= small.beats()[-1]
        assert numbers == list(range(first, first + len(numbers)))
        ran_on(host, small)


def test_held_then_resumed(host: Host, small: Traveller) -> None:
    sent = sent_away(host, small)
    assert "bhysend --resume proof" in sent.stderr
    [row] = host.rows()
    assert (row.guest, row.phase, row.operand) == ("proof", "held", small.place.operand)
    assert small.place.is_held(host)
    silent = small.place.said()
    resumed = host.act(BHYSEND, "--resume", "proof")
    assert "runs" in resumed.stderr
    assert small.place.said().startswith(silent)
    ran_on(host, small)


OPERANDS = [("name",), ("id",), ("socket",)]


@pytest.mark.parametrize("kind, operand", matrix(OPERANDS, OPERANDS[2:], also=OPERANDS[:1]))
def test_held_then_discarded(host: Host, small: Traveller, operand: str) -> None:
    sent_away(host, small)
    [row] = host.rows()
    names = {"name": row.guest, "id": row.id, "socket": row.operand}
    host.act(BHYSEND, "--discard", names[operand])
    assert small.place.has_ended()
    small.assert_settled(host)
    assert host.run(*BHYSEND, "--resume", names[operand]).status == 69


@ANY
def test_a_held_guest_is_not_sent(host: Host, small: Traveller) -> None:
    sent_away(host, small)
    [again] = run(small.send(), env=host.env)
    assert again.status == 69, report(again)
    assert "held here since an earlier stream" in again.stderr
    assert again.output == b""
    assert len(host.rows()) == 1
    host.act(BHYSEND, "--resume", "proof")
    ran_on(host, small)


# bhyrecv -u.


def test_left_paused_then_resumed(host: Host, small: Traveller) -> None:
    to = small.next()
    ended = run(small.send(), small.receive(to, "-u"), env=host.env)
    assert [one.status for one in ended] == [80, 0], report(*ended)
    assert to.is_loaded(host)
    assert to.said() == b""
    [row] = host.rows(BHYRECV)
    assert (row.guest, row.phase, row.operand) == ("proof", "loaded", to.operand)
    host.act(BHYRECV, "--resume", row.id)
    assert host.rows(BHYRECV) == []
    assert host.run(*BHYRECV, "--discard", row.id).status == 69
    small.settle(host, to)
    small.prove()


def test_left_paused_then_discarded_and_taken_back(host: Host, small: Traveller) -> None:
    to = small.next()
    ended = run(small.send(), small.receive(to, "-u"), env=host.env)
    assert [one.status for one in ended] == [80, 0], report(*ended)
    assert to.is_loaded(host)
    host.act(BHYRECV, "--discard", "proof")
    assert to.hypervisors() == []
    assert not to.is_building()
    assert not to.is_loaded(host)
    assert host.rows(BHYRECV) == []
    host.act(BHYSEND, "--resume", "proof")
    ran_on(host, small)


# The same stream again.


def test_a_stream_starts_once(host: Host, small: Traveller) -> None:
    path = kept(host, small)
    for options, status in [((), 0), ((), 76), (("--again",), 0)]:
        to = small.next()
        with to.reaped():
            ended = received(host, path, small, to, *options)
            assert ended.status == status, report(ended)
            if status == 0:
                to.await_sweeps(1)
            else:
                assert f"stream {stream_id(path)} was started on this host before" in ended.stderr
                to.assert_nothing_left()
    ran_on(host, small)


# Options of the pipeline between.


def test_compressed(host: Host, small: Traveller) -> None:
    sent, _ = small.move(host, send=("-z", "3"))
    assert "held here" in sent.stderr


@ANY
def test_rate_and_progress_for_programs(kind: str, host: Host, small: Traveller) -> None:
    # At this rate round 0 takes longer than a second.
    rate = 32 if kind == "qemu" else 6
    options = ("-P", "-B", f"{rate}M", "-f", "-r", "2")
    sent, got = small.move(host, send=options, receive=("-P",))
    npages = small.npages
    for ended in (sent, got):
        rows = [line.split("\t") for line in ended.stderr.splitlines() if "\t" in line]
        assert rows, "more than a second went by"
        for row in rows:
            assert len(row) == 9
            assert row[0] == "progress"
            _, done, total, sent_pages, sent_bytes, time_ns, predicted_ns = map(int, row[2:])
            assert 0 < done <= total == npages
            assert sent_pages * 4096 <= sent_bytes
            assert predicted_ns >= -1
            # bhysend keeps to the rate from the first byte on, but for one section ahead; a slow
            # machine is only slower.
            if ended is sent and row[1] == "round":
                assert sent_bytes <= (rate << 20) * time_ns / 1e9 + (1 << 20)


def has_report(said: str) -> bool:
    """Say whether a message reports the progress and the rate of round 0."""
    return bool(re.search(r"^bhy\S+: guest proof: round 0: \d+%, [^;]*/s", said, re.MULTILINE))


@ANY
def test_a_signal_asks_for_a_report(host: Host, small: Traveller) -> None:
    to, tap = small.next(), Tap("MEMORY", 0, nth=9)
    with Pipeline(small.send(), tap.argv, small.receive(to), env=host.env, narrow=True) as pipeline:
        tap.reached()
        for stage in (pipeline[0], pipeline[2]):
            stage.kill(10)
            until(lambda stage=stage: has_report(stage.stderr), "a report")  # type: ignore[misc]
        tap.go()
        sent, _, got = pipeline.wait()
    assert (sent.status, got.status) == (80, 0), report(sent, got)
    assert has_report(sent.stderr) and has_report(got.stderr)
    small.settle(host, to)
    small.prove()


LIMITS = [("-r 2", "more than -d"), ("-T 1ms", "is over")]


@pytest.mark.parametrize("kind, limit, why", matrix(LIMITS, LIMITS[:1]))
def test_a_pause_that_cannot_be_reached_is_none(
    host: Host, small: Traveller, limit: str, why: str
) -> None:
    to = small.next()
    sent, got = run(small.send("-d", "1us", *limit.split()), small.receive(to), env=host.env)
    assert (sent.status, got.status) == (75, 69), report(sent, got)
    assert why in sent.stderr
    assert "the source gave up (status 75)" in got.stderr
    to.assert_nothing_left()
    ran_on(host, small)


@ANY
def test_force_finishes_all_the_same(host: Host, small: Traveller) -> None:
    sent, _ = small.move(host, send=("-f", "-d", "1us", "-r", "2"))
    assert "held here; 3 rounds" in sent.stderr


# The command at the pause.


@pytest.fixture
def seen(kind: str, stable: Stable) -> Iterator[Traveller]:
    if kind != "qemu":
        yield kinds.small(kind, stable)
        return
    yield stable.lend("seen", partial(QemuTraveller, SEEN))
    SECOND.unlink(missing_ok=True)


def test_the_command_runs_while_the_guest_is_paused(kind: str, host: Host, seen: Traveller) -> None:
    marker, gate = host.directory / "marker", host.directory / "gate"
    command = (
        f'read -r line; echo "$BHYSEND_GUEST $BHYSEND_ID $?" > {marker}.new; '
        f"mv {marker}.new {marker}; echo noise; read -r line < {gate}"
    )
    path = host.directory / "seen.bhys"
    with (
        fifo(gate) as opener,
        path.open("wb") as file,
        Pipeline(seen.send("-p", command), env=host.env, stdout=file) as pipeline,
    ):
        until(marker.exists, "the command")
        is_paused = seen_paused if kind == "qemu" else partial(seen.place.is_held, host)
        until(is_paused, "the pause")
        [row] = host.rows()
        assert row.phase == "paused"
        # The command's input is empty (read fails), and its output goes to standard error.
        assert marker.read_text() == f"proof {row.id} 1\n"
        os.write(opener, b"\n")
        [sent] = pipeline.wait()
    assert sent.status == 80, report(sent)
    assert "noise" in sent.stderr
    assert stream_id(path) == row.id
    to = seen.next()
    assert received(host, path, seen, to).status == 0
    seen.settle(host, to)
    seen.prove()


def seen_paused() -> bool:
    return bool(run_command(SECOND, "query-status", {})["status"] == "postmigrate")


@ANY
def test_a_command_that_fails_lets_the_guest_run_on(host: Host, small: Traveller) -> None:
    to = small.next()
    sent, got = run(small.send("-p", "exit 3"), small.receive(to), env=host.env)
    assert (sent.status, got.status) == (69, 69), report(sent, got)
    assert "the -p command ended with status 3" in sent.stderr
    assert "the source gave up (status 69)" in got.stderr
    to.assert_nothing_left()
    ran_on(host, small)
    small.move(host, send=("-p", "true"))


@pytest.mark.parametrize("kind", [QEMU])
def test_a_command_that_fails_spoils_no_kept_guest(host: Host, small: Traveller) -> None:
    [sent] = run(small.send("-k", "-p", "kill -9 $$"), env=host.env)
    assert sent.status == 69, report(sent)
    assert "the -p command was killed by SIGKILL (signal 9)" in sent.stderr
    ran_on(host, small)


# Dry runs.


@pytest.mark.parametrize("kind", [QEMU, G5])
def test_both_sides_are_asked_and_nothing_is_touched(host: Host, small: Traveller) -> None:
    to = small.next()
    sent, got = run(small.send("-n"), small.receive(to, "-n"), env=host.env)
    assert (sent.status, got.status) == (0, 0), report(sent, got)
    assert "it can be moved from here; nothing was changed" in sent.stderr
    assert f"the destination needs: {small.needs}" in sent.stderr
    assert "the head is sound" in got.stderr
    assert "this host can take the guest" in got.stderr
    to.assert_nothing_left()
    ran_on(host, small)


@ANY
def test_a_dry_run_names_what_is_missing(host: Host, small: Traveller) -> None:
    to = small.next()
    sent, got = run(small.send("-n"), small.receive_bare(to, "-n"), env=host.env)
    assert (sent.status, got.status) == (0, 76), report(sent, got)
    for name in small.missing:
        assert name in got.stderr
    ran_on(host, small)


@ANY
def test_a_dry_run_is_not_started(host: Host, small: Traveller) -> None:
    to = small.next()
    sent, got = run(small.send("-n"), small.receive(to), env=host.env)
    assert got.status == 64, report(sent, got)
    assert "bhyrecv -n" in got.stderr
    to.assert_nothing_left()


@pytest.mark.parametrize("kind", [QEMU, G5])
def test_a_dry_run_for_programs(host: Host, small: Traveller) -> None:
    [sent] = run(small.send("-n", "-P", "-B", "100M"), env=host.env)
    assert sent.status == 0, report(sent)
    rows = [line.split("\t") for line in sent.output.decode().splitlines()]
    values = {row[0]: row[1] for row in rows if len(row) == 2}
    assert values["name"] == "proof"
    assert int(values["pages"]) == small.npages
    assert 0 < int(values["data_pages"]) <= int(values["touched_pages"]) < int(values["pages"])
    assert int(values["dirty_bytes_per_second"]) > 0
    [link] = [row for row in rows if row[0] == "link"]
    assert link[1:3] == ["-B", str(100 << 20)]
    ran_on(host, small)


@ANY
def test_a_kept_stream_is_verified_to_the_end(host: Host, small: Traveller) -> None:
    path = kept(host, small)
    assert received(host, path, small, small.next(), "-n").status == 0
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    ended = received(host, path, small, small.next(), "-n")
    assert ended.status == 65
    assert "(END) at offset 0x" in ended.stderr


# Guests that the destination refuses before any memory moves.


def refused(host: Host, guest: Traveller, command: list[str], *names: str) -> None:
    """Assert that the destination refuses a guest and names why, and that the guest runs on."""
    sent, got = run(guest.send(), command, env=host.env)
    assert (sent.status, got.status) == (74, 76), report(sent, got)
    for name in names:
        assert name in got.stderr, report(got)
    assert "nothing was started here" in got.stderr
    ran_on(host, guest)


@pytest.mark.parametrize("kind", [QEMU, G5])
def test_what_is_missing_is_named(host: Host, small: Traveller) -> None:
    to = small.next()
    refused(host, small, small.receive_bare(to), *small.missing)
    to.assert_nothing_left()


def test_a_guest_that_runs_is_not_overwritten(host: Host, small: Traveller) -> None:
    there = small.receive(small.place)
    sent, got = run(small.send(), there, env=host.env)
    assert sent.status == 74, report(sent, got)
    assert got.status in (69, 76), report(sent, got)
    ran_on(host, small)

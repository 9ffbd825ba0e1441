"""Moves that only a bhyve guest can make, with the stand-in.

Ten moves in a row; a guest above 4 GiB whose memory is nearly all holes; cold snapshot files; a
pause in which bhyve has to write the memory itself; and the deaths of either bhyve: the source's
while it runs, the destination's while it restores and no program knows whether the guest has run.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from support.waiting import until

from . import kinds
from .attempt import Gate
from .kinds import G4, G5
from .pipeline import BHYRECV, BHYSEND, Pipeline, report, run
from .standin import StandinPlace, StandinTraveller
from .tap import Tap
from .test_answered import in_form
from .travel import Host, Stable, Traveller, script

pytestmark = pytest.mark.standin

BOTH = pytest.mark.parametrize("kind", [G5, G4])


@pytest.fixture(params=[G5])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def large(kind: str, stable: Stable) -> StandinTraveller:
    return kinds.large(kind, stable)


@contextmanager
def own(kind: str) -> Iterator[StandinTraveller]:
    """A guest that need not survive the test."""
    guest = kinds.own(kind)
    try:
        yield guest
    finally:
        guest.close()


# Ten moves, and a large guest.


@BOTH
def test_ten_moves_in_a_row(kind: str, host: Host) -> None:
    with own(kind) as guest:
        for leg in range(10):
            to = guest.next("there" if leg % 2 == 0 else "here")
            ended = run(guest.send(), guest.receive(to), env=host.env)
            assert [one.status for one in ended] == [80, 0], f"{leg}: {report(*ended)}"
            guest.settle(host, to)
            to.await_sweeps(1)
        guest.prove()
        assert len(host.files("destination")) == 10


@BOTH
@pytest.mark.parametrize("options", [(), ("-r", "0"), ("-z", "3")], ids=["plain", "warm", "zstd"])
def test_a_large_guest_moves(options: tuple[str, ...], host: Host, large: StandinTraveller) -> None:
    sent, _ = large.move(host, send=options)
    assert "held here" in sent.stderr
    assert large.at.allocated_bytes() < 64 << 20


@BOTH
@pytest.mark.parametrize("form", ["three-stages", "command"])
def test_a_large_guest_is_handed_over(form: str, host: Host, large: StandinTraveller) -> None:
    to = large.next()
    ended = run(*in_form(form, large.send(), large.receive(to)), env=host.env)
    assert [one.status for one in ended] == [0] * len(ended), report(*ended)
    large.hand_over(host, to)
    large.prove()


def test_a_large_guest_is_kept_and_started_later(host: Host, large: StandinTraveller) -> None:
    path = host.directory / "kept.bhys"
    with path.open("wb") as file:
        [sent] = run(large.send("-k"), env=host.env, stdout=file)
    assert sent.status == 0, report(sent)
    assert path.stat().st_size < 64 << 20
    large.run_on(host)
    to = large.next()
    with to.reaped(), path.open("rb") as file:
        [received] = run(large.receive(to), env=host.env, stdin=file)
        assert received.status == 0, report(received)
        to.await_sweeps(1)


def test_a_large_guest_is_held_and_resumed(host: Host, large: StandinTraveller) -> None:
    to = large.next()
    ended = run(large.send(), large.receive(to, "-u"), env=host.env)
    assert [one.status for one in ended] == [80, 0], report(*ended)
    assert to.is_loaded(host)
    assert large.place.is_held(host)
    host.act(BHYRECV, "--discard", large.name)
    to.assert_nothing_left()
    host.act(BHYSEND, "--resume", large.name)
    large.run_on(host)


# Moves through snapshot files.


@BOTH
def test_suspended_files_become_a_stream_and_files_again(kind: str, host: Host) -> None:
    with own(kind) as guest:
        place = guest.at
        snapshot = place.rig.suspend(guest.name)
        until(place.has_ended, "the end of the suspended")
        there = host.directory / "there"
        there.mkdir()
        send = [*place.environment, *BHYSEND, "-C", str(place.config), str(snapshot.path)]
        ended = run(send, [*place.environment, *BHYRECV, "-S", str(there)], env=host.env)
        assert [one.status for one in ended] == [0, 0], report(*ended)
        for path in (snapshot.path, snapshot.kern, snapshot.meta):
            assert (there / path.name).read_bytes() == path.read_bytes()
        # Started, the guest goes on where it was suspended, but for its FPU, which bhyve forgets.
        to = guest.next()
        to.console.forgives_fpu = True
        ended = run(send, guest.receive(to), env=host.env)
        assert [one.status for one in ended] == [0, 0], report(*ended)
        guest.arrive(to)
        guest.prove()


# If the null device cannot be mounted, bhyve writes the memory itself.


@pytest.fixture
def unmounted(host: Host) -> Host:
    """Make a host on which no program may mount anything."""
    directory = host.directory / "no-mount"
    directory.mkdir()
    script(directory / "mount", "echo not permitted >&2; exit 32")
    host.env["PATH"] = f"{directory}:{host.env['PATH']}"
    return host


@BOTH
def test_without_the_null_device_it_moves(unmounted: Host, small: Traveller) -> None:
    sent, _ = small.move(unmounted)
    assert "memory file: bhyve writes the memory into" in sent.stderr
    assert "cannot mount the null device: not permitted" in sent.stderr


@BOTH
def test_without_the_null_device_it_comes_back(unmounted: Host, small: Traveller) -> None:
    to = small.next()
    sent, received = run(small.send("-p", "exit 3"), small.receive(to), env=unmounted.env)
    assert (sent.status, received.status) == (69, 69), report(sent, received)
    small.run_on(unmounted)
    [sent, _] = run(small.send(), ["cat"], env=unmounted.env)
    assert sent.status == 80, report(sent)
    unmounted.act(BHYSEND, "--resume", small.name)
    small.run_on(unmounted)


# Failures of the destination's bhyve, from GO on.


@contextmanager
def restoring(form: str, host: Host, guest: StandinTraveller, *fail: str) -> Iterator[Restoring]:
    """Begin a move to a host whose bhyve fails in the ways of `fail` when it restores."""
    to = guest.next()
    to.rig.settings(fail=list(fail))
    with (
        Pipeline(*in_form(form, guest.send(), guest.receive(to)), env=host.env) as pipeline,
        to.reaped(),
    ):
        yield Restoring(host, pipeline, to)


class Restoring:
    """A move, and the place to which it goes."""

    def __init__(self, host: Host, pipeline: Pipeline, to: StandinPlace) -> None:
        self.host, self.pipeline, self.to = host, pipeline, to

    def await_restore(self) -> None:
        """Wait until bhyve -r has been let go, and restores."""

        def is_released() -> bool:
            files = self.to.staging.glob("bhyrecv-*/ckp")
            return any(path.stat().st_size == self.to.memory_bytes for path in files)

        until(lambda: self._is_started() and is_released(), "the release of bhyve -r")

    def _is_started(self) -> bool:
        records = (self.host.state / "destination").glob("*.json")
        return any(json.loads(path.read_text())["phase"] == "started" for path in records)

    def let_go(self) -> None:
        """Let the restore go on."""
        (self.to.rig.directory / "release").touch()


def came_back(host: Host, guest: StandinTraveller, to: StandinPlace) -> None:
    """Assert that the guest runs where it was, `to` is empty, and a second attempt succeeds."""
    to.assert_nothing_left()
    guest.run_on(host)
    to.rig.settings(fail=[])
    guest.move(host, to=to)


@BOTH
@pytest.mark.parametrize("form", ["three-stages", "command"])
def test_a_restore_that_fails_brings_the_guest_back(kind: str, form: str, host: Host) -> None:
    with own(kind) as guest:
        with restoring(form, host, guest, "restore") as move:
            sent, *_ = move.pipeline.wait()
            assert sent.status == 69, report(sent)
            assert "bhyve -r: Failed to restore vhpet" in sent.stderr
        came_back(host, guest, move.to)


@pytest.mark.parametrize("form", ["three-stages", "command"])
def test_a_bhyve_that_is_killed_while_it_restores_has_not_run(form: str, host: Host) -> None:
    with own("g5") as guest:
        with restoring(form, host, guest, "slow-restore") as move:
            move.await_restore()
            [pid] = move.to.hypervisors()
            os.kill(pid, signal.SIGKILL)
            sent, *_ = move.pipeline.wait()
            assert sent.status == 69, report(sent)
        came_back(host, guest, move.to)


@pytest.mark.parametrize("form", ["three-stages", "command"])
def test_a_bhyve_that_may_have_run_leaves_it_to_the_operator(form: str, host: Host) -> None:
    """bhyve ends after its socket appeared: no program can know whether a vCPU has run."""
    with own("g5") as guest:
        with restoring(form, host, guest, "restore-late") as move:
            sent, *_ = move.pipeline.wait()
            assert sent.status == 81, report(sent)
        assert [(row.guest, row.phase) for row in host.rows()] == [(guest.name, "in-doubt")]
        assert guest.place.is_held(host)
        assert host.run(*BHYSEND, "--resume", guest.name).status == 69
        resumed = host.run(*BHYSEND, "--resume", "--in-doubt", guest.name)
        assert resumed.status == 0, report(resumed)
        guest.run_on(host)


def test_a_bhyrecv_that_is_killed_while_bhyve_restores_is_asked_about(host: Host) -> None:
    """bhyve goes on without bhyrecv; when the operator asks, the guest runs."""
    with own("g5") as guest, restoring("three-stages", host, guest, "slow-restore") as move:
        move.await_restore()
        move.pipeline[1].kill()
        sent, *_ = move.pipeline.wait()
        assert sent.status == 81, report(sent)
        move.let_go()
        until(move.to.runs, "the guest there")
        [row] = host.rows()
        asked = run([*BHYRECV, "-q", row.id], [*BHYSEND, "-A"], env=host.env)
        assert asked[-1].status == 0, report(*asked)
        guest.hand_over(host, move.to)
        guest.prove()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_bhyve_restores_is_too_late(
    number: signal.Signals, host: Host, gate: Gate
) -> None:
    """bhyrecv's status must still say where the guest is."""
    with own("g5") as guest:
        to = guest.next()
        to.rig.settings(fail=["slow-restore"])
        with Pipeline(guest.send(), guest.receive(to), env=host.env) as pipeline:
            move = Restoring(host, pipeline, to)
            move.await_restore()
            pipeline[1].kill(number)
            move.let_go()
            ended = pipeline.wait()
        assert [one.status for one in ended] == [80, 0], report(*ended)
        guest.settle(host, to)
        guest.prove()


# Files that a killed bhyrecv leaves.


def test_what_a_killed_bhyrecv_left_goes_with_the_next(host: Host, small: Traveller) -> None:
    """These files may be as large as the guest's memory, and no other program removes them."""
    to, tap = small.next(), Tap("MEMORY", 0, nth=9)
    commands = (small.send(), tap.argv, small.receive(to))
    with Pipeline(*commands, env=host.env, narrow=True) as pipeline:
        tap.reached()
        until(to.is_building, "the memory file")
        pipeline[2].kill()
        pipeline[2].await_end()
        tap.close()
        pipeline.wait()
    assert to.is_building()
    small.run_on(host)
    small.move(host, to=to)
    assert not to.is_building()


# Several commands at once.


def test_a_second_bhysend_of_one_guest_is_refused(host: Host, small: Traveller) -> None:
    to, tap = small.next(), Tap("MEMORY", 0, nth=9)
    commands = (small.send(), tap.argv, small.receive(to))
    with Pipeline(*commands, env=host.env, narrow=True) as pipeline:
        tap.reached()
        [second] = run(small.send(), env=host.env)
        assert second.status == 69, report(second)
        assert second.output == b""
        tap.go()
        sent, _, received = pipeline.wait()
    assert (sent.status, received.status) == (80, 0), report(sent, received)
    small.settle(host, to)
    small.prove()

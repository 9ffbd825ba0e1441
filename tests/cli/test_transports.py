"""The proof guest, which has 512 MiB and rewrites tens of MiB each second, through transports.

The guest moves live, again and again, through every kind of program that passes bytes in order.
test_proof.py shows that the guest's proof notices faults; tests/standin/test_proof.py shows this
for the stand-in.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.waiting import until

from . import kinds
from .pipeline import BHYSEND, Ended, Pipeline, report, run
from .relay import SLOW
from .sshd import Sshd, free_port, listens
from .tap import Hold
from .travel import Host, Site, Traveller


@pytest.fixture(params=[kinds.QEMU, kinds.G5, kinds.G4])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def arrived(host: Host, guest: Traveller, to: Site, sent: Ended, received: Ended) -> None:
    """Assert that a move succeeded, and note the guest's new place."""
    assert (sent.status, received.status) == (80, 0), report(sent, received)
    rounds = re.search(r"held here; (\d+) rounds", sent.stderr)
    assert rounds and int(rounds[1]) >= 3, "two live rounds come before the pause"
    guest.settle(host, to)
    guest.prove()


@pytest.mark.parametrize(
    "filters",
    [
        [],
        [["mbuffer", "-q", "-m", "64M"]],
        [["zstd", "-q", "-c", "-1"], ["zstd", "-q", "-d", "-c"]],
        [["pv", "-q"]],
        [[*SLOW]],
    ],
    ids=["pipe", "mbuffer", "zstd", "pv", "slow"],
)
def test_it_moves_through_a_filter(host: Host, proof: Traveller, filters: list[list[str]]) -> None:
    to = proof.next()
    ended = run(proof.send(), *filters, proof.receive(to), env=host.env)
    assert [one.status for one in ended[1:-1]] == [0] * len(filters), report(*ended)
    arrived(host, proof, to, ended[0], ended[-1])


def test_it_moves_through_ssh(host: Host, proof: Traveller, sshd: Sshd) -> None:
    to = proof.next()
    remote = sshd.command(proof.receive(to), BHYSEND_STATE_DIR=str(host.state))
    sent, received = run(proof.send(), remote, env=host.env)
    # bhyrecv's message has come through another program's connection and shell.
    assert "it runs here" in received.stderr
    arrived(host, proof, to, sent, received)


def test_it_moves_through_a_socket(host: Host, proof: Traveller) -> None:
    to, port = proof.next(), str(free_port())
    listener = ["nc", "-l", "127.0.0.1", port]
    with Pipeline(listener, proof.receive(to), env=host.env) as there:
        until(lambda: listens(int(port)), "nc")
        sent, _ = run(proof.send(), ["nc", "-N", "127.0.0.1", port], env=host.env)
        _, received = there.wait()
    arrived(host, proof, to, sent, received)


def test_it_moves_through_a_file(host: Host, proof: Traveller) -> None:
    to, path = proof.next(), host.directory / "proof.bhys"
    with path.open("wb") as file:
        [sent] = run(proof.send(), env=host.env, stdout=file)
    with path.open("rb") as file:
        [received] = run(proof.receive(to), env=host.env, stdin=file)
    arrived(host, proof, to, sent, received)


# Copies of the stream, and readers that come late.


def sound(host: Host, guest: Traveller, path: Path) -> None:
    """Assert that a stream in a file is verified to its end, by a host that has not seen it yet."""
    other = Host(host.directory / "other")
    with path.open("rb") as file:
        [ended] = run(guest.receive(guest.next(), "-n"), env=other.env, stdin=file)
    assert ended.status == 0, report(ended)
    assert "the stream is sound" in ended.stderr


def test_a_copy_made_on_the_way_is_sound(host: Host, proof: Traveller) -> None:
    to, path = proof.next(), host.directory / "proof.bhys"
    ended = run(proof.send(), ["tee", str(path)], proof.receive(to), env=host.env)
    arrived(host, proof, to, ended[0], ended[-1])
    sound(host, proof, path)


@pytest.mark.parametrize("options", [(), ("-k",)], ids=["plain", "kept"])
def test_what_is_read_after_the_guest_runs_again_is_sound(
    options: tuple[str, ...], host: Host, proof: Traveller
) -> None:
    """The last bytes stay in pipes until the guest has rewritten what they were made of."""
    hold, path = Hold(), host.directory / "proof.bhys"
    with (
        path.open("wb") as file,
        Pipeline(proof.send(*options), hold.argv, env=host.env, stdout=file) as pipeline,
    ):
        hold.reached()
        sent = pipeline[0].await_end()
        assert sent.status == (0 if options else 80), report(sent)
        if not options:
            host.act(BHYSEND, "--resume", proof.name)
        proof.run_on(host)
        before = path.stat().st_size
        hold.go()
        pipeline.wait()
    assert path.stat().st_size > before
    sound(host, proof, path)

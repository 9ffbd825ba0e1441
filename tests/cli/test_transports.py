"""The proof guest, 512 MiB of memory and tens of them rewritten each second, through transports.

It is moved live, on and on, through whatever passes bytes in order.  Then the move is stopped
short of the start, and what arrived is compared with what was left, byte by byte.  Last, it is
shown that all of this would notice: one byte that changes on the way, and one page that is older
than it should be.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest import Spec, ram

from .pipeline import BHYRECV, Ended, Pipeline, report, run, until
from .sshd import Sshd, free_port, listens
from .tap import Tap
from .travel import Host, Place, Stable, Traveller

pytestmark = pytest.mark.guest

PROOF = Spec()


@pytest.fixture
def proof(stable: Stable) -> Traveller:
    return stable.lend(PROOF)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


def arrived(host: Host, guest: Traveller, to: Place, sent: Ended, received: Ended) -> None:
    """Assert that a move was one, and go on with the guest where it is now."""
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
    ],
    ids=["pipe", "mbuffer", "zstd", "pv"],
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
    # It has come through another program's connection and shell, and still says who it is.
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


def loaded(host: Host, guest: Traveller) -> Place:
    """Move a guest and stop short of its start, its memory in a file with a name."""
    to = guest.next()
    options = ("-u", "-o", f"mem={to.ram}")
    ended = run(guest.send(), guest.receive(to, *options), env=host.env)
    assert [one.status for one in ended] == [80, 0], report(*ended)
    assert [(row.guest, row.phase) for row in host.rows(BHYRECV)] == [("proof", "loaded")]
    assert to.status() == "paused"
    return to


def test_memory_arrives_byte_for_byte(host: Host, proof: Traveller) -> None:
    # The file of the first source has a name; of a later one it has none any more.
    source = ram_of(proof)
    to = loaded(host, proof)
    assert filecmp.cmp(source, to.ram, shallow=False)
    assert ram.allocated_bytes(to.ram) <= ram.allocated_bytes(source)
    host.act(BHYRECV, "--resume", "proof")
    assert host.rows(BHYRECV) == []
    proof.settle(host, to)
    proof.prove()


def ram_of(guest: Traveller) -> Path:
    """Return a name of the memory of a guest, wherever it lives."""
    if guest.place.ram.exists():
        return guest.place.ram
    for entry in Path(f"/proc/{guest.place.pid}/fd").iterdir():
        if "/bhyrecv-" in str(entry.readlink()):
            return entry
    raise LookupError("the guest's memory is in no file")


# The proof can fail.


def test_one_byte_changed_on_the_way_is_refused(host: Host, proof: Traveller) -> None:
    to, tap = proof.next(), Tap("MEMORY", 0, nth=100)
    with Pipeline(proof.send(), tap.argv, proof.receive(to), env=host.env) as pipeline:
        tap.reached()
        tap.flip()
        sent, _, received = pipeline.wait()
    assert (sent.status, received.status) == (74, 65), report(sent, received)
    assert "section 105 (MEMORY) at offset 0x" in received.stderr
    assert "are not what was sent" in received.stderr
    assert "nothing was started here" in received.stderr
    assert "it runs here" in sent.stderr
    to.assert_nothing_left()
    assert host.rows() == []
    proof.prove()


def test_one_page_older_than_it_should_be_is_noticed(host: Host) -> None:
    # A guest of its own: it does not survive the proof.
    guest = Traveller(PROOF)
    try:
        before = ram.owned_pages(guest.place.ram)
        guest.place.serial.await_heartbeats(10)
        to = loaded(host, guest)
        after = ram.owned_pages(to.ram)
        index = next(
            index
            for index, page in after.items()
            if index in before and before[index].generation < page.generation
        )
        old, new = before[index].generation, after[index].generation
        ram.patch(to.ram, after[index].offset_bytes, ram.page_content(index, old))
        host.act(BHYRECV, "--resume", "proof")
        guest.arrive(to)
        to.serial.await_fault(rf"^BAD page={index} want={new} got={old}$")
    finally:
        guest.close()

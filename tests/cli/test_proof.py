"""Moves of the proof guest under QEMU, compared byte by byte.

The move is stopped just before the start, and the memory at the destination is compared with the
memory at the source.  Then the tests show that the guest's own proof notices one byte that changes
on the way, and one page that is too old.
"""

from __future__ import annotations

import filecmp

import pytest

from guest import ram

from .kinds import PROOF, QEMU
from .pipeline import BHYRECV, Pipeline, report, run
from .qemu import QemuPlace, QemuTraveller, qemu
from .tap import Tap
from .travel import Host, Traveller

pytestmark = pytest.mark.guest


@pytest.fixture(params=[QEMU])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ours(proof: Traveller) -> QemuTraveller:
    return qemu(proof)


def loaded(host: Host, guest: QemuTraveller) -> QemuPlace:
    """Move a guest, but do not start it; its memory at the destination is a file with a name."""
    to = guest.next()
    options = ("-u", "-o", f"mem={to.ram}")
    ended = run(guest.send(), guest.receive(to, *options), env=host.env)
    assert [one.status for one in ended] == [80, 0], report(*ended)
    assert [(row.guest, row.phase) for row in host.rows(BHYRECV)] == [("proof", "loaded")]
    assert to.status() == "paused"
    return to


def test_memory_arrives_byte_for_byte(host: Host, ours: QemuTraveller) -> None:
    source = ours.memory_file()
    to = loaded(host, ours)
    assert filecmp.cmp(source, to.ram, shallow=False)
    assert ram.allocated_bytes(to.ram) <= ram.allocated_bytes(source)
    host.act(BHYRECV, "--resume", "proof")
    assert host.rows(BHYRECV) == []
    ours.settle(host, to)
    ours.prove()


# The guest's proof can fail.


def test_one_byte_changed_on_the_way_is_refused(host: Host, ours: QemuTraveller) -> None:
    to, tap = ours.next(), Tap("MEMORY", 0, nth=100)
    with Pipeline(ours.send(), tap.argv, ours.receive(to), env=host.env) as pipeline:
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
    ours.prove()


def test_one_page_older_than_it_should_be_is_noticed(host: Host) -> None:
    # This test boots its own guest, because the guest does not survive the test.
    guest = QemuTraveller(PROOF)
    try:
        before = ram.owned_pages(guest.at.ram)
        guest.at.serial.await_heartbeats(10)
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

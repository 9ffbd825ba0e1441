"""The pages of a live guest that are read: no page is lost, and reading allocates none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from bhystream.backend.bhyve.memory import Memory
from bhystream.guest import PAGE_BYTES
from bhystream.send.transfer import Transfer
from bhystream.standin.kernel import StandinHost
from bhystream.standin.vm import StandinVm
from bhystream.stream import format as fmt
from bhystream.stream.format import Form, Header
from bhystream.stream.writer import Writer
from standin.rig import Guest, Rig, Spec

from .bhyve_rig import ID, Two, require_sink, two_hosts

NPAGES = (64 << 20) // PAGE_BYTES
BIG = Spec(memory="8G", touched="64M")
# An upper bound of the memory that fpu.py borrows from the guest, whether it was touched or not.
STUB_BYTES = 64 << 10


@pytest.fixture
def two() -> Iterator[Two]:
    with two_hosts() as made:
        yield made


def swap_out(rig: Rig, guest: Guest) -> None:
    """Let mincore(2) answer as if every page of a guest were in swap."""
    (rig.directory / "vmm" / f"{guest.name}.swapped").write_bytes(b"\1" * NPAGES)


def count(memory: Memory) -> int:
    return sum(end - first for first, end in memory.touched())


def test_only_touched_pages_are_read_where_mincore_tells_them(two: Two) -> None:
    two.start()
    memory = Memory(two.here.host, "g")
    assert 1024 <= count(memory) < 2048
    memory.close()


@pytest.mark.parametrize("swap_used_bytes", [1, 1 << 30])
def test_every_page_is_read_where_the_host_swaps(two: Two, swap_used_bytes: int) -> None:
    swap_out(two.here, two.start())
    memory = Memory(two.here.host, "g")
    assert count(memory) == 0
    two.here.settings(swap_used_bytes=swap_used_bytes)
    assert count(memory) == NPAGES
    memory.close()


@pytest.mark.parametrize("value", ["1", "", "2"])
def test_every_page_is_read_where_mincore_tells_nothing(two: Two, value: str) -> None:
    two.start()
    two.here.settings(sysctl={"vm.mincore_mapped": value})
    memory = Memory(two.here.host, "g")
    assert list(memory.touched()) == [(0, NPAGES)]
    memory.close()


def test_swap_that_comes_into_use_while_mincore_is_asked_is_seen(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.start()
    memory = Memory(two.here.host, "g")
    real = StandinVm.resident

    def swapping(self: StandinVm, *args: object) -> bytes:
        found = real(self, *args)  # type: ignore[arg-type]
        two.here.settings(swap_used_bytes=4096)
        return bytes(len(found))

    monkeypatch.setattr(StandinVm, "resident", swapping)
    assert count(memory) == NPAGES
    memory.close()


def test_lowmem_and_highmem_are_covered_each_by_its_extents(two: Two) -> None:
    two.start(Spec(memory="4G"))
    two.here.settings(sysctl={"vm.mincore_mapped": "1"})
    memory = Memory(two.here.host, "g")
    border, end = (3 << 30) // PAGE_BYTES, (4 << 30) // PAGE_BYTES
    assert list(memory.touched()) == [(0, border), (border, end)]
    assert [len(view) for view in memory.views] == [3 << 30, 1 << 30]
    memory.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"swap_used_bytes": 1 << 20},
        {"sysctl": {"vm.mincore_mapped": "1"}},
        {"dirty_log": True},
        {"dirty_log": True, "swap_used_bytes": 1 << 20},
        {"dirty_log": True, "generation": 4},
    ],
    ids=["swap", "mincore-1", "log", "log-and-swap", "log-and-G4"],
)
def test_nothing_is_lost(settings: dict[str, object]) -> None:
    require_sink()
    with two_hosts(**settings) as two:
        guest = two.start(Spec(working_set="2M"))
        if "swap_used_bytes" in settings:
            swap_out(two.here, guest)
        ended = two.move("-f", "-r", "3")
        assert ended.status == 0, ended.stderr
        two.assert_moved(sweeps=2)


def test_highmem_moves_with_a_dirty_log() -> None:
    require_sink()
    with two_hosts(dirty_log=True) as two:
        two.start(Spec(memory="5G", touched="16M"))
        ended = two.move("-f", "-r", "3")
        assert ended.status == 0, ended.stderr
        two.assert_moved(sweeps=2)


# The dirty log.


def walked(two: Two, rounds: int) -> list[int]:
    """Send rounds of the running guest, a beat apart; return how many pages each round walked."""
    [guest] = two.guests
    source = two.source()
    source.prepare(ID)
    found = []
    with open(os.devnull, "wb") as nowhere:
        header = Header(Form.PLAIN, fmt.Feature(0), bytes(16), 1)
        writer = Writer(nowhere.fileno(), header)
        transfer = Transfer(source, source.head().layout, writer)
        for _ in range(rounds):
            guest.console.await_beats(len(guest.console.beats()) + 1)
            before = transfer.walked_pages
            transfer.round()
            found.append(transfer.walked_pages - before)
        del transfer
    source.close()
    return found


def test_without_a_log_every_round_walks_the_whole_guest(two: Two) -> None:
    two.start()
    assert walked(two, 3) == [NPAGES] * 3


def test_with_a_log_later_rounds_walk_what_was_written() -> None:
    with two_hosts(dirty_log=True) as two:
        two.start(Spec(touched="16M", working_set="1M"))
        first, *later = walked(two, 4)
        assert first == NPAGES
        # The working set has 256 pages; devices, clock and console write some more.
        assert all(0 < pages < 512 for pages in later), later


def test_the_last_round_believes_no_log() -> None:
    """Devices without a pause callback write during the pause, and the log does not show that."""
    with two_hosts(dirty_log=True, generation=4) as two:
        two.start()
        source = two.source()
        source.prepare(ID)
        assert source.changed() is not None
        paused = source.pause()
        assert source.changed() is None
        paused.resume()
        source.close()
        two.assert_runs_on()


# Reading allocates nothing.


@pytest.fixture
def big() -> Iterator[tuple[Two, int]]:
    """A guest of 8 GiB that has touched 64 MiB, and a descriptor of its node."""
    require_sink()
    with two_hosts() as two:
        two.start(BIG).console.await_sweeps(1)
        fd = os.open(two.here.directory / "vmm" / "g", os.O_RDONLY)
        try:
            yield two, fd
        finally:
            os.close(fd)


def allocated(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_a_survey_allocates_nothing(big: tuple[Two, int]) -> None:
    two, fd = big
    before = allocated(fd)
    assert 64 << 20 <= before < 80 << 20
    [ended] = two.run(two.send("-nP"))
    assert ended.status in (0, 75), ended.stderr
    assert allocated(fd) == before
    two.assert_runs_on()


def test_a_refused_send_allocates_nothing(big: tuple[Two, int]) -> None:
    two, fd = big
    before = allocated(fd)
    [ended] = two.run([*two.send("-f"), *two.receive()[:-1], "-x", "pci.0.9.0", "g"])
    assert ended.status == 76, ended.stderr
    assert allocated(fd) == before
    two.assert_runs_on()


def test_a_send_allocates_nothing_at_either_end(big: tuple[Two, int]) -> None:
    two, fd = big
    before = allocated(fd)
    ended = two.move("-f", "-r", "2")
    assert ended.status == 0, ended.stderr
    assert allocated(fd) <= before + STUB_BYTES
    two.assert_moved()
    there = (two.there.directory / "vmm" / "g").stat().st_blocks * 512
    assert there < before + (4 << 20)


def test_a_hold_allocates_nothing(big: tuple[Two, int]) -> None:
    two, fd = big
    before = allocated(fd)
    source = two.source()
    source.prepare(ID)
    paused = source.pause()
    assert allocated(fd) <= before + STUB_BYTES
    paused.resume()
    source.close()
    two.assert_runs_on()


def test_the_standin_would_show_a_page_that_is_read(big: tuple[Two, int]) -> None:
    """Check the measure of the tests above: reading a page outside touched() does allocate."""
    two, fd = big
    before = allocated(fd)
    memory = Memory(StandinHost(two.here.directory), "g")
    last = memory.views[1]
    assert last[len(last) - PAGE_BYTES] == 0
    memory.close()
    assert allocated(fd) > before

"""The proving guest proves itself, and fails when it should.

Every other test with a guest relies on these facts: the guest beats and sweeps
on each machine type; the guest reports each kind of damage (a flipped byte, a
page lost, stale or torn, data in a hole, a wrong table, a wrong disk block); and
a guest that is moved by hand, with QEMU's own commands and a plain copy of the
RAM file, lives on, but notices one page that is left out of that copy.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest import (
    Guest,
    GuestDied,
    SerialLog,
    Spec,
    Stamps,
    assert_unbroken,
    build,
    handover_gap,
    machine,
    make_disk,
    peer_pid,
    ram,
    reaping,
)
from guest.serial import stamped_beats

MIB = 1 << 20
# A page that is never rewritten, and a page that always is: see the defaults in proof.c.
STATIC_PAGE = 30_000
HOLE_PAGES = range(48 * 256, 56 * 256)

IGNORE_SHARED = [{"capability": "x-ignore-shared", "state": True}]


def log_of(*lines: str) -> SerialLog:
    return SerialLog("".join(line + "\n" for line in lines).encode())


def beat(sequence: int, bad: int = 0) -> str:
    return f"hb {sequence} sweeps=0 bad={bad} gen=0"


# The judges of a guest's output, without a guest.


def test_a_line_cut_by_the_move_is_mended() -> None:
    source = SerialLog(b"hb 1 sweeps=0 bad=0 gen=0\nhb 2 swe")
    assert_unbroken(source, SerialLog(b"eps=0 bad=0 gen=0\nhb 3 sweeps=0 bad=0 gen=0\n"))


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ([beat(3)], "heartbeat 3 came where 2 was due"),
        ([beat(1), beat(2)], "heartbeat 1 came where 2 was due"),
        ([], "nothing beats at the destination"),
        ([beat(2, bad=1)], "counts 1 faults"),
        ([beat(2), "hb 3 swe"], "garbled"),
        ([beat(2), "BAD page=1 want=2 got=1"], "found faults"),
    ],
)
def test_a_broken_life_is_refused(after: list[str], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_unbroken(log_of(beat(1)), log_of(*after))


@pytest.mark.parametrize(
    "line",
    [
        "[    1.33] Kernel panic - not syncing: Attempted to kill init!",
        "[    1.33] BUG: unable to handle page fault for address: 0",
        "FAIL /dev/vda: No such file or directory",
    ],
)
def test_death_is_recognised(line: str) -> None:
    with pytest.raises(GuestDied):
        log_of(beat(1), line).assert_sound()


def test_a_beat_is_stamped_when_its_line_is_complete() -> None:
    text = beat(1) + "\n"
    stamped = stamped_beats([(10, text[:5].encode()), (20, text[5:].encode())])
    assert [(when, b.sequence) for when, b in stamped] == [(20, 1)]


def test_a_missing_tool_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="apt-cache is missing"):
        build.images(tmp_path / "cache")


def test_an_abandoned_directory_is_removed_and_a_locked_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_ABANDONED_S", -1.0)
    abandoned, owned = tmp_path / "bhysend-test-a", tmp_path / "bhysend-test-b"
    abandoned.mkdir()
    owned.mkdir()
    (abandoned / "ram").touch()
    with ram.opened(owned, os.O_RDONLY) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        machine.remove_abandoned(tmp_path)
    assert not abandoned.exists()
    assert owned.exists()


# A guest to which nothing is done.


@pytest.fixture(scope="module")
def sound() -> Iterator[Guest]:
    with Guest(Spec("q35")) as guest:
        guest.serial.await_ready()
        yield guest


@pytest.mark.guest
def test_heartbeats_come_without_gaps_and_sweeps_find_nothing(sound: Guest) -> None:
    sound.serial.await_sweeps(3)
    sound.serial.read().assert_unbroken()


@pytest.mark.guest
def test_memory_that_the_guest_never_touched_stays_unallocated(sound: Guest) -> None:
    sound.serial.await_sweeps(1)
    assert sound.ram_path.stat().st_size == 512 * MIB
    assert 160 * MIB < ram.allocated_bytes(sound.ram_path) < 320 * MIB


@pytest.mark.guest
def test_tens_of_mebibytes_are_dirtied_each_second(sound: Guest) -> None:
    before, after = sound.directory / "before", sound.directory / "after"
    ram.copy_sparse(sound.ram_path, before)
    sound.serial.await_heartbeats(10)
    ram.copy_sparse(sound.ram_path, after)
    dirty_mib = ram.changed_pages(before, after) * ram.PAGE_BYTES / MIB
    before.unlink()
    after.unlink()
    print(f"dirtied in a second of the guest: {dirty_mib:.1f} MiB")
    assert dirty_mib > 10


@pytest.mark.guest
def test_a_page_holds_what_the_host_expects_of_it(sound: Guest) -> None:
    offset = ram.find_page(sound.ram_path, STATIC_PAGE)
    generation = ram.page_generation(sound.ram_path, offset)
    assert ram.read_page(sound.ram_path, offset) == ram.page_content(STATIC_PAGE, generation)
    assert ram.owned_pages(sound.ram_path)[STATIC_PAGE] == ram.OwnedPage(offset, generation)


@pytest.mark.guest
def test_some_pages_become_holes_and_come_back(sound: Guest) -> None:
    def holes() -> set[int]:
        return set(HOLE_PAGES) - ram.owned_pages(sound.ram_path).keys()

    sound.serial.wait(lambda _: len(holes()) >= 64, "holes")
    first = holes()
    sound.serial.wait(lambda _: bool(first - holes()), "filled hole")


@pytest.mark.guest
def test_stop_and_cont_leave_the_guest_sound(sound: Guest) -> None:
    sound.qmp("stop")
    assert sound.status() == "paused"
    silent = sound.serial.read().raw
    sound.qmp("cont")
    sound.serial.await_heartbeats(5)
    assert sound.serial.read().raw.startswith(silent)
    sound.serial.await_sweeps(1)
    sound.serial.read().assert_unbroken()


@pytest.mark.guest
def test_the_qmp_socket_tells_the_process(sound: Guest) -> None:
    assert peer_pid(sound.qmp_path) == sound.pid


# Boots on other machine types, which only have to succeed; see also the moves below.


@pytest.mark.guest
@pytest.mark.parametrize(
    "spec",
    [Spec("pc"), Spec("q35", vcpus=2, ram="memfd"), Spec("microvm", vcpus=2)],
    ids=["pc", "q35-2vcpu-memfd", "microvm-2vcpu"],
)
def test_each_machine_boots(spec: Spec) -> None:
    with Guest(spec) as guest:
        guest.serial.await_ready()
        guest.serial.await_sweeps(1)
        guest.serial.read().assert_unbroken()
        assert STATIC_PAGE in ram.owned_pages(guest.ram_path)


@pytest.mark.guest
def test_a_guest_that_cannot_start_says_why() -> None:
    with (
        Guest(Spec("microvm", proof={"nonsense": 1})) as guest,
        pytest.raises(GuestDied, match=r"proof\.nonsense=1"),
    ):
        guest.serial.await_ready()


@pytest.mark.guest
def test_nothing_is_left_behind() -> None:
    with Guest(Spec("microvm")) as guest:
        pid, directory = guest.pid, guest.directory
    assert not directory.exists()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.guest
def test_reaping_ends_whoever_listens() -> None:
    with Guest(Spec("microvm")) as guest:
        with reaping(guest.qmp_path):
            pass
        with pytest.raises(GuestDied, match="status -9"):
            guest.serial.await_ready()


# Damage.  One guest takes every fault: each is in a separate page, and repaired at once.


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    disk = make_disk(tmp_path_factory.mktemp("disk") / "disk.img")
    with Guest(Spec("microvm", disk=disk)) as guest:
        guest.serial.await_ready()
        yield guest


def changed_page(guest: Guest, index: int, offset: int) -> tuple[bytes, bytes]:
    """Return an old and the present content of a page in the working set; stop the guest."""
    old = ram.read_page(guest.ram_path, offset)
    while True:
        guest.serial.await_heartbeats(10)
        guest.qmp("stop")
        new = ram.read_page(guest.ram_path, offset)
        if old != new:
            return old, new
        guest.qmp("cont")


@pytest.mark.guest
@pytest.mark.parametrize("byte", [0, 12, 16, 2048, 4095])
def test_one_flipped_byte_is_reported(victim: Guest, byte: int) -> None:
    index = STATIC_PAGE + byte
    offset = ram.find_page(victim.ram_path, index) + byte
    ram.flip_byte(victim.ram_path, offset)
    try:
        victim.serial.await_fault(rf"^BAD page={index} ")
    finally:
        ram.flip_byte(victim.ram_path, offset)


@pytest.mark.guest
def test_a_stale_page_is_reported(victim: Guest) -> None:
    index = 17
    offset = ram.find_page(victim.ram_path, index)
    old, new = changed_page(victim, index, offset)
    ram.patch(victim.ram_path, offset, old)
    victim.qmp("cont")
    want, got = (struct.unpack_from("<I", page, 12)[0] for page in (new, old))
    victim.serial.await_fault(rf"^BAD page={index} want={want} got={got}$")


@pytest.mark.guest
def test_a_torn_page_is_reported(victim: Guest) -> None:
    index = 4242
    offset = ram.find_page(victim.ram_path, index)
    old, new = changed_page(victim, index, offset)
    ram.patch(victim.ram_path, offset + 2048, old[2048:])
    victim.qmp("cont")
    want = struct.unpack_from("<I", new, 12)[0]
    victim.serial.await_fault(rf"^BAD page={index} want={want} got={want} torn at=2048$")


@pytest.mark.guest
def test_a_lost_page_is_reported(victim: Guest) -> None:
    index = STATIC_PAGE + 5000
    offset = ram.find_page(victim.ram_path, index)
    content = ram.read_page(victim.ram_path, offset)
    ram.patch(victim.ram_path, offset, bytes(ram.PAGE_BYTES))
    try:
        victim.serial.await_fault(rf"^BAD page={index} want=1 got=zero$")
    finally:
        ram.patch(victim.ram_path, offset, content)


@pytest.mark.guest
def test_a_zero_page_that_was_not_sent_is_reported(victim: Guest) -> None:
    before = ram.owned_pages(victim.ram_path)
    while True:
        victim.serial.await_heartbeats(3)
        victim.qmp("stop")
        holes = before.keys() - ram.owned_pages(victim.ram_path).keys()
        if holes:
            break
        victim.qmp("cont")
    index = min(holes)
    ram.patch(
        victim.ram_path,
        before[index].offset_bytes,
        ram.page_content(index, before[index].generation),
    )
    victim.qmp("cont")
    got = before[index].generation
    victim.serial.await_fault(rf"^BAD page={index} want=zero got={got}$")


@pytest.mark.guest
def test_a_table_that_went_back_is_reported(victim: Guest) -> None:
    # The part of the table for the pages that stay at generation 1 for ever.
    page = struct.pack("<I", 1 << 1) * (ram.PAGE_BYTES // 4)
    offset = next(
        start + at
        for start, data in ram.blocks(victim.ram_path)
        for at in range(0, len(data), ram.PAGE_BYTES)
        if data[at : at + ram.PAGE_BYTES] == page
    )
    ram.patch(victim.ram_path, offset, struct.pack("<I", 0))
    try:
        victim.serial.await_fault(r"^BAD table thread=0 ")
    finally:
        ram.patch(victim.ram_path, offset, struct.pack("<I", 1 << 1))


@pytest.mark.guest
def test_a_lost_disk_block_is_reported(victim: Guest) -> None:
    assert victim.spec.disk is not None
    victim.serial.wait(lambda log: (log.last.disk or 0) > 100, "disk traffic")
    victim.qmp("stop")
    ram.patch(victim.spec.disk, 0, bytes(8 * MIB))
    victim.qmp("cont")
    victim.serial.await_fault(r"^BAD block=\d+ want=\d+ got=garbage")


# The move by hand: what bhysend and bhyrecv automate, without any of their code.


def hand_over(source: Guest, destination: Guest, *, lose_page: int | None = None) -> None:
    """Stop the source, copy state and RAM, and let the destination run.

    lose_page: index of a page that is zero in the copy.
    """
    state = destination.directory / "state"
    source.qmp("migrate-set-capabilities", capabilities=IGNORE_SHARED)
    destination.qmp("migrate-set-capabilities", capabilities=IGNORE_SHARED)
    source.qmp("stop")
    source.qmp("migrate", uri=f"exec:cat > {state}")
    source.await_migration()
    ram.copy_sparse(source.ram_path, destination.ram_path)
    if lose_page is not None:
        offset = ram.find_page(destination.ram_path, lose_page)
        ram.patch(destination.ram_path, offset, bytes(ram.PAGE_BYTES))
    destination.qmp("migrate-incoming", uri=f"exec:cat {state}")
    destination.await_migration()
    destination.qmp("cont")


@pytest.mark.guest
@pytest.mark.parametrize(
    "spec, disk",
    [
        pytest.param(Spec("q35"), True, id="q35-disk"),
        pytest.param(Spec("q35", vcpus=2, ram="memfd"), False, id="q35-2vcpu-memfd"),
        pytest.param(Spec("pc"), False, id="pc"),
        pytest.param(Spec("microvm", vcpus=2), True, id="microvm-2vcpu-disk"),
    ],
)
def test_a_guest_moved_by_hand_lives_on(spec: Spec, disk: bool, tmp_path: Path) -> None:
    if disk:
        image = make_disk(tmp_path / "disk.img")
        spec = Spec(spec.machine, spec.vcpus, ram=spec.ram, disk=image)
    with (
        Guest(spec) as source,
        Stamps(source.serial.path) as here,
    ):
        source.serial.await_ready()
        source.serial.await_sweeps(1)
        with (
            Guest(spec, incoming=True) as destination,
            Stamps(destination.serial.path) as there,
        ):
            hand_over(source, destination)
            destination.serial.await_sweeps(2)
            assert source.status() == "postmigrate"
            assert_unbroken(source.serial.read(), destination.serial.read())
            if disk:
                carried = source.serial.read().last.disk or 0
                assert (destination.serial.read().last.disk or 0) > carried
            gap = handover_gap(here, there)
            assert gap.first_at_destination == gap.last_at_source + 1
            print(f"silence at the serial line: {gap.gap_ms:.0f} ms")


@pytest.mark.guest
def test_one_page_lost_on_the_way_is_noticed_there() -> None:
    spec = Spec("microvm")
    with Guest(spec) as source, Guest(spec, incoming=True) as destination:
        source.serial.await_ready()
        hand_over(source, destination, lose_page=STATIC_PAGE)
        destination.serial.await_fault(rf"^BAD page={STATIC_PAGE} want=1 got=zero$")


@pytest.mark.guest
def test_a_source_that_was_moved_and_taken_back_goes_on() -> None:
    with Guest(Spec("microvm")) as source:
        source.serial.await_ready()
        source.qmp("migrate-set-capabilities", capabilities=IGNORE_SHARED)
        source.qmp("stop")
        source.qmp("migrate", uri="exec:cat > /dev/null")
        source.await_migration()
        assert source.status() == "postmigrate"
        source.qmp("cont")
        source.serial.await_sweeps(1)
        source.serial.read().assert_unbroken()

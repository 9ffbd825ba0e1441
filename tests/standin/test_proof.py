"""The guest's proof of itself: a sound guest passes, and every planted fault is reported."""

from __future__ import annotations

from itertools import pairwise

import pytest

from bhystream.standin.proof import (
    Boot,
    content,
    describe,
    describe_fpu,
    fpu_registers,
    make_plans,
    unpack_boot,
)

from .rig import Rig, Snapshot, Spec, assert_unbroken

SPEC = Spec()
BOOT = Boot(2, 64 << 8, 1024, 256, 16 << 20, 64 << 20)
PLANS = make_plans(BOOT)
STATIC = PLANS[0].static[10]
WORKING = PLANS[1].working[5]


def suspended(host: Rig, spec: Spec = SPEC) -> Snapshot:
    guest = host.start("g", spec)
    guest.console.await_sweeps(1)
    snapshot = host.suspend("g")
    assert guest.await_exit() == 5
    return snapshot


def old_and_new(host: Rig) -> tuple[Snapshot, Snapshot]:
    """Return a checkpoint and, a few beats later, a suspend of the same guest."""
    guest = host.start("g", SPEC)
    assert host.checkpoint("g", filename="old") == {}
    guest.console.await_beats(len(guest.console.beats()) + 2)
    host.suspend("g")
    return host.snapshot("old"), host.snapshot("g")


def changed_page(old: Snapshot, new: Snapshot) -> int:
    """Return a working page that differs between the two snapshots."""
    return next(page for page in PLANS[1].working if old.page(page) != new.page(page))


def wrong_after(host: Rig, snapshot: Snapshot, what: str, spec: Spec = SPEC) -> str:
    return host.launch("g", spec, snapshot.path).console.await_wrong(what)


def test_a_generation_differs_in_the_whole_page() -> None:
    for generation in range(64):
        before, after = content(300, generation), content(300, generation + 1)
        same = sum(a == b for a, b in zip(before, after, strict=True))
        assert same < 4096 // 8
        assert all(before[i : i + 64] != after[i : i + 64] for i in range(0, 4096, 64))


def test_pieces_of_a_page_do_not_fit_elsewhere_in_it() -> None:
    page = content(300, 1)
    for size in (64, 512, 2048):
        pieces = [page[at : at + size] for at in range(0, 4096, size)]
        assert all(one != other for one, other in pairwise(pieces))


def test_a_plan_says_the_generation_of_each_page_at_each_step() -> None:
    plan = PLANS[0]
    held = dict.fromkeys(plan.working, 0)
    for step in range(3 * len(plan.working) + 7):
        page, generation = plan.at(step)
        assert held[page] == generation
        held[page] += 1
    step = 3 * len(plan.working) + 7
    assert dict.fromkeys(plan.static, 0) | held == dict(
        plan.held(index, step) for index in range(plan.npages)
    )


def test_plans_share_nothing_and_reach_into_highmem() -> None:
    boot = Boot(3, (5 << 30) // 4096, 4096, 512, 0, 0)
    plans = make_plans(boot)
    pages = [page for plan in plans for page in plan.working + plan.static]
    assert len(pages) == len(set(pages)) == 4096
    assert sum(len(plan.working) for plan in plans) == 512
    low_pages = (3 << 30) // 4096
    assert min(pages) < low_pages // 2 and max(pages) > low_pages
    assert max(pages) < boot.npages


def test_a_boot_page_is_read_back_or_refused() -> None:
    page = BOOT.pack()
    assert unpack_boot(page) == BOOT
    assert unpack_boot(page[:9] + b"\1" + page[10:]) is None
    assert unpack_boot(bytes(4096)) is None


def test_what_a_wrong_page_holds_is_described() -> None:
    assert describe(300, content(300, 4), 5) == "generation 4"
    assert describe(300, bytes(4096), 5) == "zero"
    torn = content(300, 5)[:2048] + content(300, 6)[2048:]
    assert describe(300, torn, 5) == "torn, begins as generation 5"


def test_a_guest_that_was_not_harmed_goes_on_without_a_gap(host: Rig) -> None:
    guest = host.start("g", SPEC)
    guest.console.await_sweeps(1)
    host.suspend("g")
    again = host.start("g", SPEC, host.snapshot("g").path)
    again.console.await_sweeps(2)
    assert_unbroken(guest.console, again.console)


def test_a_guest_that_hardly_writes_is_swept_all_the_same(host: Rig) -> None:
    guest = host.start("g", Spec(rate="1B"))
    guest.console.await_sweeps(2)
    snapshot = host.suspend("g")
    snapshot.flip(WORKING)
    wrong_after(host, snapshot, f"page {WORKING}:", Spec(rate="1B"))


def test_a_flipped_bit_of_a_static_page_is_reported(host: Rig) -> None:
    snapshot = suspended(host)
    snapshot.flip(STATIC)
    line = wrong_after(host, snapshot, f"page {STATIC}:")
    assert "expected generation 0 found" in line


def test_a_flipped_bit_of_a_working_page_is_reported(host: Rig) -> None:
    snapshot = suspended(host)
    snapshot.flip(WORKING, at=4095)
    wrong_after(host, snapshot, f"page {WORKING}:")


def test_a_stale_working_page_is_reported(host: Rig) -> None:
    old, new = old_and_new(host)
    page = changed_page(old, new)
    new.put_page(page, old.page(page))
    wrong_after(host, new, f"page {page}:")


def test_a_torn_working_page_is_reported(host: Rig) -> None:
    old, new = old_and_new(host)
    page = changed_page(old, new)
    new.put_page(page, old.page(page)[:2048])
    wrong_after(host, new, f"page {page}:")


def test_a_lost_page_is_reported(host: Rig) -> None:
    snapshot = suspended(host)
    lost = next(page for page in PLANS[0].static if content(page, 0) != bytes(4096))
    snapshot.put_page(lost, bytes(4096))
    assert "found zero" in wrong_after(host, snapshot, f"page {lost}:")


def test_a_page_that_was_never_written_must_stay_zero(host: Rig) -> None:
    snapshot = suspended(host)
    known = {page for plan in PLANS for page in plan.working + plan.static}
    stray = next(page for page in range(256, BOOT.npages) if page not in known)
    snapshot.put_page(stray, b"x")
    assert "never written" in wrong_after(host, snapshot, f"page {stray}:")


def test_a_plain_restore_loses_the_fpu_and_each_vcpu_says_so_once(host: Rig) -> None:
    console = host.launch("g", SPEC, suspended(host).path).console
    console.await_sweeps(1)
    console.forgives_fpu = False
    lost = sorted(line.partition(": expected step")[0] for line in console.wrong())
    assert lost == ["WRONG fpu vcpu 0", "WRONG fpu vcpu 1"]
    assert all("found nothing, as after a reset" in line for line in console.wrong())


def test_what_an_fpu_holds_is_described() -> None:
    registers = fpu_registers(1, 40)[0][1]
    assert describe_fpu(1, registers, 50) == "step 40"
    assert describe_fpu(0, registers, 50).startswith("unknown ")
    assert describe_fpu(1, bytes(len(registers)), 50) == "nothing, as after a reset"


def test_registers_that_went_back_in_time_are_reported(host: Rig) -> None:
    old, new = old_and_new(host)
    new.put_blob("vmcx", old.blob("vmcx"))
    console = host.launch("g", SPEC, new.path).console
    console.await_wrong("blob vmcx: expected clock")
    console.await_wrong("page ")


@pytest.mark.parametrize("name", ["vhpet", "virtio-blk@pci.0.3.0"])
def test_a_timer_that_went_back_in_time_is_reported(host: Rig, name: str) -> None:
    old, new = old_and_new(host)
    new.put_blob(name, old.blob(name))
    wrong_after(host, new, f"ticks of {name}: expected")


def test_a_uart_that_went_back_in_time_is_reported(host: Rig) -> None:
    old, new = old_and_new(host)
    new.put_blob("lpc@pci.0.31.0", old.blob("lpc@pci.0.31.0"))
    wrong_after(host, new, "bytes sent to com1")


@pytest.mark.parametrize("name", ["vm", "vioapic", "vlapic", "vatpit", "vatpic", "vpmtmr", "vrtc"])
def test_an_old_blob_of_a_kernel_structure_is_reported(host: Rig, name: str) -> None:
    old, new = old_and_new(host)
    new.put_blob(name, old.blob(name))
    wrong_after(host, new, f"blob {name}: expected clock")


@pytest.mark.parametrize(
    ("one", "other"),
    [("vatpit", "vatpic"), ("vm", "vmcx"), ("lpc@pci.0.31.0", "atkbdc")],
)
def test_swapped_blobs_are_reported(host: Rig, one: str, other: str) -> None:
    snapshot = suspended(host)
    snapshot.swap(one, other)
    wrong_after(host, snapshot, f"blob {one}: expected {one} found {other}")


def test_a_blob_of_nothing_is_reported(host: Rig) -> None:
    snapshot = suspended(host)
    snapshot.put_blob("vatpic", bytes(len(snapshot.blob("vatpic"))))
    wrong_after(host, snapshot, "blob vatpic: expected vatpic found no name")


def test_a_lost_boot_page_is_reported(host: Rig) -> None:
    snapshot = suspended(host)
    snapshot.put_page(1, bytes(4096))
    wrong_after(host, snapshot, "boot page")


def test_memory_saved_before_e1000_stopped_writing_is_reported(host: Rig) -> None:
    """e1000 has no pause callback: the memory image that bhyve wrote is behind e1000's blob."""
    spec = Spec(devices=(("0.5.0", "e1000"),))
    snapshot = suspended(host, spec)
    wrong_after(host, snapshot, "memory of e1000@pci.0.5.0: expected at least", spec)


def test_memory_read_after_the_exit_is_right_also_for_e1000(host: Rig) -> None:
    spec = Spec(devices=(("0.5.0", "e1000"),))
    guest = host.start("g", spec)
    guest.console.await_sweeps(1)
    vm = host.host.open_vm("g")
    with vm.map(0, 64 << 20) as mapping:
        snapshot = host.suspend("g")
        guest.await_exit()
        snapshot.path.write_bytes(mapping)
    again = host.start("g", spec, snapshot.path)
    again.console.await_sweeps(1)
    assert_unbroken(guest.console, again.console)

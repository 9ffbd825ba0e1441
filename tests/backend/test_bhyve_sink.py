"""BhyveSink over the stand-in: what it checks, makes and starts, and what a failure leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bhystream.backend.bhyve import fpu as fpus
from bhystream.backend.bhyve.wanted import Wanted
from bhystream.errors import GuestError, IncompatibleError, InputOutputError, InternalError
from bhystream.guest import PAGE_BYTES, State
from bhystream.memory.target import FileTarget, MappedTarget
from standin.rig import Spec

from .arriving import ID, Arriving, arriving, kill, read_page, restored_of


@pytest.fixture
def guest() -> Iterator[Arriving]:
    with arriving() as made:
        yield made


def meta_with(plan: bytes, **changes: Any) -> bytes:
    """Return a FILE.meta with other basic metadata."""
    value = json.loads(plan)
    value["basic metadata"].update(changes)
    return json.dumps(value).encode()


def renamed(plan: bytes, old: str, new: str) -> bytes:
    assert old.encode() in plan
    return plan.replace(old.encode(), new.encode())


# A verdict.


@pytest.mark.parametrize("unstarted", [False, True], ids=["early", "loaded"])
def test_one_that_is_refused_leaves_what_another_run_has_made(
    guest: Arriving, unstarted: bool
) -> None:
    other = guest.sink(unstarted=unstarted)
    guest.build(other, late=unstarted)
    left = guest.left()
    guest.resources["com1"] = None
    sink = guest.sink(unstarted=unstarted)
    assert "com1: no -o com1= is given" in "".join(sink.check(guest.head))
    with pytest.raises(InternalError, match="refused the guest"):
        sink.open(b"")
    sink.abort()
    assert guest.left() == left
    if not unstarted:
        other.start()
        guest.await_unbroken()


def test_one_that_cannot_make_its_directory_removes_none(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = guest.sink()
    monkeypatch.setattr(Wanted, "remove_leftovers", lambda self, restored: None)
    assert sink.check(guest.head) == []
    staging = Path(restored_of(guest).staging)
    staging.mkdir()
    with pytest.raises(InputOutputError, match="File exists"):
        sink.open(guest.plan)
    sink.abort()
    assert staging.is_dir()


# The whole way.


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_a_guest_is_built_and_started(guest: Arriving, late: bool) -> None:
    sink = guest.sink()
    guest.build(sink, late=late)
    assert not sink.may_have_run
    assert guest.console.lines() == []
    sink.start()
    assert sink.may_have_run
    sink.abort()  # does nothing: the guest is no longer the sink's
    guest.await_unbroken()
    assert list(guest.staging_root.iterdir()) == []
    assert guest.started() == []
    assert sink.notices == []


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_a_guest_with_highmem_is_built_and_stays_sparse(late: bool) -> None:
    with arriving(Spec(memory="5G", touched="16M")) as guest:
        sink = guest.sink()
        targets = guest.open(sink, late=late)
        assert [type(one) for one in targets] == [FileTarget if late else MappedTarget] * 2
        sink.abort()
        assert guest.left() == []
        sink = guest.sink()
        guest.build(sink, late=late)
        sink.start()
        guest.await_unbroken()
        assert guest.memory().stat().st_blocks * 512 < 256 << 20


def test_a_guest_without_a_boot_rom_is_built() -> None:
    with arriving(Spec(has_rom=False)) as guest:
        sink = guest.sink()
        guest.build(sink)
        sink.start()
        guest.await_unbroken()


def test_a_guest_may_have_another_name_there(guest: Arriving) -> None:
    sink = guest.sink("other")
    guest.build(sink)
    sink.start()
    assert guest.there.host.exists("other")
    guest.await_unbroken()


def test_pages_that_were_data_and_are_zero_are_zero(guest: Arriving) -> None:
    """A guest may have cleared a page after the first round has brought its data."""
    sink = guest.sink()
    targets = guest.open(sink)
    npages = guest.head.layout.npages
    touched = next(first for first, _ in guest.touched(guest.image, None, 0, npages))
    last = npages - 1
    for page in (touched + 7, npages - 2, last, 12345):
        extent = page.to_bytes(8, "little") + (1).to_bytes(4, "little")
        listed = memoryview(extent + bytes(4))
        targets[0].place(0, npages, listed, memoryview(b"x" * PAGE_BYTES))
        assert read_page(guest.memory(), page) == b"x" * PAGE_BYTES
        targets[0].place(0, npages, memoryview(extent + b"\1\0\0\0"), memoryview(b""))
        assert read_page(guest.memory(), page) == bytes(PAGE_BYTES)
    guest.place(targets, guest.image)
    sink.load(guest.states)
    sink.start()
    guest.await_unbroken()


@pytest.mark.parametrize("page", [-1, -2], ids=["last", "last-but-one"])
def test_the_pages_that_hold_it_arrive_as_others_do(guest: Arriving, page: int) -> None:
    sink = guest.sink()
    targets = guest.open(sink)
    npages = guest.head.layout.npages
    at = npages + page
    listed = memoryview(at.to_bytes(8, "little") + b"\1\0\0\0\0\0\0\0")
    targets[0].place(0, npages, listed, memoryview(b"last" * (PAGE_BYTES // 4)))
    guest.place(targets, guest.image)
    sink.load(guest.states)
    files = guest.staging_root / f"bhyrecv-{ID[:16]}.g"
    keep_as = guest.directory / "kept"
    os.link(files / "ckp", keep_as)
    sink.start()
    assert read_page(keep_as, npages - 1) == (b"last" * 1024 if page == -1 else bytes(PAGE_BYTES))
    assert read_page(guest.memory(), at) == b"last" * (PAGE_BYTES // 4)
    # The guest never wrote to this page, and reports it as wrong: it has only the placed bytes.
    assert guest.console.await_wrong(f"page {at}")


# The verdict.


def reasons(
    guest: Arriving, *, options: dict[str, bool] | None = None, **changes: Any
) -> list[str]:
    sink = guest.sink("g", id_=ID, **(options or {}))
    found = sink.check(guest.head._replace(**changes))
    sink.abort()
    return found


FORCE = {"force": True}


def test_the_verdict_touches_nothing(guest: Arriving) -> None:
    assert reasons(guest) == []
    assert guest.left() == []
    assert not (guest.base / "loaded").exists()


def test_what_a_host_cannot_take_is_named(guest: Arriving) -> None:
    head, there = guest.head, guest.there
    assert reasons(guest, host={**head.host, "hypervisor": "bhyve"}) == [
        "hypervisor: the guest runs under 'bhyve', not standin"
    ]
    [reason] = reasons(guest, config={**head.config, "keys": {}})
    assert "is missing" in reason
    there.host.create("g")
    [reason] = reasons(guest, options=FORCE)
    assert reason.startswith("name: a VM g is here already")
    there.host.destroy("g")
    assert guest.left() == []


@pytest.mark.parametrize(
    ("options", "needed"),
    [({}, 64 << 20), ({"is_kept": True}, 128 << 20), ({"unstarted": True}, None)],
    ids=["live", "kept", "left-loaded"],
)
def test_memory_that_is_not_there_is_named(
    guest: Arriving, options: dict[str, bool], needed: int | None
) -> None:
    """Twice the guest's memory is needed only if it goes through a file in memory."""
    if needed is None:
        needed = (128 if guest.there.host.is_memory(guest.base) else 64) << 20
    guest.there.settings(free_memory_bytes=needed)
    assert reasons(guest, options=options) == []
    guest.there.settings(free_memory_bytes=needed - 1)
    [reason] = reasons(guest, options=options)
    assert f"has {needed - 1} bytes free, up to {needed} are needed" in reason
    assert reasons(guest, options={**options, **FORCE}) == []


def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(f_bavail=1, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: full)


def test_room_for_a_file_is_asked_for_only_where_it_is_needed(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    little_room(monkeypatch)
    assert reasons(guest) == []
    [reason] = reasons(guest, options={"is_kept": True})
    assert reason.startswith(f"staging: {guest.staging_root} has 4096 bytes free")
    [reason] = reasons(guest, options={"unstarted": True})
    assert reason.startswith(f"state: {guest.base} has 4096 bytes free")
    assert reasons(guest, options={"is_kept": True, **FORCE}) == []


def test_room_for_a_late_start_is_asked_for_when_it_is_known(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    little_room(monkeypatch)
    sink = guest.sink()
    with pytest.raises(IncompatibleError, match=r"guest g: staging: .* has 4096 bytes free"):
        guest.open(sink, late=True)
    sink.abort()
    assert guest.left() == []
    guest.open(guest.sink(force=True), late=True)
    sink = guest.sink()
    guest.open(sink)  # early: no room for a file is needed
    sink.abort()


# Hostile streams.


def test_optional_states_that_are_not_known_are_left_out(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    real = fpus.load

    def load(vm: Any, memory: memoryview, states: Sequence[State], *more: Any) -> None:
        seen.append([state.name for state in states])
        real(vm, memory, states, *more)

    monkeypatch.setattr(fpus, "load", load)
    more = [State(name, b"x", is_optional=True) for name in ("other", "fpu/x", "meta")]
    sink = guest.sink()
    guest.build(sink, states=[*guest.states, *more])
    assert seen == [["fpu/0", "fpu/1"]]
    sink.start()
    guest.await_unbroken()


# Failures.


def test_nothing_is_made_of_a_guest_that_was_not_checked(guest: Arriving) -> None:
    for call in (lambda: guest.sink().open(b""), lambda: guest.sink().start()):
        with pytest.raises(InternalError):
            call()


def test_what_cannot_be_made_is_an_error_of_ours(guest: Arriving) -> None:
    (guest.base / "loaded").write_text("in the way")
    sink = guest.sink()
    with pytest.raises(InputOutputError, match="cannot make"):
        guest.open(sink)
    sink.abort()


@pytest.mark.parametrize("step", ["open", "build"])
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_abort_leaves_nothing_and_may_be_done_twice(guest: Arriving, step: str, late: bool) -> None:
    sink = guest.sink()
    if step == "open":
        guest.open(sink, late=late)
    else:
        guest.build(sink, late=late)
    assert guest.left() != []
    for _ in range(2):
        sink.abort()
        assert guest.left() == []
    assert not sink.may_have_run


@pytest.mark.parametrize("fail", ["restore-early", "late-cut"])
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_a_bhyve_that_cannot_be_held_leaves_nothing(guest: Arriving, fail: str, late: bool) -> None:
    guest.there.settings(fail=[fail])
    sink = guest.sink()
    with pytest.raises(GuestError, match="bhyve -r"):
        guest.build(sink, late=late)
    sink.abort()
    assert guest.left() == []
    guest.there.settings(fail=[])
    sink = guest.sink()
    guest.build(sink, late=late)
    sink.start()
    guest.await_unbroken()


def test_a_start_that_fails_never_ran_and_is_undone(guest: Arriving) -> None:
    guest.there.settings(fail=["restore"])
    sink = guest.sink()
    guest.build(sink)
    with pytest.raises(GuestError, match="bhyve -r: Failed to restore"):
        sink.start()
    assert not sink.may_have_run
    sink.abort()
    assert guest.left() == []


def test_a_start_that_fails_behind_its_socket_may_have_run(guest: Arriving) -> None:
    guest.there.settings(fail=["restore-late"])
    sink = guest.sink()
    guest.build(sink)
    with pytest.raises(GuestError, match=r"bhyve -r: .*Unable to restore time"):
        sink.start()
    assert sink.may_have_run
    sink.abort()
    assert list(guest.staging_root.iterdir()) != []  # left for the operator


@pytest.mark.parametrize("late", [False, True])
def test_a_bhyve_is_waited_for_aloud_and_its_end_is_seen(guest: Arriving, late: bool) -> None:
    sink, calls = guest.sink(), []
    sink.on_wait = lambda: calls.append(1)
    sink.require_alive()
    guest.build(sink, late=late)
    assert calls != []
    sink.require_alive()
    [pid] = guest.processes()
    kill(pid)
    with pytest.raises(GuestError, match="bhyve -r: "):
        sink.require_alive()
    sink.abort()
    assert guest.left() == []


def test_a_clock_chip_that_cannot_be_set_is_told_and_no_error(
    guest: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, seconds: int) -> None:
        raise GuestError("VM_RTC_SETTIME: Operation not permitted")

    monkeypatch.setattr("bhystream.standin.vm.StandinVm.set_rtc", refuse)
    sink = guest.sink()
    guest.build(sink)
    sink.start()
    [notice] = sink.notices
    assert notice == "its clock chip is not set: VM_RTC_SETTIME: Operation not permitted"
    guest.await_unbroken()


def test_a_held_guest_is_ready_for_as_long_as_one_likes(guest: Arriving) -> None:
    """After READY nothing of the guest runs, so nothing of it can change."""
    sink = guest.sink()
    guest.build(sink)
    started = sink.record()["process"]
    before = cpu_ticks(started["pid"])
    names = sorted(path.name for path in next(guest.staging_root.iterdir()).iterdir())
    assert names == ["ckp", "ckp.conf", "ckp.kern", "ckp.meta", "ckp.tail"]
    assert cpu_ticks(started["pid"]) == before
    assert state_of(started["pid"]) == "T"
    sink.start()
    guest.await_unbroken()


def cpu_ticks(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# vm-bhyve's guest of that name.


@pytest.fixture
def lock(guest: Arriving) -> Path:
    """The run.lock of a guest that vm-bhyve manages at the destination."""
    directory = guest.there.directory / "vm" / "g"
    directory.mkdir()
    (directory / "g.conf").write_text("loader=uefi\n")
    return directory / "run.lock"


def test_a_started_guest_is_locked_for_this_host(guest: Arriving, lock: Path) -> None:
    sink = guest.sink()
    guest.build(sink)
    assert not lock.exists()
    sink.start()
    assert lock.read_text().splitlines()[0] == os.uname().nodename
    assert "memory.size=" in (lock.parent / "bhysend.conf").read_text()


def test_a_guest_that_is_another_hosts_is_refused(guest: Arriving, lock: Path) -> None:
    lock.write_text("elsewhere\n")
    [reason] = reasons(guest, options=FORCE)
    assert reason == (
        f"{lock}: the guest belongs to 'elsewhere'; if it surely does not run there: rm {lock}"
    )

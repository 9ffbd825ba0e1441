"""BhyveSink over the stand-in: what it checks, makes, starts, and leaves of what failed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.base import PAGE_BYTES, Head, State
from bhystream.backend.bhyve import paused, restore
from bhystream.backend.bhyve.sink import BhyveSink
from bhystream.errors import (
    BhyError,
    FormatError,
    GuestError,
    IncompatibleError,
    InternalError,
    PipeError,
)
from bhystream.standin.node import data_extents
from standin.rig import Console, Spec, assert_unbroken

from .bhyve_rig import ID, Two, small_tmpfs, two_hosts


@pytest.fixture
def two() -> Iterator[Two]:
    with two_hosts() as made:
        yield made


class Arriving:
    """A guest that was suspended at the source, its memory in a file, and a sink for it.

    resources: the -o words; None leaves one out.
    """

    def __init__(self, two: Two, spec: Spec | None = None) -> None:
        self.two = two
        guest = two.start(spec)
        source = two.source()
        source.prepare(ID)
        self.head: Head = source.head()
        source.pause()
        guest.await_exit()
        self.states: Sequence[State] = source.states()
        source.keep()
        source.close()
        self.image = two.base / "held" / ID / "ckp"
        words = two.resources()
        self.resources: dict[str, str | None] = {}
        for word in words[1::2]:
            key, _, self.resources[key] = word.partition("=")
        os.environ["BHYSEND_VMM_DIR"] = str(two.there.directory)

    def sink(self, name: str = "g", *, force: bool = False) -> BhyveSink:
        given = {word: value for word, value in self.resources.items() if value is not None}
        return BhyveSink(self.two.there.host, name, given, [], self.two.base_there, ID, force=force)

    def fill(self, sink: BhyveSink) -> None:
        """Do what the engine does up to READY."""
        assert sink.check(self.head) == []
        destinations = sink.open()
        with self.image.open("rb") as image:
            base = 0
            for segment, to in zip(self.head.layout, destinations, strict=True):
                end = base + segment.npages * PAGE_BYTES
                for at, stop in data_extents(image.fileno(), base, end):
                    moved = to.offset_bytes - base
                    while at < stop:
                        at += os.pwrite(to.fd, os.pread(image.fileno(), stop - at, at), at + moved)
                base = end
        sink.load(self.states)

    def reasons(self, *, force: bool = False, **changes: Any) -> list[str]:
        sink = self.sink(force=force)
        found = sink.check(replace(self.head, **changes))
        sink.abort()
        return found

    @property
    def staging(self) -> Path:
        return self.two.staging_there / f"bhyrecv-{ID[:16]}"

    def nothing_is_left(self) -> bool:
        two = self.two
        return (
            list(two.staging_there.iterdir()) == []
            and not (two.base_there / "loaded" / ID).exists()
            and list((two.base_there / "log").iterdir()) == []
            and not two.there.host.exists("g")
        )


@pytest.fixture
def arriving(two: Two) -> Arriving:
    return Arriving(two)


def test_a_guest_is_built_and_started(arriving: Arriving) -> None:
    sink = arriving.sink()
    arriving.fill(sink)
    assert not sink.may_have_run
    assert sorted(os.listdir(arriving.staging)) == ["ckp", "ckp.kern", "ckp.meta"]
    sink.start()
    assert sink.may_have_run
    sink.abort()  # it is nobody's any more
    console = arriving.two.arrived()
    console.await_sweeps(1)
    assert_unbroken(Console(arriving.two.guests[0].console.path), console)
    assert not arriving.staging.exists()


def test_a_guest_with_highmem_is_built(two: Two) -> None:
    arriving = Arriving(two, Spec(memory="5G", touched="16M"))
    sink = arriving.sink()
    assert sink.check(arriving.head) == []
    low, high = sink.open()
    assert (low.offset_bytes, high.offset_bytes) == (0, 3 << 30)
    sink.abort()
    sink = arriving.sink()
    arriving.fill(sink)
    sink.start()
    two.arrived().await_sweeps(1)


def test_a_guest_may_have_another_name_there(arriving: Arriving) -> None:
    sink = arriving.sink("other")
    arriving.fill(sink)
    sink.start()
    assert arriving.two.there.host.exists("other")
    arriving.two.arrived().await_sweeps(1)


def test_the_verdict_touches_nothing(arriving: Arriving) -> None:
    assert arriving.reasons() == []
    assert arriving.nothing_is_left()


def test_what_a_host_cannot_take_is_named(arriving: Arriving) -> None:
    two, head = arriving.two, arriving.head
    assert arriving.reasons(host={**head.host, "hypervisor": "bhyve"}) == [
        "hypervisor: the guest runs under 'bhyve', not standin"
    ]
    [reason] = arriving.reasons(layout=head.layout * 2, force=True)
    assert reason.startswith("layout: it is not that of memory.size=")
    [reason] = arriving.reasons(config={**head.config, "keys": {}})
    assert "memory.size" in reason or "cpus" in reason
    two.there.host.create("g")
    [reason] = arriving.reasons(force=True)
    assert reason.startswith("name: a VM g is here already")
    two.there.host.destroy("g")
    two.there.settings(free_memory_bytes=1 << 20)
    [reason] = arriving.reasons()
    assert reason.startswith("memory: this host has 1048576 bytes free")
    assert arriving.reasons(force=True) == []
    assert arriving.nothing_is_left()


@pytest.mark.parametrize(
    ("word", "value", "reason"),
    [
        ("disk0", "/nonexistent", "disk0: /nonexistent: there is no such file"),
        ("bootrom", "/nonexistent", "bootrom: /nonexistent: there is no such file"),
        ("net0", "tap99", "net0: tap99: there is no such interface"),
        ("net0", None, "net0: no -o net0= is given"),
    ],
)
def test_a_resource_that_is_not_there_is_named(
    arriving: Arriving, word: str, value: str | None, reason: str
) -> None:
    arriving.resources = {**arriving.resources, word: value}
    [found] = arriving.sink(force=True).check(arriving.head)
    assert found.startswith(reason)
    assert arriving.nothing_is_left()


def test_room_that_is_not_there_is_named(arriving: Arriving) -> None:
    with small_tmpfs(arriving.two.directory / "tiny", "8m") as tiny:
        os.environ["BHYRECV_STAGING"] = str(tiny)
        [reason] = arriving.reasons()
        assert reason.startswith(f"staging: {tiny} has ")
        assert list(tiny.iterdir()) == []


def test_room_that_vanishes_is_an_error_and_leaves_nothing(arriving: Arriving) -> None:
    with small_tmpfs(arriving.two.directory / "tiny", "80m") as tiny:
        os.environ["BHYRECV_STAGING"] = str(tiny)
        sink = arriving.sink()
        assert sink.check(arriving.head) == []
        sink.open()
        free = os.statvfs(tiny)
        with (tiny / "other").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
        with pytest.raises(PipeError, match="No space left"):
            sink.load(arriving.states)
        sink.abort()
        assert [path.name for path in tiny.iterdir()] == ["other"]


def test_what_cannot_be_made_is_an_error_of_ours(arriving: Arriving) -> None:
    (arriving.two.base_there / "loaded").write_text("in the way")
    sink = arriving.sink()
    assert sink.check(arriving.head) == []
    with pytest.raises(PipeError, match="cannot make"):
        sink.open()
    sink.abort()


def test_nothing_is_made_of_a_guest_that_was_not_checked(arriving: Arriving) -> None:
    with pytest.raises(InternalError):
        arriving.sink().open()


@pytest.mark.parametrize("step", ["open", "fill"])
def test_abort_leaves_nothing_and_may_be_done_twice(arriving: Arriving, step: str) -> None:
    sink = arriving.sink()
    if step == "open":
        assert sink.check(arriving.head) == []
        sink.open()
    else:
        arriving.fill(sink)
    assert arriving.staging.exists()
    for _ in range(2):
        sink.abort()
        assert arriving.nothing_is_left()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b'"ncpus": 2|"ncpus": 1', "ncpus is 1, not cpus"),
        (b'"memsize": 67108864|"memsize": 33554432', "memsize is 33554432, not memory.size"),
    ],
)
def test_a_state_of_another_guest_is_refused(
    arriving: Arriving, change: bytes, message: str
) -> None:
    sink = arriving.sink()
    assert sink.check(arriving.head) == []
    sink.open()
    meta, *blobs = arriving.states
    before, after = change.split(b"|")
    assert before in meta.data
    with pytest.raises(FormatError, match=message):
        sink.load([State("meta", meta.data.replace(before, after)), *blobs])
    sink.abort()
    assert arriving.nothing_is_left()


# The start.


def test_a_start_that_fails_never_ran_and_is_undone(arriving: Arriving) -> None:
    arriving.two.there.settings(fail=["restore"])
    sink = arriving.sink()
    arriving.fill(sink)
    with pytest.raises(GuestError, match="bhyve -r: Failed to restore"):
        sink.start()
    assert not sink.may_have_run
    sink.abort()
    assert arriving.nothing_is_left()
    # The next attempt.
    arriving.two.there.settings(fail=[])
    sink = arriving.sink()
    arriving.fill(sink)
    sink.start()
    arriving.two.arrived().await_sweeps(1)


def test_a_start_that_fails_behind_its_socket_may_have_run(arriving: Arriving) -> None:
    arriving.two.there.settings(fail=["restore-late"])
    sink = arriving.sink()
    arriving.fill(sink)
    with pytest.raises(GuestError, match="bhyve -r: vm_restore_time"):
        sink.start()
    assert sink.may_have_run


def test_a_vm_that_came_meanwhile_is_left_alone(arriving: Arriving) -> None:
    sink = arriving.sink()
    arriving.fill(sink)
    arriving.two.there.host.create("g")
    with pytest.raises(IncompatibleError, match="a VM of that name came here meanwhile"):
        sink.start()
    assert not sink.may_have_run
    sink.abort()
    assert arriving.two.there.host.exists("g")


# bhyrecv -u, and what -q sees.


def test_a_guest_that_is_left_paused_is_found_and_started(arriving: Arriving) -> None:
    sink = arriving.sink()
    arriving.fill(sink)
    sink.leave_paused()
    sink.abort()
    assert not arriving.staging.exists()
    loaded = paused.open_paused(sink.revive())
    assert loaded.is_alive() and not loaded.runs()
    loaded.resume()
    assert paused.open_paused(sink.revive()).runs()
    console = arriving.two.arrived()
    console.await_sweeps(1)
    assert_unbroken(Console(arriving.two.guests[0].console.path), console)


def test_a_guest_that_is_left_paused_destroys_no_vm_that_came_meanwhile(
    arriving: Arriving,
) -> None:
    sink = arriving.sink()
    arriving.fill(sink)
    arriving.two.there.host.create("g")
    sink.leave_paused()
    paused.open_paused(sink.revive()).discard("")
    assert arriving.two.there.host.exists("g")


def test_a_started_guest_is_seen_running(arriving: Arriving) -> None:
    sink = arriving.sink()
    arriving.fill(sink)
    sink.start()
    found = paused.open_paused(sink.revive())
    assert found.is_alive() and found.runs()


@pytest.mark.parametrize("is_left", [False, True], ids=["files-gone", "files-left"])
def test_another_guest_of_that_name_does_not_make_it_one_that_runs(
    arriving: Arriving, is_left: bool
) -> None:
    """RUNNING is what has the source end its own: a guest started anew here is not the guest."""
    two = arriving.two
    sink = arriving.sink()
    arriving.fill(sink)
    sink.start()
    two.arrived().await_beats(1)
    record = sink.revive()
    pid = two.there.pid("g")
    assert pid is not None
    two.there.host.destroy("g")
    end(pid)
    if is_left:
        arriving.fill(arriving.sink())
    other = two.there.launch("g", Spec(touched="1M"))
    other.console.await_beats(1)
    assert not seen_running(record)
    other.console.await_sweeps(1)


def seen_running(record: Any) -> bool:
    """Say what bhyrecv -q would see."""
    try:
        return paused.open_paused(record).runs()
    except BhyError:
        return False


def end(pid: int) -> None:
    """Wait for the end of a stand-in whose VM is destroyed; it is a child of this process."""
    os.waitpid(pid, 0)


def test_one_whose_bhyrecv_was_killed_while_it_loaded_is_seen_running(
    arriving: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: restore.Restore) -> None:
        raise KeyboardInterrupt

    sink = arriving.sink()
    arriving.fill(sink)
    with monkeypatch.context() as patch:
        patch.setattr(restore.Restore, "_await", killed)
        patch.setattr(restore.Restore, "_undo", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            sink.start()
    assert paused.open_paused(sink.revive()).runs()
    arriving.two.arrived().await_sweeps(1)


# vm-bhyve's guest of that name.


@pytest.fixture
def lock(arriving: Arriving) -> Path:
    """The run.lock of a guest that vm-bhyve knows at the destination."""
    directory = arriving.two.there.directory / "vm" / "g"
    directory.mkdir()
    (directory / "g.conf").write_text("loader=uefi\n")
    return directory / "run.lock"


def test_a_started_guest_is_locked_for_this_host(arriving: Arriving, lock: Path) -> None:
    sink = arriving.sink()
    arriving.fill(sink)
    assert not lock.exists()
    sink.start()
    assert lock.read_text().splitlines()[0] == os.uname().nodename
    assert "memory.size=" in (lock.parent / "bhysend.conf").read_text()


def test_a_guest_that_is_another_hosts_is_refused(arriving: Arriving, lock: Path) -> None:
    lock.write_text("elsewhere\n")
    [reason] = arriving.reasons(force=True)
    assert reason == f"{lock}: the guest belongs to 'elsewhere'"


def test_a_guest_left_paused_is_locked_until_it_is_discarded(
    arriving: Arriving, lock: Path
) -> None:
    sink = arriving.sink()
    arriving.fill(sink)
    sink.leave_paused()
    assert lock.read_text() == "held-by-bhysend\n"
    paused.open_paused(sink.revive()).discard("")
    assert not lock.exists()

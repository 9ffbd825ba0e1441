"""BhyveSource over a live guest: opening it, the rehearsal, and what needs room."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bhystream.backend.bhyve import opened, rehearsal, snapshot, snapshotfiles
from bhystream.backend.bhyve.checkpoint import Checkpoint, UnansweredError
from bhystream.backend.bhyve.memory import Memory
from bhystream.backend.bhyve.snapshotdir import SnapshotDir
from bhystream.backend.bhyve.source import BhyveSource
from bhystream.errors import GuestEndedError, GuestError, IncompatibleError
from bhystream.guest import State
from bhystream.standin.kernel import StandinHost
from bhystream.standin.vm import StandinVm
from standin.held import fifos_of
from standin.rig import Spec

from .bhyve_rig import (
    ID,
    UUID,
    Two,
    require_sink,
    sink_prefix,
    small_tmpfs,
    two_hosts,
    without_sink,
)
from .revived import open_paused

NVME = Spec(devices=(*Spec().devices, ("0.9.0", "nvme")))


# Opening a guest.


def test_opening_and_closing_changes_nothing(two: Two) -> None:
    guest = two.start()
    made = two.source()
    assert made.name == "g"
    assert made.lock_name == "standin-g"
    assert [one.name for one in made.head().layout.segments] == ["lowmem"]
    assert made.resources()
    made.close()
    made.close()
    two.assert_runs_on()
    assert "nvlist_recv() failed" not in guest.stderr()


def test_a_guest_that_is_not_here_is_named(two: Two) -> None:
    two.start()
    config = str(two.config())
    with pytest.raises(GuestError, match="guest h: no VM of that name is here"):
        BhyveSource(two.here.host, "h", two.base, config, force=False)


def test_a_configuration_of_another_guest_is_refused(two: Two) -> None:
    two.start()
    path = two.config()
    path.write_text(path.read_text().replace("memory.size=64M", "memory.size=128M"))
    with pytest.raises(IncompatibleError, match=r"memory\.size: the configuration says 134217728"):
        BhyveSource(two.here.host, "g", two.base, str(path), force=False)


def test_a_guest_without_a_configuration_is_refused(two: Two) -> None:
    two.start()
    with pytest.raises(IncompatibleError, match="its configuration is not known"):
        BhyveSource(two.here.host, "g", two.base, None, force=False)


def test_everything_that_speaks_against_a_move_is_said_at_once(two: Two) -> None:
    two.start(Spec(keys={"standin.waiting": "1"}))
    two.here.settings(can_snapshot=False)
    path = two.config()
    text = path.read_text().replace("memory.size=64M", "memory.size=128M")
    path.write_text(text.replace(f"uuid={UUID}", "pci.0.9.0.device=nvme\npci.0.9.0.path=/none"))
    with pytest.raises(IncompatibleError) as caught:
        BhyveSource(two.here.host, "g", two.base, str(path), force=False)
    lines = [str(caught.value), *caught.value.hint.splitlines()]
    assert [line.split(";")[0].removeprefix("guest g: ") for line in lines] == [
        "configuration: bhyve does not save nvme@pci.0.9.0",
        "configuration: uuid is not set: the default changes with the host",
        "memory.size: the configuration says 134217728, the running guest has 67108864",
        "vcpus: 1 of 2 were never started, or are stopped: a checkpoint would let them run",
        "vmm: the vmm here has no snapshots",
    ]
    assert all(line.startswith("guest g: ") for line in lines)
    assert all(one.cure for one in caught.value.reasons())
    assert "or start it with cpus=1" in lines[3]
    two.assert_runs_on()


def test_a_guest_without_a_configuration_is_examined_all_the_same(two: Two) -> None:
    two.start(Spec(keys={"standin.waiting": "1"}))
    with pytest.raises(IncompatibleError, match="its configuration is not known") as caught:
        BhyveSource(two.here.host, "g", two.base, None, force=False)
    assert "vcpus: 1 of 2 were never started" in caught.value.hint
    two.assert_runs_on()


def test_what_ends_the_search_is_said_behind_what_was_found(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reason gives the status, as if the search had ended there."""
    monkeypatch.setattr(opened, "_SYNC_S", 0.2)
    two.start()
    path = two.config("g", "device=virtio-blk")
    with two.here.connect("g"), pytest.raises(IncompatibleError, match="is not known") as caught:
        BhyveSource(two.here.host, "g", two.base, str(path), force=False)
    assert "has not answered for" in caught.value.hint.splitlines()[-1]
    two.assert_runs_on()


def test_a_guest_of_vm_bhyve_is_refused_in_the_words_of_its_conf(two: Two) -> None:
    with two.supervise(replace(NVME, keys={"uuid": UUID})):
        two.hide_work()
        conf = two.here.directory / "vm" / "g" / "g.conf"
        conf.write_text(conf.read_text() + 'disk0_type="nvme"\ndisk0_name="x"\n')
        (conf.parent / "g.save").touch()
        with pytest.raises(IncompatibleError) as caught:
            BhyveSource(two.here.host, "g", two.base, None, force=False)
        assert caught.value.reasons() == (
            f"{conf.parent}/g.save exists: vm-bhyve would resume that state again; run vm discard"
            " g",
            'configuration: bhyve does not save nvme@pci.0.9.0; set disk0_type="virtio-blk" in'
            " g.conf, then vm stop g and vm start g",
        )
        two.assert_runs_on()


def test_a_bhyve_that_does_not_answer_is_told(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "_SYNC_S", 0.2)
    two.start()
    with two.here.connect("g"), pytest.raises(UnansweredError, match="has not answered for"):
        two.source()
    two.assert_runs_on()


# vCPUs that were never started.


def test_a_guest_with_vcpus_that_never_started_is_refused_before_anything(two: Two) -> None:
    guest = two.start(Spec(keys={"standin.waiting": "1"}))
    with pytest.raises(IncompatibleError, match="vcpus: 1 of 2 were never started"):
        two.source()
    two.assert_runs_on()  # any checkpoint would have let vCPU 1 run
    assert guest.process.poll() is None


@pytest.mark.parametrize("when", ["prepare", "pause"])
def test_a_vcpu_that_stopped_since_is_seen(
    two: Two, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.start()
    made = two.source()
    prepared = made.prepare(ID) if when == "pause" else None
    monkeypatch.setattr(Memory, "waiting_vcpus", lambda self: frozenset({1}))
    asks = []
    monkeypatch.setattr(Checkpoint, "request", lambda *words: asks.append(words))
    with pytest.raises(IncompatibleError, match="vcpus: 1 of 2"):
        made.pause() if when == "pause" else made.prepare(ID)
    assert asks == []
    made.close()
    if prepared:  # the engine does this after a failed pause
        monkeypatch.undo()
        open_paused(prepared.record).resume()
    two.assert_runs_on()


def test_a_guest_that_somebody_else_stops_just_then_is_let_alone(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All vCPUs wait, as in any program's checkpoint, but we have not asked for one."""
    two.start()
    made, record = two.prepared()
    everyone = frozenset({0, 1})
    with monkeypatch.context() as patch:
        patch.setattr(Memory, "waiting_vcpus", lambda self: everyone)
        patch.setattr(StandinVm, "waiting_vcpus", lambda self: everyone)
        with pytest.raises(IncompatibleError, match="vcpus: 0, 1 of 2"):
            made.pause()
        made.close()
        open_paused(record).resume()
    two.assert_runs_on()


# The rehearsal.


def test_a_rehearsal_tells_what_the_pause_will_find(two: Two, sink: str) -> None:
    guest = two.start()
    made = two.source()
    before = made.fixed()
    prepared = made.prepare(ID)
    meta = snapshot.parse(prepared.plan)
    assert meta.vmname == "g" and meta.ncpus == 2 and meta.memory_bytes == 64 << 20
    directory = Path(prepared.record["directory"])
    assert directory == two.base / "held" / ID
    assert directory.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in directory.iterdir()) == (
        ["ckp", "ckp.meta", "dev"] if sink == "sink" else ["ckp.meta"]
    )
    assert (directory / "ckp.meta").is_fifo()
    assert made._ready is not None and made._ready.rehearsal.took_ns > 0
    assert made.fixed() == before._replace(state_ns=made._ready.rehearsal.took_ns)
    assert any("memory file: " in line for line in made.warnings()) == (sink == "file")
    assert guest.process.poll() is None
    made.close()
    two.assert_runs_on()


def test_a_pause_finds_it_and_the_guest_stands_until_it_is_resumed(two: Two, sink: str) -> None:
    guest = two.start()
    made = two.source()
    plan = made.prepare(ID).plan
    paused = made.pause()
    beats = guest.console.beats()
    states = [state for state in paused.states() if not state.is_optional]
    assert [state.name for state in paused.states()[len(states) :]] == ["fpu/0", "fpu/1", "clock"]
    assert paused.reasons == []
    text, kern = states[0], b"".join(state.data for state in states[1:])
    assert text == State("meta", plan)
    assert [state.name for state in states[1:]] == [
        item.state_name for item in snapshot.parse(plan).items
    ]
    path = Path(paused.record.directory, "ckp.kern")
    assert path.read_bytes() == kern
    assert made.changed() is None
    paused.require_paused()
    assert guest.console.beats() == beats
    paused.resume()
    made.close()
    two.assert_runs_on()
    assert "nvlist_recv() failed" not in guest.stderr()


def test_only_bhyve_has_the_fifo_open_while_the_guest_stands(two: Two, sink: str) -> None:
    """Else the end of a request could not be seen: see fifo.has_reader()."""
    guest = two.start()
    made = two.source()
    made.prepare(ID)
    paused = made.pause()
    path = Path(paused.record.directory, "ckp.meta")
    assert fifos_of(os.getpid(), path) == 0
    assert fifos_of(guest.process.pid, path) > 0
    paused.resume()
    made.close()
    two.assert_runs_on()


def test_a_device_that_cannot_be_saved_is_refused_by_the_rehearsal(two: Two, sink: str) -> None:
    guest = two.start(NVME)
    made = two.source(without="0.9.0")
    with pytest.raises(GuestError) as caught:
        made.prepare(ID)
    assert caught.value.hint == rehearsal.UNSAVED
    made.close()
    two.assert_runs_on()
    assert guest.stderr().count("Failed to snapshot nvme@pci.0.9.0") == 1  # not tried again


def test_what_bhyve_says_of_a_refusal_is_handed_on() -> None:
    with two_hosts(generation=5) as two:
        two.start(NVME)
        made = two.source(without="0.9.0")
        with pytest.raises(GuestError, match=r"refused: failed to snapshot: Operation not supp"):
            made.prepare(ID)
        made.close()
        two.assert_runs_on()


def test_a_device_that_bhyve_may_not_open_is_replaced_by_a_file(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    if require_sink():
        pytest.skip("only root can remount")
    two.start()
    real = StandinHost.mount_null

    def mount(self: StandinHost, directory: Path) -> None:
        real(self, directory)
        subprocess.run(["mount", "-o", "remount,bind,nodev", directory / "null"], check=True)

    monkeypatch.setattr(StandinHost, "mount_null", mount)
    made = two.source()
    made.prepare(ID)
    [said] = [line for line in made.warnings() if line.startswith("memory file: ")]
    assert "bhyve cannot write it to the null device" in said
    paused = made.pause()
    image = Path(paused.record.directory, "ckp")
    assert image.is_file() and image.stat().st_size == 64 << 20
    paused.resume()
    made.close()
    two.assert_runs_on()


def test_the_throttle_resumes_only_what_it_has_suspended(two: Two) -> None:
    """The other vCPU waits for its SIPI: its registers are not those of a vCPU that runs."""
    two.start()
    made, _ = two.prepared()
    vm = two.here.host.open_vm("g", is_writable=True)
    for waiting in (set[int](), {1}, set[int]()):
        for vcpu in waiting:
            vm.suspend_cpu(vcpu)
        made.suspend_vcpus()
        assert vm.waiting_vcpus() == {0, 1}
        made.resume_vcpus()
        assert vm.waiting_vcpus() == waiting
        for vcpu in waiting:
            vm.resume_cpu(vcpu)
    vm.close()
    made.close()
    two.assert_runs_on()
    assert two.held() == []


def test_a_device_that_takes_no_write_of_that_size_is_not_tried(two: Two) -> None:
    two.here.settings(sysctl={"debug.devfs_iosize_max_clamp": "1"})
    two.start(Spec(memory="2G"))
    made = two.source()
    [said] = [line for line in made.warnings() if line.startswith("memory file: ")]
    assert "debug.devfs_iosize_max_clamp: it is 1 here" in said
    assert made.fixed().state_ns > 10**9
    made.close()


def test_a_rehearsal_without_an_answer_is_given_up(two: Two, impatient: None) -> None:
    two.start()
    made = two.source()
    two.here.settings(fail=["hang"])
    with pytest.raises(UnansweredError, match="has not answered for"):
        made.prepare(ID)
    made.close()
    two.assert_runs_on()


@pytest.mark.parametrize("fail", ["die", "power-off"])
def test_a_guest_that_ends_in_the_rehearsal_is_gone(two: Two, fail: str) -> None:
    guest = two.start()
    made = two.source()
    if fail == "die":
        two.here.settings(fail=["die"])
    else:
        guest.power_off()
    with pytest.raises(GuestEndedError):
        made.prepare(ID)
    made.close()
    assert two.held() == []
    assert guest.await_exit() != 0


@pytest.mark.parametrize("size", [100, 9000])
def test_a_state_whose_text_does_not_hold_is_refused(
    two: Two, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    two.start()
    made = two.source()
    real = snapshotfiles.read_meta
    monkeypatch.setattr(snapshotfiles, "read_meta", lambda files: (real(files)[0], bytes(size)))
    with pytest.raises(IncompatibleError, match=f"has {size} bytes, and can pause a guest only"):
        made.prepare(ID)
    made.close()
    two.assert_runs_on()


# What a killed bhysend has left.


def test_what_a_killed_bhysend_left_is_swept_by_the_next(two: Two) -> None:
    two.start()
    left, record = two.prepared()
    left._made.pop_all()  # a killed bhysend undoes nothing
    left.close()
    assert two.held() == [ID]
    made = two.source()
    made.prepare("f" * 32)
    assert two.held() == ["f" * 32]
    made.close()
    assert record["directory"].endswith(ID)
    two.assert_runs_on()


def test_what_a_record_speaks_of_is_not_swept(two: Two) -> None:
    two.start()
    left, _ = two.prepared()
    left._made.pop_all()
    left.close()
    (two.base / "source" / f"{ID}.json").write_text("{}")
    made = two.source()
    made.prepare("f" * 32)
    assert sorted(two.held()) == [ID, "f" * 32]
    made.close()
    assert two.held() == [ID]


def test_what_somebody_stands_in_is_not_swept(two: Two, impatient: None) -> None:
    """The directory stays even if the record was removed, or the guest could not be resumed."""
    two.start()
    found = two.hold()
    lock = two.base / "lock" / "standin-g"
    assert lock.read_text() == found.record.directory
    other = SnapshotDir(two.base / "held" / ("f" * 32))
    other.sweep(two.here.host, lock, two.base / "source")
    assert found.stands()
    found.resume()
    two.assert_runs_on()


# Room.


def fill(directory: Path, leave_bytes: int = 0) -> None:
    """Fill a file system, except for leave_bytes."""
    free = os.statvfs(directory)
    with (directory / "other").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - leave_bytes)


def test_a_directory_without_room_is_refused_before_the_rehearsal(two: Two) -> None:
    two.start()
    with small_tmpfs(two.base / "held", "1m") as room:
        made = two.source()
        with pytest.raises(GuestError, match=rf"state directory: {room}\S* has \d+ bytes free"):
            made.prepare(ID)
        made.close()
    two.assert_runs_on()


def test_why_the_memory_needs_room_is_told_with_the_refusal(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_sink(monkeypatch)
    two.start()
    with small_tmpfs(two.base / "held", "100m"):
        made = two.source()
        with pytest.raises(GuestError, match="state directory: ") as caught:
            made.prepare(ID)
        assert "Operation not permitted" in caught.value.hint
        made.close()
    two.assert_runs_on()


def test_room_that_vanishes_before_the_pause_is_seen_again(two: Two) -> None:
    two.start()
    with small_tmpfs(two.base / "held", "80m") as room:
        made, _ = two.prepared()
        fill(room)
        with pytest.raises(GuestError, match=r"state directory: .* has 0 bytes free"):
            made.pause()
        made.close()
    two.assert_runs_on()


def test_room_that_vanishes_in_the_pause_leaves_the_guest_running(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = two.start()
    require_sink()
    with small_tmpfs(two.base / "held", "80m") as room:
        made, record = two.prepared()
        real = Checkpoint.request

        def request(self: Checkpoint, *words: int) -> None:
            fill(room, 4096)
            real(self, *words)  # type: ignore[arg-type]

        monkeypatch.setattr(Checkpoint, "request", request)
        with pytest.raises(GuestError, match=r"but not now|No space left"):
            made.pause()
        made.close()
        assert "Failed to write all snapshotted data." in guest.stderr()
        open_paused(record).resume()
    two.assert_runs_on()


def test_the_sink_can_be_had_in_ci() -> None:
    assert sink_prefix() is not None or os.environ.get("CI") != "true"

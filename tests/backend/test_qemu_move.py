"""QemuSource and QemuSink with real QEMUs on both sides, memory copied by hand."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bhystream.backend.qemu import open_paused
from bhystream.backend.qemu.paused import QemuPaused
from bhystream.backend.qemu.sink import QemuSink
from bhystream.backend.qemu.source import QemuSource
from bhystream.errors import (
    GuestError,
    IncompatibleError,
    InternalError,
)
from bhystream.guest import PAGE_BYTES, Head, State
from bhystream.memory.target import FileTarget
from support.waiting import until

from .qemu_rig import SIZE, Rig, copy_memory, monitor, peer, state_of, stop

pytestmark = pytest.mark.guest

MEMFD = "memory-backend-memfd"


def move(
    source: QemuSource, sink: QemuSink, keep: Callable[[QemuPaused], None] = lambda paused: None
) -> dict[str, float]:
    """Move a guest by hand; return the milliseconds of each paused step.

    keep: called with the paused guest, right after the pause.
    """
    assert sink.check(source.head()) == []
    [destination] = sink.open(b"")
    copy_memory(source, destination)
    took: dict[str, float] = {}

    def timed(what: str, begin: float) -> None:
        took[what] = (time.perf_counter() - begin) * 1000

    begin = time.perf_counter()
    paused = source.pause()
    timed("pause", begin)
    keep(paused)
    states = paused.states()
    took["bytes"] = len(states[0].data)
    copy_memory(source, destination)
    begin = time.perf_counter()
    sink.load(states)
    timed("load", begin)
    begin = time.perf_counter()
    sink.start()
    timed("start", begin)
    sink.settle()
    return took


@pytest.mark.parametrize("ram", ["", MEMFD], ids=["file", "memfd"])
@pytest.mark.parametrize("machine", ["pc-q35-7.2", "pc-i440fx-7.2", "microvm"])
@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_guest_moves(rig: Rig, machine: str, vcpus: int, ram: str) -> None:
    path = rig.start("here", "-smp", str(vcpus), machine=machine, ram=ram)
    source, sink = QemuSource(path), rig.sink("there")
    assert source.name == "here"
    took = move(source, sink)
    print(machine, vcpus, took)
    there = str(rig.state_dir / "there.qmp")
    assert (state_of(there), sink.may_have_run) == ("running", True)
    # The guest's memory file has no name any more, and the guest can be sent on.
    assert not os.path.exists(f"/dev/shm/bhyrecv-there-{os.getpid()}")
    again = QemuSource(there)
    assert again.head().config["machine"]["type"] == machine
    again.close()
    source.close()
    assert state_of(path) == "postmigrate"
    stop(there)
    open_paused(sink.record()).discard("")


def test_the_memory_there_is_the_memory_here(rig: Rig) -> None:
    source, sink = QemuSource(rig.start("here")), rig.sink()
    assert sink.check(source.head()) == []
    [destination] = sink.open(b"")
    assert isinstance(destination, FileTarget)
    assert os.fstat(destination.fd).st_blocks == 0
    paused = source.pause()
    states = paused.states()
    copy_memory(source, destination)
    sink.load(states)
    [view] = source.memory()
    with mmap.mmap(destination.fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as there:
        assert view == memoryview(there)[:].tobytes()
    sink.abort()
    source.close()


@pytest.mark.parametrize(
    ("interface", "device"),
    [("none", "virtio-blk-pci,drive=d0"), ("virtio", ""), ("ide", "")],
)
def test_a_guest_moves_with_a_shared_disk(rig: Rig, interface: str, device: str) -> None:
    image = rig.path("disk.img")
    Path(image).write_bytes(bytes(1 << 20))
    extra = ["-drive", f"file={image},if={interface},id=d0,format=raw"]
    extra += ["-device", device] if device else []
    path = rig.start("here", *extra)
    source, sink = QemuSource(path), rig.sink("there", disk0=image)
    kept: list[QemuPaused] = []
    move(source, sink, kept.append)
    there = str(rig.state_dir / "there.qmp")
    assert state_of(there) == "running"
    # The destination holds the image's lock now: two copies cannot run.
    with pytest.raises(GuestError, match="lock"):
        kept[0].resume()
    # Once that QEMU has ended, the source gets its disk back.
    stop(there)
    open_paused(sink.record()).discard("")
    kept[0].resume()
    assert kept[0].runs()
    kept[0].close()
    source.close()


def state_of_open(source: QemuSource) -> str:
    """Return QEMU's run state through the source, which holds the one QMP connection."""
    return str(source._opened.qmp.execute("query-status", doing="ask")["status"])


def test_a_destination_whose_disk_is_locked_never_ran(rig: Rig) -> None:
    ours, theirs = rig.path("ours.img"), rig.path("theirs.img")
    for image in (ours, theirs):
        Path(image).write_bytes(bytes(1 << 20))
    drive = "if=virtio,format=raw,file="
    source = QemuSource(rig.start("here", "-drive", drive + ours))
    rig.start("other", "-drive", drive + theirs)
    sink = rig.sink("there", disk0=theirs)
    kept: list[QemuPaused] = []
    with pytest.raises(GuestError, match="lock"):
        move(source, sink, kept.append)
    assert not sink.may_have_run
    sink.abort()
    kept[0].resume()
    source.close()


def test_a_qemu_that_has_ended_before_the_start_has_not_run(rig: Rig) -> None:
    source, sink = QemuSource(rig.start("here")), rig.sink()
    assert sink.check(source.head()) == []
    [destination] = sink.open(b"")
    paused = source.pause()
    copy_memory(source, destination)
    sink.load(paused.states())
    os.kill(sink.record()["pid"], 9)
    until(lambda: not open_paused(sink.record()).is_alive(), "the end of QEMU")
    with pytest.raises(GuestError, match="QEMU has ended"):
        sink.start()
    assert not sink.may_have_run
    sink.abort()
    paused.resume()
    source.close()


def test_many_devices_move(rig: Rig) -> None:
    path = rig.start(
        "here", "-device", "pcie-root-port,id=rp0,chassis=1", "-object", "rng-builtin,id=r0",
        "-device", "virtio-rng-pci,rng=r0,bus=rp0", "-netdev", "user,id=n0",
        "-device", "virtio-net-pci,netdev=n0", "-nic", "user,model=e1000",
        "-serial", "null", "-device", "virtio-serial-pci,id=vs0", "-chardev", "null,id=c0",
        "-device", "virtserialport,bus=vs0.0,chardev=c0", "-device", "VGA",
        "-device", "virtio-balloon-pci", "-device", "qemu-xhci", "-device", "usb-tablet",
        "-uuid", "8c1b4c5e-0d3f-4c41-9e63-0b8f5b3c2a11", "-rtc", "base=utc",
        "-smbios", "type=1,product=A box", "-drive", "if=ide,media=cdrom,index=2",
        "-global", "ICH9-LPC.disable_s3=1", "-boot", "menu=off", "-cpu", "qemu64,+ssse3",
    )  # fmt: skip
    source = QemuSource(path)
    sink = rig.sink("there", net0="none", net1="user", serial0=rig.path("log"))
    move(source, sink)
    there = QemuSource(str(rig.state_dir / "there.qmp"))
    assert there.head().devices == source.head().devices
    there.close()
    source.close()


def test_what_qemu_takes_in_other_words_moves(rig: Rig) -> None:
    """Options as other tools write them: QEMU has to accept these, and those made from them."""
    image = rig.path("disk.img")
    Path(image).write_bytes(bytes(1 << 20))
    path = rig.start(
        "here", "-name", "my web server", "-m", "0.0625G", "-boot", "menu=yes",
        "-machine", "kernel_irqchip=off,mem_merge=off,smp.cpus=2", "-smbios", "type=0x1,serial=a",
        "-drive", f"if=none,id=d0,format=raw,file={image},noreadonly,snapshot=off,node-name=n0",
        "-device", '{"driver":"virtio-blk-pci","drive":"d0","id":"v0","addr":49}',
        "-device", "e1000-82540em,mac=52-54-00-AA-00-01", "-cpu", "qemu64,model-id=My CPU",
    )  # fmt: skip
    source, sink = QemuSource(path), rig.sink("there", disk0=image)
    assert source.name == "my-web-server"
    [warning] = source.warnings()
    assert "'my web server'" in warning and "bhyrecv's operand" in warning
    move(source, sink)
    assert state_of(str(rig.state_dir / "there.qmp")) == "running"
    source.close()


def test_resume_after_states_leaves_qemu_as_found(rig: Rig) -> None:
    path = rig.start("here")
    with monitor(path) as ask:
        before = ask("query-migrate-capabilities"), ask("query-migrate-parameters")
    source = QemuSource(path)
    for _ in range(3):  # a second attempt must work too
        paused = source.pause()
        assert len(paused.states()[0].data) > 10_000
        paused.resume()
        paused.resume()
        assert state_of_open(source) == "running"
    source.close()
    with monitor(path) as ask:
        assert (ask("query-migrate-capabilities"), ask("query-migrate-parameters")) == before


def test_state_with_ram_in_it_is_refused_and_the_guest_resumes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rig.start("here")
    source = QemuSource(path)
    monkeypatch.setattr("bhystream.backend.qemu.state.MAX_STATE_BYTES", 100_000)
    monkeypatch.setattr("bhystream.backend.qemu.state.PIPE_BYTES", 4096)
    with pytest.raises(GuestError, match="put RAM into the state"):
        source.pause()
    assert state_of_open(source) == "running"
    source.close()


def test_abort_leaves_nothing(rig: Rig) -> None:
    source = QemuSource(rig.start("here", "-serial", "null"))
    sink = rig.sink("there", serial0=rig.path("serial"), mem=rig.path("mem"))
    assert sink.check(source.head()) == []
    assert not os.path.exists(rig.path("mem"))
    sink.open(b"")
    pid = sink.record()["pid"]
    assert os.path.exists(rig.path("mem"))
    sink.abort()
    sink.abort()
    assert not os.path.exists(f"/proc/{pid}")
    assert [str(path) for path in rig.state_dir.rglob("*")] == [str(rig.state_dir / "log")]
    assert sorted(os.listdir(rig.directory)) == ["here.qmp", "here.ram", "state"]
    # A second attempt can follow at once.
    move(source, rig.sink("there", serial0=rig.path("serial")))
    source.close()


def test_a_state_that_qemu_cannot_load_is_reported_in_its_words(rig: Rig) -> None:
    source, sink = QemuSource(rig.start("here")), rig.sink()
    assert sink.check(source.head()) == []
    sink.open(b"")
    with pytest.raises(GuestError, match=r"QEMU has ended: .*Not a migration stream"):
        sink.load([State("qemu", os.urandom(3 << 20))])
    sink.abort()
    assert [str(path) for path in rig.state_dir.rglob("*")] == [str(rig.state_dir / "log")]
    source.close()


def test_open_needs_a_verdict(rig: Rig) -> None:
    with pytest.raises(InternalError):
        rig.sink().open(b"")


def test_a_waiting_qemu_is_filled_and_started(rig: Rig) -> None:
    source = QemuSource(rig.start("here"))
    waiting = rig.start("wait", "-incoming", "defer")
    # An earlier attempt has left pages in QEMU's memory.
    with open(rig.path("wait.ram"), "r+b") as file:
        file.write(b"x" * SIZE)
    sink = QemuSink(waiting, {}, None, False, str(rig.state_dir))
    assert sink.check(source.head()) == []
    [destination] = sink.open(b"")
    assert isinstance(destination, FileTarget)
    assert os.fstat(destination.fd).st_blocks == 0
    assert os.pread(destination.fd, PAGE_BYTES, SIZE - PAGE_BYTES) == bytes(PAGE_BYTES)
    sink.abort()
    with monitor(waiting) as ask:  # as it was found: another attempt may follow
        assert ask("query-status")["status"] == "inmigrate"
        assert not any(each["state"] for each in ask("query-migrate-capabilities"))
        assert "not found" in ask("closefd", fdname="bhyrecv")["error"]["desc"]
    move(source, QemuSink(waiting, {}, None, False, str(rig.state_dir)))
    assert state_of(waiting) == "running"
    source.close()


def test_a_waiting_qemu_on_the_source_memory_is_refused(rig: Rig) -> None:
    source = QemuSource(rig.start("here"))
    same = f"memory-backend-file,share=on,mem-path={rig.path('here.ram')}"
    waiting = rig.start("wait", "-S", "-incoming", "defer", ram=same)
    sink = QemuSink(waiting, {}, None, False, str(rig.state_dir))
    assert sink.check(source.head()) == []
    with pytest.raises(IncompatibleError, match=f"in use by process {rig.processes['here'].pid}"):
        sink.open(b"")
    sink.abort()
    assert sum(end - first for first, end in source.touched()) > 0
    source.close()


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (("-cpu", "max"), "cpu: the stream says none, here max"),
        (("-device", "virtio-rng-pci"), "device 0: the stream says none, here virtio-rng-pci"),
        (("-smp", "2"), "smp.cpus: the stream says 1, here 2"),
    ],
)
def test_a_waiting_qemu_that_is_another_machine_is_refused(
    rig: Rig, extra: tuple[str, ...], reason: str
) -> None:
    source = QemuSource(rig.start("here"))
    waiting = rig.start("wait", "-S", "-incoming", "defer", *extra)
    sink = QemuSink(waiting, {}, None, False, str(rig.state_dir))
    assert sink.check(source.head()) == [reason]
    with pytest.raises(InternalError):
        sink.open(b"")
    sink.abort()
    forced = QemuSink(waiting, {}, None, True, str(rig.state_dir))
    assert forced.check(source.head()) == []
    forced.abort()
    source.close()


def test_a_running_guest_at_the_destination_is_not_taken_over(rig: Rig) -> None:
    source = QemuSource(rig.start("here"))
    other = rig.start("other")
    sink = QemuSink(other, {}, None, True, str(rig.state_dir))
    assert sink.check(source.head()) == [
        f"qmp: {other} is a QEMU that is 'running', not an empty one"
    ]
    sink.abort()
    assert state_of(other) == "running"
    source.close()


def test_a_template_is_compared_and_started(rig: Rig) -> None:
    source = QemuSource(rig.start("here"))
    argv = [word.replace("here", "tmpl") for word in rig.argv("here")]
    Path(rig.path("template")).write_text(" ".join(argv) + "\n", encoding="utf-8")
    move(source, rig.sink("there", template=rig.path("template")))
    assert state_of(str(rig.state_dir / "there.qmp")) == "running"
    Path(rig.path("template")).write_text(" ".join([*argv, "-cpu", "max"]), encoding="utf-8")
    assert rig.sink("two", template=rig.path("template")).check(source.head()) == [
        "cpu: the stream says none, here max"
    ]
    Path(rig.path("template")).write_text(" ".join([*argv, "-daemonize"]), encoding="utf-8")
    [reason] = rig.sink("two", template=rig.path("template")).check(source.head())
    assert "remove -daemonize" in reason
    source.close()


def test_the_host_is_checked_before_anything_is_made(rig: Rig) -> None:
    source = QemuSource(rig.start("here"))
    head = source.head()
    strange = dict(head.config) | {"machine": {"type": "pc-q35-99.9", "props": {}}}
    sink = rig.sink("there", mem=rig.path("here.ram"))
    assert sink.check(Head(head.host, head.layout, strange, ())) == [
        "machine: this QEMU does not know pc-q35-99.9",
        f"mem: {rig.path('here.ram')} exists; remove it or name another",
    ]
    newer = dict(head.host) | {"hypervisor_version": "99.1.0"}
    [reason] = rig.sink().check(Head(newer, head.layout, head.config, ()))
    assert reason.startswith("hypervisor_version: the source runs QEMU '99.1.0'")
    other = dict(head.host) | {"hypervisor": "bhyve"}
    assert "bhyve" in rig.sink().check(Head(other, head.layout, head.config, ()))[0]
    Path(rig.state_dir / "file.qmp").write_text("precious", encoding="utf-8")
    assert "not a socket" in rig.sink("file").check(head)[0]
    source.close()


def test_a_qemu_without_seccomp_is_started_without_a_sandbox(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = rig.path("qemu")
    Path(program).write_text(
        '#!/bin/sh\ncase "$*" in *-sandbox*)\n'
        'echo "qemu: -sandbox on: sandbox support is not enabled in this QEMU build" >&2; exit 1\n'
        'esac\nexec qemu-system-x86_64 "$@"\n',
        encoding="utf-8",
    )
    os.chmod(program, 0o700)
    monkeypatch.setenv("BHYRECV_QEMU", program)
    source, sink = QemuSource(rig.start("here")), rig.sink()
    move(source, sink)
    there = Path(f"/proc/{peer(str(rig.state_dir / 'there.qmp'))}/cmdline").read_bytes()
    assert b"-sandbox" not in there
    source.close()

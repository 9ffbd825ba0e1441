"""The guests that QemuSource refuses, and what it finds in others, with a real QEMU."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from bhystream.backend.process import end_process, identify, is_alive
from bhystream.backend.qemu import facts, qmp
from bhystream.backend.qemu.qmp import Qmp
from bhystream.backend.qemu.ram import extents
from bhystream.backend.qemu.source import QemuSource
from bhystream.errors import GuestError, IncompatibleError
from bhystream.guest import PAGE_BYTES, Segment
from support.waiting import until

from .qemu_rig import DEADLINE_S, SIZE, Rig, monitor

pytestmark = pytest.mark.guest


def test_the_head_describes_guest_and_host(rig: Rig) -> None:
    source = QemuSource(rig.start("web1", "-device", "virtio-rng-pci,id=r1"))
    head = source.head()
    assert head.layout.segments == (Segment("ram0", None, SIZE // PAGE_BYTES),)
    assert head.devices == ("virtio-rng-pci r1",)
    assert (head.host["hypervisor"], head.host["hw.pagesize"]) == ("qemu", 4096)
    assert head.host["hypervisor_version"].count(".") == 2
    pid = rig.processes["web1"].pid
    assert source.lock_name.startswith(f"qemu-{pid}-")
    source.close()
    source.close()


@pytest.mark.parametrize("ram", ["", "memory-backend-memfd"], ids=["file", "memfd"])
def test_untouched_pages_stay_untouched(rig: Rig, ram: str) -> None:
    source = QemuSource(rig.start("here", ram=ram))
    until(lambda: list(source.touched()), "memory", DEADLINE_S)
    source.pause()
    found = list(source.touched())
    assert found == sorted(found)
    assert all(0 <= first < end <= SIZE // PAGE_BYTES for first, end in found)
    pages = sum(end - first for first, end in found)
    assert 0 < pages < SIZE // PAGE_BYTES
    [view] = source.memory()
    assert len(view) == SIZE and view.readonly
    for first, end in found:
        assert len(bytes(view[first * PAGE_BYTES : end * PAGE_BYTES])) == (end - first) * PAGE_BYTES
    assert list(source.touched()) == found
    del view
    source.close()


def test_memory_whose_file_was_unlinked_is_found(rig: Rig) -> None:
    path = rig.start("here")
    os.unlink(rig.path("here.ram"))
    source = QemuSource(path)
    assert len(source.memory()[0]) == SIZE
    source.close()


def test_extents_of_a_sparse_file(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 64 * PAGE_BYTES)
    assert list(extents(fd, 64 * PAGE_BYTES, os.getpid())) == []
    os.pwrite(fd, b"x", 3 * PAGE_BYTES + 5)
    os.pwrite(fd, b"x" * 2 * PAGE_BYTES, 63 * PAGE_BYTES)  # past the size asked for
    assert list(extents(fd, 64 * PAGE_BYTES, os.getpid())) == [(3, 4), (63, 64)]
    os.close(fd)


def test_unshared_memory_is_refused_by_name(rig: Rig) -> None:
    path = rig.start("here", ram="memory-backend-ram")
    with pytest.raises(IncompatibleError, match="memory backend ram0 is not share=on") as caught:
        QemuSource(path)
    [reason] = caught.value.reasons()
    assert "memory-backend-file" in reason.cure


def test_two_memory_backends_are_refused(rig: Rig) -> None:
    path = rig.start("here", "-object", "memory-backend-ram,id=ram1,size=4M")
    with pytest.raises(IncompatibleError, match="exactly one"):
        QemuSource(path)


def test_a_paused_guest_is_refused_with_the_cure(rig: Rig) -> None:
    path = rig.start("here", "-S")
    with pytest.raises(GuestError, match="'prelaunch', not running"):
        QemuSource(path)
    with monitor(path) as ask:
        ask("cont")
        ask("stop")
    with pytest.raises(GuestError, match="guest here: cannot send it: it is 'paused'") as caught:
        QemuSource(path)
    [reason] = caught.value.reasons()
    assert "cont" in reason.cure


def test_the_throttle_stops_a_guest_and_lets_it_run(rig: Rig) -> None:
    source = QemuSource(rig.start("here"))
    source.resume_vcpus()  # nothing to undo
    for _ in range(2):
        source.suspend_vcpus()
        assert facts.status(source._opened.qmp) == "paused"
        source.resume_vcpus()
        assert facts.status(source._opened.qmp) == "running"
    source.close()


def test_the_throttle_leaves_a_guest_alone_that_another_monitor_has_stopped(rig: Rig) -> None:
    source = QemuSource(rig.start("here"))
    qmp = source._opened.qmp
    qmp.execute("stop", doing="stand in for another monitor")
    with pytest.raises(GuestError, match="guest here: cannot throttle it: it is 'paused'"):
        source.suspend_vcpus()
    source.resume_vcpus()
    assert facts.status(qmp) == "paused"
    source.close()


def test_a_guest_with_another_capability_is_refused_by_name(rig: Rig) -> None:
    path = rig.start("here")
    with monitor(path) as ask:
        wanted = [{"capability": "auto-converge", "state": True}]
        ask("migrate-set-capabilities", capabilities=wanted)
    with pytest.raises(GuestError, match="auto-converge"):
        QemuSource(path)


def test_a_guest_that_migrates_already_is_refused(rig: Rig) -> None:
    path = rig.start("here")
    read_end, write_end = os.pipe()
    connection = qmp.Qmp(path, "guest here")
    connection.execute("migrate-set-parameters", {"max-bandwidth": 4096}, doing="slow")
    connection.send_fd("out", write_end, doing="begin")
    connection.execute("migrate", {"uri": "fd:out"}, doing="begin")
    connection.close()
    with pytest.raises(GuestError, match="a migration is in progress"):
        QemuSource(path)
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize("extra", [("id", "late"), ()], ids=["named", "nameless"])
def test_a_device_plugged_in_later_is_refused(rig: Rig, extra: tuple[str, ...]) -> None:
    path = rig.start("here", "-device", "qemu-xhci")
    with monitor(path) as ask:
        named = {"id": extra[1]} if extra else {}
        assert ask("device_add", driver="usb-tablet", **named) == {}
    with pytest.raises(IncompatibleError, match="plugged"):
        QemuSource(path)


def test_a_qmp_socket_that_is_taken_is_named(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "GREETING_LIMIT_S", 0.3)
    path = rig.start("here")
    with (
        monitor(path),
        pytest.raises(GuestError, match=f"another client holds {path}") as caught,
    ):
        QemuSource(path)
    assert "second -qmp" in caught.value.hint
    QemuSource(path).close()  # free again


def test_a_socket_without_a_listener_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "x.qmp")
    with pytest.raises(GuestError, match=r"guest x: cannot connect to .*No such file"):
        QemuSource(path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    with pytest.raises(GuestError, match="Connection refused"):
        QemuSource(path)
    with pytest.raises(GuestError, match="too long"):
        QemuSource("/" + "x" * 200)


def test_a_listener_that_is_not_qemu_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "x.qmp")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()

        def answer() -> None:
            peer, _ = server.accept()
            peer.sendall(b"220 mail\r\n")
            peer.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(GuestError, match="does not speak QMP"):
            QemuSource(path)
        thread.join()


def test_a_guest_of_libvirt_is_refused_by_name(rig: Rig) -> None:
    Path(rig.path("key")).write_bytes(b"x" * 32)
    secret = f"secret,id=masterKey0,format=raw,file={rig.path('key')}"
    path = rig.start("here", "-object", secret)
    with pytest.raises(GuestError, match="libvirt") as caught:
        QemuSource(path)
    assert caught.value.hint == "virsh migrate"


def test_a_command_has_a_time_limit(rig: Rig) -> None:
    connection = Qmp(rig.start("here"), "guest here")
    rig.processes["here"].send_signal(signal.SIGSTOP)
    with pytest.raises(GuestError, match=r"did not answer query-status in 0\.2 s"):
        connection.execute("query-status", doing="ask", limit_s=0.2)
    rig.processes["here"].send_signal(signal.SIGCONT)
    # The late answer is dropped, and the connection still works.
    assert connection.execute("query-status", doing="ask")["running"]
    connection.close()


def test_commands_sent_ahead_are_done_in_order_each_with_its_answer(rig: Rig) -> None:
    connection = Qmp(rig.start("here"), "guest here")
    with connection.ahead("query-status", "stop", "query-status", "query-name"):
        assert facts.status(connection) == "running"
        connection.execute("stop", doing="ask")
        assert facts.status(connection) == "paused"
        assert connection.execute("query-name", doing="ask") == {"name": "here"}
    connection.close()


def test_an_answer_that_nobody_took_is_no_later_answer(rig: Rig) -> None:
    connection = Qmp(rig.start("here"), "guest here")
    with (
        pytest.raises(GuestError, match="cannot frob"),
        connection.ahead("nix", "query-status", "query-status"),
    ):
        connection.execute("nix", doing="frob")
    connection.execute("stop", doing="ask")
    assert facts.status(connection) == "paused"
    connection.close()


def test_another_command_than_was_sent_ahead_gets_its_own_answer(rig: Rig) -> None:
    connection = Qmp(rig.start("here"), "guest here")
    with connection.ahead("query-status"):
        assert connection.execute("query-name", doing="ask") == {"name": "here"}
        found = {"path": "/machine", "property": "type"}
        assert connection.execute("qom-get", found, doing="ask") == "pc-q35-7.2-machine"
        assert facts.status(connection) == "running"
    connection.close()


def test_signals_set_flags_and_interrupt_nothing(rig: Rig) -> None:
    source = QemuSource(rig.start("here"))
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        for _ in range(50):
            assert source._opened.qmp.execute("query-status", doing="ask")["running"]
        paused = source.pause()
        assert paused.states()[0].data
        paused.resume()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen
    assert threading.active_count() == 1
    source.close()


def test_an_error_of_qemu_says_what_could_not_be_done(rig: Rig) -> None:
    connection = Qmp(rig.start("here"), "guest here")
    with pytest.raises(GuestError, match=r"^guest here: cannot frob: The command nix"):
        connection.execute("nix", doing="frob")
    connection.close()


def test_a_daemonized_qemu_is_found(rig: Rig) -> None:
    import subprocess

    argv = [*rig.argv("here"), "-daemonize", "-pidfile", rig.path("pid")]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    pid = int(Path(rig.path("pid")).read_text(encoding="ascii"))
    who = identify(pid, "QEMU")
    try:
        source = QemuSource(rig.path("here.qmp"))
        assert source.prepare("").record["pid"] == pid
        source.close()
    finally:
        assert end_process(who)
    assert not is_alive(who)

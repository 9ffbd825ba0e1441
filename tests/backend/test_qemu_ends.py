"""QEMUs that end, and guests that are found by their records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading

import pytest

from bhystream.backend.qemu import open_paused
from bhystream.backend.qemu.source import QemuSource
from bhystream.errors import (
    GuestEndedError,
    GuestError,
    StaleError,
)

from .qemu_rig import Rig, copy_memory, monitor, state_of, strings

pytestmark = pytest.mark.guest


def test_a_guest_left_paused_is_resumed_and_discarded_from_its_record(rig: Rig) -> None:
    source, sink = QemuSource(rig.start("here")), rig.sink()
    assert sink.check(source.head()) == []
    [destination] = sink.open(b"")
    paused = source.pause()
    states = paused.states()
    copy_memory(source, destination)
    sink.load(states)
    sink.leave_paused()
    sink.abort()  # does nothing: the guest is no longer the sink's
    there = str(rig.state_dir / "there.qmp")
    assert state_of(there) == "paused"
    held = open_paused(json.loads(json.dumps(sink.record())))
    held.resume()
    held.resume()
    held.close()
    assert state_of(there) == "running"
    # A guest that runs must not be ended here.
    with pytest.raises(GuestError, match="it runs, so it is not ended here"):
        held.discard("")
    assert held.is_alive()
    with monitor(there) as ask:
        ask("stop")
        # The socket is in use, so QEMU cannot be asked: the operator's word counts.
        held.discard("")
    assert not held.is_alive()
    held.discard("")
    source.close()


def test_the_source_is_resumed_and_discarded_from_its_record(rig: Rig) -> None:
    path = rig.start("here")
    source = QemuSource(path)
    record = json.loads(json.dumps(source.prepare("").record))
    assert not [text for text in strings(record) if text.startswith("/") and text != path]
    source.pause()
    source.close()  # as if bhysend had died
    held = open_paused(record)
    assert held.is_alive()
    held.resume()
    held.close()
    with monitor(path) as ask:
        assert ask("query-status")["status"] == "running"
        assert not any(each["state"] for each in ask("query-migrate-capabilities"))
        assert ask("query-migrate-parameters")["max-bandwidth"] == 134217728
        ask("stop")
    held.discard("")
    rig.processes["here"].wait(10)
    assert not held.is_alive()
    with pytest.raises(GuestError, match="has ended"):
        held.resume()


def test_another_guest_at_the_socket_is_never_touched(rig: Rig) -> None:
    path = rig.start("here")
    source = QemuSource(path)
    record = dict(source.prepare("").record)
    source.close()
    with pytest.raises(GuestError, match="record"):
        open_paused({**record, "hypervisor": "bhyve"})
    with pytest.raises(GuestError, match="record"):
        open_paused({})
    # The recorded process lives, but is not the process at the socket.
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        from bhystream.backend.process import identify

        who = identify(sleeper.pid, "sleep")
        stale = open_paused({**record, "pid": who.pid, "start_ticks": who.start_ticks})
        with pytest.raises(GuestError, match="another guest"):
            stale.resume()
        # Another process has the recorded pid: the guest has ended, and nothing is ended.
        reused = open_paused({**record, "pid": who.pid})
        assert not reused.is_alive()
        reused.discard("")
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()
    assert state_of(path) == "running"


def test_a_guest_killed_while_paused_is_reported(rig: Rig) -> None:
    source = QemuSource(rig.start("here"))
    paused = source.pause()
    rig.processes["here"].kill()
    rig.processes["here"].wait()
    with pytest.raises(GuestEndedError, match=r"its QEMU \(process \d+\) has ended"):
        paused.require_paused()
    with pytest.raises(GuestEndedError, match="has ended"):
        paused.resume()
    source.close()


def test_a_guest_killed_before_its_pause_is_reported(rig: Rig) -> None:
    source = QemuSource(rig.start("here"))
    rig.processes["here"].kill()
    rig.processes["here"].wait()
    with pytest.raises(GuestEndedError, match=r"guest here: its QEMU \(process \d+\) has ended"):
        source.pause()
    source.close()


@pytest.mark.parametrize("commands", [("cont",), ("cont", "stop")])
def test_a_guest_that_another_monitor_has_let_run_is_seen(
    rig: Rig, commands: tuple[str, ...]
) -> None:
    """The same holds if the guest was stopped again: what was sent is no longer this guest."""
    second = rig.path("second.qmp")
    path = rig.start("here", "-qmp", f"unix:{second},server=on,wait=off")
    source = QemuSource(path)
    paused = source.pause()
    paused.require_paused()
    with monitor(second) as ask:
        for command in commands:
            ask(command)
        with pytest.raises(StaleError, match="another program let the guest run while it stood"):
            paused.require_paused()
        paused.resume()
        assert ask("query-status")["status"] == "running"
    source.close()


def test_a_destination_killed_before_the_load_is_reported(rig: Rig) -> None:
    source, sink = QemuSource(rig.start("here")), rig.sink()
    assert sink.check(source.head()) == []
    sink.open(b"")
    os.kill(sink.record()["pid"], 9)
    paused = source.pause()
    states = paused.states()
    with pytest.raises(GuestError, match="QEMU has ended"):
        sink.load(states)
    sink.abort()
    paused.resume()
    source.close()


def test_a_qemu_that_ends_while_it_is_asked_is_named(rig: Rig) -> None:
    """Its socket accepts the connection, but no greeting comes any more."""
    path = rig.start("here")
    process = rig.processes["here"]
    process.send_signal(signal.SIGSTOP)
    timer = threading.Timer(0.2, process.kill)
    timer.start()
    try:
        with pytest.raises(GuestError, match=rf"its QEMU \(process {process.pid}\) has ended"):
            QemuSource(path)
    finally:
        timer.join()


def test_a_socket_that_is_refused_with_its_qemu_is_its_end(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same holds if the process is seen alive a last time before its end."""
    source = QemuSource(rig.start("here"))
    record = source.prepare("").record
    source.pause()
    source.close()
    rig.processes["here"].kill()
    rig.processes["here"].wait()
    held = open_paused(record)
    monkeypatch.setattr(held, "is_alive", lambda: True)
    for act in (held.require_paused, held.resume, held.runs):
        with pytest.raises(GuestEndedError, match="has ended"):
            act()

"""A checkpoint held in its last write: the behavior of bhyve that bhysend's hold relies on."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bhystream.standin.devices import UNSAVED
from bhystream.standin.proof import DEVICE_PAGE

from .held import Hold, drain, fifos_of, kern_bytes
from .rig import Rig, Spec, assert_unbroken, await_true

_READER = """
import os, select, sys
fifo = os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK)
left = int(sys.argv[2])
while left > 0:
    select.select([fifo], [], [])
    left -= len(os.read(fifo, 1 << 16))
"""
_HOLDER = """
import os, signal, sys
from pathlib import Path
from standin.held import Hold
from standin.rig import Rig
host = Rig.at(Path(sys.argv[1]))
hold = Hold(host, "g")
hold.ask(is_anchored=sys.argv[2] == "anchored")
hold.await_held()
os.kill(os.getpid(), signal.SIGKILL)
"""


def goes_on(host: Rig) -> None:
    """Assert that the guest beats on without a fault and without a missing beat."""
    console = host.guest("g").console
    console.await_sweeps(1)
    assert_unbroken(console)


@pytest.mark.parametrize("generation", [4, 5])
def test_a_rehearsal_tells_what_the_hold_will_have(generation: int) -> None:
    with Rig(generation=generation) as host:
        host.start("g")
        assert host.checkpoint("g") == ({} if generation == 5 else None)
        rehearsed = host.snapshot("g").read_meta()
        goes_on(host)
        with Hold(host) as hold:
            hold.ask()
            hold.await_held()
            assert host.snapshot("g").kern.stat().st_size == kern_bytes(rehearsed)
            assert hold.release() == rehearsed
        goes_on(host)


def test_a_held_guest_is_saved_whole_and_stands(host: Rig) -> None:
    guest = host.start("g")
    with Hold(host) as hold, host.host.open_vm("g").map(0, 64 << 20) as mapping:
        hold.ask()
        hold.await_held()
        lines = guest.console.lines()
        image = host.snapshot("g").path.read_bytes()
        for _ in range(8):
            assert mapping[:] == image
        assert guest.console.lines() == lines
        assert not hold.has_ended()
        hold.release()
    goes_on(host)


def test_devices_without_a_pause_go_on_in_a_hold(host: Rig) -> None:
    host.start("g", Spec(devices=(*Spec().devices, ("0.5.0", "e1000"))))
    page = DEVICE_PAGE + 3  # the fourth device by slot
    with Hold(host) as hold, host.host.open_vm("g").map(0, 64 << 20) as mapping:
        hold.ask()
        hold.await_held()
        before = mapping[:]
        await_true(lambda: mapping[page * 4096] != before[page * 4096], "a change by e1000")
        after = mapping[:]
        changed = [
            p
            for p in range(16384)
            if before[p * 4096 : (p + 1) * 4096] != after[p * 4096 : (p + 1) * 4096]
        ]
        assert changed == [page]
        hold.release()
    goes_on(host)


def test_anybody_releases_a_hold(host: Rig) -> None:
    host.start("g")
    with Hold(host) as hold:
        hold.ask()
        hold.await_held()
        wanted = str(hold.capacity + 1000)
        subprocess.run([sys.executable, "-c", _READER, str(hold.path), wanted], check=True)
        await_true(hold.has_ended, "the end of the handler")
    goes_on(host)


def test_a_hold_outlives_all_of_ours(host: Rig) -> None:
    guest = host.start("g")
    holder = subprocess.run([sys.executable, "-c", _HOLDER, str(host.directory), "anchored"])
    assert holder.returncode == -9
    path = host.snapshot("g").meta
    assert fifos_of(guest.pid, path) == 2
    lines = guest.console.lines()
    fifo = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    assert guest.console.lines() == lines
    text = drain(fifo, lambda: fifos_of(guest.pid, path) == 0)
    assert text.endswith(b"}\n")
    os.close(fifo)
    goes_on(host)


@pytest.mark.parametrize("how", ["bare", "ignored"])
def test_without_the_anchor_the_last_readers_death_is_the_guests(host: Rig, how: str) -> None:
    guest = host.start("g")
    if how == "ignored":
        host.settings(fail=["no-anchor"])
    is_anchored = "bare" if how == "bare" else "anchored"
    words = [sys.executable, "-c", _HOLDER, str(host.directory), is_anchored]
    assert subprocess.run(words).returncode == -9
    assert guest.await_exit() == -13
    assert host.host.exists("g")


def test_the_anchor_is_open_until_the_connection_has_ended(host: Rig) -> None:
    guest = host.start("g")
    with Hold(host) as hold:
        hold.ask()
        hold.await_held()
        assert fifos_of(guest.pid, hold.path) == 2
        hold.release()
        await_true(lambda: fifos_of(guest.pid, hold.path) == 0, "the end of the descriptors")


def test_a_discarded_guest_leaves_its_node(host: Rig) -> None:
    guest = host.start("g")
    with Hold(host) as hold:
        hold.ask()
        hold.await_held()
        guest.kill()
        assert host.host.exists("g")
        refused = host.launch("g")
        assert refused.await_exit() == 4
        host.host.destroy("g")
        assert not host.host.exists("g")
    assert not guest.console.wrong()


def test_a_held_guest_does_not_notice_that_its_vm_is_destroyed(host: Rig) -> None:
    guest = host.start("g")
    with Hold(host) as hold:
        hold.ask()
        hold.await_held()
        host.host.destroy("g")
        with pytest.raises(subprocess.TimeoutExpired):
            guest.process.wait(0.3)
        hold.release()
        assert guest.await_exit() == 4


def test_the_meta_file_waits_in_open_for_a_reader_with_the_guest_running(host: Rig) -> None:
    guest = host.start("g")
    os.mkfifo(host.snapshot("g").meta)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(host.checkpoint, "g")
        await_true(host.snapshot("g").path.exists, "the file")
        guest.console.await_sweeps(1)
        assert not asked.done()
        fifo = os.open(host.snapshot("g").meta, os.O_RDONLY | os.O_NONBLOCK)
        assert asked.result() == {}
    assert b'"vmname": "g"' in os.read(fifo, 1 << 16)
    os.close(fifo)


def test_a_checkpoint_that_fails_fills_the_fifo_when_the_guest_runs(host: Rig) -> None:
    """A full FIFO does not prove that the guest stands: here only the short FILE.kern tells."""
    guest = host.start("g")
    assert host.checkpoint("g") == {}
    whole = host.snapshot("g").kern.stat().st_size
    host.settings(fail=["hold-fail"])
    with Hold(host) as hold:
        hold.ask()
        hold.await_held()
        guest.console.await_sweeps(1)
        assert host.snapshot("g").kern.stat().st_size < whole
        drain(hold.fifo, hold.has_ended)
    assert "Failed to snapshot atkbdc; ret=28" in guest.stderr()
    goes_on(host)


def test_a_guest_of_many_devices_stands_before_all_is_saved(host: Rig) -> None:
    """libxo flushes a text that outgrows libxo's buffer before the text is complete."""
    places = [(f"0.{1 + n // 8}.{n % 8}", "virtio-rnd") for n in range(90)]
    guest = host.start("g", Spec(devices=tuple(places)))
    assert host.checkpoint("g") == {}
    rehearsed = host.snapshot("g").read_meta()
    with Hold(host) as hold:
        hold.ask()
        hold.await_held()
        assert 0 < host.snapshot("g").kern.stat().st_size < kern_bytes(rehearsed)
        assert hold.release() == rehearsed
    assert not guest.console.wrong()


@pytest.mark.parametrize("word", ["hold-grow", "hold-hang", "hold-die", "hold-fail", "held-die"])
def test_what_fails_in_a_hold_does_not_in_the_rehearsal(host: Rig, word: str) -> None:
    host.start("g")
    host.settings(fail=[word])
    assert host.checkpoint("g") == {}
    goes_on(host)


def test_a_device_that_grew_shows_in_the_size_of_kern(host: Rig) -> None:
    host.start("g")
    host.checkpoint("g")
    rehearsed = host.snapshot("g").read_meta()
    host.settings(fail=["hold-grow"])
    with Hold(host) as hold:
        hold.ask()
        hold.await_held()
        assert host.snapshot("g").kern.stat().st_size == kern_bytes(rehearsed) + 64
        assert hold.release() != rehearsed
    goes_on(host)


def test_a_hold_that_never_comes_leaves_the_guest_standing(host: Rig) -> None:
    guest = host.start("g")
    host.checkpoint("g")
    whole = host.snapshot("g").kern.stat().st_size
    host.settings(fail=["hold-hang"])
    with Hold(host) as hold:
        hold.ask()
        kern = host.snapshot("g").kern
        await_true(lambda: kern.exists() and kern.stat().st_size == whole, "FILE.kern")
        lines = guest.console.lines()
        assert hold.filled_bytes == hold.capacity - 1
        assert guest.console.lines() == lines


@pytest.mark.parametrize("word", ["die", "hold-die", "held-die"])
def test_a_guest_that_dies_leaves_its_node(host: Rig, word: str) -> None:
    guest = host.start("g")
    host.settings(fail=[word])
    with Hold(host) as hold:
        hold.ask()
        assert guest.await_exit() == -9
        assert host.host.exists("g")
        assert hold.filled_bytes == hold.capacity - (word != "held-die")


@pytest.mark.parametrize("kind", sorted(UNSAVED))
def test_a_rehearsal_shows_a_device_that_cannot_be_saved(host: Rig, kind: str) -> None:
    guest = host.start("g", Spec(devices=(("0.7.0", kind),)))
    reply = host.checkpoint("g")
    assert reply is not None and "not supported" in str(reply["error"])
    assert f"Failed to snapshot {kind}@pci.0.7.0; ret=45" in guest.stderr()
    assert Path(host.snapshot("g").meta).read_bytes().startswith(b'{\n  "basic metadata": {')
    goes_on(host)


def test_a_checkpoint_runs_a_vcpu_that_was_never_started(host: Rig) -> None:
    guest = host.start("g", Spec(cpus=4, keys={"standin.waiting": "2"}))
    guest.console.await_sweeps(1)
    assert host.waiting("g") == {2, 3}
    with Hold(host) as hold:
        hold.ask()
        hold.await_held()
        assert host.waiting("g") == {0, 1, 2, 3}
        hold.release()
    assert guest.console.await_wrong("vcpu 2") == "WRONG vcpu 2: ran without a SIPI"
    assert guest.console.await_wrong("vcpu 3")
    assert not host.waiting("g")


def test_even_a_checkpoint_that_opens_nothing_runs_it(host: Rig) -> None:
    guest = host.start("g", Spec(cpus=2, keys={"standin.waiting": "1"}))
    host.snapshot("g").kern.symlink_to("/nowhere")
    host.checkpoint("g")
    assert guest.console.await_wrong("vcpu 1: ran without a SIPI")

"""`bhyve -r` started by us: what is left of one that fails, and whether it may have run."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bhystream.backend.bhyve import restore
from bhystream.backend.bhyve.config import parse
from bhystream.backend.bhyve.host import Host
from bhystream.backend.bhyve.place import Place
from bhystream.backend.bhyve.restore import Restore, listener, listens
from bhystream.backend.bhyve.snapshot import Files
from bhystream.backend.process import is_alive
from bhystream.errors import GuestError, PipeError
from standin.rig import Console, Snapshot, Spec, assert_unbroken, await_true

from .bhyve_rig import Two, two_hosts


@pytest.fixture
def two() -> Iterator[Two]:
    with two_hosts() as made:
        yield made


@pytest.fixture
def snapshot(two: Two) -> Snapshot:
    """The files of a guest that was suspended; no socket is left of it."""
    return suspended(two)


def suspended(two: Two, spec: Spec | None = None) -> Snapshot:
    guest = two.start(spec)
    found = two.here.suspend("g")
    guest.await_exit()
    (two.here.directory / "run" / "g").unlink()
    return found


def place(two: Two, memory_bytes: int = 64 << 20) -> Place:
    (two.base / "held").mkdir(exist_ok=True)
    return Place(
        kind="standin",
        vmm_dir=str(two.here.directory),
        name="g",
        process=None,
        staging=str(two.staging / "x"),
        kept=str(two.base / "held" / "x"),
        keys=parse(two.config().read_text()),
        memory_bytes=memory_bytes,
        bridges={},
        manager="",
    )


def made(two: Two, snapshot: Snapshot) -> Restore:
    return Restore(two.here.host, place(two), Files(snapshot.path.parent, snapshot.path.name))


def fails(one: Restore, message: str, *, may_have_run: bool = False) -> None:
    with pytest.raises(GuestError, match=message):
        one.run()
    assert one.may_have_run == may_have_run


def console(two: Two) -> Console:
    return Console(two.guests[0].console.path)


def is_clean(two: Two) -> bool:
    """Say whether nothing of a failed start is left, not even its log."""
    return not two.here.host.exists("g") and list((two.base / "log").iterdir()) == []


@pytest.mark.parametrize("has_rom", [True, False])
def test_a_guest_is_started_and_is_nobodys(two: Two, has_rom: bool) -> None:
    snapshot = suspended(two, Spec(has_rom=has_rom))
    one = made(two, snapshot)
    one.run()
    assert not one.may_have_run
    assert listens(two.here.host, "g")
    found = listener(two.here.host, "g")
    assert found is not None and is_alive(found)
    assert place(two).is_started()
    assert os.getsid(found.pid) == found.pid
    console(two).await_sweeps(1)
    assert_unbroken(console(two))


def test_its_configuration_is_for_us_alone(two: Two, snapshot: Snapshot) -> None:
    made(two, snapshot).run()
    config = Path(f"{snapshot.path}.conf")
    assert config.stat().st_mode & 0o777 == 0o600
    assert parse(config.read_text()) == parse(two.config().read_text())


def test_a_restore_that_fails_never_ran_and_leaves_nothing(two: Two, snapshot: Snapshot) -> None:
    two.here.settings(fail=["restore"])
    fails(made(two, snapshot), "bhyve -r: Failed to restore kernel structs")
    assert is_clean(two)
    two.here.settings(fail=[])
    made(two, snapshot).run()
    console(two).await_sweeps(1)


def test_a_vm_that_was_made_for_a_guest_without_a_rom_goes_with_it(two: Two) -> None:
    snapshot = suspended(two, Spec(has_rom=False))
    two.here.settings(fail=["restore"])
    fails(made(two, snapshot), "bhyve -r")
    assert is_clean(two)


def test_a_restore_that_fails_with_its_socket_there_may_have_run(
    two: Two, snapshot: Snapshot
) -> None:
    two.here.settings(fail=["restore-late"])
    fails(made(two, snapshot), "bhyve -r: vm_restore_time", may_have_run=True)
    assert list((two.base / "log").iterdir()) != []  # to be read


def test_a_slow_restore_is_waited_for(two: Two, snapshot: Snapshot) -> None:
    two.here.settings(fail=["slow-restore"])
    one = made(two, snapshot)
    thread = threading.Thread(target=one.run)
    thread.start()
    await_true(place(two).is_started, "bhyve -r")
    assert thread.is_alive()
    assert not listens(two.here.host, "g")
    (two.here.directory / "release").touch()
    thread.join(30)
    assert not thread.is_alive()
    console(two).await_sweeps(1)


def test_a_restore_that_takes_too_long_is_ended_and_never_ran(
    two: Two, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "_LIMIT_S", 0.0)
    two.here.settings(fail=["slow-restore"])
    fails(made(two, snapshot), "bhyve -r: not done in 1 s")
    assert is_clean(two)
    assert not place(two).is_started()


def test_a_guest_of_that_name_that_runs_is_left_alone(two: Two, snapshot: Snapshot) -> None:
    other = two.here.launch("g", Spec(touched="1M"))
    other.console.await_beats(1)
    fails(made(two, snapshot), "a bhyve of that name runs here")
    other.console.await_sweeps(1)
    assert_unbroken(other.console)


def test_a_vm_of_that_name_is_left_alone(two: Two, snapshot: Snapshot) -> None:
    two.here.host.create("g")
    fails(made(two, snapshot), "a VM of that name is here; destroy it first")
    assert two.here.host.exists("g")


def test_a_socket_that_others_left_proves_nothing(two: Two, snapshot: Snapshot) -> None:
    """Else a guest that never ran would count as one that may have."""
    guest = two.here.start("g", restore=snapshot.path)
    guest.kill()
    two.here.host.destroy("g")
    node = two.here.directory / "run" / "g"
    assert node.exists()
    two.here.settings(fail=["restore"])
    fails(made(two, snapshot), "bhyve -r")
    assert not node.exists()


def test_a_program_that_cannot_be_run_leaves_nothing(
    two: Two, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(two.here.host), "program", lambda self: ["/nonexistent/bhyve"])
    with pytest.raises(PipeError, match="cannot run /nonexistent/bhyve"):
        made(two, snapshot).run()
    assert is_clean(two)


def test_a_configuration_that_cannot_be_written_starts_nothing(
    two: Two, snapshot: Snapshot
) -> None:
    Path(f"{snapshot.path}.conf").mkdir()
    with pytest.raises(PipeError, match="cannot write"):
        made(two, snapshot).run()
    assert is_clean(two)


def test_an_interrupt_leaves_nothing(
    two: Two, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.here.settings(fail=["slow-restore"])

    def interrupt(host: Host, name: str) -> bool:
        if not place(two).is_started():
            return False
        raise KeyboardInterrupt

    monkeypatch.setattr(restore, "listens", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made(two, snapshot).run()
    assert is_clean(two)


def test_a_missing_file_is_told_in_bhyves_words(two: Two, snapshot: Snapshot) -> None:
    snapshot.kern.unlink()
    fails(made(two, snapshot), r"bhyve -r: Failed to open restore file .*\.kern: No such file")
    assert is_clean(two)


def test_a_socket_that_cannot_be_removed_starts_nothing(two: Two, snapshot: Snapshot) -> None:
    (two.here.directory / "run" / "g").mkdir()
    with pytest.raises(PipeError, match="cannot remove"):
        made(two, snapshot).run()
    assert is_clean(two)


def test_nobody_listens_where_there_is_no_socket(two: Two) -> None:
    assert not listens(two.here.host, "g")
    assert listener(two.here.host, "g") is None


def test_one_whose_queue_is_full_listens_and_cannot_be_told_apart(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = two.start()
    two.here.settings(fail=["hang"])
    held: list[socket.socket] = []
    with pytest.raises(BlockingIOError):
        while len(held) < 64:
            held.append(socket.socket(socket.AF_UNIX))
            held[-1].setblocking(False)
            held[-1].connect(str(two.here.directory / "run" / "g"))
    assert listens(two.here.host, "g")
    monkeypatch.setattr(restore, "_PROBE_S", 0.1)
    with pytest.raises(GuestError, match="busy, or hangs"):
        listener(two.here.host, "g")
    for one in held:
        one.close()
    guest.kill()

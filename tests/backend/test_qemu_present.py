"""What QEMU's command line, which tells the start, does not tell: jobs and drives now."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bhystream.backend.qemu.source import QemuSource
from bhystream.errors import GuestError, IncompatibleError
from support.waiting import until

from .qemu_rig import (
    DEADLINE_S,
    MIB,
    Ask,
    Rig,
    cdrom,
    disk,
    export,
    image,
    monitor,
    node,
)

pytestmark = pytest.mark.guest

ROOT = Path(__file__).resolve().parents[2]


# ---- jobs


def start_copy(ask: Ask, rig: Rig, command: str) -> Any:
    target = image(rig, "target")
    return ask(command, device="d0", target=target, format="raw", sync="full", mode="existing",
               speed=1)  # fmt: skip


def start_mirror(ask: Ask, rig: Rig) -> Any:
    return start_copy(ask, rig, "drive-mirror")


def start_backup(ask: Ask, rig: Rig) -> Any:
    return start_copy(ask, rig, "drive-backup")


def start_stream(ask: Ask, rig: Rig) -> Any:
    return ask("block-stream", device="d0", speed=1)


def start_commit(ask: Ask, rig: Rig) -> Any:
    return ask("block-commit", device="d0", speed=1)


@pytest.mark.parametrize("start", [start_mirror, start_backup, start_stream, start_commit])
def test_a_job_on_a_disk_is_refused_by_name(rig: Rig, start: Callable[[Ask, Rig], Any]) -> None:
    below = image(rig, "base")
    path = rig.start("here", *disk(image(rig, "over", "qcow2", backing=below), "qcow2"))
    with monitor(path) as ask:
        if start is start_commit:  # there is no job if nothing is to be committed
            ask("human-monitor-command", **{"command-line": 'qemu-io d0 "write 0 4M"'})
        assert start(ask, rig) == {}
    kind = start.__name__.removeprefix("start_")
    with pytest.raises(GuestError, match=rf"guest here: the job 'd0' \({kind}, ") as caught:
        QemuSource(path)
    [reason] = caught.value.reasons()
    assert "id d0" in reason.cure
    with monitor(path) as ask:
        ask("block-job-cancel", device="d0", force=True)
        until(lambda: ask("query-jobs") == [], "the end of the job", DEADLINE_S)
    QemuSource(path).close()


def test_a_job_that_has_ended_is_no_reason(rig: Rig) -> None:
    path = rig.start("here")
    with monitor(path) as ask:
        options = {"driver": "file", "filename": rig.path("new"), "size": 512}
        assert ask("blockdev-create", **{"job-id": "made", "options": options}) == {}
        until(
            lambda: [job["status"] for job in ask("query-jobs")] == ["concluded"],
            "the end of the job",
            DEADLINE_S,
        )
    QemuSource(path).close()


def test_a_disk_that_is_exported_is_refused_by_name(rig: Rig) -> None:
    path = rig.start("here", *disk(image(rig, "base")))
    with monitor(path) as ask:
        export(ask, rig)
    with pytest.raises(GuestError, match="the nbd export 'backup'") as caught:
        QemuSource(path)
    [reason] = caught.value.reasons()
    assert "block-export-del" in reason.cure


@pytest.mark.parametrize("step", ["require_described", "pause"])
def test_a_job_that_starts_while_the_guest_is_sent_is_refused(rig: Rig, step: str) -> None:
    second = rig.path("second.qmp")
    monitor_too = ("-qmp", f"unix:{second},server=on,wait=off")
    path = rig.start("here", *disk(image(rig, "base")), *monitor_too)
    source = QemuSource(path)
    source.require_described()
    with monitor(second) as ask:
        assert start_mirror(ask, rig) == {}
        with pytest.raises(GuestError, match="the job 'd0'"):
            getattr(source, step)()
        assert ask("query-status")["status"] == "running"
    source.close()


def test_an_export_in_the_pause_is_seen(rig: Rig) -> None:
    second = rig.path("second.qmp")
    monitor_too = ("-qmp", f"unix:{second},server=on,wait=off")
    path = rig.start("here", *disk(image(rig, "base")), *monitor_too)
    source = QemuSource(path)
    paused = source.pause()
    paused.require_paused()
    with monitor(second) as ask:
        export(ask, rig)
        with pytest.raises(GuestError, match="the nbd export 'backup'"):
            paused.require_paused()
        paused.resume()
        assert ask("query-status")["status"] == "running"
    source.close()


# ---- disks


def snapshot(ask: Ask, rig: Rig) -> str:
    over = rig.path("over.qcow2")
    wanted = {"device": "d0", "snapshot-file": over, "format": "qcow2"}
    assert ask("blockdev-snapshot-sync", **wanted) == {}
    return over


def snapshot_node(ask: Ask, rig: Rig) -> str:
    over = image(rig, "over.qcow2", "qcow2")
    file = {"driver": "file", "filename": over}
    above = {"driver": "qcow2", "node-name": "n1", "file": file, "backing": None}
    assert ask("blockdev-add", **above) == {}
    assert ask("blockdev-snapshot", node="n0", overlay="n1") == {}
    return over


def mirrored(ask: Ask, rig: Rig) -> str:
    target = image(rig, "target")
    wanted = {"target": target, "format": "raw", "sync": "full", "mode": "existing"}
    assert ask("drive-mirror", device="d0", **wanted) == {}
    until(lambda: ask("query-block-jobs")[0]["ready"], "the job", DEADLINE_S)
    assert ask("block-job-complete", device="d0") == {}
    until(lambda: ask("query-jobs") == [], "the end of the job", DEADLINE_S)
    return target


OTHERS = [
    (disk, "raw", snapshot, "qcow2"),
    (disk, "qcow2", snapshot, "qcow2"),
    (node, "raw", snapshot_node, "qcow2"),
    (node, "qcow2", snapshot_node, "qcow2"),
    (disk, "raw", mirrored, "raw"),
]


@pytest.mark.parametrize(("option", "kind", "change", "kind_now"), OTHERS)
def test_a_guest_that_writes_to_another_image_needs_force(
    rig: Rig, option: Any, kind: str, change: Any, kind_now: str
) -> None:
    base = image(rig, "base", kind)
    path = rig.start("here", *option(base, kind))
    with monitor(path) as ask:
        now = change(ask, rig)
    text = f"disk (d|n)0: QEMU writes to {now}, but its command line names {base}"
    with pytest.raises(IncompatibleError, match=text) as caught:
        QemuSource(path)
    [reason] = caught.value.reasons()
    assert "or use -f" in reason.cure
    source = QemuSource(path, force=True)
    [found] = source.head().config["disks"]
    assert found["props"]["format"] == kind_now
    [warning] = source.warnings()
    assert f"QEMU writes to {now}" in warning
    source.close()


def test_each_device_is_told_with_its_own_node(rig: Rig) -> None:
    options: list[str] = []
    for at in "ab":
        file = f"driver=file,filename={image(rig, at)},node-name=f{at}"
        options += ["-blockdev", file, "-blockdev", f"driver=raw,node-name=n{at},file=f{at}"]
        options += ["-device", f"virtio-blk-pci,drive=n{at},id=v{at}"]
    path = rig.start("here", *options)
    with monitor(path) as ask:
        for at in "ba":
            below = {"driver": "file", "filename": image(rig, f"over-{at}", "qcow2")}
            above = {"driver": "qcow2", "node-name": f"over-{at}", "file": below, "backing": None}
            assert ask("blockdev-add", **above) == {}
            assert ask("blockdev-snapshot", node=f"n{at}", overlay=f"over-{at}") == {}
    source = QemuSource(path, force=True)
    assert [line.split(";")[0] for line in source.warnings()] == [
        f"disk n{at}: QEMU writes to {rig.path(f'over-{at}')}, but its command line names"
        f" {rig.path(at)}"
        for at in "ab"
    ]
    source.close()


def test_a_daemon_has_left_the_directory_of_its_names(rig: Rig) -> None:
    image(rig, "base")
    argv = [*rig.argv("here"), *disk("base"), "-daemonize", "-pidfile", rig.path("pid")]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, cwd=rig.directory)
    try:
        QemuSource(rig.path("here.qmp")).close()
    finally:
        os.kill(int(Path(rig.path("pid")).read_text()), 9)


def test_a_snapshot_that_was_committed_is_gone(rig: Rig) -> None:
    path = rig.start("here", *disk(image(rig, "base")))
    with monitor(path) as ask:
        snapshot(ask, rig)
        assert ask("block-commit", device="d0") == {}
        until(lambda: ask("query-block-jobs")[0]["ready"], "the job", DEADLINE_S)
        assert ask("block-job-complete", device="d0") == {}
        until(lambda: ask("query-jobs") == [], "the end of the job", DEADLINE_S)
    source = QemuSource(path)
    assert source.head().config["disks"][0]["props"]["format"] == "raw"
    source.close()


@pytest.mark.parametrize("change", [os.unlink, lambda path: os.replace(path + ".new", path)])
def test_an_image_whose_path_leads_elsewhere_needs_force(rig: Rig, change: Any) -> None:
    base = image(rig, "base")
    image(rig, "base.new")
    path = rig.start("here", *disk(base))
    change(base)
    with pytest.raises(IncompatibleError, match=f"{base} is no longer the file that QEMU has open"):
        QemuSource(path)
    QemuSource(path, force=True).close()


def test_an_image_is_one_under_all_its_names(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    base = image(rig, "base")
    os.symlink(base, rig.path("link"))
    monkeypatch.chdir(rig.directory)
    for name in ("link", "./link", "file:link"):
        path = rig.start("here", *disk(name))
        QemuSource(path).close()
        rig.processes["here"].kill()
        rig.processes["here"].wait()


def test_a_disk_that_has_grown_is_told_with_its_size(rig: Rig) -> None:
    path = rig.start("here", *disk(image(rig, "base", "qcow2"), "qcow2"))
    with monitor(path) as ask:
        assert ask("block_resize", device="d0", size=16 * MIB) == {}
    source = QemuSource(path)
    assert source.head().config["disks"][0]["size_bytes"] == 16 * MIB
    source.close()


@pytest.mark.parametrize("option", [disk, node])
def test_what_changes_while_the_guest_is_sent_is_refused(rig: Rig, option: Any) -> None:
    second = rig.path("second.qmp")
    monitor_too = ("-qmp", f"unix:{second},server=on,wait=off")
    path = rig.start("here", *option(image(rig, "base")), *cdrom(image(rig, "cd")), *monitor_too)
    source = QemuSource(path, force=True)
    with monitor(second) as ask:
        ask("eject", id="ide0", force=True)
        with pytest.raises(GuestError, match=r"changed while it was sent: disk\d: .* empty"):
            source.require_described()
        with pytest.raises(GuestError, match="changed as it was paused"):
            source.pause()
        assert ask("query-status")["status"] == "running"
    source.close()


# ---- the program


def eject_cd(ask: Ask, rig: Rig) -> None:
    assert ask("eject", id="ide0", force=True) == {}


@pytest.mark.parametrize(
    ("change", "status", "named"),
    [
        (start_mirror, 69, "the job 'd0' (mirror, running)"),
        (snapshot, 76, "its command line names"),
        (eject_cd, 69, "its devices or disks were changed while it was sent: disk1"),
    ],
)
def test_bhysend_lets_a_guest_run_that_was_changed_while_it_was_sent(
    rig: Rig, change: Callable[[Ask, Rig], Any], status: int, named: str
) -> None:
    """The pipe is full, so that bhysend is in the first round when the change is made."""
    second = rig.path("second.qmp")
    monitor_too = ("-qmp", f"unix:{second},server=on,wait=off")
    options = (*disk(image(rig, "base")), *cdrom(image(rig, "cd")), *monitor_too)
    path = rig.start("here", *options)
    with open(rig.path("here.ram"), "r+b") as memory:
        memory.seek(24 * MIB)
        memory.write(os.urandom(16 * MIB))
    command = [sys.executable, str(ROOT / "bhysend"), f"qemu:{path}"]
    state = rig.directory / "sending"
    state.mkdir(mode=0o700)
    environment = {**os.environ, "BHYSEND_STATE_DIR": str(state)}
    with (
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as sending,
        monitor(second) as ask,
    ):
        assert sending.stdout is not None and sending.stderr is not None
        assert len(sending.stdout.read(4 * MIB)) == 4 * MIB
        change(ask, rig)
        out, err = sending.communicate(timeout=60)
        assert ask("query-status")["status"] == "running"
    text = err.decode()
    assert sending.returncode == status, text
    assert named in text and "it runs here" in text
    assert len(out) > 8 * MIB
    assert list(state.glob("source/*.json")) == []


@pytest.mark.parametrize(("options", "status"), [((), 76), (("-f",), 0)])
def test_force_sends_a_guest_with_what_it_writes_to(
    rig: Rig, options: tuple[str, ...], status: int
) -> None:
    path = rig.start("here", *disk(image(rig, "base")))
    with monitor(path) as ask:
        over = snapshot(ask, rig)
    state = rig.directory / "sending"
    state.mkdir(mode=0o700)
    done = subprocess.run(
        [sys.executable, str(ROOT / "bhysend"), "-n", *options, f"qemu:{path}"],
        env={**os.environ, "BHYSEND_STATE_DIR": str(state)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    assert f"disk d0: QEMU writes to {over}" in done.stderr.decode()

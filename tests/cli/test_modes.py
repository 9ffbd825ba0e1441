"""Nobody else may open what holds a guest, whatever the umask of the programs' parent is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from support.waiting import until

from .kinds import G5, QEMU
from .pipeline import Pipeline, report
from .qemu import QemuPlace
from .standin import StandinPlace
from .test_odd_parents import odd
from .travel import SHM, Host, Site, Traveller


@pytest.fixture(params=[QEMU, G5])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def places(host: Host, *sites: Site) -> list[Path]:
    """Return the directories in which the programs and hypervisors make files, and the nodes."""
    found = [host.state]
    for site in sites:
        if isinstance(site, StandinPlace):
            found += [site.staging, site.rig.directory / "vmm" / site.operand]
        elif isinstance(site, QemuPlace):
            found += [site.qmp, site.serial.path, site.ram]
    return found


def look(host: Host, *sites: Site) -> dict[str, os.stat_result]:
    """Return the status of each file that is there now, by its path.

    A memory file that has no name any more is looked at through the process that has it open.
    """
    found: dict[str, os.stat_result] = {}
    paths = [path for top in places(host, *sites) for path in (top, *top.rglob("*"))]
    paths += SHM.glob("bhyrecv-*")
    for path in paths:
        try:
            found[str(path)] = path.lstat()
        except FileNotFoundError:
            continue
    for pid in (pid for site in sites for pid in site.hypervisors()):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(entry)
                if target.startswith(f"{SHM}/bhyrecv-"):
                    found[target] = entry.stat()
            except FileNotFoundError:
                continue
    return found


def open_to_others(found: dict[str, os.stat_result]) -> dict[str, str]:
    """Return the modes of the files that other users may open; a link has no mode of its own.

    A device is the null device, which everybody may open.
    """
    shown = {path: status.st_mode for path, status in found.items()}
    return {
        path: stat.filemode(mode)
        for path, mode in shown.items()
        if mode & 0o077 and not (stat.S_ISLNK(mode) or stat.S_ISCHR(mode))
        if "/dev/" not in path.removeprefix("/dev/shm/")
    }


def test_all_that_holds_a_guest_is_ours_alone(
    host: Host, small: Traveller, gate: tuple[Path, int]
) -> None:
    to, (path, fd) = small.next(), gate
    mark = host.directory / "paused"
    hook = f"touch {mark}; read -r _ < {path}"
    free = "os.umask(0)"
    commands = (odd(free, *small.send("-p", hook)), odd(free, *small.receive(to)))
    with Pipeline(*commands, env=host.env) as pipeline:
        until(lambda: mark.exists() or pipeline[0].process.poll() is not None, "the pause")
        until(lambda: to.is_building() or pipeline[1].process.poll() is not None, "the guest")
        # The QEMU at the source was started by the test, with files of its own.
        paused = look(host, *([small.place] if isinstance(to, StandinPlace) else []), to)
        os.write(fd, b"\n")
        ended = pipeline.wait()
    assert [one.status for one in ended] == [80, 0], report(*ended)
    # The hook had the operator's umask, so the umask was 0 indeed.
    assert mark.stat().st_mode & 0o777 == 0o666
    found = look(host, to)
    for moment in (paused, found):
        assert len(moment) > 12, sorted(moment)
        assert open_to_others(moment) == {}
    kinds = {stat.S_IFMT(status.st_mode) for status in paused.values()}
    if isinstance(to, StandinPlace):
        [meta] = [
            status
            for name, status in paused.items()
            if "/held/" in name and stat.S_ISFIFO(status.st_mode)
        ]
        assert meta.st_mode & 0o7777 == 0o600 and meta.st_uid == os.geteuid()
        assert any(name.endswith("/ckp") and "/staging/" in name for name in paused)
    else:
        assert stat.S_IFSOCK in kinds and any("bhyrecv-" in name for name in paused)
    small.settle(host, to)
    small.prove()

"""Moves of a real bhyve guest between two names on one FreeBSD host, and their failures.

    BHYSEND_TEST_ROM=/root/rom.bin python -m pytest -m bhyve -v -rA tests/bhyve/test_moves.py

Run the tests as root.  They use a guest of their own (rom.py) and touch no other guest.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .harmed import Harmed, records
from .rom import NEEDS_FREEBSD, Ended, Host, booted, program, until

pytestmark = NEEDS_FREEBSD


@pytest.fixture
def host() -> Iterator[Host]:
    # The paths of pytest's own directories are too long for a socket and for bhyve -r.
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as path, booted(Path(path)) as made:
        yield made


def move(host: Host, *options: str) -> Ended:
    """Move the guest to its other name in the command form."""
    to = host.other()
    done = host.run(*host.send(*options), *host.receive(to))
    assert done.status == 0, done.said
    host.arrived(to)
    return done


def tidy(host: Host) -> None:
    """Assert that a finished move has left nothing."""
    until(lambda: not list((host.state("a") / "held").glob("*")), "end of what held the guest")
    assert records(host) == []
    mounts = subprocess.run(["/sbin/mount"], capture_output=True, text=True, check=True).stdout
    assert str(host.directory) not in mounts


# Moves in every form.


@pytest.mark.parametrize("options", [(), ("-r", "0"), ("-z", "3")], ids=["live", "warm", "zstd"])
def test_it_moves_in_the_command_form(host: Host, options: tuple[str, ...]) -> None:
    move(host, *options)
    host.prove()
    tidy(host)


def test_it_moves_throttled(host: Host) -> None:
    """Nothing fits into -d 0ms, so the throttle grows until -f pauses the guest."""
    options = ("-f", "-d", "0ms", "-r", "8", "-B", "4M", "--throttle", "90")
    done = move(host, *options)
    assert "; throttled by " in done.said
    host.prove()
    tidy(host)


def test_it_moves_in_three_stages(host: Host) -> None:
    to = host.other()
    stages = [host.send("-a"), host.receive(to), [*program("bhysend"), "-A"]]
    done = host.shell(" | ".join(map(shlex.join, stages)))
    assert done.status == 0, done.said
    host.arrived(to)
    host.prove()
    tidy(host)


def test_it_is_held_in_the_plain_form_and_discarded(host: Host) -> None:
    to, pid = host.other(), host.pid()
    done = host.shell(f"{shlex.join(host.send())} | {shlex.join(host.receive(to))}")
    assert done.status == 0, done.said
    assert host.pid() == pid
    ended = host.run(*program("bhysend"), "--discard", host.at)
    assert ended.status == 0, ended.said
    host.arrived(to)
    host.prove()
    tidy(host)


def test_it_is_held_in_the_plain_form_and_resumed(host: Host) -> None:
    pid = host.pid()
    done = host.shell(f"{shlex.join(host.send())} > /dev/null; test $? = 80")
    assert done.status == 0, done.said
    assert host.stands_still()
    ended = host.run(*program("bhysend"), "--resume", host.at)
    assert ended.status == 0, ended.said
    assert host.pid() == pid
    host.prove()
    tidy(host)


def test_it_is_kept_and_goes_on_from_the_file(host: Host) -> None:
    path = host.directory / "kept.bhys"
    done = host.shell(f"{shlex.join(host.send('-k'))} > {path}")
    assert done.status == 0, done.said
    host.prove()
    tidy(host)
    host.end()
    # The copy starts from the stream: the beats that the guest printed since do not count.
    to, count = host.other(), len(host.beats())
    done = host.shell(f"{shlex.join(host.receive(to))} < {path}")
    assert done.status == 0, done.said
    host.at = to
    host.lived = host.lived[-1:]
    until(lambda: len(host.beats()) > 15, "heartbeats of the copy")
    assert not any(bad for _, bad in host.beats())
    assert host.beats()[0][0] < count
    assert "LOST" not in "\n".join(host.lines())


def test_it_stands_loaded_and_is_let_run(host: Host) -> None:
    to = host.other()
    done = host.shell(f"{shlex.join(host.send())} | {shlex.join(host.receive(to, '-u'))}")
    assert done.status == 0, done.said
    ended = host.run(*program("bhyrecv"), "--resume", to, side="b")
    assert ended.status == 0, ended.said
    ended = host.run(*program("bhysend"), "--discard", host.at)
    assert ended.status == 0, ended.said
    host.arrived(to)
    host.prove()


def test_ten_moves_there_and_back(host: Host) -> None:
    for _ in range(10):
        move(host)
        host.prove(5)
    tidy(host)


# Moves that fail and leave the guest at the source.


def goes_on(host: Host, pid: int, *, is_tidy: bool = True) -> None:
    """Assert that the guest runs on in the same process, and can move after all.

    is_tidy: bhysend or the keeper lived to clean up after the first move; if not,
    the next move cleans up.
    """
    host.stayed()
    assert host.pid() == pid
    host.prove()
    if is_tidy:
        tidy(host)
    move(host)
    host.prove()
    tidy(host)


def test_a_hook_that_fails_lets_it_go_on(host: Host) -> None:
    pid = host.pid()
    done = host.run(*host.send("-p", "false"), *host.receive(host.other()))
    assert done.status == 69, done.said
    goes_on(host, pid)


# The processes that are killed (SIGKILL), and the points of the move at which this happens.
#
# round-0   while pages are on their way
# others    before bhysend has this answer.  At READY the guest stands; at RUNNING the guest
#           runs at the destination

_WHO = {
    "bhysend": ("bhysend",),
    "keeper": ("keeper",),
    "bhysend-and-keeper": ("bhysend", "keeper"),
    "bhyrecv": ("bhyrecv",),
    # As when ssh ends, both directions break.
    "way": ("there", "back"),
    "source": ("source",),
    "destination": ("destination",),
}
_POINTS = ("round-0", "ACCEPT", "SEEN", "READY", "RUNNING")
_NOT_AT = {
    "ACCEPT": ("keeper", "bhysend-and-keeper", "destination"),
    "RUNNING": ("destination",),
}
_KILLS = [
    pytest.param(who, point, id=f"{point}-{who}")
    for point in _POINTS
    for who in _WHO
    # The keeper and the destination's bhyve start after ACCEPT.  At RUNNING the destination's
    # bhyve is the guest, and is not killed.
    if who not in _NOT_AT.get(point, ())
]


@pytest.mark.parametrize("who, point", _KILLS)
def test_whoever_is_killed_one_guest_goes_on(host: Host, who: str, point: str) -> None:
    killed = _WHO[who]
    with Harmed(host, point) as move_of:
        assert point != "READY" or host.stands_still()
        move_of.kill(*killed)
        status = move_of.wait()
    if "bhysend" in killed:
        assert status == -signal.SIGKILL
    elif who == "source" and point == "READY":
        # The destination had the whole guest by then, so the guest goes on at the destination.
        assert status == 0
        host.arrived(move_of.to)
        host.prove()
        return
    elif who == "source" and point != "RUNNING":
        # bhysend cannot save a guest whose bhyve was killed: bhysend fails, and no copy starts.
        assert status in range(64, 78)
        until(lambda: not os.path.exists(f"/dev/vmm/{move_of.to}"), "end of the destination's VM")
        assert host.pid() == host.pid(move_of.to) == 0
        tidy(host)
        return
    phase = move_of.phase()
    if point != "RUNNING":
        if killed == ("bhysend", "keeper") and point == "READY":
            assert phase == "paused" and host.stands_still()
            done = host.run(*program("bhysend"), "--resume", host.at)
            assert done.status == 0, done.said
        elif killed == ("keeper",) and status == 0:
            host.arrived(move_of.to)
            host.prove()
            return
        elif phase == "in-doubt" and point == "READY":
            # bhysend sent GO before it saw the answers end; the destination can tell.
            assert status == 81
            assert move_of.ask() in range(64, 78)
        elif "bhysend" not in killed:
            assert status in range(64, 78)
        goes_on(host, move_of.was, is_tidy=killed != ("bhysend", "keeper"))
        return
    assert status == {"way": 81}.get(who, status) and status in (0, 81, -signal.SIGKILL)
    if phase:
        assert phase == "in-doubt" and host.pid() == move_of.was and status != 0
        assert move_of.ask() == 0
    host.arrived(move_of.to)
    host.prove()

"""Moves of a real bhyve guest between two names on one FreeBSD host, and their failures.

    BHYSEND_TEST_ROM=/root/rom.bin python -m pytest -m bhyve -v -rA tests/bhyve/test_moves.py

Run the tests as root.  They use a guest of their own (rom.py) and touch no other guest.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .rom import DEADLINE_S, Ended, Host, booted, program, until

pytestmark = [
    pytest.mark.bhyve,
    pytest.mark.skipif(
        not sys.platform.startswith("freebsd"), reason="a bhyve guest needs FreeBSD"
    ),
]


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


def records(host: Host) -> list[Path]:
    return list((host.state("a") / "source").glob("*.json"))


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
# The shell keeps no pipe open, so that each process sees when the other one ends.
_WAY = (
    "exec 3<&0; sh -c 'echo $$ > {directory}/there; exec cat' <&3 3<&-"
    " | {receive} 3<&- | sh -c {back} 3<&- & exec <&- >&- 3<&-; wait $!"
)
# The first SEEN answer the head and the pages pushed after it; bhysend then prepares the pause.
_HOLD = """
echo $$ > {directory}/back
while read -r answer; do
    is_reached=
    case {point}$answer in
    round-0*" ACCEPT"*) : > {directory}/reached;;
    SEEN*" SEEN "*) ls {directory}/a/held/* > /dev/null 2>&1 && is_reached=1;;
    SEEN*) ;;
    {point}*" {point}"*) is_reached=1;;
    esac
    if test $is_reached; then
        : > {directory}/reached
        until test -e {directory}/go; do sleep 0.1; done
    fi
    echo "$answer"
done
"""


KEEPER, BHYRECV = "bhystream.send.keeper", "bhystream.recv"


class Harmed:
    """A move in the command form, stopped at a point so that the test can kill a process."""

    def __init__(self, host: Host, point: str) -> None:
        self.host, self.to, self.point = host, host.other(), point
        self.was = host.pid()
        directory = host.directory
        back = _HOLD.format(directory=directory, point=point)
        receive = host.receive(self.to)
        way = _WAY.format(directory=directory, receive=shlex.join(receive), back=shlex.quote(back))
        # The bandwidth is low enough that the move is still in its first round at the kill.
        options = ("-B", "2M") if point == "round-0" else ()
        self.log = directory / "bhysend.log"
        with self.log.open("wb") as log:
            self.sender = subprocess.Popen(
                [*host.send(*options), "sh", "-c", way],
                env=host.environment("a"),
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        until((directory / "reached").exists, point)

    def __enter__(self) -> Harmed:
        return self

    def __exit__(self, *_: object) -> None:
        (self.host.directory / "go").touch()
        self.sender.kill()
        self.sender.wait()
        for end in ("there", "back"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid(end), signal.SIGKILL)

    def pid(self, who: str) -> int:
        """Return the id of a process; wait for the process, which in round 0 may still start."""
        if who == "bhysend":
            return self.sender.pid
        if who in ("there", "back"):
            return int((self.host.directory / who).read_text())
        if who in ("source", "destination"):
            name = self.host.at if who == "source" else self.to
            until(lambda: self.host.pid(name), who)
            return self.host.pid(name)
        module = KEEPER if who == "keeper" else BHYRECV
        until(lambda: _programs(module), who)
        [pid] = _programs(module)
        return pid

    def kill(self, *who: str) -> None:
        pids = [self.pid(one) for one in who]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        if "bhysend" in who:
            self.sender.wait()
        for pid in pids:
            until(lambda pid=pid: not _is_there(pid), "end of the killed")  # type: ignore[misc]

    def wait(self) -> int:
        """Let the answer pass, and wait until all programs have ended; return bhysend's status."""
        (self.host.directory / "go").touch()
        status = self.sender.wait(DEADLINE_S)
        until(lambda: not _programs(KEEPER), "end of the keeper")
        until(lambda: not _programs(BHYRECV), "end of bhyrecv")
        print(self.log.read_text())
        return status

    def phase(self) -> str:
        """Return the guest's phase in `bhysend -l`, "" if the guest is not listed."""
        words = [*program("bhysend"), "-l"]
        listed = subprocess.run(
            words, env=self.host.environment("a"), capture_output=True, text=True, check=True
        ).stdout
        rows = [line.split("\t") for line in listed.splitlines()]
        return next((row[1] for row in rows if row[0] == self.host.at), "")

    def ask(self) -> int:
        """Ask where the guest is, by the command that bhysend prints; return its status."""
        [record] = records(self.host)
        asking = (
            f"env BHYSEND_STATE_DIR={self.host.state('b')}"
            f" {shlex.join(program('bhyrecv'))} -q {record.stem}"
        )
        return self.host.shell(f"{asking} | {shlex.join(program('bhysend'))} -A").status


def _programs(module: str) -> list[int]:
    """Return the ids of the processes that run one of our modules."""
    words = ["/bin/ps", "-axww", "-o", "pid=", "-o", "args="]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in found.splitlines()]
    # bhysend's own arguments, which also name a module, come after these words.
    return [int(words[0]) for words in lines if "python" in words[1] and module in words[2:7]]


def _is_there(pid: int) -> bool:
    words = ["/bin/ps", "-o", "state=", "-p", str(pid)]
    state = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    return state.strip() != "" and not state.startswith("Z")


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

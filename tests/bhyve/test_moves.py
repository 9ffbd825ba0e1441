"""Moves of a real bhyve guest between two names on one FreeBSD host, and what fails in them.

    BHYSEND_TEST_ROM=/root/rom.bin python -m pytest -m bhyve -v -rA tests/bhyve/test_moves.py

Run as root.  The guest is the tests' own (rom.py), so nothing of yours is touched.
"""

from __future__ import annotations

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
        not sys.platform.startswith("freebsd"), reason="a guest of bhyve's needs FreeBSD"
    ),
]

# The way back as a shell's loop, which ends with the shell where a word comes.
_CUT = 'while read -r l; do case $l in *" {word}"*) kill -9 $$; exit;; *) echo "$l"; esac; done'


@pytest.fixture
def host() -> Iterator[Host]:
    # pytest's own directories have names too long for a socket and for bhyve -r.
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
    """See that a move that is over has left nothing."""
    until(lambda: not list((host.state("a") / "held").glob("*")), "end of what held the guest")
    assert records(host) == []
    mounts = subprocess.run(["/sbin/mount"], capture_output=True, text=True, check=True).stdout
    assert str(host.directory) not in mounts


# Every form.


@pytest.mark.parametrize("options", [(), ("-r", "0"), ("-z", "3")], ids=["live", "warm", "zstd"])
def test_it_moves_in_the_command_form(host: Host, options: tuple[str, ...]) -> None:
    move(host, *options)
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
    # What it said since is of another life.
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


# What fails, and whom it leaves where it was.


def goes_on(host: Host, pid: int) -> None:
    """See it run on in the same process, and move after all."""
    host.stayed()
    assert host.pid() == pid
    host.prove()
    tidy(host)
    move(host)
    host.prove()


def test_a_hook_that_fails_lets_it_go_on(host: Host) -> None:
    pid = host.pid()
    done = host.run(*host.send("-p", "false"), *host.receive(host.other()))
    assert done.status == 69, done.said
    goes_on(host, pid)


@pytest.mark.parametrize("word", ["ACCEPT", "SEEN", "READY"])
def test_a_way_back_that_breaks_before_go_lets_it_go_on(host: Host, word: str) -> None:
    pid = host.pid()
    cut = f"{shlex.join(host.receive(host.other()))} | {_CUT.format(word=word)}"
    done = host.run(*host.send(), "sh", "-c", cut)
    assert done.status in range(64, 78), done.said
    until(lambda: not os.path.exists(f"/dev/vmm/{host.other()}"), "end of the destination's VM")
    goes_on(host, pid)


def test_a_way_back_that_breaks_after_go_is_asked_about(host: Host) -> None:
    to = host.other()
    cut = f"{shlex.join(host.receive(to))} | {_CUT.format(word='RUNNING')}"
    done = host.run(*host.send(), "sh", "-c", cut)
    assert done.status == 81, done.said
    [record] = records(host)
    asked = host.shell(
        f"env BHYSEND_STATE_DIR={host.state('b')} {shlex.join(program('bhyrecv'))} -q {record.stem}"
        f" | {shlex.join(program('bhysend'))} -A"
    )
    assert asked.status == 0, asked.said
    host.arrived(to)
    host.prove()


@pytest.mark.parametrize("who", [("bhysend",), ("bhysend", "keeper")])
def test_one_who_is_killed_in_the_pause_loses_nothing(host: Host, who: tuple[str, ...]) -> None:
    pid = host.pid()
    paused, go = host.directory / "paused", host.directory / "go"
    hook = f"touch {paused}; while ! test -e {go}; do sleep 0.1; done"
    with subprocess.Popen(
        [*host.send("-p", hook), *host.receive(host.other())], env=host.environment("a")
    ) as sender:
        until(paused.exists, "pause")
        assert host.stands_still()
        words = ["/bin/pgrep", "-f", "bhystream[.]keeper"]
        [keeper] = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        if "keeper" in who:
            os.kill(int(keeper), signal.SIGKILL)
        sender.send_signal(signal.SIGKILL)
        sender.wait()
        go.touch()
    if "keeper" in who:
        assert host.stands_still()
        listed = subprocess.run(
            [*program("bhysend"), "-l"],
            env=host.environment("a"),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert f"{host.at}\tpaused\t" in listed
        done = host.run(*program("bhysend"), "--resume", host.at)
        assert done.status == 0, done.said
    until(lambda: not os.path.exists(f"/dev/vmm/{host.other()}"), "end of the destination's VM")
    goes_on(host, pid)


def test_a_destination_that_is_killed_before_go_lets_it_go_on(host: Host) -> None:
    """bhyve -r is killed when the guest stands paused here; it held its memory already."""
    pid, to = host.pid(), host.other()
    ready, go = host.directory / "ready", host.directory / "go"
    stop = f"touch {ready}; while ! test -e {go}; do sleep 0.1; done"
    cut = (
        f"{shlex.join(host.receive(to))} | while read -r l; do"
        f' case $l in *" READY "*) {stop};; esac; echo "$l"; done'
    )
    with subprocess.Popen([*host.send(), "sh", "-c", cut], env=host.environment("a")) as sender:
        until(ready.exists, "READY")
        os.kill(host.pid(to), signal.SIGKILL)
        until(lambda: not host.pid(to), "end of the destination's bhyve")
        go.touch()
        assert sender.wait(DEADLINE_S) == 69
    goes_on(host, pid)

"""A process's ancestors, and the unit that the process is in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bhystream.backend.lineage import Above, Unit, above, parse_cgroup, unit_of


@contextmanager
def running(*words: str, stdin: int = subprocess.PIPE) -> Iterator[int]:
    """Run a command that prints the pid of a process that lives until it is killed."""
    with subprocess.Popen(words, stdin=stdin, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        try:
            yield pid
        finally:
            os.kill(pid, 9)
            child.kill()


def test_the_processes_above_one_are_found_to_the_top() -> None:
    with running("sh", "-c", "sleep 600 >/dev/null & echo $!; wait") as pid:
        chain = above(pid)
        assert chain[0].command.startswith("sh -c sleep 600")
        assert chain[1].pid == os.getpid()
        assert chain[1:] == above(chain[0].pid)
        assert above(chain[-1].pid) == []


def test_a_process_that_is_gone_has_nothing_above_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert above(child.pid) == []


@pytest.mark.parametrize(
    ("code", "is_fed"),
    [
        # First the shell itself is the parent, then its copy, which runs the parentheses.
        ("sleep 600 >/dev/null & echo $!; wait", False),
        ("(sleep 600 >/dev/null & echo $!; wait); :", True),
    ],
)
def test_a_copy_of_a_shell_is_told_from_a_shell(code: str, is_fed: bool) -> None:
    terminal, ours = os.openpty()
    try:
        with running("sh", "-c", code, stdin=ours) as pid:
            shell = above(pid)[0]
            assert shell.command.startswith("sh -c")
            assert shell.is_fed == is_fed
    finally:
        os.close(terminal)
        os.close(ours)


def test_a_shell_that_reads_its_script_is_told_from_a_terminals() -> None:
    with subprocess.Popen(["sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sh:
        assert sh.stdin is not None and sh.stdout is not None
        sh.stdin.write("sleep 600 >/dev/null & echo $!\n")
        sh.stdin.flush()
        pid = int(sh.stdout.readline())
        assert above(pid)[0] == Above(sh.pid, "sh", is_fed=True)
        os.kill(pid, 9)


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("0::/system.slice/web1.service\n", Unit("web1.service")),
        ("0::/system.slice/web1.service/payload\n", Unit("web1.service")),
        ("0::/user.slice/user-0.slice/session-3.scope\n", Unit("session-3.scope")),
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/web1.service\n",
            Unit("web1.service", 1000),
        ),
        ("0::/user.slice/user-7.slice/user@7.service/init.scope\n", Unit("init.scope", 7)),
        ("0::/user.slice/user-7.slice/user@7.service\n", Unit("user@7.service")),
        # With controllers of version 1 too, systemd's own hierarchy counts; either may be idle.
        (
            "2:cpu,cpuacct:/a.service\n1:name=systemd:/system.slice/b.service\n0::/\n",
            Unit("b.service"),
        ),
        ("9:name=systemd:/\n1:cpu:/a.service\n0::/machine.slice/b.scope\n", Unit("b.scope")),
        ("12:pids:/system.slice/a.service\n0::/\n", None),
        ("0::/docker/0123456789ab\n", None),
        ("0::/\n", None),
        ("", None),
    ],
)
def test_the_innermost_unit_is_read(text: str, unit: Unit | None) -> None:
    assert parse_cgroup(text) == unit


def test_without_systemd_there_is_no_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "isdir", lambda path: path != "/run/systemd/system")
    assert unit_of(os.getpid()) is None

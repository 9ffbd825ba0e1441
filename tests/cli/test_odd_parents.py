"""Programs that inherit odd things from a parent: ignored signals, streams that do not wait."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

import pytest

from support.waiting import until

from .kinds import ANY
from .pipeline import BHYSEND, Pipeline, report, run
from .test_forms import kept, ran_on
from .travel import Host, Traveller, program_at

_ODD = """
import os, resource, signal, sys
{before}
os.execvp(sys.argv[1], sys.argv[1:])
"""
# Signals that a parent ignores or blocks: this must not change what our programs see or do.
_SIGNALS = {
    "SIGCHLD ignored": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "all blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
}


def odd(before: str, *command: str | Path) -> list[str]:
    """Return a command whose parent ran the Python code `before` first."""
    words = [str(word) for word in command]
    at = program_at(words)
    return [*words[:at], sys.executable, "-P", "-c", _ODD.format(before=before), *words[at:]]


@ANY
@pytest.mark.parametrize("before", _SIGNALS.values(), ids=list(_SIGNALS))
def test_a_command_at_the_pause_that_fails_stops_the_move(
    before: str, host: Host, small: Traveller
) -> None:
    to = small.next()
    hook = ("-p", "sleep 0.2; exit 3")
    sent, got = run(odd(before, *small.send(*hook)), small.receive(to), env=host.env)
    assert sent.status == 69, report(sent, got)
    assert "the -p command ended with status 3" in sent.stderr
    to.assert_nothing_left()
    ran_on(host, small)


@ANY
@pytest.mark.parametrize("before", _SIGNALS.values(), ids=list(_SIGNALS))
def test_the_status_of_the_command_is_told(before: str, host: Host, small: Traveller) -> None:
    [sent] = run([*odd(before, *small.send()), "sh", "-c", "exit 7"], env=host.env)
    assert sent.status == 69, report(sent)
    assert "it ended with status 7" in sent.stderr
    ran_on(host, small)


@ANY
@pytest.mark.parametrize("before", _SIGNALS.values(), ids=list(_SIGNALS))
def test_a_guest_moves_whatever_the_parents_signals(
    before: str, host: Host, small: Traveller
) -> None:
    to = small.next()
    command = odd(before, *small.receive(to))
    [sent] = run([*odd(before, *small.send()), *command], env=host.env)
    assert sent.status == 0, report(sent)
    small.hand_over(host, to)


@ANY
def test_a_stream_waits_for_a_reader_also_where_others_would_not(
    host: Host, small: Traveller
) -> None:
    """O_NONBLOCK belongs to the pipe's end, which others may share; the reader sees all bytes."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with Pipeline(small.send("-k"), env=host.env, stdout=write_end) as pipeline:
        until(lambda: not select.select([], [write_end], [], 0)[1], "a full pipe")
        os.set_blocking(write_end, False)  # again: any process that shares the end may do so
        os.close(write_end)
        with open(read_end, "rb") as file:
            stream = file.read()
        [sent] = pipeline.wait()
    assert sent.status == 0, report(sent)
    path = host.directory / "kept.bhys"
    path.write_bytes(stream)
    with path.open("rb") as file:
        [checked] = run(small.receive(small.next(), "-n"), env=host.env, stdin=file)
    assert checked.status == 0, report(checked)
    ran_on(host, small)


@ANY
def test_a_stream_is_waited_for_also_where_others_would_not(host: Host, small: Traveller) -> None:
    stream = kept(host, small).read_bytes()
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    with Pipeline(small.receive(small.next(), "-n"), env=host.env, stdin=read_end) as pipeline:
        until(lambda: os.get_blocking(read_end), "bhyrecv")
        os.set_blocking(read_end, False)  # and again
        view = memoryview(stream)
        while view and pipeline[0].process.poll() is None:
            if select.select([], [write_end], [], 0.1)[1]:
                view = view[os.write(write_end, view[: select.PIPE_BUF]) :]
        os.close(write_end)
        [got] = pipeline.wait()
    assert got.status == 0, report(got)
    assert not os.get_blocking(read_end)
    os.close(read_end)
    ran_on(host, small)


@ANY
def test_the_command_at_the_pause_writes_into_no_file_of_ours(host: Host, small: Traveller) -> None:
    """Its output goes to our standard error, which was closed: no file of ours may be number 2."""
    out = host.directory / "out.bhys"
    said = host.directory / "said"
    hook = f"echo from the hook; umask > {said}"
    with out.open("wb") as file:
        [kept_] = run(
            odd("os.close(2); os.umask(0o27)", *small.send("-k", "-p", hook)),
            env=host.env,
            stdout=file,
        )
    assert kept_.status == 0, report(kept_)
    assert said.read_text() == "0027\n"
    assert b"from the hook" not in out.read_bytes()
    for path in host.state.rglob("*"):
        assert not path.is_file() or b"from the hook" not in path.read_bytes(), path
    ran_on(host, small)


@ANY
def test_no_guest_is_started_under_a_limit_that_would_end_it(host: Host, small: Traveller) -> None:
    """bhyrecv looks at the limit first, and refuses without a start; it lifts a soft limit."""
    for limit, says in (("RLIMIT_CPU", "CPU time"), ("RLIMIT_FSIZE", "file size")):
        to = small.next()
        hard = f"resource.setrlimit(resource.{limit}, (1 << 40, 1 << 40))"
        sent, got = run(small.send("-n"), odd(hard, *small.receive(to, "-n")), env=host.env)
        assert (sent.status, got.status) == (0, 76), report(sent, got)
        assert f"a hard limit of {says}" in got.stderr
        [moved] = run([*small.send(), *odd(hard, *small.receive(to))], env=host.env)
        assert moved.status == 76, report(moved)
        assert f"a hard limit of {says}" in moved.stderr
        to.assert_nothing_left()
    ran_on(host, small)


@ANY
def test_a_soft_limit_ends_nothing(host: Host, small: Traveller) -> None:
    to = small.next()
    soft = (
        "inf = resource.RLIM_INFINITY; resource.setrlimit(resource.RLIMIT_FSIZE, (0, inf));"
        "resource.setrlimit(resource.RLIMIT_CPU, (1, inf));"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (10, 4096))"
    )
    [sent] = run([*odd(soft, *small.send()), *odd(soft, *small.receive(to))], env=host.env)
    assert sent.status == 0, report(sent)
    small.hand_over(host, to)


@pytest.mark.parametrize("umask", ["0", "0o777"])
def test_a_listing_makes_a_state_directory_of_ours_alone(umask: str, host: Host) -> None:
    base = host.directory / "a/b/state"
    env = {**host.env, "BHYSEND_STATE_DIR": str(base)}
    for _ in range(2):
        [ended] = run(odd(f"os.umask({umask})", *BHYSEND, "-l"), env=env)
        assert ended.status == 0, report(ended)
    for path in (base, base.parent, base.parent.parent):
        assert path.stat().st_mode & 0o7777 == 0o700, path

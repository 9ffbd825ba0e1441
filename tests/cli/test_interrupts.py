"""Ctrl-C at every moment of a move: once, twice at once, and again after the first message.

A Ctrl-C reaches every process in the foreground of its terminal.  Whatever was held up at that
moment stays held up until the programs have ended: nobody who does not answer keeps them.  In the
end one copy of the guest runs, a message says what has happened, the statuses are the table's, and
a second move succeeds.
"""

from __future__ import annotations

import os
import pty
import select
import shlex
import signal
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from support.waiting import DEADLINE_S, until

from . import kinds
from .attempt import THIRD, Attempt, Gate
from .kinds import ANY, matrix
from .pipeline import BHYSEND, ROOT, Ended, Pipeline, Stage, Words, report
from .tap import Tap
from .test_answered import shell_pipe
from .test_failures import ROUNDS
from .travel import Host, Traveller, limited

# Whoever waited for one of these times would not end at all.
NEVER = ("send.conversation._END_SECONDS=9999", "send.third_stage._DRAIN_SECONDS=9999")
# How often the key is pressed, and whether the program has said something before the second time.
HOW = ("once", "twice", "again")


def ctrl_c(stages: list[Stage]) -> None:
    """Do what a terminal does on a Ctrl-C: send SIGINT to each process of the pipeline."""
    for stage in stages:
        with suppress(ProcessLookupError):
            os.killpg(stage.pid, signal.SIGINT)


def press(stages: list[Stage], how: str) -> None:
    """Press Ctrl-C, in one of the ways of HOW."""
    ctrl_c(stages)
    if how == "again":
        until(
            lambda: "SIGINT" in stages[0].stderr or stages[0].process.poll() is not None,
            "a message",
        )
    if how != "once":
        ctrl_c(stages)


def assert_said(ended: Ended, where: str = "it runs here") -> None:
    """Assert that a program says why it ended, where the guest is, and nothing of Python's."""
    assert "interrupted by SIGINT" in ended.stderr, report(ended)
    assert where in ended.stderr, report(ended)
    assert "Traceback" not in ended.stderr


# A move in an answered form.

POINTS = ("HELLO", "ACCEPT", "round-0", "paused", "READY")
FORMS = ("command", "three-stages")


@pytest.mark.parametrize(
    "kind, form, point, how",
    matrix(
        [(form, point, how) for form in FORMS for point in POINTS for how in HOW],
        [("command", "READY", "again"), ("three-stages", "paused", "twice")],
    ),
)
def test_before_go_the_guest_runs_on_here(
    form: str, point: str, how: str, host: Host, small: Traveller, gate: Gate
) -> None:
    attempt = Attempt(form, point, host, small, gate)
    attempt.send, before = limited(attempt.send, *NEVER), attempt.send
    assert before[-1] == attempt.send[-1]
    with attempt.begin():
        press(attempt.pipeline.stages, how)
        sent = attempt.pipeline[0].await_end()
        assert sent.status == 75, report(sent)
        assert_said(sent)
        if form == "command":
            attempt.release("never")
        attempt.wait()
        assert attempt.end() == "here", attempt.said()
        attempt.settle("here")


@pytest.mark.parametrize("kind, how", matrix([(how,) for how in HOW], []))
def test_after_go_it_is_too_late_and_bhysend_says_so_each_time(
    how: str, host: Host, small: Traveller, gate: Gate
) -> None:
    attempt = Attempt("command", "RUNNING", host, small, gate)
    with attempt.begin():
        press(attempt.pipeline.stages, how)
        until(lambda: "SIGINT: too late, GO is out" in attempt.pipeline[0].stderr, "a line")
        attempt.release("late")
        [sent] = attempt.wait()
        assert sent.status == 0, attempt.said()
        assert attempt.end() == "there"
        attempt.settle("there")


# The plain form, and a kept stream.


@pytest.mark.parametrize(
    "kind, point, how",
    matrix(
        [(point, how) for point in ("CONFIG", "MEMORY", "ROUND_END", "STATE") for how in HOW],
        [("MEMORY", "twice")],
    ),
)
def test_in_the_plain_form_the_guest_runs_on_here(
    point: str, how: str, host: Host, small: Traveller, gate: Gate
) -> None:
    """Both programs end although neither gets an answer, or another byte."""
    to, tap = small.next(), Tap(point)
    # The command at the pause never ends: else the rest would fit into the pipe.
    send = small.send(*ROUNDS, "-p", f"read -r line < {gate[0]}")
    with Pipeline(send, tap.argv, small.receive(to), env=host.env, narrow=True) as pipeline:
        tap.reached()
        until(lambda: pipeline[2].catches(signal.SIGTERM), "the start of bhyrecv")
        press([pipeline[0], pipeline[2]], how)
        sent, got = pipeline[0].await_end(), pipeline[2].await_end()
        tap.close()
    assert (sent.status, got.status) == (75, 75), report(sent, got)
    assert_said(sent)
    assert_said(got, "nothing was")
    to.assert_nothing_left()
    small.run_on(host, sweeps=1)
    small.move(host, sweeps=1)


@ANY
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "options", [(), ("-k",), ("-B", "1"), ("-n", "-P")], ids=["plain", "kept", "rate", "dry"]
)
def test_a_pipe_that_nobody_reads_keeps_nobody(
    options: tuple[str, ...], how: str, host: Host, small: Traveller
) -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with suppress(BlockingIOError):
        while "-n" in options:  # a dry run alone would not fill it
            os.write(write_end, bytes(4096))
    os.set_blocking(write_end, True)
    try:
        with Pipeline(small.send(*options), env=host.env, stdout=write_end) as pipeline:
            until(lambda: is_writing(pipeline[0].pid), "a write that waits")
            press(pipeline.stages, how)
            [sent] = pipeline.wait()
    finally:
        os.close(read_end)
        os.close(write_end)
    assert sent.status == 75, report(sent)
    assert_said(sent, "" if "-n" in options else "it runs here")
    small.run_on(host, sweeps=1)


@ANY
def test_a_command_that_lingers_after_a_dry_run_keeps_nobody(
    host: Host, small: Traveller, tmp_path: Path
) -> None:
    """And a Ctrl-C that ends the wait for it ends the dry run too."""
    there = tmp_path / "there"
    receive = shlex.join(map(str, small.receive(small.next(), "-n")))
    command = ["sh", "-c", f"{receive}; touch {there}; exec sleep 999"]
    with Pipeline([*small.send("-n"), *command], env=host.env) as pipeline:
        until(there.exists, "the end of bhyrecv")
        press(pipeline.stages, "once")
        [sent] = pipeline.wait()
    assert sent.status == 75, report(sent)
    assert sent.output == b""
    small.run_on(host, sweeps=1)


def is_writing(pid: int) -> bool:
    """Say whether a process waits in write(2) to standard output, or sleeps to keep to a rate."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/syscall").read_text().split()
        return words[:2] == ["1", "0x1"] or words[0] == "230"
    return False


# The destination.


@pytest.mark.standin
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("form", ["plain", "answered"])
def test_a_hypervisor_that_does_not_start_keeps_nobody(form: str, how: str, host: Host) -> None:
    """bhyve is started while the memory comes, and then waits for ever."""
    guest = kinds.own("g5")
    try:
        to = guest.next()
        to.rig.settings(fail=["slow-read"])
        send = guest.send(*(("-a",) if form == "answered" else ()))
        stages = [send, guest.receive(to)] + ([[*BHYSEND, "-A"]] if form == "answered" else [])
        with Pipeline(*stages, env=host.env) as pipeline, to.reaped():
            until(to.hypervisors, "bhyve")
            press(pipeline.stages, how)
            ended = pipeline.wait()
        assert ended[1].status == 75, report(*ended)
        assert_said(ended[1], "nothing was started here")
        assert ended[0].status in (69, 74, 75), report(*ended)
        to.assert_nothing_left()
        to.rig.settings(fail=[])
        guest.run_on(host, sweeps=1)
        guest.move(host, sweeps=1)
    finally:
        guest.close()


@pytest.mark.standin
@pytest.mark.parametrize("how", HOW)
def test_a_start_is_not_undone(how: str, host: Host) -> None:
    """In the plain form; after GO test_handshake_signals.py has it."""
    guest = kinds.own("g5")
    try:
        to = guest.next()
        to.rig.settings(fail=["slow-restore"])
        with Pipeline(guest.send(), guest.receive(to), env=host.env) as pipeline:
            sent = pipeline[0].await_end()
            until(lambda: has_phase(host, "started"), "the record")
            ctrl_c([pipeline[1]])
            line = "SIGINT: too late, the guest is started"
            until(lambda: line in pipeline[1].stderr, "a message")
            if how != "once":
                ctrl_c([pipeline[1]])
            (to.rig.directory / "release").touch()
            got = pipeline[1].await_end()
        assert (sent.status, got.status) == (80, 0), report(sent, got)
        guest.settle(host, to)
        guest.prove(1)
    finally:
        guest.close()


def has_phase(host: Host, phase: str) -> bool:
    return any(phase in path.read_text() for path in (host.state / "destination").glob("*"))


@ANY
@pytest.mark.parametrize("how", HOW)
def test_a_destination_that_is_done_waits_for_nobody(
    how: str, host: Host, small: Traveller, gate: Gate
) -> None:
    """bhyrecv reads on for the sake of filters before it, whose input is still open."""
    attempt = Attempt("three-stages", "RUNNING", host, small, gate)
    attempt.receive = limited(attempt.receive, "recv.reply._DRAIN_SECONDS=9999")
    with attempt.begin():
        press([attempt.pipeline[2]], how)
        got = attempt.pipeline[2].await_end()
        assert got.status == 0, report(got)
        assert "it runs here" in got.stderr
        attempt.release("late")
        sent, *_ = attempt.wait()
        assert sent.status == 0, attempt.said()
        attempt.settle("there")


# At a terminal, which sends the signals itself.

PROMPT = "stty -echo < /dev/tty; echo password: > /dev/tty; read -r line < /dev/tty"


@ANY
@pytest.mark.parametrize("times", [1, 2])
def test_a_password_is_waited_for_until_ctrl_c(times: int, host: Host, small: Traveller) -> None:
    """bhysend kills the command that still asks, and lets the terminal show what is typed again."""
    with Terminal([*small.send(), "sh", "-c", PROMPT], host) as terminal:
        terminal.await_words(b"password:")
        terminal.type(b"\x03" * times)
        assert terminal.await_end() == 75, terminal.said
        assert b"interrupted by SIGINT" in terminal.said
        assert b"it runs here" in terminal.said
        assert terminal.echoes()
    small.run_on(host, sweeps=1)


@ANY
@pytest.mark.parametrize("times", [1, 2])
def test_a_pipeline_of_a_shell_ends(times: int, host: Host, small: Traveller, gate: Gate) -> None:
    """The shell, both programs and all that stands between them get the signal."""
    to, marker = small.next(), host.directory / "paused"
    send = small.send("-a", "-p", f": > {marker}; read -r line < {gate[0]}")
    text = shell_pipe(send, ["cat"], small.receive(to), ["cat"], THIRD)
    words = ["bash", "-c", f"trap : INT; {text}; echo status ${{PIPESTATUS[*]}}"]
    with Terminal(words, host) as terminal:
        until(marker.exists, "the pause")
        terminal.type(b"\x03" * times)
        terminal.await_end()
        assert b"status 75 130 75 130 75" in terminal.said, terminal.said
        assert b"guest proof: it runs here" in terminal.said
        assert b"Traceback" not in terminal.said
    to.assert_nothing_left()
    small.run_on(host, sweeps=1)
    small.move(host, sweeps=1)


class Terminal:
    """A command in the foreground of a terminal of its own, with all that the terminal shows."""

    def __init__(self, words: Words, host: Host) -> None:
        self._pid, self._fd = pty.fork()
        if not self._pid:
            os.execvpe(str(words[0]), [str(word) for word in words], host.env)
        self.said = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *failure: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.close(self._fd)

    def await_words(self, words: bytes) -> None:
        """Wait until the terminal shows some words, or the command has ended."""
        with suppress(OSError):
            while words not in self.said and select.select([self._fd], [], [], DEADLINE_S)[0]:
                self.said += os.read(self._fd, 4096)

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._fd)[3] & termios.ECHO)

    def await_end(self) -> int:
        """Wait until the command has ended, and all that it has started; return its status."""
        self.await_words(b"never shown")
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


# The first moment and the last.

# A signal comes when a module is looked for: as good as any other moment of an import.
AT_IMPORT = """
import os, runpy, signal, sys
_, module, times, program, *_ = sys.argv
del sys.argv[:3]
class Finder:
    def find_spec(self, name, path, target=None):
        if name == module:
            for _ in range(int(times)):
                os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
runpy.run_path(program, run_name="__main__")
"""


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("program", "module", "argv"),
    [
        ("bhysend", "bhystream.send.main", ["-n", "web1"]),
        ("bhysend", "bhystream.report", ["web1"]),
        ("bhysend", "bhystream.handover.verbs", ["-l"]),
        ("bhyrecv", "bhystream.recv.main", []),
        ("bhyrecv", "bhystream.memory.page", []),
        ("bhyrecv", "bhystream.recv.query", ["-q", "0" * 32]),
    ],
)
def test_before_it_has_begun_a_program_says_that(
    program: str, module: str, argv: list[str], times: int, host: Host
) -> None:
    ended = host.run(
        sys.executable, "-c", AT_IMPORT, module, str(times), str(ROOT / program), *argv
    )
    assert ended.status == 75, report(ended)
    [first, second] = ended.stderr.splitlines()
    assert first.startswith(program)
    assert first.endswith(": interrupted by SIGINT")
    nothing = "begun" if program == "bhysend" else "started here"
    assert second.endswith(f": nothing was {nothing}")


AT_END = """
import os, signal, sys
from bhystream.start import run
status = run("bhysend", "send")
for _ in range(2):
    os.kill(os.getpid(), signal.SIGINT)
sys.exit(status)
"""


def test_at_its_end_a_program_keeps_its_status(host: Host) -> None:
    ended = host.run(sys.executable, "-c", AT_END, "-l")
    assert (ended.status, ended.stderr) == (0, ""), report(ended)

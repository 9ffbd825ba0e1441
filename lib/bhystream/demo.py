"""Show a live migration: a guest moves between two hosts that this machine plays.

    python -m bhystream.demo

bhysend, bhyrecv, the pipe between them and the whole protocol are the real
ones, run as a user would run them.  Only bhyve is played, by a stand-in
(bhystream.standin).  The stand-in's guest proves itself: the guest rewrites its
memory all the time, and knows what each page has to hold.  The demonstration
needs neither root nor a hypervisor.

Every number of the report is taken from what bhysend printed, or from the
guest's console, except the silence and the time, which are measured here.

Exit status: 0 only if the guest proved itself at the destination; 74 or 77 if
files could not be written; 69 for any other failure; 128 plus the signal's
number if the demonstration was interrupted.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bhystream import inherited
from bhystream.errors import BhyError, GuestError, ending, from_oserror
from bhystream.signals import Ended, end_early, ignore_all
from bhystream.standin.stage import PlayedHost, Stage
from bhystream.units import duration

# Where the programs are: beside Python, but the packages of Debian and FreeBSD put them into sbin.
_BINS = (Path(sys.executable).parent, Path(sys.executable).parent.parent / "sbin")
_NAME = "web1"
_MEMORY_MIB, _TOUCHED_MIB, _WORKING_MIB, _RATE_MIB = 256, 128, 16, 24
_KEYS = ("cpus=2", f"memory.size={_MEMORY_MIB}M")
_OPTIONS = (
    *("-o", f"standin.touched={_TOUCHED_MIB}M"),
    *("-o", f"standin.working_set={_WORKING_MIB}M"),
    *("-o", f"standin.rate={_RATE_MIB}M"),
    *("-o", "standin.sweep_rate=128M"),
)
# The touched memory of both hosts, once more in a memory file each, and room for records.
_NEEDED_BYTES = (2 * _MEMORY_MIB + 128) << 20
_LINK = "1Gbit"  # for bhysend -B: the speed of a network

# The way back as a loop of a shell that kills itself when READY comes.
_CUT = 'while read -r l; do case $l in *" READY "*) kill -9 $$; exit;; *) echo "$l"; esac; done'

_WAIT_S = 60.0
_LOOK_S = 0.002
_SWEEPS = 2

_BEAT = re.compile(r"beat (\d+)")
_SWEEP = re.compile(r"sweep (\d+) pages (\d+) wrong (\d+)")
# What send/stopwatch.py prints after a move, and what bhyve/source.py prints if the memory file
# is not the null device.
_CLOSING = re.compile(
    r"it runs on .*?; (\d+) rounds, ([^;]+); paused (.+?) "
    r"\(state (.+?), last pages .+?, answers .+?\), predicted (.+?) \("
)
_WRITTEN = re.compile(r"bhyve writes the memory into .*?: (.+)")


@dataclass(frozen=True)
class Moved:
    """What bhysend and the consoles said about one move; took_ns and silent_ns were measured."""

    rounds: str
    sent: str
    paused: str
    state: str
    predicted: str
    why_written: str
    took_ns: int
    silent_ns: int


@dataclass(frozen=True)
class Proof:
    """What the guest printed: beats from 1 on, whole sweeps at the destination, pages in each."""

    beats: int
    sweeps: int
    pages: int


class Demo:
    """One demonstration on a stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._is_color = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def run(self) -> None:
        """Start the guest, move it, let it prove itself.  Raises GuestError if that fails."""
        here = self._stage.here
        self._title("A live migration between two hosts; this machine plays both, and bhyve")
        self._say("")
        self._title(f"{_NAME} starts on host a: 2 vCPUs, {_MEMORY_MIB} MiB")
        config = self._stage.write_config(_NAME, _KEYS)
        self._stage.start_guest(_NAME, config, _OPTIONS)
        await_true(lambda: sweeps(here), "the guest has not started", self._log)
        _, pages, bad = sweeps(here)[-1]
        self._say(
            f"  it has checked its {pages} pages, {bad} were wrong; it rewrites"
            f" {_RATE_MIB} MiB of them\n  each second, and goes on checking\n"
        )
        self._title("A first move breaks: the link is cut when host b says that it is ready")
        self._say(f"  {self._break(config)}\n")
        self._title(f"It moves to host b through a pipe of {_LINK}/s, and runs on meanwhile")
        moved = self._move(config)
        self._say("")
        self._title("It proves on host b that no page and no beat was lost")
        self._report(moved, self._prove())

    def _receiver(self) -> tuple[list[str], list[str]]:
        """Return the environment of bhyrecv, and its -o options."""
        there = self._stage.there
        lent = [word for pair in there.resources().items() for word in ("-o", "=".join(pair))]
        variables = {**there.variables(), "BHYRECV_STAGING": str(there.directory)}
        return [f"{key}={value}" for key, value in variables.items()], lent

    def _send(self, send: list[str], receive: list[str]) -> tuple[int, str, int]:
        """Run bhysend; return its status, its messages, and the ns that the guest was silent."""
        here = self._stage.here
        ours, theirs = _stderr_pair()
        try:
            process = self._stage.start_program(
                [*program("bhysend"), *send, *receive], here.variables(), theirs
            )
            os.close(theirs)
            said, silent_ns = _follow(process, ours, here, self._stage.there)
        finally:
            os.close(ours)
        return process.returncode, said, silent_ns

    def _break(self, config: Path) -> str:
        """Let a move fail when READY comes; return what became of the guest, for the report.

        Raises GuestError if the guest does not run on, or finds a fault.
        """
        here = self._stage.here
        receiver, lent = self._receiver()
        receive = shlex.join(["env", *receiver, *program("bhyrecv"), *lent, _NAME])
        path = self._stage.directory / "cut"
        path.write_text(f"{receive} | {_CUT}\n")
        beats = len(here.lines())
        status, said, _ = self._send(["-C", str(config), _NAME], ["sh", str(path)])
        if status != GuestError.status or f"guest {_NAME}: it runs here" not in said:
            raise GuestError(f"bhysend {ending(status)}: the guest had to run on")
        count = len(sweeps(here))
        await_true(lambda: len(sweeps(here)) > count + 1, "the guest does not go on", self._log)
        if complaints := wrong(here):
            raise GuestError(f"the guest found a fault: {complaints[0]}")
        return (
            f"bhysend ends with {status}: the guest runs on, in the same process; it has said"
            f"\n  {len(here.lines()) - beats} lines since, and none of its pages is wrong"
        )

    def _move(self, config: Path) -> Moved:
        receiver, lent = self._receiver()
        send = ["-v", "-B", _LINK, "-C", str(config), _NAME]
        receive = ["env", *receiver, *program("bhyrecv"), *lent, _NAME]
        self._show_command(send, receiver, lent)
        start_ns = time.monotonic_ns()
        status, said, silent_ns = self._send(send, receive)
        took_ns = time.monotonic_ns() - start_ns
        closing = _CLOSING.search(said)
        if status != 0 or not closing:
            raise GuestError(f"bhysend {ending(status)}: the guest has not moved")
        written = _WRITTEN.search(said)
        rounds, sent, paused, state, predicted = closing.groups()
        why = written[1].strip().rpartition(": ")[2] if written else ""
        return Moved(rounds, sent, paused, state, predicted, why, took_ns, silent_ns)

    def _prove(self) -> Proof:
        """Wait for whole sweeps at the destination; the sweep under way does not count.

        Raises GuestError if a page is wrong or a beat is missing.
        """
        here, there = self._stage.here, self._stage.there
        await_true(
            lambda: len(sweeps(there)) > _SWEEPS or wrong(there),
            "the guest does not go on",
            there.directory / "var" / "log" / f"{_NAME}.log",
        )
        lines = here.lines() + there.lines()
        beats = [int(found[1]) for line in lines if (found := _BEAT.fullmatch(line))]
        if complaints := wrong(here) + wrong(there):
            raise GuestError(f"the guest found a fault: {complaints[0]}")
        if beats != list(range(1, len(beats) + 1)):
            raise GuestError("a beat of the guest is missing")
        done = sweeps(there)
        if any(count for _, _, count in done):
            raise GuestError(f"the guest found {done[-1][2]} wrong pages")
        return Proof(len(beats), len(done) - 1, done[-1][1])

    @property
    def _log(self) -> Path:
        return self._stage.directory / f"{_NAME}.log"

    # ---- what is shown

    def _show_command(self, send: list[str], receiver: list[str], lent: list[str]) -> None:
        own = [f"{k}={v}" for k, v in self._stage.here.variables().items()]
        root = str(self._stage.directory)
        pieces = [own, ["bhysend", *send], ["env", *receiver], ["bhyrecv", *lent[:4]]]
        pieces += [[*lent[4:], _NAME]]
        text = " \\\n    ".join(shlex.join(piece) for piece in pieces)
        self._say(f"  D={root}\n  {text.replace(root, '$D')}\n")

    def _report(self, moved: Moved, found: Proof) -> None:
        rows = {
            "guest": f"beats 1 to {found.beats}, none missing; checked {found.sweeps} times there:"
            f"\n{found.pages} pages, 0 wrong",
            "moved": f"{moved.sent} in {moved.rounds} rounds, {duration(moved.took_ns)}",
            "pause": f"{moved.paused}, predicted {moved.predicted};"
            f" its console was silent for {duration(moved.silent_ns)}",
            "memory file": f"the null device: in the pause bhyve wrote no memory, but only the"
            f"\nstate, in {moved.state}",
        }
        if moved.why_written:
            rows["memory file"] = (
                f"a file, no null device: {moved.why_written};"
                f"\nso bhyve wrote memory and state in the pause, in {moved.state};"
                "\nif you are root, bhyve writes only the state"
            )
        for key, text in rows.items():
            self._say(f"  {key:13}" + text.replace("\n", "\n" + " " * 15))
        self._say("")

    def _title(self, text: str) -> None:
        self._say(self._styled("1", text))

    def passed(self, took_ns: int) -> None:
        """Print that the demonstration passed.  The stage is gone by then."""
        self._say(
            f"{self._styled('1;32', 'passed')} in {duration(took_ns)}; nothing is left behind"
        )

    def _styled(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._is_color else text

    def _say(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def program(name: str) -> list[str]:
    """Return the words that run bhysend or bhyrecv: the installed program, else the module."""
    for directory in _BINS:
        if os.access(directory / name, os.X_OK):
            return [str(directory / name)]
    return inherited.program(name.removeprefix("bhy"))


def sweeps(host: PlayedHost) -> list[tuple[int, int, int]]:
    """Return (number, pages, wrong) of each sweep that the guest has printed."""
    found = (_SWEEP.fullmatch(line) for line in host.lines())
    return [(int(one[1]), int(one[2]), int(one[3])) for one in found if one]


def wrong(host: PlayedHost) -> list[str]:
    """Return the faults that the guest has printed."""
    return [line for line in host.lines() if line.startswith("WRONG ")]


def await_true(condition: Callable[[], object], what: str, log: Path) -> None:
    """Wait until a condition holds.

    Raises GuestError after 60 s, with `what` and the last line of the log.
    """
    end = time.monotonic() + _WAIT_S
    while not condition():
        if time.monotonic() > end:
            words = log.read_text(errors="replace") if log.exists() else ""
            last = words.strip().rpartition("\n")[2]
            raise GuestError(f"{what} in {_WAIT_S:.0f} s: {last or 'its log is empty'}")
        time.sleep(_LOOK_S)


def _stderr_pair() -> tuple[int, int]:
    """Return (ours, theirs) for bhysend's standard error: a terminal if our own is a terminal."""
    if not sys.stderr.isatty():
        return os.pipe()
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    termios.tcsetwinsize(theirs, termios.tcgetwinsize(sys.stderr.fileno()))
    return ours, theirs


def _follow(
    process: subprocess.Popen[bytes], ours: int, here: PlayedHost, there: PlayedHost
) -> tuple[str, int]:
    """Pass on what a program prints until the program has ended.

    Returns all that was printed, and how long the guest was silent, in ns: from
    its last line on the source's console to the first on the destination's.
    """
    said = b""
    sizes = [0, 0]
    heard_ns = [0, 0]
    is_over = False
    while not is_over:
        is_over = process.poll() is not None
        while select.select([ours], [], [], _LOOK_S)[0]:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # EIO: every process has closed the terminal
                piece = b""
            if not piece:
                break
            said += piece
            sys.stderr.buffer.write(piece)
            sys.stderr.flush()
        for side, host in enumerate((here, there)):
            size = host.console.stat().st_size if host.console.exists() else 0
            if size != sizes[side] and not (side and heard_ns[1]):
                sizes[side], heard_ns[side] = size, time.monotonic_ns()
    return said.decode(errors="replace"), heard_ns[1] - heard_ns[0]


def main() -> int:
    """Run the demonstration; return its exit status."""
    end_early("")
    try:
        with inherited.taken():
            return _run()
    except Ended as ended:
        sys.stderr.write(f"demo: {ended.as_error()}\n")
        return 128 + ended.number
    finally:
        ignore_all()


def _run() -> int:
    start_ns = time.monotonic_ns()
    try:
        with Stage(_NEEDED_BYTES) as stage:
            demo = Demo(stage)
            demo.run()
        demo.passed(time.monotonic_ns() - start_ns)
    except (BhyError, OSError) as raised:
        error = from_oserror(raised, "run the demo") if isinstance(raised, OSError) else raised
        sys.stderr.write(f"demo: FAILED: {error}\n")
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())

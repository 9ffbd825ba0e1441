"""What the programs say: messages, progress, the closing line, syslog.

Everything goes to standard error, because standard output carries the stream.
A message is one line in err(3) shape.  Numbers are measured, or called
predicted.

No library draws the line of progress: a progress library shows one quantity,
and this line shows a round, a rate and a predicted pause, and has a form for
machines.  Such a library would also be the slowest import of the program.
"""

from __future__ import annotations

import os
import re
import sys
import syslog
import time
from collections.abc import Sequence
from typing import TextIO

from bhystream.errors import BhyError, InternalError
from bhystream.guest import PAGE_BYTES
from bhystream.units import NS, duration, size

_TERMINAL_NS = 100_000_000
_LINE_NS = NS
MAX_HOST_NAME_BYTES = 254
# The shortest name of a guest, and the shortest bar, on a narrow terminal.
_SHORT_NAME = 6
_SHORT_BAR = 4
_COLUMNS = 80  # if the terminal does not tell its width


def printable(text: str) -> str:
    """Make text from a stream safe for a terminal; bytes that are not UTF-8 show as hexadecimal."""
    return "".join(c if c.isprintable() else f"\\x{_byte(c):02x}" for c in text)


def _byte(character: str) -> int:
    """Return the code of a character, or the byte that a lone surrogate stands for."""
    code = ord(character)
    return code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code


class Console:
    """Lines on standard error, and in syslog, in the name of one program."""

    def __init__(self, program: str, *, show_host: bool = False) -> None:
        """show_host: begin lines with the host's name, for the far end of ssh."""
        self._prefix = f"{program}({host_name()})" if show_host else program
        # None if descriptor 2 was closed when the program was started.
        self._err: TextIO | None = sys.stderr
        self._drawn = False
        syslog.openlog(program, syslog.LOG_PID, syslog.LOG_DAEMON)

    def say(self, text: str) -> None:
        """Print one line; a closed standard error is no error."""
        self.clear()
        self._write(f"{self._prefix}: {printable(text)}\n")

    def show(self, lines: Sequence[str]) -> None:
        """Print lines without the program's name, for the operator to copy."""
        self.clear()
        self._write("".join(f"{printable(line)}\n" for line in lines))

    def fail(self, error: BhyError) -> int:
        """Print an error and, on separate lines, what to type next.

        Returns the error's exit status.  Prints the traceback of an InternalError.
        """
        self.clear()
        if isinstance(error, InternalError):
            import traceback

            self._write("".join(traceback.format_exception(error)))
        self.say(str(error))
        for line in filter(None, error.hint.splitlines()):
            self.say(line)
        syslog.syslog(syslog.LOG_ERR, printable(str(error)))
        return error.status

    def log(self, text: str) -> None:
        """Write to syslog only."""
        syslog.syslog(syslog.LOG_NOTICE, printable(text))

    def raw(self, line: str) -> None:
        """Print a line for machines, without a prefix."""
        self._write(line + "\n")

    def draw(self, line: str) -> None:
        """Redraw the line of progress, cut to the terminal's width."""
        width = self._width()
        text = printable(f"{self._prefix}: {line}")[:width]
        self._write("\r" + text.ljust(width if self._drawn else 0))
        self._drawn = True

    @property
    def columns(self) -> int:
        """Return how many columns of a line are left after the program's name."""
        return self._width() - len(self._prefix) - len(": ")

    def clear(self) -> None:
        """Erase the line of progress."""
        if self._drawn:
            self._write("\r" + " " * self._width() + "\r")
            self._drawn = False

    def close(self) -> None:
        """Drop what standard error has not taken; otherwise Python would end with status 120."""
        try:
            if self._err is not None:
                self._err.flush()
        except (OSError, ValueError):
            sys.stderr = None

    def is_terminal(self) -> bool:
        """Say whether standard error is a terminal."""
        return self._err is not None and self._err.isatty()

    def _width(self) -> int:
        """Return the columns that a line may have on the terminal of standard error."""
        try:
            columns = os.get_terminal_size(self._err.fileno()).columns if self._err else 0
        except (OSError, ValueError):
            columns = 0
        return (columns or _COLUMNS) - 1

    def _write(self, text: str) -> None:
        if self._err is None:
            return
        try:
            self._err.write(text)
            self._err.flush()
        except (OSError, ValueError, RuntimeError):
            # RuntimeError: a signal handler wrote its report while a line was being written.
            return


class Progress:
    """Where a move stands, and when to show it.

    verbose: for people (-v).  machine: tab-separated (-P).  sent_bytes and the
    rate are of the whole stream, all other counts of the round under way.
    done_pages: the place in the guest's memory, for -P.  work_done, work_total:
    the pages that take time, done and in all; work_total is 0 if not known.
    """

    def __init__(
        self,
        console: Console,
        guest: str,
        npages: int,
        *,
        verbose: bool = False,
        machine: bool = False,
    ) -> None:
        """Begin now, with round 0."""
        self.console, self.guest, self.npages = console, guest, npages
        self.verbose, self.machine = verbose, machine
        self.phase, self.round = "round", 0
        self.done_pages = self.sent_pages = self.sent_bytes = 0
        self.work_done = self.work_total = 0
        self.predicted_ns: int | None = None
        self._start_ns = self._round_ns = self._shown_ns = time.monotonic_ns()

    def enter(self, phase: str, number: int) -> None:
        """Begin a round, or another phase that is shown as one."""
        self.phase, self.round = phase, number
        self.done_pages = self.sent_pages = self.work_done = 0
        self._round_ns = time.monotonic_ns()

    @property
    def share(self) -> float:
        """Return how much of the round is done, 0.0 to 1.0."""
        return min(self.work_done / self.work_total, 1.0) if self.work_total else 0.0

    def tick(self) -> None:
        """Show the progress if the last line is old enough."""
        if not (self.verbose or self.machine):
            return
        now = time.monotonic_ns()
        drawing = self.verbose and not self.machine and self.console.is_terminal()
        if now - self._shown_ns < (_TERMINAL_NS if drawing else _LINE_NS):
            return
        self._shown_ns = now
        if self.machine:
            self.console.raw(self.fields(now))
        elif drawing:
            self.console.draw(self.short_line(now, self.console.columns))
        else:
            self.console.say(self.line(now))

    def report(self) -> None:
        """Show one line now, whatever the options (SIGINFO, SIGUSR1)."""
        self.console.say(self.line(time.monotonic_ns()))

    def line(self, now_ns: int) -> str:
        """Return the whole progress for people."""
        return (
            f"guest {self.guest}: {self._measures(now_ns)}; "
            f"{size(self.sent_pages * PAGE_BYTES)} in it, {size(self.sent_bytes)} in all, "
            f"{duration(now_ns - self._start_ns)}"
        )

    def short_line(self, now_ns: int, columns: int) -> str:
        """Return what fits into `columns`: the measures first, then a bar in the room left."""
        measures = self._measures(now_ns)
        text = f"guest {self.guest}: {measures}"
        if len(text) > columns:
            room = max(columns - len(f": {measures}"), _SHORT_NAME)
            name = self.guest if len(self.guest) <= room else f"{self.guest[: room - 2]}.."
            text = f"{name}: {measures}"
        width = columns - len(text) - len(" []")
        if not self.work_total or width < _SHORT_BAR:
            return text
        bar = ("#" * int(self.share * width)).ljust(width, ".")
        return f"{text} [{bar}]"

    def _measures(self, now_ns: int) -> str:
        """Return the phase, the share done, the rate, the time left and the predicted pause."""
        text = f"{self.phase} {self.round}: "
        if self.work_total:
            text += f"{self.share:.0%}, "
        text += f"{size(self.sent_bytes * NS / max(now_ns - self._start_ns, 1))}/s"
        if self.work_done and self.work_total:
            spent_ns = now_ns - self._round_ns
            left_ns = spent_ns * max(self.work_total - self.work_done, 0) / self.work_done
            text += f", {duration(left_ns)} left"
        if self.predicted_ns is not None:
            text += f", pause {duration(self.predicted_ns)}"
        return text

    def fields(self, now_ns: int) -> str:
        """Return the progress for machines (-P), tab-separated."""
        predicted = -1 if self.predicted_ns is None else self.predicted_ns
        values = (
            "progress",
            self.phase,
            self.round,
            self.done_pages,
            self.npages,
            self.sent_pages,
            self.sent_bytes,
            now_ns - self._start_ns,
            predicted,
        )
        return "\t".join(str(value) for value in values)


def host_name() -> str:
    """Return this host's name as one word, for messages and HELLO.

    Characters that HELLO does not allow become "_", so the word is safe in a command.
    """
    word = re.sub(r"[^A-Za-z0-9._-]", "_", os.uname().nodename)[:MAX_HOST_NAME_BYTES]
    return word if re.match(r"[A-Za-z0-9_]", word) else f"_{word[1:]}"

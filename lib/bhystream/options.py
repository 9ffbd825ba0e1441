"""Option parsing, units and pipes of both command lines, and what bhysend's says.

Options are parsed in POSIX order by getopt(3): the first operand ends them.
Long options are never abbreviated, because they are the dangerous ones.
"""

from __future__ import annotations

import fcntl
import getopt
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from bhystream.errors import UsageError
from bhystream.format import Form
from bhystream.precopy import Limits

_TIME_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_SIZE = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BITS = {"kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9}
_PIPE_BYTES = 1 << 20
# As subprocess has it: a child's umask is ours.
AS_IT_IS = -1
# So many digits stay finite as a float in any unit.
_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"


@dataclass
class SendOptions:
    """The command line of bhysend, parsed.

    command: of the command form, empty without one.  hook: -p.  config: -C.
    umask: of whoever started us, for the command and the hook; or AS_IT_IS.
    """

    guest: str
    limits: Limits
    answered: bool = False
    command: tuple[str, ...] = ()
    keep: bool = False
    dry_run: bool = False
    machine: bool = False
    verbose: bool = False
    hook: str | None = None
    level: int | None = None
    config: str | None = None
    umask: int = AS_IT_IS

    @property
    def form(self) -> Form:
        """Return the form of the stream."""
        if self.keep:
            return Form.KEPT
        return Form.ANSWERED if self.answered or self.command else Form.PLAIN


def parse(
    argv: Sequence[str], short: str, long: Sequence[str], usage: str
) -> tuple[list[tuple[str, str]], list[str]]:
    """Split argv into options and operands.

    Raises UsageError, with the usage as its hint, also for an abbreviated
    long option and for a second operand that begins with "-".
    """
    try:
        options, operands = getopt.getopt(list(argv), short, list(long))
    except getopt.GetoptError as error:
        raise UsageError(error.msg, usage) from None
    for arg in argv[: len(argv) - len(operands)]:
        name = arg.partition("=")[0]
        if name.startswith("--") and name != "--" and name[2:] not in [w.rstrip("=") for w in long]:
            raise UsageError(f"option {name}: write it in full", usage)
    # Behind it stand a command's own.
    if len(operands) > 1 and operands[1].startswith("-"):
        raise UsageError(f"option {operands[1]} stands after the guest", usage)
    return options, operands


def time_ns(text: str, option: str) -> int:
    """Parse "300ms" into ns.  Units ns us ms s m h; a bare number is refused."""
    match = re.fullmatch(rf"({_NUMBER})([a-z]+)", text)
    if not match or match[2] not in _TIME_NS:
        raise UsageError(f"{option} {text}: not a time with its unit, such as 300ms or 10m")
    return round(float(match[1]) * _TIME_NS[match[2]])


def rate_bytes(text: str, option: str) -> int:
    """Parse "100M" (bytes a second, powers of 1024) or "10Gbit" into bytes a second."""
    match = re.fullmatch(rf"({_NUMBER})([A-Za-z]*)", text)
    value = 0.0
    if match and match[2] in _SIZE:
        value = float(match[1]) * _SIZE[match[2]]
    elif match and match[2] in _BITS:
        value = float(match[1]) * _BITS[match[2]] / 8
    if value < 1:
        raise UsageError(f"{option} {text}: not a rate, such as 100M or 10Gbit")
    return int(value)


def number(text: str, option: str, low: int, high: int) -> int:
    """Parse a whole number within [low, high]."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise UsageError(f"{option} {text}: not a number from {low} to {high}")
    return int(text)


def refuse_closed(fd: int, name: str, wrong: int) -> None:
    """Refuse a standard stream that was closed, or is open for the other direction.

    wrong: the other direction, os.O_RDONLY or os.O_WRONLY; see inherited.py.
    """
    try:
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        mode = wrong
    if mode == wrong:
        raise UsageError(f"{name} is closed, or open for the other direction: a stream goes there")


def widen_pipe(fd: int) -> None:
    """Make a pipe as large as an unprivileged process may; no pipe, no matter.

    Fewer switches between the programs of a pipeline: about twice the speed of
    a 64 KiB pipe.  Source: pipe(7), F_SETPIPE_SZ and pipe-max-size.
    """
    command = getattr(fcntl, "F_SETPIPE_SZ", None)
    try:
        if command is not None and stat.S_ISFIFO(os.fstat(fd).st_mode):
            fcntl.fcntl(fd, command, _PIPE_BYTES)
    except OSError:
        return

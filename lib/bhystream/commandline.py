"""What both command lines have in common: their grammar, their numbers, their pipes.

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
from typing import NamedTuple

from bhystream.errors import UsageError

_PIPE_BYTES = 1 << 20
_VERBS = ("-A", "-l", "-q", "--discard", "--resume")


def parse(
    argv: Sequence[str], short: str, long: Sequence[str], usage: str
) -> tuple[list[tuple[str, str]], list[str]]:
    """Split argv into options and operands.

    Raises UsageError, with the usage as its hint, if getopt(3) does not accept
    argv, a long option is abbreviated, or the second operand begins with "-".
    """
    try:
        options, operands = getopt.getopt(list(argv), short, list(long))
    except getopt.GetoptError as error:
        raise UsageError(error.msg, usage) from None
    for arg in argv[: len(argv) - len(operands)]:
        name = arg.partition("=")[0]
        if name.startswith("--") and name != "--" and name[2:] not in [w.rstrip("=") for w in long]:
            raise UsageError(f"option {name}: write it in full", usage)
    # The options of a command follow its name, so no option of it is the second operand.
    if len(operands) > 1 and operands[1].startswith("-"):
        raise UsageError(f"option {operands[1]} stands after the guest", usage)
    return options, operands


class Verb(NamedTuple):
    """One of the verbs, parsed.  guest: name, operand or stream id, or None.

    in_doubt: --resume also if GO may be out.
    """

    name: str
    guest: str | None
    in_doubt: bool = False


def parse_verb(given: Sequence[str], operands: Sequence[str], usage: str) -> Verb | None:
    """Return the verb among the options, None if there is none.

    Raises UsageError if a verb has other options, or lacks its guest.
    """
    verbs = [name for name in given if name in _VERBS]
    if not verbs:
        return None
    in_doubt = sorted(given) == ["--in-doubt", "--resume"]
    if len(given) > 1 and not in_doubt:
        raise UsageError(f"{verbs[0]} goes with no other option", usage)
    if len(operands) > 1 or (verbs[0] not in ("-A", "-l") and not operands):
        raise UsageError(f"{verbs[0]}: name one guest", usage)
    return Verb(verbs[0], operands[0] if operands else None, in_doubt)


def number(text: str, option: str, low: int, high: int) -> int:
    """Parse a whole number within [low, high].  Raises UsageError for anything else."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise UsageError(f"{option} {text}: not a number from {low} to {high}")
    return int(text)


def refuse_closed(fd: int, name: str, wrong: int) -> None:
    """Raise UsageError if a standard stream was closed, or is open for the other direction.

    wrong: the other direction, os.O_RDONLY or os.O_WRONLY; see inherited.py.
    """
    try:
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        mode = wrong
    if mode == wrong:
        raise UsageError(f"{name} is closed, or open for the other direction: a stream goes there")


def widen_pipe(fd: int) -> None:
    """Make a pipe as large as an unprivileged process may; leave anything else as it is.

    The programs of a pipeline then switch less often, at about twice the speed
    of a 64 KiB pipe.  Source: pipe(7), F_SETPIPE_SZ and pipe-max-size.
    """
    command = getattr(fcntl, "F_SETPIPE_SZ", None)
    try:
        if command is not None and stat.S_ISFIFO(os.fstat(fd).st_mode):
            fcntl.fcntl(fd, command, _PIPE_BYTES)
    except OSError:
        return

"""bhyrecv(8): options, wiring, and its one error handler.

The guest is built by build.py; what -n says of a stream is judge.py's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from bhystream import hold, inherited, options, query, state
from bhystream.build import Build, Options
from bhystream.errors import OK, BhyError, UsageError, as_error
from bhystream.format import Form
from bhystream.judge import Judge
from bhystream.reply import TimedInput
from bhystream.report import Console
from bhystream.signals import Signals
from bhystream.verify import Walk

USAGE = """\
usage: bhyrecv [-fnPuv] [--again] [-o key=value]... [-S directory] [-x key]... [guest]
       bhyrecv -l [guest]
       bhyrecv -q id
       bhyrecv --discard guest
       bhyrecv --resume guest"""

_STDIN = 0


def parse_options(argv: Sequence[str]) -> Options | hold.Verb:
    """Parse the command line.  Raises UsageError."""
    found, operands = options.parse(argv, "flno:PqS:uvx:", ["again", "discard", "resume"], USAGE)
    names = [name for name, _ in found]
    verb = hold.parse_verb(names, operands, USAGE)
    if verb:
        return verb
    if len(operands) > 1:
        raise UsageError("name at most one guest", USAGE)
    _refuse_mixtures(names)
    opts = Options(
        guest=operands[0] if operands else None,
        force="-f" in names,
        dry_run="-n" in names,
        machine="-P" in names,
        unstarted="-u" in names,
        verbose="-v" in names,
        again="--again" in names,
    )
    for name, value in found:
        if name == "-o":
            key, equals, text = value.partition("=")
            if not equals or key in opts.resources:
                # Not its value, which may be a password.
                raise UsageError(f"-o {key}: not a key=value, or given twice", USAGE)
            opts.resources[key] = text
        elif name == "-x":
            opts.dropped.append(value)
        elif name == "-S":
            opts.directory = value
    return opts


def _refuse_mixtures(names: Sequence[str]) -> None:
    """Refuse options that mean something to a guest only, where files are made."""
    for name in ("-o", "-u", "-x", "--again"):
        if "-S" in names and name in names:
            raise UsageError(f"-S makes files and starts nothing: not with {name}", USAGE)


def receive(opts: Options, console: Console) -> int:
    """Read a stream from standard input."""
    options.refuse_closed(_STDIN, "standard input", os.O_WRONLY)
    if os.isatty(_STDIN):
        raise UsageError("standard input is a terminal: a stream comes from a pipe or a file")
    signals = Signals()
    options.widen_pipe(_STDIN)
    base = state.directory()
    try:
        with signals.interruptible():
            source = TimedInput(_STDIN)
            walk = Walk(source)
    except BhyError as early:
        early.hint = "nothing was started here"
        raise
    if opts.dry_run:
        Judge(opts, walk, source, base, console, signals).run()
        return OK
    build = Build(opts, walk, source, base, console, signals)
    try:
        build.run()
    except Exception as raised:
        signals.forget()
        error = as_error(raised)
        if build.let_go:
            # The guest is where it was wanted; what failed came after that.
            console.fail(error)
            return OK
        raise build.undo(error) from raised
    finally:
        build.close()
    if walk.header.form == Form.ANSWERED:
        source.drain()
    return OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run bhyrecv(8); return its exit status.  argv: as send.main() has it."""
    console = Console("bhyrecv", show_host=True)
    try:
        if argv is None:
            with inherited.taken():
                return _run(sys.argv[1:], console)
        return _run(argv, console)
    except Exception as raised:
        return console.fail(as_error(raised))
    finally:
        console.close()


def _run(argv: Sequence[str], console: Console) -> int:
    parsed = parse_options(argv)
    if isinstance(parsed, hold.Verb):
        if parsed.name == "-q":
            return query.run(parsed.guest or "", console)
        return hold.run(parsed, "destination", console)
    return receive(parsed, console)


if __name__ == "__main__":
    sys.exit(main())

"""bhyrecv(8): options, wiring, the dry run, and its one error handler.

The guest is built by build.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bhystream import hold, hypervisors, options, query, state
from bhystream.backend.base import Head
from bhystream.build import Build, Options, refuse
from bhystream.errors import OK, BhyError, UsageError, as_error
from bhystream.format import Form
from bhystream.reply import Reply, TimedInput
from bhystream.report import Console, size
from bhystream.signals import Signals
from bhystream.verify import Walk

USAGE = """\
usage: bhyrecv [-fnPuv] [--again] [-o key=value]... [-S directory] [-x key]... [guest]
       bhyrecv -l [guest]
       bhyrecv -q id
       bhyrecv --discard guest
       bhyrecv --resume guest"""

_STDIN = 0
_STDOUT = 1


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


def verdict(opts: Options, walk: Walk, base: Path, console: Console, signals: Signals) -> None:
    """Verify a stream to its end and say whether this host could take it (-n).

    In the answered forms that is answered too.
    """
    if walk.header.form != Form.ANSWERED:
        return _judge(opts, walk, base, console, signals, None)
    reply = Reply(base, walk.header.stream_id.hex())
    reply.hello()
    try:
        if not walk.is_dry_run:
            raise UsageError("-n: the stream is no dry run (bhysend -n)")
        opts.refuse_answered()
        _judge(opts, walk, base, console, signals, reply)
    except BhyError as error:
        reply.try_to_say("REFUSED", str(error))
        raise


def _judge(
    opts: Options,
    walk: Walk,
    base: Path,
    console: Console,
    signals: Signals,
    reply: Reply | None,
) -> None:
    reasons: list[str] = []
    name = "?"
    events = walk.events()
    while True:
        with signals.interruptible():
            event = next(events, None)
        if event is None:
            break
        if isinstance(event, Head):
            sink, name, _ = hypervisors.open_sink(
                event.host["hypervisor"], event.config["name"], opts.receiving(base, walk)
            )
            reasons = sink.check(event)
            if reply and not reasons:
                reply.say("ACCEPT")
        if reply:
            reply.seen(walk.reader.sequence - 1, walk.reader.offset_bytes, now=True)
            refuse(reasons, name)
    if walk.header.form != Form.ANSWERED:
        with signals.interruptible():
            walk.expect_end_of_input()
    refuse(reasons, name)
    what = "the head" if walk.is_dry_run else "the stream"
    console.say(
        f"guest {name}: {what} is sound ({size(walk.reader.offset_bytes)}); "
        "this host can take the guest"
    )


def receive(opts: Options, console: Console) -> int:
    """Read a stream from standard input."""
    options.refuse_closed(_STDIN, "standard input")
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
        verdict(opts, walk, base, console, signals)
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
    """Run bhyrecv(8); return its exit status."""
    console = Console("bhyrecv", show_host=True)
    try:
        parsed = parse_options(sys.argv[1:] if argv is None else argv)
        if isinstance(parsed, hold.Verb):
            if parsed.name == "-q":
                return query.run(parsed.guest or "", console)
            return hold.run(parsed, "destination", console)
        return receive(parsed, console)
    except Exception as raised:
        return console.fail(as_error(raised))
    finally:
        console.close()


if __name__ == "__main__":
    sys.exit(main())

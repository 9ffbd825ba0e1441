"""bhyrecv(8): options, wiring, and its one error handler.

incoming.py builds the guest; judge.py does what -n asks for.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from bhystream import commandline, inherited
from bhystream.errors import EXIT_OK, BhyError, Interrupted, UsageError, as_error
from bhystream.handover import state
from bhystream.recv.options import Options, parse_options
from bhystream.report import Console
from bhystream.signals import Ended, Signals
from bhystream.stream.format import Form

_STDIN = 0


def receive(opts: Options, console: Console) -> int:
    """Receive the stream on standard input; return the exit status.  Raises BhyError."""
    # A call that is a verb needs none of these.
    from bhystream.recv.incoming import Incoming
    from bhystream.recv.judge import Judge
    from bhystream.recv.receiving import RecvJob
    from bhystream.recv.reply import Reply, Silence, TimedInput
    from bhystream.stream.verify import Walk

    commandline.refuse_closed(_STDIN, "standard input", os.O_WRONLY)
    if os.isatty(_STDIN):
        raise UsageError("standard input is a terminal: a stream comes from a pipe or a file")
    signals = Signals()
    commandline.widen_pipe(_STDIN)
    base = state.directory()
    try:
        with signals.interruptible():
            source = TimedInput(_STDIN)
            walk = Walk(source)
    except BhyError as early:
        early.hint = "nothing was started here"
        raise
    is_answered = walk.header.form == Form.ANSWERED
    reply = Reply(base, walk.header.stream_id.hex()) if is_answered else Silence()
    records = state.Records(base, "destination")
    job = RecvJob(opts, walk, source, base, console, signals, records, reply)
    if opts.dry_run:
        Judge(job).run()
        return EXIT_OK
    incoming = Incoming(job)
    try:
        incoming.run()
    except Exception as raised:
        signals.forget()
        signals.on_deferred = lambda name: console.say(
            f"{name}: bhyrecv is ending already, and first removes what it made"
        )
        error = as_error(raised)
        if incoming.is_let_go:
            # The guest is where it was wanted; what failed came later.
            console.fail(error)
            return EXIT_OK
        raise incoming.undo(error) from raised
    finally:
        incoming.close()
    if is_answered:
        with contextlib.suppress(Interrupted), signals.interruptible():
            source.drain()
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run bhyrecv(8); return its exit status.

    argv: the words after the program's name; None to take them from sys.argv, and
    to set what the process has inherited.
    """
    console = Console("bhyrecv", show_host=True)
    try:
        if argv is None:
            with inherited.taken():
                return _run(sys.argv[1:], console)
        return _run(argv, console)
    except Ended as ended:
        return console.fail(ended.as_error())
    except Exception as raised:
        return console.fail(as_error(raised))
    finally:
        console.close()


def _run(argv: Sequence[str], console: Console) -> int:
    parsed = parse_options(argv)
    if isinstance(parsed, commandline.Verb):
        if parsed.name == "-q":
            from bhystream.recv import query

            return query.run(parsed.guest or "", console)
        from bhystream.handover import verbs

        return verbs.run(parsed, "destination", console)
    return receive(parsed, console)

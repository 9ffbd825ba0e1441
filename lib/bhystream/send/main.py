"""bhysend(8): the options, the wiring, and the one error handler.

outgoing.py makes the move.  Each way through the program imports what it alone needs when
it is taken: a dry run would else spend half of its CPU time on imports.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bhystream import commandline, hypervisors, inherited
from bhystream.errors import (
    BhyError,
    InputOutputError,
    InternalError,
    Interrupted,
    UsageError,
    as_error,
)
from bhystream.handover import prune, standing, state
from bhystream.report import Console
from bhystream.send.options import AS_IT_IS, SendOptions, parse_options
from bhystream.signals import Ended, Signals

if TYPE_CHECKING:
    from bhystream.send.job import SendJob

_STDOUT = 1
# What says nothing about the guest.
_NO_REFUSALS = (UsageError, Interrupted, InternalError, InputOutputError)


def send(opts: SendOptions, console: Console) -> int:
    """Do as send_one(); a guest that -n -P refuses is told to programs too."""
    try:
        return send_one(opts, console)
    except BhyError as error:
        if opts.dry_run and opts.machine and not isinstance(error, _NO_REFUSALS):
            from bhystream.send import dryrun

            dryrun.refuse(error)
        raise


def send_one(opts: SendOptions, console: Console) -> int:
    """Send one guest, or say what sending it would mean (-n); return the exit status.

    The source and the guest's lock are opened and closed here.  Raises UsageError for a
    standard output that takes no stream, GuestError for a guest that is held or busy,
    and whatever the move or the dry run raises.
    """
    if not opts.command:
        commandline.refuse_closed(_STDOUT, "standard output", os.O_RDONLY)
        if os.isatty(_STDOUT) and (opts.answered or not opts.dry_run):
            raise UsageError("standard output is a terminal: a stream goes into a pipe or a file")
    signals = Signals()
    base = state.directory()
    standing.refuse_held(base, opts.guest)
    what = hypervisors.Sending(opts.guest, base, config=opts.config, force=opts.limits.finish)
    if what.is_cold:
        return send_cold(what, opts, base, console, signals)
    try:
        with signals.at_waits():
            source = hypervisors.open_source(what, signals.check)
    except Interrupted as early:
        early.hint = "nothing was begun"
        raise
    try:
        with state.Lock(base, source.lock_name, f"guest {source.name}") as lock:
            standing.refuse_held(base, opts.guest, source.lock_name)
            if opts.dry_run:
                from bhystream.send import dryrun

                status = dryrun.run(source, opts, base, console, signals)
                if not opts.machine:  # the report for people contains every warning
                    state.Told(base, source.lock_name).new(source.warnings(), everything=True)
                return status
            from bhystream.send.job import SendJob

            return move(SendJob(opts, base, console, signals, source, lock))
    finally:
        source.close()
        prune.prune_locks(base)


def send_cold(
    what: hypervisors.Sending, opts: SendOptions, base: Path, console: Console, signals: Signals
) -> int:
    """Send snapshot files, or say what sending them would mean; return the exit status.

    The snapshot is opened and closed here.  Raises what cold.send() and dryrun.run() raise.
    """
    snapshot = hypervisors.open_snapshot(what)
    try:
        if opts.dry_run:
            from bhystream.send import dryrun

            return dryrun.run(snapshot, opts, base, console, signals)
        from bhystream.send import cold

        return cold.send(snapshot, opts, console, signals)
    finally:
        snapshot.close()


def move(job: SendJob) -> int:
    """Move a guest; return the exit status.

    On a failure, brings the guest back and raises the error that says where the guest
    is.  The third stage gets the status last, once nothing can change it.
    """
    from bhystream.send.outgoing import Outgoing

    outgoing, status = Outgoing(job), InternalError.status
    try:
        status = outgoing.run()
    except Exception as raised:
        # Drop a pending signal: bhysend brings the guest back now in any case.
        job.signals.forget()
        job.signals.on_deferred = lambda name: job.say(
            f"{name}: bhysend is ending already, and first makes sure where the guest is"
        )
        error = outgoing.recover(as_error(raised))
        status = error.status
        raise error from raised
    finally:
        outgoing.close(status)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run bhysend(8); return its exit status.

    argv: the command line, in a process that has called inherited.take() already; None
    if this process is the program.
    """
    console = Console("bhysend")
    try:
        if argv is None:
            with inherited.taken() as found:
                return _run(sys.argv[1:], console, found.umask)
        return _run(argv, console, AS_IT_IS)
    except Ended as ended:
        return console.fail(ended.as_error())
    except Exception as raised:
        return console.fail(as_error(raised))
    finally:
        console.close()


def _run(argv: Sequence[str], console: Console, umask: int) -> int:
    parsed = parse_options(argv)
    if isinstance(parsed, commandline.Verb):
        if parsed.name == "-A":
            from bhystream.send import third_stage

            return third_stage.run(parsed.guest, console)
        from bhystream.handover import verbs

        return verbs.run(parsed, "source", console)
    return send(parsed._replace(umask=umask), console)
